"""Files that are whole or not there: temporary name, fsync, rename. And what names their content: hashes."""

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pusa.system.text import printable

log = logging.getLogger(__name__)

PARTIAL = ".partial-"
Stamp = tuple[int, int]  # size and time of change: what stands for a file's content until it is decoded
GONE: Stamp = (-1, -1)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success it becomes `path`, on any error it is removed.

    It may be made a file or a new folder. It keeps the suffix, since encoders choose their format by it.

    Raises:
        OSError: it could not be written; the message names `path`, whatever the library in between said.
    """
    with scratch(path) as partial:
        yield partial
        publish(partial, path)


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """As `atomic`, for what gets its name only when it is written: what is not published is removed.

    Raises:
        OSError: as `atomic`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{PARTIAL}{secrets.token_hex(6)}-{path.name}")
    try:
        yield partial
    except SafetensorError as error:  # its name for a full disk, among others
        raise OSError(f"{path} could not be written: {error}") from error
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, str(error.strerror), str(path)) from error
    finally:
        remove(partial)


def publish(partial: Path, path: Path) -> None:
    """Give what was written its name, once all of it is on the disk."""
    _flush(partial)
    partial.replace(path)
    _sync(path.parent)


def remove_partials(folder: Path) -> None:
    """Remove what killed writers left half written. Only for who knows that no other writes there."""
    for path in folder.glob(f"{PARTIAL}*"):
        remove(path)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, atomically."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a whole JSON file, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds, or None where there is none, or it is torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def set_link(link: Path, name: str) -> None:
    """Make `link` a symbolic link to its neighbour `name`, atomically."""
    with atomic(link) as partial:
        partial.symlink_to(name)


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp_of(path: Path) -> Stamp:
    """A file's stamp, `GONE` where there is none."""
    try:
        stat = os.stat(path)
    except OSError:
        return GONE
    return stat.st_size, stat.st_mtime_ns


def digest(value: Any) -> str:
    """The SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def derived_seed(*parts: Any) -> int:
    """A seed of its own for each combination of parts."""
    return int(digest(parts)[:15], 16)


def _flush(path: Path) -> None:
    """Bring a file, or a folder with all that is in it, to the disk."""
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
    """Remove a file, a link or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        for inner in path.iterdir():
            remove(inner)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def walk(folder: Path) -> Iterator[tuple[Path, list[str] | OSError]]:
    """Every folder with its files' names in order, hidden ones left out; for what cannot be read, the error.

    Links are followed, and a folder that was listed already is not listed again.
    """
    seen: set[tuple[int, int]] = set()
    refused: list[OSError] = []
    for inner, folders, names in os.walk(folder, followlinks=True, onerror=refused.append):
        yield from _told(refused)
        try:
            stat = os.stat(inner)
        except OSError as error:  # it vanished just now
            folders.clear()
            yield Path(inner), error
            continue
        if (stat.st_dev, stat.st_ino) in seen:
            log.warning("%s is a link to a folder that was listed already", printable(inner))
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(inner), sorted(name for name in names if not name.startswith("."))
    yield from _told(refused)


def _told(refused: list[OSError]) -> Iterator[tuple[Path, OSError]]:
    yield from ((Path(error.filename), error) for error in refused)
    refused.clear()
