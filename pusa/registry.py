"""Look a name up in a table of "module:object" strings, importing only the module asked for."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from pusa.errors import ManifestError


def find(table: Mapping[str, str], name: str, what: str) -> Any:
    """Return the object that `name` stands for.

    Raises:
        ManifestError: the table has no such name; the message lists the names it has.
    """
    if name not in table:
        raise ManifestError(f"unknown {what} {name!r}; allowed are {', '.join(table)}")
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute)
