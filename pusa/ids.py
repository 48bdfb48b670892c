"""How a value reads in the id of a job that was expanded."""

import json
import re
from typing import Any

from pusa.errors import ManifestError
from pusa.files import digest
from pusa.strict import shown

MAX_PART = 40  # characters


def id_part(value: Any, text: str | None = None) -> str:
    """A value as a part of an id: its text, by default as it is written; a digest tells apart what that leaves out.

    Raises:
        ManifestError: JSON cannot hold it.
    """
    items = value if isinstance(value, list) else []
    plain = not isinstance(value, dict) and all(isinstance(item, int | float) for item in items)
    try:
        text = _written(value) if text is None else text
        clean = re.sub(r"[^A-Za-z0-9._-]", "_", text)
        exact = clean == text and len(text) <= MAX_PART and plain
        return clean if exact else f"{clean[: MAX_PART - 7]}.{digest(value)[:6]}"
    except (TypeError, ValueError):
        raise ManifestError(f"{shown(value)} is no text, number, list or mapping") from None


def _written(value: Any) -> str:
    """Numbers at their shortest, lists by their items; a mapping has no short text."""
    if isinstance(value, list):
        return "_".join(map(_written, value))
    if isinstance(value, float):
        return repr(value).removesuffix(".0").replace("+", "")
    return "" if isinstance(value, dict) else value if isinstance(value, str) else json.dumps(value)
