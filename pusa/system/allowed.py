"""Keep what a worker reads and writes inside the folders that its configuration allows.

Whoever may submit a manifest could otherwise name any file of the worker's machine. Links are resolved first. Hard
links and mounts cannot be seen. A link that is set after the check of a manifest is found when a stage begins, and for
videos, pictures and captions when the file is open; files of tables and weights are not checked again.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Self

from pusa.errors import ManifestError
from pusa.system.text import join_names, printable

VARIABLE = "PUSA_ALLOWED_FOLDERS"  # absolute folders, joined by os.pathsep; unset or empty: no restriction
MAX_NAMES = 2_000_000  # in one folder that is searched for links
REFUSED = "it leads out of the folders that this worker allows"


class Allowed:
    """The folders that a worker may use; false where it may use all."""

    def __init__(self, folders: Sequence[str] = ()) -> None:
        self.folders = tuple(folders)
        self._real_folders = tuple(map(os.path.realpath, self.folders))
        self._known: dict[str, str] = {}  # real paths of folders, of one check
        self._searched: set[str] = set()  # for links

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Return what the worker has set for the runs that it starts.

        Raises:
            ManifestError: a folder is not absolute.
        """
        folders = [folder for folder in environment.get(VARIABLE, "").split(os.pathsep) if folder]
        if relative := [folder for folder in folders if not os.path.isabs(folder)]:
            raise ManifestError(f"{VARIABLE} has {relative[0]!r}; expected absolute folders, joined by {os.pathsep!r}")
        return cls(folders)

    def __bool__(self) -> bool:
        """Return whether anything is refused."""
        return bool(self.folders)

    def allows(self, path: str) -> bool:
        """Return whether a path leads into one of the folders."""
        return not self or self._has(self._real(path))

    def allows_open(self, handle: int, path: Path) -> bool:
        """Return whether an open file is in one of the folders, or in the cache of the hub, which a manifest may name.

        Args:
            handle: the file descriptor. Nobody can set a link between this check and the reading.
            path: the path that it was opened by, for systems that do not tell where an open file is.
        """
        if not self:
            return True
        from huggingface_hub.constants import HF_HUB_CACHE

        here = f"/proc/self/fd/{handle}"
        real = os.readlink(here) if os.path.islink(here) else os.path.realpath(path)
        return self._has(real) or _is_inside(real, os.path.realpath(HF_HUB_CACHE))

    def require(self, path: Path) -> None:
        """Check that a path leads into one of the folders. It need not exist; nothing is read but links.

        Raises:
            ManifestError: it leads elsewhere, or no file can have this name.
        """
        if not self.allows(str(path)):
            raise ManifestError(self._refusal(str(path)))

    def require_tree(self, path: Path) -> None:
        """Check a path as `require` does, and where it is a folder, each link in it and in the folders below.

        Raises:
            ManifestError: it or a link leads elsewhere, or there are too many files to look for links.
        """
        self.require(path)
        for link in self._links_out(str(path)) if self else ():
            raise ManifestError(self._refusal(link))

    def _has(self, real: str) -> bool:
        return any(_is_inside(real, top) for top in self._real_folders)

    def _refusal(self, path: str) -> str:
        real = self._real(path)
        where = "is" if os.path.normpath(path) == real else f"leads to {printable(real)}, which is"
        return f"{printable(path)} {where} outside the folders that this worker allows: {join_names(self.folders)}"

    def _real(self, path: str) -> str:
        """Return a path without links. Many paths of a manifest lie in one folder, which is resolved once."""
        folder, name = os.path.split(os.path.abspath(path) if os.pardir not in path.split(os.sep) else path)
        try:
            if name in ("", os.curdir, os.pardir) or os.path.islink(path):
                return os.path.realpath(path)
            if folder not in self._known:
                self._known[folder] = os.path.realpath(folder)
        except ValueError as error:  # a null character
            raise ManifestError(f"{path!r:.200} is not a path: {error}") from error
        return os.path.join(self._known[folder], name)

    def _links_out(self, start: str) -> Iterator[str]:
        """Yield the links below a folder that lead out of the allowed ones. Links that stay inside are followed."""
        count, todo = 0, [start]
        while todo:
            real = os.path.realpath(todo.pop())
            if real in self._searched:
                continue
            self._searched.add(real)
            try:
                with os.scandir(real) as entries:
                    found = list(islice(entries, MAX_NAMES + 1))
            except OSError:  # not a folder, or nobody can read it, nor can the stage
                continue
            count += len(found)
            if count > MAX_NAMES:
                raise ManifestError(f"{start} has more than {MAX_NAMES:,} files, too many to look for links out of it")
            for entry in found:
                if entry.is_symlink() and not self.allows(entry.path):
                    yield entry.path
                elif entry.is_symlink() or entry.is_dir(follow_symlinks=False):
                    todo.append(entry.path)


def _is_inside(real: str, top: str) -> bool:
    return real == top or real.startswith(os.path.join(top, ""))


ANYWHERE = Allowed()
