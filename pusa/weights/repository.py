"""Read the repositories of a model hub into the cache that huggingface_hub's programs share, and trust no answer.

Names, commits and hashes are checked by their form before anything is written, the length of every answer is bounded,
and a file gets its name only when its bytes have the listed hash. No header becomes a path. huggingface_hub's own
download trusts the server: it makes paths of the headers ETag and X-Repo-Commit, writes however many bytes arrive, and
gives the addresses in other headers to Xet's client. So only its settings, its HTTP client, its token and the layout of
its cache are used here.
"""

import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Any, BinaryIO, Literal
from urllib.parse import parse_qs, quote, urlsplit

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from pusa.errors import WeightsError
from pusa.system.files import naming, publish
from pusa.system.locks import open_lock, try_lock
from pusa.system.progress import Progress
from pusa.system.text import printable
from pusa.weights.hub_client import HubUnreachable, not_a_hub, open_answer, pieces, read_json

log = logging.getLogger(__name__)

COMMIT = re.compile(r"[0-9a-f]{40}")
_HASHES = {"SHA-256": re.compile(r"[0-9a-f]{64}"), "git hash": re.compile(r"[0-9a-f]{40}")}
_MOST_FILES, _LONGEST_LIST, _MOST_PAGES = 1_000_000, 256 << 20, 5000  # of a data set; bytes; a page has 1000 files
_LONGEST_PATH, _LONGEST_COMPONENT = 1024, 255  # bytes
_ATTEMPTS, _WAIT, _LONGEST_WAIT = 6, 1.0, 300.0  # of one download in a row that bring nothing much; seconds
_WORTHWHILE = 1 << 16  # bytes of an attempt that do not count as nothing much


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository, in a list whose form is checked.

    Args:
        path: its path in the repository.
        size: its bytes; None if the hub lists no size.
        hash: the SHA-256 of its content (64 digits), or git's hash (40 digits); None if the hub lists neither.
    """

    path: str
    size: int | None
    hash: str | None


@dataclass(frozen=True)
class Listing:
    """The commit of a revision, and what the hub says of its files; of that, only the commit is checked."""

    commit: str
    entries: dict[str, dict[str, Any]]

    def check(self, paths: Sequence[str]) -> list[RemoteFile]:
        """Return the files at `paths`, which are some of the listed paths.

        Raises:
            WeightsError: a path would lead out of the repository's folder, or a size or hash has another form.
        """
        return [self._check(path) for path in paths]

    def _check(self, path: str) -> RemoteFile:
        name, entry = f"'{printable(path, 100)}'", self.entries[path]
        if (fault := path_fault(path)) is not None:
            raise WeightsError(f"the hub lists a file {name}, whose name {fault}; nothing is downloaded")
        if clash := [parent for parent in map(str, PurePosixPath(path).parents) if parent in self.entries]:
            raise WeightsError(f"the hub lists '{printable(clash[0], 100)}' as a file and as the folder of {name}")
        size, large = entry.get("size"), entry.get("lfs")
        if size is not None and (type(size) is not int or not 0 <= size < 1 << 63):
            raise WeightsError(f"the hub lists {name} with the size {printable(size, 40)}; expected its bytes")
        kind, known = "git hash", entry.get("blobId", entry.get("oid"))
        if large is not None:
            kind, known = "SHA-256", large.get("sha256", large.get("oid")) if isinstance(large, dict) else large
        if (large, known) != (None, None) and not (isinstance(known, str) and _HASHES[kind].fullmatch(known)):
            raise WeightsError(f"the hub lists {name} with the {kind} '{printable(known, 80)}', which is not one")
        return RemoteFile(path, size, known)


@dataclass(frozen=True)
class Repository:
    """A repository of the hub that HF_ENDPOINT names, and its folder in the cache."""

    name: str
    kind: Literal["model", "dataset"] = "model"

    @property
    def page(self) -> str:
        """Its address on the hub."""
        return f"{constants.ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"

    @property
    def folder(self) -> Path:
        """Its folder in the cache."""
        return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.name, repo_type=self.kind)

    def list_files(self, revision: str | None) -> Listing:
        """Ask the hub for the commit of a revision (None: main) and for its files.

        Raises:
            WeightsError: the hub refuses, or its answer is not a list of files.
        """
        api = f"{constants.ENDPOINT}/api/{self.kind}s/{self.name}"
        at = "" if revision is None else f"/revision/{quote(revision, safe='')}"
        # A model's files come with the answer. A data set may have more of them than fit: these come in pages.
        query = "blobs=true" if self.kind == "model" else "expand=sha"
        info, _, _ = read_json(self.page, revision, f"{api}{at}?{query}", dict)
        commit = info.get("sha")
        if not (isinstance(commit, str) and COMMIT.fullmatch(commit)):
            raise WeightsError(f"the hub names the commit '{printable(commit, 60)}'; expected a git hash of 40 digits")
        if revision is not None and COMMIT.fullmatch(revision) and commit != revision:
            raise WeightsError(f"the hub answers with another commit, {commit}")
        if self.kind == "dataset":
            key, found = "path", self._tree(f"{api}/tree/{commit}?recursive=true")
        else:
            key, found = "rfilename", info.get("siblings")
        if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
            raise not_a_hub()
        entries: dict[str, dict[str, Any]] = {}
        for entry in found:
            path = entry.get(key)
            if not isinstance(path, str) or path in entries:
                raise WeightsError(f"the hub lists '{printable(path, 100)}' twice, or not as the name of a file")
            if entry.get("type", "file") == "file":
                entries[path] = entry
        return Listing(commit, entries)

    def _tree(self, url: str) -> list[Any]:
        """Return the files and folders of a data set, which the hub lists page by page."""
        found: list[Any] = []
        address, length = url, 0
        for _ in range(_MOST_PAGES):
            page, size, link = read_json(self.page, None, address, list)
            found += page
            length += size
            if len(found) > _MOST_FILES or length > _LONGEST_LIST:
                break
            # Only the cursor is taken from the address of the next page: the hub does not choose whom to ask.
            cursors = parse_qs(urlsplit(link).query).get("cursor") if link else None
            if not cursors:
                return found
            address = f"{url}&cursor={quote(cursors[0], safe='')}"
        raise WeightsError(f"the hub's list of files does not end; at most {_MOST_FILES:,} files are allowed")

    def snapshot(self, revision: str | None, finished: bool = False) -> Path | None:
        """Return the cache's folder for a revision (None: main), complete or not; with `finished`, only if recorded."""
        name = revision or constants.DEFAULT_REVISION
        if finished or not COMMIT.fullmatch(name):
            try:
                with (self.folder / "refs" / name).open(encoding="utf-8") as file:
                    name = file.read(64).strip()
            except (OSError, UnicodeDecodeError):
                return None
        folder = self.folder / "snapshots" / name
        return folder if COMMIT.fullmatch(name) and folder.is_dir() else None

    def record(self, revision: str | None, commit: str) -> None:
        """Record the commit of a revision: its name leads there when the hub cannot be reached."""
        path = self.folder / "refs" / (revision or constants.DEFAULT_REVISION)
        (self.folder / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not atomic(): other programs take every file in this folder for a revision.
        partial = self.folder / f".{secrets.token_hex(6)}.incomplete"
        partial.write_text(commit, encoding="utf-8")
        publish(partial, path)

    def download(self, commit: str, file: RemoteFile, progress: Progress, stop: Event) -> None:
        """Put a file into the cache's folder of a commit; its content is downloaded unless the cache has it.

        Args:
            commit: the commit.
            file: the file, from `Listing.check`.
            progress: counts the bytes.
            stop: when set, the download ends without the file.

        Raises:
            WeightsError: the content cannot be downloaded, or is not what the hub lists.
        """
        blobs, folder = self.folder / "blobs", self.folder / "snapshots" / commit
        key = file.hash or hashlib.sha256(f"{commit}/{file.path}".encode()).hexdigest()
        with self._lock(key, file.path):
            if file.hash is not None and _is_whole(blobs / file.hash, file):
                return _link(folder / file.path, blobs / file.hash)
            blobs.mkdir(parents=True, exist_ok=True)
            partial = blobs / f"{key}.{secrets.token_hex(4)}.incomplete"
            try:
                with naming(blobs):
                    with partial.open("wb") as out:
                        self._transfer(f"{self.page}/resolve/{commit}/{quote(file.path)}", out, file, progress, stop)
                    if not _is_whole(partial, file):
                        again = "run the same command again to download it"
                        raise WeightsError(f"{printable(file.path)} arrived damaged and was removed; {again}")
                    blob = blobs / (file.hash or _digest(partial, "sha256"))
                    publish(partial, blob)
            finally:
                partial.unlink(missing_ok=True)
            _link(folder / file.path, blob)

    @contextmanager
    def _lock(self, key: str, path: str) -> Iterator[None]:
        """Hold the lock that huggingface_hub holds for the same content, so that no two processes download it."""
        locks = Path(constants.HF_HUB_CACHE) / ".locks" / self.folder.name
        locks.mkdir(parents=True, exist_ok=True)
        other, file = "another HF_HUB_CACHE", locks / f"{key}.lock"
        with open_lock(file) as lock:
            if not try_lock(lock, fcntl.LOCK_EX, wait=False, other=other):
                log.info("%s: waiting for another process that downloads it", printable(path))
                try_lock(lock, fcntl.LOCK_EX, wait=True, other=other)
            yield

    def _transfer(self, url: str, out: BinaryIO, file: RemoteFile, progress: Progress, stop: Event) -> None:
        """Download into an open file; after a broken connection, continue where it broke."""
        failures = 0
        while True:
            start = out.tell()
            try:
                with open_answer(self.page, None, url, start) as response:
                    if start and response.status_code == 200:  # the whole file again
                        out.seek(0)
                        out.truncate()
                        progress.advance(-start)
                    elif start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                        raise WeightsError(f"the hub does not continue {printable(file.path)} where it broke")
                    size = self._size_of(file, response, out.tell())
                    for piece in pieces(response, size - out.tell(), printable(file.path)):
                        if stop.is_set():
                            raise WeightsError("another file of the repository cannot be downloaded")
                        out.write(piece)
                        progress.advance(len(piece))
                if out.tell() == size:
                    return
                raise HubUnreachable(f"{printable(file.path)} ended early; run the same command again")
            except HubUnreachable as error:
                failures = 1 if out.tell() - start >= _WORTHWHILE else failures + 1
                if failures == _ATTEMPTS or stop.wait(min(max(_WAIT, error.wait), _LONGEST_WAIT)):
                    raise

    def _size_of(self, file: RemoteFile, response: Any, start: int) -> int:
        """Return a file's size as listed, or as the answer states it, if the disk can hold all from `start` on."""
        length = response.headers.get("Content-Range", response.headers.get("Content-Length", "")).rpartition("/")[2]
        if file.size is None and re.fullmatch(r"\d{1,18}", length) is None:
            raise WeightsError(f"the hub does not say how large {printable(file.path)} is")
        size = int(length) if file.size is None else file.size
        if size - start > shutil.disk_usage(self.folder).free:
            # Everything that downloads would fail in the same way.
            place = f"{constants.HF_HUB_CACHE} (HF_HUB_CACHE) for {printable(file.path)}, {size:,} bytes"
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), place)
        return size


