"""Texts by strangers as words that are safe to show."""

import difflib
import itertools
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from pusa.errors import ManifestError

MAX_LISTED = 20  # names in one message


def printable(value: Any, longest: int = 300) -> str:
    """A text on one line, cut at `longest`; what would steer a terminal, or turn the writing round, is spelled out."""
    text = str(value)
    kept = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:longest])
    return kept if len(text) <= longest else f"{kept}... ({len(text):,} characters)"


def first_line(error: BaseException) -> str:
    """What an error says, without the traces that some libraries put into their messages."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip()[:200] if lines else type(error).__name__


def read_text(path: Path, max_bytes: int) -> str:
    """A text file, not one byte more of it than allowed.

    Raises:
        ManifestError: it is too large or no UTF-8, or the system refuses it.
    """
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise ManifestError(f"{path} is too large; allowed are {max_bytes} bytes")
        return data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path} cannot be read: {error}") from error


def join_names(names: Collection[str]) -> str:
    """Names for a message, the first few of them."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(map(repr, itertools.islice(names, MAX_LISTED))) + more


def describe_unknown_key(key: str, known: Iterable[str]) -> str:
    """What to say of a key that is not among those known."""
    near = difflib.get_close_matches(key, known := sorted(known), 1)
    return f"unknown key; did you mean {near[0]!r}?" if near else f"unknown key; known keys are {', '.join(known)}"


def preview(value: Any) -> str:
    """The beginning of a value, for a message."""
    try:
        return f"{value!r:.80}"
    except ValueError:  # Python refuses to write out thousands of digits
        return "a number of thousands of digits"
