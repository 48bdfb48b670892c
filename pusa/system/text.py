"""Make untrusted text safe for a terminal, a log and a page in markdown, and short enough for a message."""

import difflib
import hashlib
import itertools
import re
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pusa.errors import ManifestError

MAX_LISTED = 20  # names in one message
MAX_LINES = 50  # problems in one message
MAX_RANGES = 5  # of numbers in one name
LONGEST_NAME = 300  # characters of a name, and of a text on one line
# A comment between the parts of an address: some dashboards make links of all addresses, escaped or not.
_ADDRESSES = re.compile(r"(?<=http)(?=\\:)|(?<=https)(?=\\:)|(?<=ftp)(?=\\:)|(?<=www)(?=\\\.)|(?=\\@)", re.IGNORECASE)
NOTHING = "<!-- -->"


def printable(value: Any, longest: int = LONGEST_NAME) -> str:
    """Return a text on one line, cut at `longest` characters.

    Characters that steer a terminal or reverse the direction of writing become escape sequences.
    """
    return _escape(str(value), longest)


def printable_lines(value: Any, longest: int | None = None) -> str:
    """Return a text as `printable` does, but with its line breaks and tabs, and by default whole."""
    return _escape(str(value), longest, "\n\t")


def markdown(value: Any, longest: int = LONGEST_NAME) -> str:
    """Return markdown that shows a text literally, on one line: as `printable`, and with every mark escaped.

    No link, address, picture, HTML, code, heading or cell of a table is made of it.
    """
    escaped = re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", printable(value, longest).strip())
    return _ADDRESSES.sub(NOTHING, escaped)


def _escape(text: str, longest: int | None, kept: str = "") -> str:
    """Cut a text; return it with escape sequences for the characters that are neither printable nor in `kept`."""

    def shown(match: re.Match[str]) -> str:
        character = match[0]
        safe = character.isprintable() or character in kept
        return character if safe else character.encode("unicode_escape").decode()

    more = "" if longest is None or len(text) <= longest else f"... ({len(text):,} characters)"
    return re.sub(r"[^ -~]", shown, text[:longest]) + more


def shown_path(path: Path) -> str:
    """Return a path as people write it: relative to the current folder if it is in there."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except (ValueError, OSError):  # it is elsewhere, or the current folder was removed
        return str(path)


def local_time(text: str) -> str:
    """Return a time in ISO form as this machine's clock shows it; a text that is no time, as it is."""
    try:
        return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return text


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; some libraries put whole traces into theirs."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip()[:200] if lines else type(error).__name__


def read_text(path: Path, max_bytes: int, sha256: str | None = None) -> str:
    """Read a text file of at most `max_bytes` bytes; of a larger file, no more than that is read.

    Raises:
        ManifestError: the file is too large, is not UTF-8, cannot be opened, or its bytes do not have the hash.
    """
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise ManifestError(f"{path} is too large; at most {max_bytes} bytes are allowed")
        if sha256 and (found := hashlib.sha256(data).hexdigest()) != sha256:
            raise ManifestError(
                f"{path} was changed after it was handed over: its sha256 is {found}, not {sha256}; submit it again"
            )
        return data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path} cannot be read: {error}") from error


def join_names(names: Collection[Any], most: int = MAX_LISTED) -> str:
    """Return the first names in quotes, at most `most`, and the number of the others."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(f"{name!r:.{LONGEST_NAME}}" for name in itertools.islice(names, most)) + more


def join_ranges(numbers: Iterable[int]) -> str:
    """Return numbers as the first `MAX_RANGES` of their ranges, and how many others there are: "1-3, 8, 10-12"."""
    ranges: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    left = sum(last - first + 1 for first, last in ranges[MAX_RANGES:])
    parts = [f"{first}-{last}" if last > first else str(first) for first, last in ranges[:MAX_RANGES]]
    return ", ".join(parts) + (f" and {left:,} more" if left else "")


def join_lines(heading: str, lines: Sequence[str]) -> str:
    """Return a message: the heading, the first `MAX_LINES` lines below it, indented, and the number of the others."""
    more = [f"and {len(lines) - MAX_LINES:,} more"] if len(lines) > MAX_LINES else []
    return "\n  ".join([heading, *lines[:MAX_LINES], *more])


def describe_unknown_key(key: str, known: Iterable[str]) -> str:
    """Return the message for a key that is not one of `known`: the nearest known key, or all of them."""
    near = difflib.get_close_matches(key[:LONGEST_NAME], known := sorted(known), 1)
    return f"unknown key; did you mean {near[0]!r}?" if near else f"unknown key; known keys are {', '.join(known)}"


def preview(value: Any) -> str:
    """Return the first 80 characters of a value's repr."""
    try:
        return f"{value!r:.80}"
    except ValueError:  # Python refuses to convert integers of thousands of digits
        return "a number of thousands of digits"
