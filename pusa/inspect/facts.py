"""Read the facts of a table, and check that they are what a stage writes; leave out shards that cannot be read."""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pusa.data.reader import Table
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
    pooled_width: Count | None = None  # of families without pooled text features
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
                Table(table.folder, {part: [entry]}, {}).read(part, READ_COLUMNS.get(part))
                parts[part].append(entry)
            except TableError as error:
                reasons.append(str(error))
    return Table(table.folder, parts, table.facts), reasons
