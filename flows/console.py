"""Write to the terminal and the log: results, errors and log lines, above a footer. Imports nothing heavy.

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
from contextlib import suppress
from threading import RLock
from typing import Any, TextIO

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
    """A text stream that escapes what would steer a terminal, except `STEERING`, and writes above the footer."""

    def write(self, text: str, /) -> int:
        safe = text
        if not text.isprintable():
            parts = STEERING.split(text)  # each second part is allowed
            safe = "".join(part if i % 2 else printable_lines(part) for i, part in enumerate(parts))
        if self.isatty():
            footer.write_above(self, safe)
        else:
            self.write_as_is(safe)
        return len(text)

    def write_as_is(self, text: str) -> None:
        """Write a text that steers the terminal as intended."""
        super().write(text)


class Footer:
    """Rows on the terminal below all that is written to it, such as a table that is drawn again and again.

    The cursor stays above the rows, at the end of the last line that was written: what another program writes to the
    terminal scrolls above them too, and a terminal that changes its size moves cursor and rows alike. Threads may
    write and draw at once.
    """

    def __init__(self) -> None:
        self._forget()
        os.register_at_fork(after_in_child=self._forget)  # another thread may have held the lock

    def _forget(self) -> None:
        self._lock = RLock()  # a signal's handler may write too
        self._stream: _Terminal | None = None  # where rows are shown
        self._rows: list[str] = []
        self._line = ""  # the last line, if it has not ended

    @staticmethod
    def is_possible() -> bool:
        """Return whether stderr is a terminal that can show a footer."""
        return isinstance(sys.stderr, _Terminal) and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    @staticmethod
    def size() -> tuple[int, int] | None:
        """Return the columns and rows of the terminal; None if nothing can be shown there now."""
        stream: TextIO | None = sys.stderr
        if stream is None or not Footer.is_possible():
            return None
        with suppress(OSError):  # it is not the terminal that controls this process
            if os.tcgetpgrp(stream.fileno()) != os.getpgrp():
                return None  # in the background of a shell
        try:
            size = os.get_terminal_size(stream.fileno())
        except OSError:
            return None
        return size.columns or 80, size.lines or 24

    def show(self, rows: Sequence[str]) -> None:
        """Show rows in place of those that are there; none removes them.

        Args:
            rows: their texts, safe to print, not wider than the terminal; colours are allowed.
        """
        with self._lock:
            stream = sys.stderr if isinstance(sys.stderr, _Terminal) else None
            if stream is None or not (rows or self._rows):
                return
            stream.write_as_is(self._drawn(rows or [""] * len(self._rows)))
            stream.flush()
            self._stream, self._rows = stream, list(rows)

    def write_above(self, stream: _Terminal, text: str) -> None:
        """Write a text that is safe to a terminal, above the rows."""
        with self._lock:
            whole = self._line + text
            line = re.split(r"[\r\n]|\x1b\[\d*[AB]", whole)[-1]
            self._line = line.replace("\x1b[K", "")
            if not self._rows or self._stream is None or not text:
                stream.write_as_is(text)
                return
            if len(self._line) >= (self.size() or (80, 24))[0]:  # it fills several rows of the terminal
                whole, self._line = f"{whole}\n", ""
            # Not erased as a whole before: that flickers, and some terminals keep an erased screen in their history.
            stream.write_as_is("\r" + whole.replace("\n", "\x1b[K\n"))
            stream.flush()
            self._stream.write_as_is(self._drawn(self._rows))
            self._stream.flush()

    def _drawn(self, rows: Sequence[str]) -> str:
        """Return what draws the rows, from the cursor's row on, without a line break by the terminal itself."""
        height = (self.size() or (80, 24))[1]
        rows = rows[: max(0, height - 1)]
        drawn = "".join(f"\n\r{row}\x1b[K" for row in rows)
        up = f"\x1b[{len(rows)}A" if rows else ""
        return f"\r{self._line}\x1b[K\x1b[?7l{drawn}\x1b[J\x1b[?7h{up}\r{self._line}"


footer = Footer()


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
    footer.show(())
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

    Of a long list, the number and the first entries are printed. Last comes what to do next, if the result says so.
    """
    for name, value in ((title_of(result, name), value) for name, value in vars(result).items()):
        if isinstance(value, dict):
            lines = [f"    {key}: {printable(text, LONGEST_LINE)}" for key, text in value.items()]
            if lines:
                show(f"  {name}:", *lines)
        elif isinstance(value, list) and len(value) > MAX_LISTED:
            show(f"  {name}: {len(value):,}, the first are {', '.join(value[:MAX_LISTED])}")
        elif value != []:
            show(f"  {name}: {', '.join(value) if isinstance(value, list) else value}")
    if step := getattr(result, "next_step", ""):
        show(f"  {step}")


def title_of(result: Any, name: str) -> str:
    """Return what people call a field of a stage's result: what its class says in `TITLES`, or the field's name."""
    return str(getattr(result, "TITLES", {}).get(name, name.replace("_", " ")))


def print_error(error: BaseException | str) -> None:
    """Print an error on stderr after "pusa: ", with its lines cut after `LONGEST_LINE` characters and some lines."""
    lines = [printable(line, LONGEST_LINE) for line in f"pusa: {error}".split("\n")]
    more = [f"  and {len(lines) - 2 * MAX_LINES:,} more lines"] if len(lines) > 2 * MAX_LINES else []
    show(*lines[: 2 * MAX_LINES], *more, error=True)
