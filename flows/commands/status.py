"""Show how far a run is: which videos are made, which jobs failed and why, and how long the rest takes."""

import sys
from collections.abc import Callable
from json import dumps
from time import sleep
from typing import TYPE_CHECKING

from flows.commands.options import File
from flows.console import redraw, show

if TYPE_CHECKING:
    from pusa.generate.summary import Status

SECONDS_BETWEEN_LOOKS = 2.0


def status(run: File, /, *, json: bool = False, watch: bool = False) -> int:
    """Report how far the videos of a run are. No server is asked; the run may go on meanwhile, or not.

    The exit code is 0 also where jobs have failed.

    Args:
        run: The folder of the run, for example runs/tiny.
        json: Print one JSON object: counts by state, seconds left, failed ids with reasons, the state of each job.
        watch: Report again whenever something changes, until all jobs are done or failed.
    """
    from pusa.generate.listed import require_list
    from pusa.generate.status import StatusReader

    require_list(run)
    follow(StatusReader(run / "videos").read, json, watch, sys.stdout.isatty(), sleep)
    return 0


def follow(
    read: "Callable[[], Status]", as_json: bool, watch: bool, on_terminal: bool, pause: Callable[[float], None]
) -> None:
    """Print a status; with `watch`, again after each pause, until all jobs are done or failed.

    On a terminal the new lines replace the old ones. Elsewhere a line is printed for each change.
    """
    drawn, last = 0, None
    while True:
        now = read()
        if watch and on_terminal and not as_json:
            drawn = redraw(now.lines(), drawn)
        elif last != (last := (now.jobs, now.failed, bool(now.paused))):
            if as_json:
                show(dumps(now.as_json(), indent=None if watch else 2))
            else:
                show(*([now.summary()] if watch else now.lines()))
        if not watch or now.ended:
            return
        pause(SECONDS_BETWEEN_LOOKS)
