"""Write to the terminal and the log: results, errors and log lines. Imports nothing heavy.

File names, captions, metadata and errors may hold characters that steer a terminal, so each way out escapes them:
`show` and `print_error` for what commands print, `_Record` for log lines (Prefect's too), and `_Terminal` for what
others write to the streams, such as warnings and tracebacks.
"""

import errno
import io
import logging
import os
import re
import select
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from pusa.errors import PusaError
from pusa.system.text import MAX_LINES, MAX_LISTED, printable, printable_lines

LONGEST_LINE = 4000  # characters of an error; it may quote file names and manifests
LONGEST_ENTRY = 20_000  # characters of a log line with all its lines, and of its traceback
# What progress bars and colours need: back to the start of the line, colours, up and down, erase, hide and show.
STEERING = re.compile(r"(\r|\x1b\[[\d;]*[mABK]|\x1b\[\?25[hl])")
DESCRIPTORS = {"stdin": 0, "stdout": 1, "stderr": 2}


class _Output(io.FileIO):
    """A descriptor whose errors (nobody reads it, a full disk) are kept in `error` and end nobody's work."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            while (count := super().write(data)) is None:  # another program made the terminal non-blocking
                select.select([], [self], [])
        except OSError as error:
            self.error = self.error or error
            return memoryview(data).nbytes
        return count


class _Terminal(io.TextIOWrapper):
    """A text stream that escapes what would steer a terminal, except `STEERING`."""

    def write(self, text: str, /) -> int:
        if not text.isprintable():
            parts = STEERING.split(text)  # each second part is allowed
            super().write("".join(part if i % 2 else printable_lines(part) for i, part in enumerate(parts)))
        else:
            super().write(text)
        return len(text)


class _Record(logging.LogRecord):
    """A log record with an escaped message and traceback, whatever formats it and sends it on.

    An error that Pusa raises on purpose has no traceback: its sentence, which the message has, says everything.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # None: Prefect logs a failed state as if it were raised.
        if not self.exc_info or self.exc_info[0] is None or issubclass(self.exc_info[0], PusaError):
            self.exc_info = None
        else:  # a formatter uses the text that is there
            self.exc_text = printable_lines(logging.Formatter().formatException(self.exc_info), LONGEST_ENTRY)

    def getMessage(self) -> str:
        return printable_lines(super().getMessage(), LONGEST_ENTRY)


def open_streams() -> None:
    """Make stdin, stdout and stderr usable, whatever they were at the start, and what is written safe for a terminal.

    A closed descriptor becomes /dev/null; otherwise the next file that is opened would take its number, and log lines
    would land in that file. What cannot be written is dropped, and a character that the encoding lacks becomes an
    escape sequence. Streams that a program put in place of Python's own are left alone.
    """
    logging.setLogRecordFactory(_Record)
    for descriptor in DESCRIPTORS.values():
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free
    for name, descriptor in DESCRIPTORS.items():
        stream = getattr(sys, name)
        if stream is None:
            mode = "r" if name == "stdin" else "w"
            stream = open(descriptor, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, f"__{name}__", stream)
        elif stream is not getattr(sys, f"__{name}__"):
            continue
        if name != "stdin":
            stream.flush()
            buffer = io.BufferedWriter(_Output(descriptor, "w", closefd=False))
            at_once = name == "stderr" or stream.line_buffering or stream.write_through
            setattr(sys, name, _Terminal(buffer, stream.encoding, "backslashreplace", line_buffering=at_once))
        else:
            sys.stdin = stream


def flush_streams() -> str:
    """Write what is still in memory, and return why stdout is incomplete; "" if it is not, or if its reader left."""
    failures = []
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        raw = getattr(getattr(stream, "buffer", None), "raw", None)
        failures.append(raw.error if isinstance(raw, _Output) else None)
    if failures[0] is None or failures[0].errno == errno.EPIPE:
        return ""
    return f"the output is incomplete: standard output cannot be written ({failures[0].strerror}); write it elsewhere"


def log_to_console(level: int = logging.INFO) -> None:
    """Show the log lines of `pusa` on stderr, from a level on."""
    logging.setLogRecordFactory(_Record)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("pusa").setLevel(level)


def show(*lines: object, error: bool = False) -> None:
    """Print lines on stdout or stderr at once; characters that would steer a terminal are escaped."""
    print(*map(printable_lines, lines), sep="\n", file=sys.stderr if error else sys.stdout, flush=True)


def redraw(lines: Sequence[str], drawn: int) -> int:
    """Print lines on a terminal in place of the `drawn` lines that are there from the last call; return the new number.

    Lines are cut at the terminal's width, so that each takes one row, and at its height, so that all can be reached.
    """
    columns, rows = shutil.get_terminal_size()
    lines = [printable_lines(line)[: columns - 1] for line in lines[: rows - 1]]
    blank = [""] * (drawn - len(lines))
    up = f"\x1b[{drawn}A" if drawn else ""
    print("\r" + up + "".join(f"{line}\x1b[K\n" for line in [*lines, *blank]), end="", flush=True)
    return len(lines) + len(blank)


def print_result(result: Any) -> None:
    """Print a stage's result: one line for each field that is not empty, and for each entry of a dict.

    Of a long list, the number and the first entries are printed.
    """
    for name, value in vars(result).items():
        if isinstance(value, dict):
            lines = [f"    {key}: {printable(text, LONGEST_LINE)}" for key, text in value.items()]
            if lines:
                show(f"  {name}:", *lines)
        elif isinstance(value, list) and len(value) > MAX_LISTED:
            show(f"  {name}: {len(value):,}, the first are {', '.join(value[:MAX_LISTED])}")
        elif value != []:
            show(f"  {name}: {', '.join(value) if isinstance(value, list) else value}")


def print_error(error: BaseException | str) -> None:
    """Print an error on stderr after "pusa: ", with its lines cut after `LONGEST_LINE` characters and some lines."""
    lines = [printable(line, LONGEST_LINE) for line in f"pusa: {error}".split("\n")]
    more = [f"  and {len(lines) - 2 * MAX_LINES:,} more lines"] if len(lines) > 2 * MAX_LINES else []
    show(*lines[: 2 * MAX_LINES], *more, error=True)
