"""Run ffmpeg on one file, so that it opens no other file and ends in time, whatever the file contains."""

import hashlib
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
from pusa.system.allowed import REFUSED, Allowed
from pusa.system.failures import RUN_ERRNOS
from pusa.system.processes import Deadline, ending, kill

LineHandler = Callable[[str], None]
THREADS = 2  # for each ffmpeg: several sources are decoded in parallel
MAX_LINE_BYTES = 2**16
# Only containers: playlists and scripts name other files, and pictures are not videos.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg"
METADATA_PIPE = "{metadata pipe}"  # on the command line, stands for the name of a pipe that filters can write to
_LOG_LINE = re.compile(r"(?:\[([^\]]*) @ 0x[0-9a-f]+\] )*\[(error|fatal|panic)\] (.*)")


@contextmanager
def open_regular_file(path: Path) -> Iterator[int]:
    """Open a regular file for reading, and yield its file descriptor; see `fd_path`.

    Raises:
        Rejected: UNREADABLE: the file is missing, is not a regular file, its name is invalid, or it is outside the
            folders that the worker allows.
        OSError: no file can be opened, because too many are open.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # without O_NONBLOCK, a named pipe blocks
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in RUN_ERRNOS:
            raise
        cause = getattr(error, "strerror", None) or error
        raise Rejected(Reason.UNREADABLE, f"{path} cannot be read: {cause}") from error
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise Rejected(Reason.UNREADABLE, f"{path} is not a regular file")
        if not Allowed.from_environment().allows_open(handle, path):
            raise Rejected(Reason.UNREADABLE, f"{path} cannot be read: {REFUSED}")
        yield handle
    finally:
        os.close(handle)


def hash_regular_file(path: Path) -> str:
    """Return the SHA-256 of a regular file in hexadecimal.

    Raises:
        Rejected: UNREADABLE: as `open_regular_file`, or the disk fails.
        OSError: as `open_regular_file`.
    """
    with open_regular_file(path) as handle, open(handle, "rb", closefd=False) as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise Rejected(Reason.UNREADABLE, f"{path} cannot be read: {error.strerror}") from error


def fd_path(handle: int) -> str:
    """Return a path for a file descriptor. Decoders get it instead of the file's own path.

    In the file's own path, a decoder might see a protocol, a pattern or an option.
    """
    return f"/dev/fd/{handle}"


@contextmanager
def run_ffmpeg(
    path: Path,
    output: Sequence[str],
    seconds: float,
    on_log: LineHandler,
    on_metadata: LineHandler | None = None,
    options: Sequence[str] = (),
    level: str = "warning",
) -> Iterator[subprocess.Popen[bytes]]:
    """Run ffmpeg on a file and yield the process, whose standard output is to be read by the caller.

    When the context ends, every line has been handled and the process has ended.

    Args:
        path: the file.
        output: arguments after the input.
        seconds: time limit, after which the process is killed.
        on_log: is called with each line of the log, in a thread of its own. If it raises `Rejected`, the process is
            killed and the context raises that error.
        on_metadata: the same for the lines that a filter writes to the file `METADATA_PIPE`. Long output must not go to
            the log: several threads of ffmpeg write to it, and a message inside another's line loses its level.
        options: arguments before the input.
        level: of the log.

    Raises:
        Rejected: the file cannot be opened, the time limit passed (TIMEOUT), or ffmpeg died (CRASHED).
    """
    with open_regular_file(path) as handle, _pipe() as (metadata, writing_end):
        options = ("-loglevel", f"repeat+level+{level}", *_limits(seconds), *options)
        process = _start_process(handle, writing_end.fileno(), options, output)
        writing_end.close()  # otherwise the metadata would never end
        assert process.stdout is not None and process.stderr is not None
        readers = (_LineReader(process, process.stderr, on_log), _LineReader(process, metadata, on_metadata))
        deadline = Deadline(process, seconds)
        try:
            for reader in readers:
                reader.start()
            with deadline:
                yield process
                for reader in readers:
                    reader.join()
                process.wait()
        finally:
            kill(process)
            for reader in readers:
                if reader.ident is not None:  # it was started
                    reader.join()
            process.stdout.close()
            process.stderr.close()
    for reader in readers:
        if reader.rejected is not None:
            raise reader.rejected
    if deadline.passed:
        raise Rejected(Reason.TIMEOUT, f"{path} took longer than {seconds:g} s to decode; ffmpeg was killed")
    if process.returncode < 0:
        raise Rejected(Reason.CRASHED, f"ffmpeg died ({ending(process)}) on {path}")


def find_error(line: str, ignored_parts: Sequence[str] = ()) -> str | None:
    """Return the message of a log line that reports an error, unless it comes from one of `ignored_parts` of ffmpeg."""
    match = _LOG_LINE.match(line)
    if match is None or (match[1] or "").rpartition(":")[2] in ignored_parts:
        return None
    return match[3]


def _limits(seconds: float) -> tuple[str, ...]:
    """Return the options that limit what ffmpeg opens and uses."""
    # Processor time is limited too, so that a spinning ffmpeg ends even if this process was killed.
    cpu_seconds = math.ceil(min(seconds, 1e6) * THREADS) + 1
    whitelists = ("-protocol_whitelist", "file,pipe", "-format_whitelist", CONTAINERS)
    # libav, decord and most players do not crop to what a container states.
    uncropped = ("-apply_cropping", "codec")
    return "-timelimit", str(cpu_seconds), *whitelists, "-threads", str(THREADS), *uncropped


def _start_process(
    handle: int, metadata_handle: int, options: Sequence[str], output: Sequence[str]
) -> subprocess.Popen[bytes]:
    output = [argument.replace(METADATA_PIPE, fd_path(metadata_handle)) for argument in output]
    quiet = ("-hide_banner", "-nostdin", "-nostats")
    return subprocess.Popen(  # noqa: S603  no argument comes from the file
        [imageio_ffmpeg.get_ffmpeg_exe(), *quiet, *options, "-i", f"file:{fd_path(handle)}", *output],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=[handle, metadata_handle],
        start_new_session=True,
        env={**os.environ, "AV_LOG_FORCE_NOCOLOR": "1"},
    )


@contextmanager
def _pipe() -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Yield the reading and the writing end of a pipe."""
    reading, writing = os.pipe()
    with open(reading, "rb") as reading_end, open(writing, "wb") as writing_end:
        yield reading_end, writing_end


class _LineReader(threading.Thread):
    """Reads the lines that a process writes, to the end, so that the process never waits for us."""

    def __init__(self, process: subprocess.Popen[bytes], stream: IO[bytes], handler: LineHandler | None) -> None:
        super().__init__(daemon=True)
        self.rejected: Rejected | None = None
        self._process, self._stream, self._handler = process, stream, handler

    def run(self) -> None:
        while line := self._stream.readline(MAX_LINE_BYTES):
            if self._handler is None or self.rejected is not None:
                continue
            try:
                self._handler(line.decode("utf-8", "replace").rstrip("\r\n"))
            except Rejected as rejected:
                self.rejected = rejected
                kill(self._process)
