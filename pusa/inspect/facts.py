"""What a table says of itself, and its rows, as they are to be: or the sentence that says what is wrong."""

from collections.abc import Sequence
from typing import Any, TypeVar

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from pusa.data.reader import Table
from pusa.data.schema import CLIPS, REJECTS, ROWS, TEXTS
from pusa.data.writer import INDEX
from pusa.errors import TableError
from pusa.system.strict import list_problems

SCHEMAS = {"clips": CLIPS, "rows": ROWS, "texts": TEXTS, "rejects": REJECTS}


class Facts(BaseModel):
    """Of what a table says, that which is told of it; None where it does not say."""

    model_config = ConfigDict(frozen=True, strict=True)


class ClipsFacts(Facts):
    """Of a clips table."""

    sources: int
    sources_with_clips: int
    retimed_sources: int | None = None
    duplicates: int | None = None
    near_duplicates: int | None = None
    near_pairs: list[list[str]] = []
    unlisted: int | None = None
    rule: dict[str, Any] | None = None


class FromIngest(Facts):
    """What a latents table hands on from its clips."""

    retimed_frames: int | None = None
    duplicates: int | None = None
    near_duplicates: int | None = None


class LatentsFacts(Facts):
    """Of a latents table."""

    text_tokens: int
    text_width: int
    clips: int | None = None
    ingest: FromIngest = FromIngest()
    dtype: str | None = None
    compression: str | None = None
    stored_space: str | None = None
    made_with: dict[str, str] | None = None
    weights: dict[str, Any] | None = None
    packages: dict[str, str] | None = None
    content: str | None = None


Kind = TypeVar("Kind", bound=Facts)


def facts_of(table: Table, kind: type[Kind]) -> Kind:
    """What a table says of itself.

    Raises:
        TableError: something is missing, or not what a stage writes.
    """
    try:
        return kind.model_validate(table.facts)
    except ValidationError as error:
        wrong = "; ".join(list_problems(error, kind))
        raise TableError(f"{table.folder / INDEX} is damaged: facts.{wrong}; run its stage again") from error


def shards_of(table: Table, part: str) -> list[dict[str, Any]]:
    """What the index says of a part's shards.

    Raises:
        TableError: there is none.
    """
    if not table.parts.get(part):
        raise TableError(f"{table.folder} has no {part}; its parts are {', '.join(table.parts) or 'none'}")
    return table.parts[part]


def read_part(table: Table, part: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Columns of a part, all of them by default.

    Raises:
        TableError: a shard is missing or damaged, or the part or a column is missing or of another type.
    """
    shards_of(table, part)
    try:
        rows = table.read(part, columns)
        found = dict(zip(rows.schema.names, rows.schema.types, strict=True))
    except (pa.ArrowException, UnicodeDecodeError) as error:  # shards differ, or their columns have no names
        raise TableError(f"{table.folder}: {part} cannot be read: {error}; run its stage again") from error
    for name in columns or SCHEMAS[part].names:
        wanted = SCHEMAS[part].field(name).type
        if found.get(name) != wanted:
            raise TableError(
                f"{table.folder}: column {name} of {part} is {found.get(name, 'not there')}; wanted is {wanted}: "
                "run its stage again"
            )
    return rows
