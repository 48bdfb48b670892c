"""Scripts as child processes, whether a process lives, and waiting for a fact."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Value = TypeVar("Value")


def python(code: str) -> list[str]:
    """Return the command that runs a script."""
    return [sys.executable, "-c", code]


def wait_for(fact: Callable[[], Value], seconds: float = 120) -> Value:
    """Return the first true value of `fact`. The limit only ends a test whose fact never comes true."""
    deadline = time.monotonic() + seconds
    while not (value := fact()):
        assert time.monotonic() < deadline, f"not true after {seconds} s"
        time.sleep(0.02)
    return value


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that has ended and was not reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def descendants(pid: int) -> list[int]:
    """Return the children of a process and theirs."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return children + [inner for child in children for inner in descendants(child)]


def command_line(pid: int) -> str:
    """Return the command of a process, its words separated by spaces."""
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
