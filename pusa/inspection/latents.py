"""A latents table in numbers. No torch here: arrays are counted, not read."""

import re
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pusa.data.reader import Table
from pusa.errors import TableError
from pusa.inspection.summary import Reject, Summary, by_reason, hours, rejects_of, tally
from pusa.inspection.words import counted, lasting, plain, size

COLUMNS = ("clip_id", "bucket", "fps", "text_key")
FROM_INGEST = ("retimed_frames", "duplicates", "near_duplicates")  # null where the table does not carry them
_FRAME = re.compile(r"@\d+(~\d+)?$")
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def summarize_latents(table: Table) -> Summary:
    """Count what a latents table holds.

    Raises:
        TableError: a shard is missing or damaged.
    """
    rows, rejects = table.read("rows", COLUMNS), rejects_of(table)
    numbers = {
        "table": str(table.folder),
        "kind": "latents",
        "sources": len(_sources(rows, rejects)),
        "clips": table.facts.get("clips"),
        "rows": rows.num_rows,
        "rejects": len(rejects),
        "rejects_by_reason": by_reason(rejects),
        **{name: table.facts.get("ingest", {}).get(name) for name in FROM_INGEST},
        "hours": round(hours(rows), 6),
        "buckets": tally(rows["bucket"]),
        **_bytes(table),
        **_tokens(table, rows),
        **_making(table),
    }
    return Summary(f"{plain(table.folder)}: latents", numbers, _lines(numbers), rejects)


def _sources(rows: pa.Table, rejects: list[Reject]) -> set[str]:
    """Rejects name the clip, so clips' names stand for sources: without the frame that follows them."""
    ids = [*rows["clip_id"].to_pylist(), *(reject["source"] for reject in rejects)]
    return {_FRAME.sub("", id) for id in ids}


def _bytes(table: Table) -> dict[str, int]:
    """Of all files, and what the latents' and the texts' values alone would take uncompressed."""
    texts = table.read("texts", ("text_shape", "dtype"))
    lengths, dtypes = pc.list_element(texts["text_shape"], 0).to_pylist(), texts["dtype"].to_pylist()
    values = sum(length * ITEM_BYTES[dtype] for length, dtype in zip(lengths, dtypes, strict=True))
    latents = sum(shard["rows"] * 2 * _array_bytes(table, shard) for shard in table.parts["latents"])
    return {
        "bytes": sum(shard["bytes"] for shards in table.parts.values() for shard in shards),
        "raw_bytes": latents + values * table.facts["text_width"],
    }


def _array_bytes(table: Table, shard: dict[str, Any]) -> int:
    """Of one array: all in a shard have the same length, which is their column's type."""
    path = table.folder / shard["name"]
    try:
        return pq.read_schema(path).field("latent_mean").type.byte_width
    except (OSError, pa.ArrowInvalid) as error:
        raise TableError(f"{path} cannot be read: {error}") from error


def _tokens(table: Table, rows: pa.Table) -> dict[str, Any]:
    """Of the captions that rows have; one that fills all there is room for was cut, as good as surely."""
    texts = table.read("texts", ("text_key", "tokens"))
    tokens = texts.filter(pc.is_in(texts["text_key"], pc.unique(rows["text_key"])))["tokens"]
    most = table.facts["text_tokens"]
    return {
        "captions": len(tokens),
        "tokens_mean": round(pc.mean(tokens).as_py() or 0, 1),
        "tokens_max": pc.max(tokens).as_py() or 0,
        "tokens_allowed": most,
        "captions_cut": pc.sum(pc.equal(tokens, most)).as_py() or 0,
    }


def _making(table: Table) -> dict[str, Any]:
    facts = table.facts
    names = ("dtype", "compression", "stored_space", "made_with", "weights", "packages", "content")
    return {name: facts.get(name) for name in names}


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
        ("weights", plain((numbers["weights"] or {}).get("weights", "not recorded"))),
        ("made with", _pairs(numbers["made_with"])),
        ("packages", _pairs(numbers["packages"])),
    ]


def _pairs(named: dict[str, str] | None) -> str:
    return ", ".join(f"{plain(name)} {plain(value, 64)}" for name, value in (named or {}).items()) or "not recorded"
