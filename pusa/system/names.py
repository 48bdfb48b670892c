"""Find names without regard to their Unicode normal form. A name that is equal always comes first.

"é" may be one character (NFC, as most systems write it) or an e and an accent (NFD, as macOS and some archives do).
Both look alike, but most file systems keep them apart.
"""

import logging
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, MutableMapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

from pusa.errors import ManifestError
from pusa.system.text import printable

log = logging.getLogger(__name__)


@lru_cache(maxsize=4096)
def log_once(message: str) -> None:
    """Log a warning; the same one only once, since a manifest with many jobs is validated path by path."""
    log.warning("%s", printable(message, 2000))


def nfc(text: str) -> str:
    """Return a text in the normal form NFC."""
    return unicodedata.normalize("NFC", text)


class Names:
    """Names, looked up by their characters whatever their form."""

    def __init__(self, names: Iterable[str], looked_up: Iterable[str] = ()) -> None:
        """Sort the names by form. Those that equal a name of `looked_up` belong to it and are found for no other.

        `looked_up` are all names that will be looked up, if several may not find the same name.
        """
        self._names, looked_up = frozenset(names), frozenset(looked_up)
        self._by_form = _by_form(self._names - looked_up)
        self._looked_up_by_form = _by_form(looked_up - self._names)

    def alike(self, name: str) -> list[str]:
        """Return the names that differ from `name` only by their form, and `name` itself if it is there."""
        return [name] * (name in self._names) + [other for other in self._by_form.get(nfc(name), ()) if other != name]

    def find(self, name: str) -> str | None:
        """Return `name` if it is there, else the name that differs only by its form, else None.

        Raises:
            ManifestError: several do, or several names that are looked up differ from it only by their form.
        """
        if name in self._names:
            return name
        found = choose(name, self.alike(name))
        if found is not None:
            choose(found, self._looked_up_by_form.get(nfc(name), ()))
        return found


def _by_form(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names by their NFC, each list sorted."""
    groups = defaultdict(list)
    for name in sorted(names):
        groups[nfc(name)].append(name)
    return groups


def choose(name: str, others: Sequence[str]) -> str | None:
    """Return the only one of the names that differ from `name` by their form; None if there is none.

    Raises:
        ManifestError: there are several.
    """
    if len(others) > 1:
        listed = " or ".join(map(ascii, others))
        raise ManifestError(f"{name!a} may be {listed}, which differ only by their Unicode normal form; rename one")
    return others[0] if others else None


def find_path(path: Path, listings: MutableMapping[Path, Names] | None = None) -> Path:
    """Return the path if something is there, else the path that differs only by its form, else the path unchanged.

    Args:
        path: a file or a folder.
        listings: keeps the names of folders that were listed, for many calls.

    Raises:
        ManifestError: several paths differ from it only by their form.
    """
    if str(path).isascii() or os.path.lexists(path):
        return path
    listings = {} if listings is None else listings
    found = [Path(path.anchor)]
    for part in path.parts[bool(path.anchor) :]:
        found = [folder / name for folder in found for name in _alike_in(folder, part, listings)]
    other = choose(str(path), [str(other) for other in found if os.path.lexists(other)])
    return path if other is None else Path(other)


def _alike_in(folder: Path, name: str, listings: MutableMapping[Path, Names]) -> list[str]:
    if name.isascii():
        return [name]
    if folder not in listings:
        try:
            listings[folder] = Names(os.listdir(folder))
        except (OSError, ValueError):  # not a readable folder, or a name that no folder can have
            listings[folder] = Names(())
    return listings[folder].alike(name)


def loosen(pattern: Path) -> Path:
    """Return a pattern of `glob` that matches at least the same names in any form; `fits` tells which do."""
    parts = (part if part.isascii() and not {"?", "["} & set(part) else _loose(part) for part in pattern.parts)
    return Path(*parts)


def _loose(part: str) -> str:
    return ".*" if part.startswith(".") else "*"


def fits(path: Path, pattern: Path) -> bool:
    """Return whether a path matches a pattern of `glob`, with `**` for any folders, if both are in one form."""
    return _fit(Path(nfc(str(path))).parts, Path(nfc(str(pattern))).parts)


def _fit(names: Sequence[str], patterns: Sequence[str]) -> bool:
    counts = {0}  # of names that the patterns so far may match
    for pattern in patterns:
        if pattern == "**" and counts:
            counts = set(range(min(counts), len(names) + 1))
        else:
            counts = {n + 1 for n in counts if n < len(names) and fnmatchcase(names[n], pattern)}
    return len(names) in counts