def path_fault(path: str) -> str | None:
    """Return why a path in a repository cannot be one below its folder; None if it can."""
    try:
        lengths = [len(component.encode()) for component in path.split("/")]
    except UnicodeEncodeError:
        return "is not text"
    if len(path.encode()) > _LONGEST_PATH or max(lengths) > _LONGEST_COMPONENT:
        return f"is longer than {_LONGEST_PATH} bytes, or {_LONGEST_COMPONENT} between slashes"
    if any(component.strip() in ("", ".", "..") for component in re.split(r"[/\\]", path)):
        return "has '.', '..' or nothing between slashes"
    if "\\" in path or any(unicodedata.category(character) == "Cc" for character in path):
        return "has a backslash or a control character"
    return None


def _digest(path: Path, algorithm: str, prefix: bytes = b"") -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, prefix, usedforsecurity=False)).hexdigest()


def _is_whole(path: Path, file: RemoteFile) -> bool:
    """Return whether a file of the cache has the size and the hash that the hub lists."""
    try:
        size = path.stat().st_size
        if file.size not in (None, size) or file.hash is None:
            return file.size in (None, size)
        kind, prefix = ("sha256", b"") if len(file.hash) == 64 else ("sha1", b"blob %d\0" % size)
        return _digest(path, kind, prefix) == file.hash
    except FileNotFoundError:
        return False


def _link(link: Path, blob: Path) -> None:
    """Make a snapshot's file a link to its content, as huggingface_hub does."""
    target = os.path.relpath(blob, link.parent)
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.unlink(missing_ok=True)
        try:
            link.symlink_to(target)
        except OSError as error:  # a file system without links; huggingface_hub moves the content, too
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            blob.replace(link)
    except (FileExistsError, NotADirectoryError) as error:
        if not (link.is_symlink() and os.readlink(link) == target):
            raise WeightsError(f"{printable(link)} is in the way; another file has that name: remove it") from error
