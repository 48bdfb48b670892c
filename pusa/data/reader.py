"""Read tables: check the index, then read whole parts. `pusa.data.shard` reads their files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
from pydantic import AfterValidator, Field, ValidationError

from pusa.data.schema import PARTS, VERSION
from pusa.data.shard import HASH_DIGITS, read_columns
from pusa.data.writer import INDEX, save_index
from pusa.errors import TableError
from pusa.system.files import digest, own_digest, read_json, sha256_file
from pusa.system.strict import Strict, list_problems
from pusa.system.text import preview

MAX_LEVELS = 32  # of values in each other, in the facts of an index
MAX_NAMES = 8  # of parts in a message
MAX_COUNT = 2**63 - 1  # what Arrow counts to


def _require_shallow(value: Any, levels: int = MAX_LEVELS) -> Any:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inner:
        if not levels:
            raise ValueError(f"more than {MAX_LEVELS} levels of values in each other")
        _require_shallow(item, levels - 1)
    return value


class Entry(Strict):
    """One shard in an index."""

    name: str = Field(pattern=r"^[\w-]+\.parquet$", max_length=200)
    rows: int = Field(ge=0, le=MAX_COUNT)
    bytes: int = Field(ge=0, le=MAX_COUNT)
    mtime_ns: int
    sha256: str = Field(pattern=r"^[0-9a-f]{32}([0-9a-f]{32})?$")  # of hashed shards the digits in their names
    footer: str | None = None  # the hash of the file's footer; tables of earlier versions lack it


class Index(Strict):
    """The content of an index file."""

    version: int
    parts: dict[str, list[Entry]]
    facts: Annotated[dict[str, Any], AfterValidator(_require_shallow)]
    sha256: str | None = None  # of all the rest; tables of earlier versions lack it


@dataclass(frozen=True)
class Table:
    """A complete table: a folder with an index that lists every shard."""

    folder: Path
    parts: dict[str, list[dict[str, Any]]]
    facts: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, part: str | None = None) -> "Table":
        """Read the index of a table.

        Args:
            folder: the table's folder.
            part: a part that this kind of table must have.

        Raises:
            TableError: there is no index (its stage has not finished), or the index is damaged, has another version,
                or belongs to another kind of table.
        """
        index = read_json(folder / INDEX)
        if index is None and (folder / INDEX).exists():
            raise TableError(f"{folder / INDEX} is damaged: it is not JSON; run its stage again")
        if index is None:
            raise TableError(
                f"{folder} has no {INDEX}: it is not a table, or the stage that writes it has not finished"
            )
        stored_version = index.get("version") if isinstance(index, dict) else None
        if stored_version != VERSION:
            raise TableError(
                f"{folder} has schema version {preview(stored_version)}; this Pusa reads {VERSION}: run its stage again"
            )
        try:
            checked = Index.model_validate(index, strict=True)
        except ValidationError as error:
            raise TableError(
                f"{folder / INDEX} is damaged: {list_problems(error, Index)[0]}; run its stage again"
            ) from error
        if checked.sha256 is not None and checked.sha256 != own_digest(index):
            raise TableError(f"{folder / INDEX} is damaged: its SHA-256 is not that in it; run its stage again")
        if part is not None and part not in checked.parts:
            raise TableError(f"{folder} is a table of {_names(checked.parts)}; expected a table with {part}")
        parts = {name: [entry.model_dump(exclude_none=True) for entry in part] for name, part in checked.parts.items()}
        return cls(folder, parts, checked.facts)

    def fact(self, name: str) -> Any:
        """Return one of the facts in the index.

        Raises:
            TableError: the index does not have it.
        """
        if name not in self.facts:
            raise TableError(f"{self.folder / INDEX} does not have the fact {name}; run its stage again")
        return self.facts[name]

    def shards(self, part: str) -> list[dict[str, Any]]:
        """Return the entries of a part's shards in the index.

        Raises:
            TableError: the table has no such part.
        """
        if part not in self.parts:
            raise TableError(f"{self.folder} is a table of {_names(self.parts)}; expected a table with {part}")
        return self.parts[part]

    def rows(self, part: str) -> int:
        """Return the number of rows of a part.

        Raises:
            TableError: the table has no such part.
        """
        return sum(shard["rows"] for shard in self.shards(part))

    def read(self, part: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Read a whole part into memory, by default all its columns.

        Raises:
            TableError: a shard is missing, damaged, or not the one that the index lists; a column is missing, or has
                other types or missing values.
        """
        entries = self.shards(part)
        if part not in PARTS:
            raise TableError(f"{self.folder}: {preview(part)} is not a part that this Pusa reads")
        names = list(columns or PARTS[part].names)
        tables = [read_columns(self.folder / entry["name"], names, PARTS[part], entry) for entry in entries]
        if len({table.schema for table in tables}) > 1:
            raise TableError(f"{self.folder}: {part} have several sizes; read a shard at a time")
        return pa.concat_tables(tables) if tables else PARTS[part].empty_table().select(names)

    @property
    def fingerprint(self) -> str:
        """Identify the content: by the fact `content`, else by the hash of the shards' hashes."""
        shards = {part: [shard["sha256"] for shard in shards] for part, shards in self.parts.items()}
        content = self.facts.get("content")
        return content if isinstance(content, str) and content else digest(shards)[:16]

    def is_intact(self) -> bool:
        """Return whether every shard is as it was written; large ones are hashed if size or time have changed."""
        shards = [(self.folder / shard["name"], shard) for part in self.parts.values() for shard in part]
        return all(
            (len(shard["sha256"]) == HASH_DIGITS and matches_index(path, shard)) or _has_hash(path, shard)
            for path, shard in shards
        )

    def update_times(self) -> None:
        """Store the present times of shards that were found intact in the index: copied files have new times."""
        parts: dict[str, list[dict[str, Any]]] = {}
        for part, shards in self.parts.items():
            paths = [self.folder / shard["name"] for shard in shards]
            parts[part] = [
                {**shard, "mtime_ns": path.stat().st_mtime_ns} if path.is_file() else shard
                for path, shard in zip(paths, shards, strict=True)
            ]
        if parts != self.parts:
            save_index(self.folder, parts, self.facts)


def _names(parts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name:.40}" for name in islice(parts, MAX_NAMES))


def matches_index(path: Path, entry: Mapping[str, Any]) -> bool:
    """Return whether a shard has the size and the time that are in the index."""
    if not path.is_file():
        return False
    stat = path.stat()
    return stat.st_size == entry["bytes"] and stat.st_mtime_ns == entry["mtime_ns"]


def _has_hash(path: Path, entry: Mapping[str, Any]) -> bool:
    """Return whether a shard has the hash in the index, which for hashed shards holds only its first digits."""
    return path.is_file() and sha256_file(path).startswith(entry["sha256"])
