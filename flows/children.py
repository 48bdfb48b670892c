"""Child processes that do not outlive us, and whose words are kept."""

import logging
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Event
from time import monotonic
from typing import BinaryIO

from pusa.errors import TrainingError
from pusa.system.processes import end_with_parent
from pusa.system.text import printable

log = logging.getLogger("pusa.child")  # shown wherever the stages' own lines are
AGENT = "PUSA_AGENT"  # in the environment: who started several processes, for them to end with it
GRACE_SECONDS = 30.0
SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_BETWEEN_LINES = 1.0
LONGEST_LINE = 500  # characters
LONGEST_READ = 1 << 20  # bytes of a log at a time


def run(
    command: Sequence[str],
    log_file: Path,
    environment: Mapping[str, str],
    stop: Event | None = None,
    grace: float = GRACE_SECONDS,
) -> int:
    """Run a command in a session of its own to its end, and return its exit code, or minus the signal that ended it.

    What it prints goes to `log_file`, of which the one before is kept; its last line is logged now and then. If
    anything else ends this call, the session's process group is sent SIGTERM, and SIGKILL `grace` seconds later.

    Raises:
        TrainingError: `stop` was set.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    if log_file.exists():
        log_file.replace(log_file.with_suffix(f".1{log_file.suffix}"))
    with log_file.open("wb") as output:
        child = subprocess.Popen(  # noqa: S603
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(end_with_parent, parent=os.getpid()),
        )
    try:
        _watch(child, log_file, stop or Event())
    finally:
        _end(child, grace)
    return child.returncode


def last_lines(log_file: Path, count: int = 12) -> list[str]:
    """The end of what a child said, fit to be shown."""
    with log_file.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4 * LONGEST_LINE * count))
        lines = file.read().decode(errors="replace").splitlines()
    return [printable(line, LONGEST_LINE) for line in lines if line.strip()][-count:]


def _watch(child: subprocess.Popen[bytes], log_file: Path, stop: Event) -> None:
    with log_file.open("rb") as words:
        teller = _Teller()
        while not _has_ended(child):
            teller.hear(_gained(words))
            if stop.wait(SECONDS_BETWEEN_LOOKS):
                raise TrainingError("the trainer was told to stop; the same run goes on from its last checkpoint")
        teller.hear(_gained(words), at_once=True)


def _gained(words: BinaryIO) -> bytes:
    """What was added to a file since the last look; of very much its end."""
    words.seek(max(words.tell(), os.fstat(words.fileno()).st_size - LONGEST_READ))
    return words.read(LONGEST_READ)


class _Teller:
    """Logs the last whole line of what it hears, but not too often."""

    def __init__(self) -> None:
        self._rest, self._line, self._told = b"", b"", -SECONDS_BETWEEN_LINES

    def hear(self, words: bytes, at_once: bool = False) -> None:
        *lines, rest = (self._rest + words).split(b"\n")
        self._rest = rest[: 4 * LONGEST_LINE]
        self._line = next((line for line in reversed(lines) if line.strip()), self._line)
        if self._line and (at_once or monotonic() - self._told >= SECONDS_BETWEEN_LINES):
            log.info("%s", printable(self._line.decode(errors="replace").rstrip(), LONGEST_LINE))
            self._line, self._told = b"", monotonic()


def _has_ended(child: subprocess.Popen[bytes]) -> bool:
    """Whether it is dead. It is not buried yet: until then its number, which is its group's, is nobody else's."""
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _end(child: subprocess.Popen[bytes], grace: float) -> None:
    """Leave no process of its group."""
    try:
        if not _has_ended(child):
            os.killpg(child.pid, signal.SIGTERM)
        until = monotonic() + grace
        while not _has_ended(child) and monotonic() < until:
            Event().wait(SECONDS_BETWEEN_LOOKS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
