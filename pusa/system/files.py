"""Write files atomically (temporary name, fsync, rename), and identify their content by hashes."""

import errno
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISDIR, S_ISLNK, S_ISREG
from typing import Any

from safetensors import SafetensorError

from pusa.errors import StageError
from pusa.system.allowed import ANYWHERE, REFUSED, Allowed
from pusa.system.text import join_names, printable

log = logging.getLogger(__name__)

PARTIAL = ".partial-"
LOCK = ".lock"  # in each folder that Pusa writes: it marks the folder as Pusa's
MARKS = (  # names that hardly any other folder has, for those of ours that were copied without hidden files
    f"{'[0-9a-f]' * 16}-{'[0-9]' * 8}*.parquet", "[0-9]*/checkpoint.json", "00000000.json", "gallery.html",
    "*.latents.safetensors", "end.json", "export.json", "quality.md", "tiny/vae/config.json",
)  # fmt: skip
TABLE_KEYS = {"version", "parts", "facts"}  # of a table's index.json; other folders have a file of this name, too
NEGLIGIBLE = {"lost+found", ".DS_Store", ".gitignore", ".gitkeep"}  # in a folder that counts as empty
MAX_JSON = 1 << 28  # bytes of a JSON file
State = tuple[int, int, int, int, int]  # device, inode, size in bytes, mtime and ctime in nanoseconds
Stamp = tuple[int, int, int]  # the part of a state that stays when a disk is mounted again
GONE: Stamp = (-1, -1, -1)  # the stamp of a missing file


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on any error.

    The caller may create a file or a folder there. The suffix is kept, since encoders choose their format by it.

    Raises:
        OSError: it could not be written; the message names `path`, whatever the writing library reported.
    """
    _require_replaceable(path)
    with scratch(path) as partial:
        yield partial
        publish(partial, path)


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` and remove it afterwards, unless the caller renames it with `publish`.

    For files whose final name depends on their content.

    Raises:
        OSError: as `atomic`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{PARTIAL}{secrets.token_hex(6)}-{path.name}")
    try:
        with naming(path):
            yield partial
    except SafetensorError as error:  # raised for a full disk, among others
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        remove(partial)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError that names no file, as that of a full disk, the name of `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, str(error.strerror), str(path)) from error


def publish(partial: Path, path: Path) -> None:
    """Sync `partial` to the disk, then rename it to `path`.

    Raises:
        OSError: it could not be written; or `path` is a device or a pipe, which a file would replace for everybody.
    """
    _require_replaceable(path)
    _flush(partial)
    partial.replace(path)
    _sync(path.parent)


def _require_replaceable(path: Path) -> None:
    """Refuse to replace a device, a pipe or a socket: the superuser could replace /dev/null."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:  # nothing is there; or what follows says why it cannot be read
        return
    if not (S_ISREG(mode) or S_ISDIR(mode) or S_ISLNK(mode)):
        raise OSError(errno.EINVAL, "it is a device or a pipe, not a file; name another one", str(path))


def remove_partials(folder: Path, name: str = "*") -> None:
    """Remove the unfinished files of killed writers: all, or those of one file. Call it only while nobody writes it."""
    for path in folder.glob(f"{PARTIAL}{name}" if name == "*" else f"{PARTIAL}*-{name}"):
        remove(path)


def require_own(folder: Path) -> None:
    """Refuse to write into a folder with files of somebody else. Call it before any work is done.

    A folder that does not exist or is empty is free, and so is one that Pusa made: it has a `.lock`. A link to such a
    folder is free as well.

    Raises:
        StageError: it is the root of the file system, or holds something else.
        OSError: it cannot be listed; it is a file, for one.
    """
    if os.path.realpath(folder) == os.sep:
        raise StageError(f"{folder} is the root of the file system; name a folder to write into")
    if not folder.exists() or (folder / LOCK).is_file() or any(any(folder.glob(mark)) for mark in MARKS):
        return
    if read_object(folder / "index.json").keys() >= TABLE_KEYS:
        return
    found = {path.name for path in folder.iterdir()}
    if names := sorted(name for name in found - NEGLIGIBLE if not name.startswith(PARTIAL)):
        raise StageError(
            f"{folder} is not empty, and Pusa did not write it: it has {join_names(names)}; name another "
            f"folder. If its files may be replaced or removed, create an empty file {LOCK} in it"
        )


