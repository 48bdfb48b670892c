"""Find the rows that a folder already has, keep a record of rejects, and move damaged shards to quarantine."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pusa.data.reader import Table, matches_index
from pusa.data.schema import KEY_COLUMNS, PARTS
from pusa.data.shard import HASH_DIGITS, read_columns
from pusa.errors import TableError
from pusa.precompute.rows import Segment
from pusa.system.files import make_own_folder, read_json, read_object, remove, sha256_file, write_json

log = logging.getLogger(__name__)

QUARANTINE = "quarantine"
UNUSED = "unused.json"  # shards that the table does not list: for each name its size, its time, and since when
SHARD_NAME = re.compile(r"(latents|texts)-[0-9a-f]{12}-[0-9a-f]{32}\.parquet")
Location = tuple[str, int]  # a shard's name, and the number of a row in it
REJECT_KEYS = ("key", "reason", "detail")
RejectEntry = dict[str, str]  # with the keys `REJECT_KEYS`


@dataclass(frozen=True)
class RejectFiles:
    """The rejects of all processes, in one file for each segment of a folder.

    Rejects from before this run are not used to skip clips: those are tried again.
    """

    folder: Path
    earlier: dict[str, int]  # file name -> mtime in nanoseconds when this run started

    @classmethod
    def at_start(cls, folder: Path) -> "RejectFiles":
        """Note the files that exist when a run starts."""
        return cls(folder, {path.name: path.stat().st_mtime_ns for path in cls.paths(folder)})

    @staticmethod
    def paths(folder: Path) -> list[Path]:
        """Return all files of rejects in a folder."""
        return sorted(folder.glob("rejected-*.json"))

    def of(self, segment: Segment) -> list[RejectEntry]:
        """Return what processes of this run have rejected of a segment."""
        path = self._path(segment)
        if not path.is_file() or self.earlier.get(path.name) == path.stat().st_mtime_ns:
            return []
        return _read_entries(path)

    def by_key(self) -> dict[str, RejectEntry]:
        """Return the rejects of this and earlier runs by key; some of these rows may have been made since."""
        return {entry["key"]: entry for path in self.paths(self.folder) for entry in _read_entries(path)}

    def add(self, segment: Segment, entries: Sequence[RejectEntry]) -> None:
        """Add rejects of a segment to those that another process, which may have died, recorded in this run."""
        write_json(self._path(segment), [*self.of(segment), *entries])

    def _path(self, segment: Segment) -> Path:
        return self.folder / f"rejected-{segment.name}.json"


def _read_entries(path: Path) -> list[RejectEntry]:
    """Read a file of rejects; anything in it that is not a reject is left out."""
    content = read_json(path)
    entries = content if isinstance(content, list) else []
    return [
        {name: entry[name] for name in REJECT_KEYS}
        for entry in entries
        if isinstance(entry, dict) and all(isinstance(entry.get(name), str) for name in REJECT_KEYS)
    ]


@dataclass
class Store:
    """The rows that exist in a folder: part -> key -> location. `refresh` finds the shards that others have added."""

    folder: Path
    locations: dict[str, dict[str, Location]] = field(default_factory=lambda: {part: {} for part in KEY_COLUMNS})
    _read: dict[str, int] = field(default_factory=dict)  # name -> mtime: a damaged shard may be made again

    def refresh(self, prefix: str = "") -> None:
        """Read the keys of shards that are new or changed, and whose names begin with `prefix`."""
        for path in sorted(self.folder.glob(f"{prefix}*.parquet")):
            match = SHARD_NAME.fullmatch(path.name)
            if not match or self._read.get(path.name) == (mtime_ns := path.stat().st_mtime_ns):
                continue
            self._read[path.name] = mtime_ns
            part, column = match[1], KEY_COLUMNS[match[1]]
            try:
                keys = read_columns(path, [column], PARTS[part])[column].to_pylist()
            except TableError as error:
                log.warning("its rows are made again: %s", error)
                continue
            for row, key in enumerate(keys):
                self.locations[part].setdefault(key, (path.name, row))

    def missing(self, segment: Segment) -> list[str]:
        """Return the keys of a segment that no shard has."""
        return [key for key in segment.keys if key not in self.locations[segment.part]]


def quarantine_damaged(folder: Path, verify_all: bool) -> None:
    """Move shards whose bytes have changed, and what is not a file, to the quarantine folder. Call it only while alone.

    Shards are hashed if their size or time differs from the index, or if the index does not list them; with
    `verify_all`, every shard is hashed.
    """
    try:
        table = Table.open(folder)
    except TableError:
        table = None
    listed = {shard["name"]: shard for shards in table.parts.values() for shard in shards} if table else {}
    unused = read_unused(folder)
    for path in sorted(folder.glob("*.parquet")):
        entry = listed.get(path.name)
        if not verify_all and path.name in unused and matches_index(path, unused[path.name]):
            continue
        if entry is None and not SHARD_NAME.fullmatch(path.name):
            continue
        trusted = entry is not None and not verify_all and matches_index(path, entry)
        expected = entry["sha256"][:HASH_DIGITS] if entry else path.stem[-HASH_DIGITS:]
        if not trusted and not (path.is_file() and sha256_file(path).startswith(expected)):
            moved = _quarantine(path)
            log.warning("%s is damaged; moved it to %s, its rows are made again", path.name, moved)
    if table is not None:
        table.update_times()


def _quarantine(path: Path) -> Path:
    """Move a file, or what has its name, to the quarantine folder beside it; return its new path.

    Raises:
        StageError: that folder is a link, or a file.
    """
    folder = path.parent / QUARANTINE
    make_own_folder(folder, "damaged shards")
    remove(folder / path.name)
    return path.rename(folder / path.name)


def read_unused(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the shards that were kept although the table does not list them."""
    kinds: dict[str, Any] = {"since": (int, float), "bytes": int, "mtime_ns": int}
    return {
        name: entry
        for name, entry in read_object(folder / UNUSED).items()
        if isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in kinds.items())
    }
