"""Find the files that the globs of a manifest match, in any Unicode form, with a limit on what is looked at."""

import glob
import itertools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from time import monotonic

from pusa.errors import ManifestError
from pusa.system.allowed import ANYWHERE, Allowed
from pusa.system.names import find_path, fits, log_once, loosen, nfc
from pusa.system.strict import Context, Place, resolve
from pusa.system.text import MAX_LISTED, join_names
from pusa.tasks.base import JOB_PREFIX

MAX_NAMES, MAX_SECONDS = 1_000_000, 60.0  # that all globs of a manifest together look at, and for which they do
MAX_PATTERN, MAX_PARTS = 4096, 100  # characters of a glob, and folders in it


def is_glob(text: str, context: Context) -> bool:
    """Return whether a path is a pattern: it has `*`, `?` or `[`, and no file has this name, in any Unicode form."""
    if not glob.has_magic(text) or "\0" in text or text.startswith(JOB_PREFIX):
        return False
    try:
        return not os.path.isfile(find_path(resolve(Path(text), context)))
    except ManifestError:  # several files have it, or it leads out of the allowed folders; the job's model refuses that
        return False


class Globs:
    """The globs of a manifest. Each is looked for once; when all together took too long, each further one is refused.

    `**` visits a folder once, however many links lead to it, also if it is inside itself.
    """

    def __init__(self, context: Context, max_names: int = MAX_NAMES, max_seconds: float = MAX_SECONDS) -> None:
        """Prepare to look for files.

        Args:
            context: the folders that patterns are relative to.
            max_names: of files and folders that are looked at.
            max_seconds: time for which they are looked at.
        """
        self._context, self._max_names, self._max_seconds = context, max_names, max_seconds
        self._allowed: Allowed = context.get("allowed") or ANYWHERE
        self._names, self._seconds, self._end = 0, max_seconds, 0.0  # looked at, left, and when none are left
        self._found: dict[str, dict[str, Path]] = {}

    def find(self, text: str) -> dict[str, Path]:
        """Return the files that match a glob in any Unicode form, by stem in NFC, sorted.

        Raises:
            ManifestError: no file matches, two have the same stem, a name is not UTF-8, which JSON cannot hold, or too
                many names were looked at; a file or a folder on the way leads out of those that the worker allows.
        """
        if text not in self._found:
            self._found[text] = self._find(text)
        return self._found[text]

    def _find(self, text: str) -> dict[str, Path]:
        exact, loose = Path(text), loosen(Path(text))
        if len(text) > MAX_PATTERN or len(exact.parts) > MAX_PARTS:
            raise ManifestError(
                f"{text!r:.80} has {len(text)} characters and {len(exact.parts)} parts; "
                f"a glob has at most {MAX_PATTERN} and {MAX_PARTS}"
            )
        escaped = {name: Path(glob.escape(str(self._context[name]))) for name in ("folder", "run_dir")}
        pattern = resolve(exact, escaped)
        names = {name for name in self._search(loose, text) if fits(Path(name), pattern)}
        for name in names:
            self._allowed.require(Path(name))
        names = {name for name in names if os.path.isfile(name)}
        if others := names.difference(self._search(exact, text)) if loose != exact else set():
            log_once(f"{text!r} matches {len(others)} names in another Unicode form: {join_names(sorted(others))}")
        if not names:
            raise ManifestError(f"no file matches {text!r} in {resolve(Path(*_fixed(exact)), self._context)}")
        if odd := sorted(name for name in names if name.encode(errors="replace").decode() != name):
            raise ManifestError(f"{text!r} matches names that are not UTF-8: {join_names(odd)}")
        return _by_stem(names, text)

    def _search(self, pattern: Path, text: str) -> set[str]:
        """Return what matches a pattern. In the folders of the context, no character is a pattern.

        Args:
            pattern: as it is written, or loosened.
            text: as it is written, for messages.
        """
        fixed = _fixed(pattern)
        folder = str(resolve(Path(*fixed), self._context))
        start, names = monotonic(), self._names
        self._end = start + self._seconds
        try:
            return self._match(folder, [*pattern.parts[len(fixed) :], *["*"] * (pattern.name == "**")])
        except _TooMuch:
            raise ManifestError(
                f"{text!r} was given up in {folder} after {self._names - names:,} names and {monotonic() - start:.0f} "
                f"s; all globs of a manifest may look at {self._max_names:,} names for {self._max_seconds:g} s"
            ) from None
        finally:
            self._seconds -= monotonic() - start

    def _match(self, start: str, parts: Sequence[str]) -> set[str]:
        """Return what lies below a folder on a path that matches these parts."""
        found: set[str] = set()
        seen: set[tuple[int, str | tuple[int, int]]] = set()
        real, linked = [(0, start)], list[tuple[int, str]]()  # folders, and how many parts lead to them
        while real or linked:
            place, folder = (real or linked).pop()  # links last, so that a folder's own path counts
            self._allowed.require(Path(folder))
            part, is_last = parts[place], place + 1 == len(parts)
            key = _identity(folder) if part == "**" else folder
            if key is None or (place, key) in seen:
                continue
            seen.add((place, key))
            if part == "**":
                real.append((place + 1, folder))
            if not glob.has_magic(part):
                path = os.path.join(folder, part)
                found.update([path] * is_last)
                real += [(place + 1, path)] * (not is_last)
                continue
            for entry in reversed(self._list(folder)):
                if not fnmatchcase(entry.name, part) or (entry.name.startswith(".") and not part.startswith(".")):
                    continue
                if is_last:
                    found.add(entry.path)
                elif _is_folder(entry):
                    (linked if entry.is_symlink() else real).append((place + (part != "**"), entry.path))
        return found

    def _list(self, folder: str) -> list[os.DirEntry[str]]:
        """Return what is in a folder, sorted; nothing if it cannot be listed, as the globs of shells do."""
        found = []
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                self._names += 1
                if self._names > self._max_names:
                    raise _TooMuch
                found.append(entry)
        if monotonic() > self._end:
            raise _TooMuch
        return sorted(found, key=lambda entry: entry.name)


