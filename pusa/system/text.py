"""Make untrusted text safe to print, and short enough for a message."""

import difflib
import itertools
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from pusa.errors import ManifestError

MAX_LISTED = 20  # names in one message


def printable(value: Any, longest: int = 300) -> str:
    """Return a text on one line, cut at `longest` characters.

    Characters that steer a terminal or reverse the direction of writing become escape sequences.
    """
    text = str(value)
    kept = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:longest])
    return kept if len(text) <= longest else f"{kept}... ({len(text):,} characters)"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; some libraries put whole traces into theirs."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip()[:200] if lines else type(error).__name__


def read_text(path: Path, max_bytes: int) -> str:
    """Read a text file of at most `max_bytes` bytes; of a larger file, no more than that is read.

    Raises:
        ManifestError: the file is too large, is not UTF-8, or cannot be opened.
    """
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise ManifestError(f"{path} is too large; at most {max_bytes} bytes are allowed")
        return data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path} cannot be read: {error}") from error


def join_names(names: Collection[str]) -> str:
    """Return the first `MAX_LISTED` names in quotes, and the number of the others."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(map(repr, itertools.islice(names, MAX_LISTED))) + more


def describe_unknown_key(key: str, known: Iterable[str]) -> str:
    """Return the message for a key that is not one of `known`: the nearest known key, or all of them."""
    near = difflib.get_close_matches(key, known := sorted(known), 1)
    return f"unknown key; did you mean {near[0]!r}?" if near else f"unknown key; known keys are {', '.join(known)}"


def preview(value: Any) -> str:
    """Return the first 80 characters of a value's repr."""
    try:
        return f"{value!r:.80}"
    except ValueError:  # Python refuses to convert integers of thousands of digits
        return "a number of thousands of digits"
