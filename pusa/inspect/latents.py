"""A latents table in numbers. No torch here: arrays are counted, not read."""

import re
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pusa.data.reader import Table
from pusa.errors import TableError
from pusa.inspect.facts import LatentsFacts, facts_of, read_part, shards_of
from pusa.inspect.summary import Reject, Summary, by_reason, counted, hours, lasting, rejects_of, size, tally
from pusa.system.text import printable

COLUMNS = ("clip_id", "bucket", "fps", "text_key")
MAKING = ("dtype", "compression", "stored_space", "made_with", "weights", "packages", "content")
_FRAME = re.compile(r"@\d+(~\d+)?$")
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def summarize_latents(table: Table) -> Summary:
    """Count what a latents table holds.

    Raises:
        TableError: a shard is missing or damaged, or the table does not say what it is to say.
    """
    facts = facts_of(table, LatentsFacts)
    rows, rejects = read_part(table, "rows", COLUMNS), rejects_of(table)
    numbers = {
        "table": str(table.folder),
        "kind": "latents",
        "sources": len(_sources(rows, rejects)),
        "clips": facts.clips,
        "rows": rows.num_rows,
        "rejects": len(rejects),
        "rejects_by_reason": by_reason(rejects),
        **facts.ingest.model_dump(),
        "hours": round(hours(rows), 6),
        "buckets": tally(rows["bucket"]),
        **_bytes(table, facts.text_width),
        **_tokens(table, rows, facts.text_tokens),
        **facts.model_dump(include=set(MAKING)),
    }
    return Summary(f"{printable(table.folder)}: latents", numbers, _lines(numbers), rejects)


def _sources(rows: pa.Table, rejects: list[Reject]) -> set[str]:
    """Rejects name the clip, so clips' names stand for sources: without the frame that follows them."""
    ids = [*rows["clip_id"].to_pylist(), *(reject["source"] for reject in rejects)]
    return {_FRAME.sub("", id) for id in ids}


def _bytes(table: Table, width: int) -> dict[str, int]:
    """Of all files, and what the latents' and the texts' values alone would take uncompressed."""
    texts = read_part(table, "texts", ("text_shape", "dtype"))
    lengths, dtypes = pc.list_element(texts["text_shape"], 0).to_pylist(), texts["dtype"].to_pylist()
    values = sum(length * ITEM_BYTES[dtype] for length, dtype in zip(lengths, dtypes, strict=True))
    latents = sum(shard["rows"] * 2 * _array_bytes(table, shard) for shard in shards_of(table, "latents"))
    return {
        "bytes": sum(shard["bytes"] for shards in table.parts.values() for shard in shards),
        "raw_bytes": latents + values * width,
    }


def _array_bytes(table: Table, shard: dict[str, Any]) -> int:
    """Of one array: all in a shard have the same length, which is their column's type."""
    path = table.folder / shard["name"]
    try:
        return pq.read_schema(path).field("latent_mean").type.byte_width
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:  # no such column, or of another type
        raise TableError(f"{path} is no shard of latents: {error}") from error


def _tokens(table: Table, rows: pa.Table, most: int) -> dict[str, Any]:
    """Of the captions that rows have; one that fills all there is room for was cut, as good as surely."""
    texts = read_part(table, "texts", ("text_key", "tokens"))
    tokens = texts.filter(pc.is_in(texts["text_key"], pc.unique(rows["text_key"])))["tokens"]
    return {
        "captions": len(tokens),
        "tokens_mean": round(pc.mean(tokens).as_py() or 0, 1),
        "tokens_max": pc.max(tokens).as_py() or 0,
        "tokens_allowed": most,
        "captions_cut": pc.sum(pc.equal(tokens, most)).as_py() or 0,
    }


def _lines(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    rows, taken, raw = numbers["rows"], numbers["bytes"], numbers["raw_bytes"]
    tokens = f"mean {numbers['tokens_mean']}, most {numbers['tokens_max']} of {numbers['tokens_allowed']}"
    return [
        ("rows", f"{rows:,} of {numbers['clips'] or rows:,} clips, {numbers['rejects']:,} rejected"),
        ("sources", f"{numbers['sources']:,}, {lasting(numbers['hours'])} of video"),
        ("shapes", counted(numbers["buckets"])),
        ("on disk", f"{size(taken)}, {size(taken / max(1, rows))} a row; {taken / max(1, raw):.0%} of {size(raw)} raw"),
        ("stored as", f"{numbers['dtype']}, compression {numbers['compression']}, space {numbers['stored_space']}"),
        ("captions", f"{numbers['captions']:,}; tokens: {tokens}; {numbers['captions_cut']:,} cut"),
        ("weights", printable((numbers["weights"] or {}).get("weights", "not recorded"))),
        ("made with", _pairs(numbers["made_with"])),
        ("packages", _pairs(numbers["packages"])),
    ]


def _pairs(named: dict[str, str] | None) -> str:
    return (
        ", ".join(f"{printable(name)} {printable(value, 64)}" for name, value in (named or {}).items())
        or "not recorded"
    )
