"""What the files of commands share: how a command is added, what numbers it takes, how it speaks."""

import argparse
import logging
import math
import sys
from collections.abc import Callable
from typing import Any


def add_command(
    commands: Any, name: str, what: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    """A command with its one sentence."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=what, description=what)
    parser.set_defaults(run=run)
    return parser


def positive(text: str) -> float:
    """A number above 0, for argparse."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def count(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def log_to_console() -> None:
    """Show what `pusa` logs, on stderr."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("pusa").setLevel(logging.INFO)


def show(result: Any) -> None:
    """Print a stage's result, a line for each of its fields that says something."""
    for name, value in vars(result).items():
        if value not in ({}, []):
            print(f"  {name}: {', '.join(value) if isinstance(value, list) else value}")