class _TooMuch(Exception):
    """The limits of a search are reached."""


def _fixed(pattern: Path) -> list[str]:
    """Return the parts of a pattern up to the first that has magic."""
    return list(itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))


def _identity(folder: str) -> tuple[int, int] | None:
    """Return what distinguishes a folder from all others, whatever its paths; None if it is missing."""
    try:
        state = os.stat(folder)
    except OSError:
        return None
    return state.st_dev, state.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, for example
        return False


def _by_stem(names: set[str], text: str) -> dict[str, Path]:
    paths = sorted((nfc(Path(name).stem), Path(name)) for name in names)
    same = {
        str(path): 0
        for (stem, first), (other, last) in itertools.pairwise(paths)
        if stem == other
        for path in (first, last)
    }
    if same:
        counts = Counter(map(nfc, same))
        if alike := [name for name in same if counts[nfc(name)] > 1]:  # they look the same, so they are escaped
            listed = ", ".join(map(ascii, alike[:MAX_LISTED]))
            raise ManifestError(f"{text!a} matches files that differ only in their Unicode normal form: {listed}")
        raise ManifestError(f"{text!r} matches files that differ only in their folder or suffix: {join_names(same)}")
    return dict(paths)


def pair_stems(matches: Mapping[Place, Mapping[str, Path]]) -> list[str]:
    """Return the stems that the files of all globs of a job share, sorted.

    Raises:
        ManifestError: a glob has a file without a partner in another.
    """
    shared = set.intersection(*(set(files) for files in matches.values()))
    alone = {
        place: [path.name for stem, path in files.items() if stem not in shared] for place, files in matches.items()
    }
    if unpaired := [f"{'.'.join(map(str, place))} {join_names(names)}" for place, names in alone.items() if names]:
        raise ManifestError(f"files pair by name without the suffix; these have no partner: {'; '.join(unpaired)}")
    return sorted(shared)
