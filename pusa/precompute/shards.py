"""Which rows a folder has already, in which shards; damaged shards are put aside."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pusa.data.reader import Table, is_as_written
from pusa.data.writer import STAMP
from pusa.errors import TableError
from pusa.precompute.rows import Piece
from pusa.system.files import read_json, sha256_file, write_json

log = logging.getLogger(__name__)

Item = dict[str, str]  # key, reason, detail


@dataclass(frozen=True)
class Refusals:
    """The rejects of a folder. Those that were there before this run count for nothing: they are tried again."""

    folder: Path
    earlier: dict[str, int]  # file name -> time

    @classmethod
    def before(cls, folder: Path) -> "Refusals":
        """As they are when a run begins."""
        return cls(folder, {path.name: path.stat().st_mtime_ns for path in cls.files(folder)})

    @staticmethod
    def files(folder: Path) -> list[Path]:
        """All of them."""
        return sorted(folder.glob("rejected-*.json"))

    def of(self, piece: Piece) -> list[Item]:
        """What processes of this run found wanting of a piece."""
        path = self._path(piece)
        if not path.is_file() or self.earlier.get(path.name) == path.stat().st_mtime_ns:
            return []
        return _items(path)

    def all(self) -> dict[str, Item]:
        """By key, those of earlier runs too: what was made since is no matter to who asks."""
        return {item["key"]: item for path in self.files(self.folder) for item in _items(path)}

    def write(self, piece: Piece, items: Sequence[Item]) -> None:
        """Say what more of a piece cannot be made: who found the first of it may have died since."""
        write_json(self._path(piece), [*self.of(piece), *items])

    def _path(self, piece: Piece) -> Path:
        return self.folder / f"rejected-{piece.name}.json"


def _items(path: Path) -> list[Item]:
    """What a file says; nothing where it was not written by this."""
    found = read_json(path)
    items = found if isinstance(found, list) else []
    return [item for item in items if isinstance(item, dict) and item.keys() >= {"key", "reason", "detail"}]


KEY_COLUMNS = {"latents": "key", "texts": "text_key"}
QUARANTINE = "quarantine"
UNUSED = "unused.json"  # shards that no table names now: name -> since when, and their size and time
SHARD_NAME = re.compile(r"(latents|texts)-[0-9a-f]{12}-[0-9a-f]{32}\.parquet")
Place = tuple[str, int]  # a shard's name, and a row of it


@dataclass
class Store:
    """The rows that are there: part -> key -> place. Others may add shards at any time; `look` sees them."""

    folder: Path
    places: dict[str, dict[str, Place]] = field(default_factory=lambda: {part: {} for part in KEY_COLUMNS})
    _seen: dict[str, int] = field(default_factory=dict)  # name -> time: a damaged one may be made again

    def look(self, prefix: str = "") -> None:
        """Take in the shards that have come since, of one piece or of all."""
        for path in sorted(self.folder.glob(f"{prefix}*.parquet")):
            match = SHARD_NAME.fullmatch(path.name)
            if match and self._seen.get(path.name) != (time := path.stat().st_mtime_ns):
                self._seen[path.name] = time
                self._take(path, match[1])

    def missing(self, piece: Piece) -> list[str]:
        """The keys of a piece that no shard has."""
        return [key for key in piece.keys if key not in self.places[piece.part]]

    def _take(self, path: Path, part: str) -> None:
        try:
            column = pq.read_table(path, columns=[KEY_COLUMNS[part]], page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            log.warning("%s cannot be read, so its rows are made again: %s", path, error)
            return
        for row, key in enumerate(column[KEY_COLUMNS[part]].to_pylist()):
            self.places[part].setdefault(key, (path.name, row))


def quarantine_damaged(folder: Path, everything: bool) -> None:
    """Put shards aside whose bytes are not those that were written. Only for who is alone.

    Hashed are those that the index does not know, or knows with another size or time; or all of them.
    """
    table = _table(folder)
    known = {shard["name"]: shard for shards in table.parts.values() for shard in shards} if table else {}
    unused = unused_in(folder)
    for path in sorted(folder.glob("*.parquet")):
        entry = known.get(path.name)
        if not everything and path.name in unused and is_as_written(path, unused[path.name]):
            continue
        if entry is None and not SHARD_NAME.fullmatch(path.name):
            continue
        trusted = entry is not None and not everything and is_as_written(path, entry)
        if not trusted and sha256_file(path)[:STAMP] != (entry["sha256"][:STAMP] if entry else path.stem[-STAMP:]):
            (folder / QUARANTINE).mkdir(exist_ok=True)
            moved = path.rename(folder / QUARANTINE / path.name)
            log.warning("%s is damaged: put aside as %s, what was in it is made again", path.name, moved)
    if table is not None:
        table.restamp()


def unused_in(folder: Path) -> dict[str, dict[str, Any]]:
    """The shards that were kept although no table names them."""
    found = read_json(folder / UNUSED)
    entries = found.items() if isinstance(found, dict) else ()
    whole = {"since", "bytes", "mtime_ns"}
    return {name: entry for name, entry in entries if isinstance(entry, dict) and entry.keys() >= whole}


def size_and_time(path: Path) -> dict[str, int]:
    """A shard's size and time, as an index has them."""
    stat = path.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _table(folder: Path) -> Table | None:
    try:
        return Table.open(folder)
    except TableError:
        return None
