"""Read the facts and the rows of a table, and check that they are what a stage writes."""

from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pusa.data.reader import Table
from pusa.data.schema import PARTS
from pusa.data.writer import INDEX
from pusa.errors import TableError
from pusa.system.strict import list_problems

# Columns that are read to find out whether a shard can be read; of other parts all.
READ_COLUMNS = {"latents": ("key",), "texts": ("text_key", "text_shape", "dtype", "tokens")}

Count = Annotated[int, Field(ge=0, le=2**31 - 1)]  # what Arrow compares with numbers of a column


class Facts(BaseModel):
    """The facts of an index that are reported; None stands for a fact that is missing."""

    model_config = ConfigDict(frozen=True, strict=True)


class ClipsFacts(Facts):
    """The facts of a clips table."""

    sources: Count
    sources_with_clips: Count
    retimed_sources: Count | None = None
    duplicates: Count | None = None
    near_duplicates: Count | None = None
    near_pairs: list[list[str]] = []
    losses: list[list[str]] = []
    unlisted: Count | None = None
    rule: dict[str, Any] | None = None


class IngestFacts(Facts):
    """The facts that a latents table copies from its clips table."""

    retimed_frames: Count | None = None
    duplicates: Count | None = None
    near_duplicates: Count | None = None


class LatentsFacts(Facts):
    """The facts of a latents table."""

    text_tokens: Count
    text_width: Count
    clips: Count | None = None
    ingest: IngestFacts = IngestFacts()
    dtype: str | None = None
    compression: str | None = None
    stored_space: str | None = None
    made_with: dict[str, str] | None = None
    weights: dict[str, Any] | None = None
    packages: dict[str, str] | None = None
    content: str | None = None


Kind = TypeVar("Kind", bound=Facts)


def read_facts(table: Table, kind: type[Kind]) -> Kind:
    """Return the checked facts of a table.

    Raises:
        TableError: a fact is missing, or has a type that no stage writes.
    """
    try:
        return kind.model_validate(table.facts)
    except ValidationError as error:
        problems = "; ".join(list_problems(error, kind))
        raise TableError(f"{table.folder / INDEX} is damaged: facts.{problems}; run its stage again") from error


def drop_unreadable(table: Table) -> tuple[Table, list[str]]:
    """Return a table without the shards whose columns, except for large arrays, cannot be read; and why, for each."""
    parts: dict[str, list[dict[str, Any]]] = {}
    reasons = []
    for part, entries in table.parts.items():
        parts[part] = []
        for entry in entries:
            try:
                read_part(Table(table.folder, {part: [entry]}, {}), part, READ_COLUMNS.get(part))
                parts[part].append(entry)
            except TableError as error:
                reasons.append(str(error))
    return Table(table.folder, parts, table.facts), reasons


def list_shards(table: Table, part: str) -> list[dict[str, Any]]:
    """Return the entries of a part's shards in the index.

    Raises:
        TableError: the part does not exist.
    """
    if part not in table.parts:
        raise TableError(f"{table.folder} has no {part}; its parts are {', '.join(table.parts) or 'none'}")
    return table.parts[part]


def read_part(table: Table, part: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read columns of a part, by default all.

    Raises:
        TableError: the part is missing, a shard is missing or damaged, or a column is missing or has another type.
    """
    list_shards(table, part)
    try:
        rows = table.read(part, columns)
        types = dict(zip(rows.schema.names, rows.schema.types, strict=True))
    except (pa.ArrowException, UnicodeDecodeError) as error:  # columns differ, or their names are not UTF-8
        raise TableError(f"{table.folder}: {part} cannot be read: {error}; run its stage again") from error
    for name in columns or PARTS[part].names:
        expected = PARTS[part].field(name).type
        if types.get(name) != expected:
            raise TableError(
                f"{table.folder}: column {name} of {part} is {types.get(name, 'missing')}; expected {expected}: "
                "run its stage again"
            )
    return rows
