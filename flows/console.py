"""Write to the terminal: log lines, results and errors. Imports nothing heavy."""

import logging
import sys
from typing import Any

from pusa.system.text import printable

LONGEST_LINE = 4000  # characters of an error; it may quote file names and manifests


def log_to_console() -> None:
    """Show the log lines of `pusa` on stderr."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("pusa").setLevel(logging.INFO)


def print_result(result: Any) -> None:
    """Print a stage's result: one line for each field that is not empty."""
    for name, value in vars(result).items():
        if value not in ({}, []):
            print(f"  {name}: {', '.join(value) if isinstance(value, list) else value}")


def print_error(error: BaseException | str) -> None:
    """Print an error on stderr after "pusa: "; characters that would control the terminal are escaped."""
    print("\n".join(printable(line, LONGEST_LINE) for line in f"pusa: {error}".splitlines()), file=sys.stderr)
