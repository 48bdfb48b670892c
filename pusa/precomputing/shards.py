"""Which rows a folder has already, in which shards; damaged shards are put aside."""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pusa.data.writer import INDEX, is_sound
from pusa.files import read_json
from pusa.precomputing.plan import Piece

log = logging.getLogger(__name__)
KEY_COLUMNS = {"latents": "key", "texts": "text_key"}
QUARANTINE = "quarantine"
_NAME = re.compile(r"(latents|texts)-[0-9a-f]{12}-[0-9a-f]{32}\.parquet")
Place = tuple[str, int]  # a shard's name, and a row of it


@dataclass
class Store:
    """The rows that are there: part -> key -> place. Others may add shards at any time; `look` sees them."""

    folder: Path
    places: dict[str, dict[str, Place]] = field(default_factory=lambda: {part: {} for part in KEY_COLUMNS})
    _seen: set[str] = field(default_factory=set)

    def look(self, prefix: str = "") -> None:
        """Take in the shards that have come since, of one piece or of all."""
        for path in sorted(self.folder.glob(f"{prefix}*.parquet")):
            if path.name not in self._seen and (match := _NAME.fullmatch(path.name)):
                self._seen.add(path.name)
                self._take(path, match[1])

    def missing(self, piece: Piece) -> list[str]:
        """The keys of a piece that no shard has."""
        return [key for key in piece.keys if key not in self.places[piece.part]]

    def without(self, wanted: Mapping[str, Iterable[str]]) -> list[Path]:
        """The shards that hold no wanted row."""
        used = {self.places[part][key][0] for part, keys in wanted.items() for key in keys if key in self.places[part]}
        return [self.folder / name for name in sorted(self._seen - used)]

    def _take(self, path: Path, part: str) -> None:
        try:
            column = pq.read_table(path, columns=[KEY_COLUMNS[part]], page_checksum_verification=True)
        except (OSError, pa.ArrowInvalid) as error:
            log.warning("%s cannot be read, so its rows are made again: %s", path, error)
            return
        for row, key in enumerate(column[KEY_COLUMNS[part]].to_pylist()):
            self.places[part].setdefault(key, (path.name, row))


def quarantine_damaged(folder: Path, everything: bool) -> list[Path]:
    """Put shards aside whose bytes are not what their names say; gives where they are now.

    Hashed again are those that the index does not know, or knows with another size or time; or all of them.
    """
    known = _known(folder)
    moved = []
    for path in sorted(folder.glob("*.parquet")):
        if not _NAME.fullmatch(path.name) or (not everything and known.get(path.name) == _stat(path)):
            continue
        if not is_sound(path):
            (folder / QUARANTINE).mkdir(exist_ok=True)
            moved.append(path.rename(folder / QUARANTINE / path.name))
            log.warning("%s is damaged: put aside as %s, its rows are made again", path.name, moved[-1])
    return moved


def _known(folder: Path) -> dict[str, Any]:
    index = read_json(folder / INDEX)
    parts = index.get("parts", {}) if isinstance(index, dict) else {}
    return {s["name"]: [s["bytes"], s.get("mtime_ns")] for shards in parts.values() for s in shards}


def _stat(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]
