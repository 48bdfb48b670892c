"""Texts by strangers as words that are safe to show."""

from typing import Any


def plain(value: Any, longest: int = 300) -> str:
    """A text on one line, cut at `longest`; what would steer a terminal, or turn the writing round, is spelled out."""
    text = str(value)
    kept = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:longest])
    return kept if len(text) <= longest else f"{kept}... ({len(text):,} characters)"


def first_line(error: BaseException) -> str:
    """What an error says, without the traces that some libraries put into their messages."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip()[:200] if lines else type(error).__name__
