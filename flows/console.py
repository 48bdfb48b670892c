"""Write to the terminal: log lines, results and errors. Imports nothing heavy."""

import errno
import io
import logging
import os
import select
import sys
from typing import Any

from pusa.system.text import printable

LONGEST_LINE = 4000  # characters of an error; it may quote file names and manifests
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


def open_streams() -> None:
    """Make stdin, stdout and stderr usable, whatever they were at the start.

    A closed descriptor becomes /dev/null; otherwise the next file that is opened would take its number, and log lines
    would land in that file. What cannot be written is dropped, and a character that the encoding lacks becomes an
    escape sequence. Streams that a program put in place of Python's own are left alone.
    """
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
            setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=at_once))
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


def log_to_console() -> None:
    """Show the log lines of `pusa` on stderr."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("pusa").setLevel(logging.INFO)


def print_result(result: Any) -> None:
    """Print a stage's result: one line for each field that is not empty, and for each entry of a dict."""
    for name, value in vars(result).items():
        if isinstance(value, dict):
            lines = [f"    {key}: {text}" for key, text in value.items()]
            print(*([f"  {name}:", *lines] if lines else ()), sep="\n", end="\n" if lines else "")
        elif value != []:
            print(f"  {name}: {', '.join(value) if isinstance(value, list) else value}")


def print_error(error: BaseException | str) -> None:
    """Print an error on stderr after "pusa: "; characters that would control the terminal are escaped."""
    print("\n".join(printable(line, LONGEST_LINE) for line in f"pusa: {error}".splitlines()), file=sys.stderr)