def make_own_folder(folder: Path, purpose: str) -> None:
    """Create a folder inside one of Pusa's folders, if it does not exist.

    Raises:
        StageError: something else has its name; a link to a folder, too, which may lead anywhere.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        kind = "a link" if folder.is_symlink() else "not a folder"
        raise StageError(f"{folder} is {kind}; expected a folder for {purpose}: remove it")
    folder.mkdir(exist_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically. Lone surrogates, as in file names that are not UTF-8, become JSON's escapes."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_text(path, text.encode("utf-8", "backslashreplace").decode("utf-8"))


def read_json(path: Path) -> Any:
    """Return the value in a JSON file; None if there is no file, or if it is torn, nested too deep or too large."""
    if not path.is_file():  # the opening of a named pipe would wait
        return None
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size  # `read` takes memory for all that it may read
            data = file.read(min(size, MAX_JSON) + 1)
    except FileNotFoundError:  # it was removed meanwhile
        return None
    return parse_json(data) if len(data) <= MAX_JSON else None


def parse_json(data: bytes) -> Any:
    """Return the value of a JSON text; None if it is torn, not UTF-8 or nested too deep."""
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one where `read_json` returns None, or a value of another shape."""
    value = read_json(path)
    return value if isinstance(value, dict) else {}


def set_link(link: Path, name: str) -> None:
    """Make `link` a symbolic link to `name` in the same folder, atomically."""
    with atomic(link) as partial:
        partial.symlink_to(name)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal.

    Raises:
        OSError: it cannot be read, or is not a file.
    """
    if path.exists() and not path.is_file():  # the opening of a named pipe would wait
        raise OSError(errno.EINVAL, "it is not a file", str(path))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_of(file: Path | int) -> State:
    """Return the state of a file or of an open one: a cheap sign that it was neither changed nor replaced.

    A copy may have the size and the mtime of another file, but nobody can set a ctime.

    Raises:
        OSError: there is no file.
    """
    stat = os.stat(file)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def stamp_of(path: Path) -> Stamp:
    """Return a file's stamp; `GONE` if there is no file."""
    try:
        return state_of(path)[2:]
    except OSError:
        return GONE


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value in hexadecimal; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def own_digest(value: Mapping[str, Any]) -> str:
    """Return the digest of a JSON object without its key `sha256`, in which its file holds this digest."""
    return digest(json.loads(json.dumps({key: inner for key, inner in value.items() if key != "sha256"})))


def derived_seed(*parts: Any) -> int:
    """Return a seed that is different for each combination of parts."""
    return int(digest(parts)[:15], 16)


def _flush(path: Path) -> None:
    """Sync a file, or a folder with everything in it, to the disk."""
    if path.is_symlink():
        return
    if path.is_dir():
        for inner in path.iterdir():
            _flush(inner)
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        for inner in path.iterdir():
            remove(inner)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def walk(folder: Path, allowed: Allowed = ANYWHERE) -> Iterator[tuple[Path, list[str] | OSError]]:
    """Yield every folder with its sorted file names, or with the error if the folder cannot be read.

    Hidden files and folders are left out. Links are followed; a folder reached twice is listed once, and one outside
    the allowed folders not at all: it has an error.
    """
    seen: set[tuple[int, int]] = set()
    errors: list[OSError] = []
    for inner, folders, names in os.walk(folder, followlinks=True, onerror=errors.append):
        yield from ((Path(error.filename), error) for error in errors)
        errors.clear()
        try:
            stat = os.stat(inner)
        except OSError as error:  # it was removed in the meantime
            folders.clear()
            yield Path(inner), error
            continue
        if (stat.st_dev, stat.st_ino) in seen:
            log.warning("%s is a link to a folder that was already listed", printable(inner))
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for refused in [name for name in folders if not allowed.allows(os.path.join(inner, name))]:
            folders.remove(refused)
            yield Path(inner, refused), OSError(errno.EACCES, REFUSED, os.path.join(inner, refused))
        yield Path(inner), sorted(name for name in names if not name.startswith("."))
    yield from ((Path(error.filename), error) for error in errors)
