"""Run what was submitted to a server: the worker, and to follow or cancel a run that is on the server."""

import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from time import sleep
from typing import Annotated

from cyclopts import Parameter, Token, validators

from flows.commands.options import Count, Text
from flows.commands.server import require_host_names
from flows.console import print_error, show
from pusa.errors import PusaError

NAME = re.compile(r"\w[\w .@-]{0,99}")
MOST_AT_ONCE = 200  # runs; the server tells the states of as many in one answer
INTERRUPTED = 130  # the exit code
SECONDS_BETWEEN_LOOKS = 2.0


def to_name(kind: type, tokens: Sequence[Token]) -> str:
    """Return the name of a worker: it stands in addresses and file names."""
    text = tokens[0].value
    if not NAME.fullmatch(text):
        raise ValueError(f"{text:.80} is not a name; expected up to 100 letters, digits, spaces and any of . @ _ -")
    return text


def to_folder(kind: type, tokens: Sequence[Token]) -> Path:
    """Return the absolute path of a folder, behind all links."""
    text = tokens[0].value
    path = Path(os.path.realpath(text))
    if not text.strip() or not path.is_dir():
        raise ValueError(f"{text!r:.80} is not a folder")
    if os.pathsep in str(path):
        raise ValueError(f"{path} has {os.pathsep!r} in its name, which separates folders; rename it")
    return path


def to_command(kind: type, tokens: Sequence[Token]) -> tuple[str, ...]:
    """Return the words of a command, as a shell takes it apart. No shell runs it."""
    text = tokens[0].value
    words = shlex.split(text)  # ValueError: a quotation mark is missing
    program = shutil.which(words[0]) if words else None
    if program is None:
        raise ValueError(f"{text!r:.80} is not a command: there is no program {words[0] if words else ''!r:.80}")
    return (os.path.abspath(program), *words[1:])


def worker(
    *,
    name: Annotated[str | None, Parameter(converter=to_name)] = None,
    limit: Annotated[Count, Parameter(validator=validators.Number(lte=MOST_AT_ONCE))] = 1,
    allow: Annotated[
        tuple[Annotated[Path, Parameter(converter=to_folder)], ...],
        Parameter(metavar="FOLDER", consume_multiple=False),
    ] = (),
    webhook_host: Annotated[tuple[str, ...], Parameter(metavar="HOST", validator=require_host_names)] = (),
    notify: Annotated[
        tuple[str, ...],
        Parameter(converter=to_command, metavar="COMMAND", accepts_keys=False, n_tokens=1),
    ] = (),
    pool: Text = "pusa",
) -> int:
    """Run what is submitted and scheduled on the server of PREFECT_API_URL, until Ctrl-C or SIGTERM.

    Each run is a process that ends with the worker. A run that was interrupted resumes as soon as a worker is there;
    one that has crashed four times is given up. A second Ctrl-C ends everything at once.

    Args:
        name: The name of this worker, by which it finds its runs again; default that of the machine.
        limit: How many runs at once; each waits for the GPUs that it needs.
        allow: Let runs read and write in this folder alone; repeat the option for each folder. Default: everywhere.
        webhook_host: A host that on_end and on_failure of a manifest may name; repeat the option for each host.
        notify: A command to run whenever a stage has ended; it gets a JSON object on its standard input.
        pool: The work pool.
    """
    import logging
    import socket

    from flows.settings import load_prefect

    load_prefect()
    logging.getLogger("pusa").setLevel(logging.INFO)
    from prefect.exceptions import ObjectNotFound

    from flows.admission import environment, sole_worker
    from flows.runs import connected
    from flows.worker import Worker

    name = name or socket.gethostname()
    with connected() as client, sole_worker(name):
        try:
            kind = client.read_work_pool(pool).type
        except ObjectNotFound as error:
            raise PusaError(f"the server has no work pool {pool!r}; make it with `pusa deploy`") from error
        if kind != "process":
            raise PusaError(f"the work pool {pool!r} has the type {kind!r}; expected one of the type process")
        serving = Worker(client, name, pool, limit, environment(os.environ, allow, notify, webhook_host))
        show(f"worker {name!r} serves the pool {pool!r} of {serving.server}; Ctrl-C ends it")
        serving.serve()
    then = "; the run that it put back goes on when a worker is there again" if serving.returned else ""
    show(f"worker {name!r} has ended{then}")
    return INTERRUPTED if serving.stopped_by == signal.SIGINT else 0


def cancel(run: Text, /, *more: Text) -> int:
    """Cancel runs on the server, and wait until all of their processes have ended. What is finished is kept.

    Args:
        run: The link or id that `pusa submit` prints, a part of an id, or the name of a run.
        more: Other runs.
    """
    from flows.settings import load_prefect

    load_prefect()
    from flows import runs

    failed = 0
    with runs.connected() as client:
        for found in [runs.find_run(client, name) for name in (run, *more)]:
            try:
                show(runs.cancel(client, found))
            except PusaError as error:
                print_error(error)
                failed = 1
    return failed


def watch(run: Text | None = None, /) -> int:
    """Follow a run on the server until it ends: its state, its jobs as `pusa status` shows them, and its log.

    The exit code tells how it ended: 0 complete, 3 with failures, 130 cancelled, 1 failed. Ctrl-C ends this command,
    and not the run.

    Args:
        run: The link or id that `pusa submit` prints, a part of an id, or a name; default the latest run.
    """
    from flows.settings import load_prefect

    load_prefect()
    from flows.following import follow
    from flows.runs import connected, find_run

    with connected() as client:
        return follow(client, find_run(client, run), sys.stdout.isatty(), lambda: sleep(SECONDS_BETWEEN_LOOKS))
