"""ffmpeg run on one file: it opens nothing else, and it ends in time, whatever is in the file."""

import math
import os
import re
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import imageio_ffmpeg

from pusa.errors import Reason, Rejected
from pusa.system.processes import Deadline, ending, kill


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A handle of a regular file; `name_of` makes it a name.

    Raises:
        Rejected: it is missing, something else, or its name is impossible.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # to open a pipe would be to wait
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Rejected(Reason.UNREADABLE, f"{path} cannot be read: {reason}") from error
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise Rejected(Reason.UNREADABLE, f"{path} is no file")
        yield handle
    finally:
        os.close(handle)


def name_of(handle: int) -> str:
    """What a decoder is given instead of the path, in which it might see a protocol, a pattern or an option."""
    return f"/dev/fd/{handle}"


Hear = Callable[[str], None]
THREADS = 2  # sources are decoded side by side
LONGEST_LINE = 2**16
# Playlists and scripts, which name other files, are no containers; nor are pictures.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg"
NOTES = "{notes}"  # stands for the name of a pipe, in the command line
QUIET = ("-hide_banner", "-nostdin", "-nostats")
_LEVEL = re.compile(r"(?:\[([^\]]*) @ 0x[0-9a-f]+\] )*\[(error|fatal|panic)\] (.*)")


@contextmanager
def ffmpeg(
    path: Path,
    output: Sequence[str],
    seconds: float,
    hear: Hear,
    note: Hear | None = None,
    options: Sequence[str] = (),
    level: str = "warning",
) -> Iterator[subprocess.Popen[bytes]]:
    """Run it; its stdout is there to be read, and each line that it says is heard in a thread of its own.

    When the context ends, every line has been heard and the process is gone.

    Args:
        path: the file.
        output: what follows the input on the command line.
        seconds: time to run, after which it is killed.
        hear: takes a line of its log; where it raises `Rejected`, the process is killed and the context raises that.
        note: as `hear`, of what a filter writes to a file named `NOTES`. The log is no place for much: ffmpeg's threads
            write it at once, and a message that falls into another's line loses its level.
        options: what stands before the input.
        level: how much it says.

    Raises:
        Rejected: the file cannot be opened, the time is up (TIMEOUT), or ffmpeg died (CRASHED).
    """
    options = ("-loglevel", f"repeat+level+{level}", *_limits(seconds), *options)
    with opened(path) as handle, _pipe() as (notes, theirs):
        process = _started(handle, theirs.fileno(), options, output)
        theirs.close()  # else the notes would have no end
        assert process.stdout is not None and process.stderr is not None
        listeners = (_Listener(process, process.stderr, hear), _Listener(process, notes, note or _ignore))
        deadline = Deadline(process, seconds)
        try:
            _start(listeners)
            with deadline:
                yield process
                _join(listeners)
                process.wait()
        finally:
            kill(process)
            _join(listeners)
            process.stdout.close()
            process.stderr.close()
    for listener in listeners:
        if listener.rejected is not None:
            raise listener.rejected
    if deadline.passed:
        raise Rejected(Reason.TIMEOUT, f"{path} took longer than {seconds:g} s to decode; ffmpeg was killed")
    if process.returncode < 0:
        raise Rejected(Reason.CRASHED, f"ffmpeg died ({ending(process)}) on {path}")


def error_in(line: str, deaf_to: Sequence[str] = ()) -> str | None:
    """The message of a line that tells of an error, unless it comes from a part named in `deaf_to`."""
    match = _LEVEL.match(line)
    if match is None or (match[1] or "").rpartition(":")[2] in deaf_to:
        return None
    return match[3]


def _limits(seconds: float) -> list[str]:
    # Of processor time: an end also where we are killed while it spins.
    limit = str(math.ceil(min(seconds, 1e6) * THREADS) + 1)
    opens = ["-protocol_whitelist", "file,pipe", "-format_whitelist", CONTAINERS]
    return ["-timelimit", limit, *opens, "-threads", str(THREADS)]


def _started(handle: int, notes: int, options: Sequence[str], output: Sequence[str]) -> subprocess.Popen[bytes]:
    named = [word.replace(NOTES, name_of(notes)) for word in output]
    return subprocess.Popen(  # noqa: S603  no word of it is the file's
        [imageio_ffmpeg.get_ffmpeg_exe(), *QUIET, *options, "-i", f"file:{name_of(handle)}", *named],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=[handle, notes],
        start_new_session=True,
        env={**os.environ, "AV_LOG_FORCE_NOCOLOR": "1"},
    )


@contextmanager
def _pipe() -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    reading, writing = os.pipe()
    with open(reading, "rb") as ours, open(writing, "wb") as theirs:
        yield ours, theirs


def _ignore(line: str) -> None:
    pass


def _start(listeners: "Sequence[_Listener]") -> None:
    for listener in listeners:
        listener.start()


def _join(listeners: "Sequence[_Listener]") -> None:
    for listener in listeners:
        if listener.ident is not None:  # it was started
            listener.join()


class _Listener(threading.Thread):
    """Hears what a process says, to the end, so that it never waits for us."""

    def __init__(self, process: subprocess.Popen[bytes], stream: IO[bytes], hear: Hear) -> None:
        super().__init__(daemon=True)
        self.rejected: Rejected | None = None
        self._process, self._stream, self._hear = process, stream, hear

    def run(self) -> None:
        while line := self._stream.readline(LONGEST_LINE):
            if self.rejected is None:
                self._take(line.decode("utf-8", "replace").rstrip("\r\n"))

    def _take(self, line: str) -> None:
        try:
            self._hear(line)
        except Rejected as rejected:
            self.rejected = rejected
            kill(self._process)
