"""Summarize a latents table in numbers, without importing torch: arrays are counted, not read."""

import re
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pusa.data.reader import Table
from pusa.errors import TableError
from pusa.inspect.facts import LatentsFacts, read_facts
from pusa.inspect.formatting import format_bytes, format_counts, format_hours
from pusa.inspect.summary import Summary, count_reasons, count_values, read_rejects, total_hours
from pusa.system.text import preview, printable

COLUMNS = ("clip_id", "bucket", "fps", "text_key")
FACTS = ("dtype", "compression", "stored_space", "made_with", "weights", "packages", "content")
FRAME_SUFFIX = re.compile(r"@\d+(~\d+)?$")  # of a clip id: the first frame, and a number if the id would be taken
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def summarize_latents(table: Table) -> Summary:
    """Count the content of a latents table.

    Raises:
        TableError: a shard is missing or damaged, or a fact of the index is missing or invalid.
    """
    facts = read_facts(table, LatentsFacts)
    rows, rejects = table.read("rows", COLUMNS), read_rejects(table)
    # Rejects name clips, not sources, so sources are counted by clip ids without the frame at their end.
    ids = [*rows["clip_id"].to_pylist(), *(reject["source"] for reject in rejects)]
    numbers = {
        "table": str(table.folder),
        "kind": "latents",
        "sources": len({FRAME_SUFFIX.sub("", id) for id in ids}),
        "clips": facts.clips,
        "rows": rows.num_rows,
        "rejects": len(rejects),
        "rejects_by_reason": count_reasons(rejects),
        **facts.ingest.model_dump(),
        "hours": round(total_hours(rows), 6),
        "buckets": count_values(rows["bucket"]),
        **_count_bytes(table, facts.text_width, facts.pooled_width or 0),
        **_count_tokens(table, rows, facts.text_tokens),
        **facts.model_dump(include=set(FACTS)),
    }
    return Summary(f"{printable(table.folder)}: latents", numbers, _make_lines(numbers), rejects)


def _count_bytes(table: Table, width: int, pooled: int) -> dict[str, int]:
    """Return the size of all files, and the uncompressed size of the values of latents and texts."""
    texts = table.read("texts", ("text_shape", "dtype"))
    raw_bytes = 0
    for shape, dtype in zip(texts["text_shape"].to_pylist(), texts["dtype"].to_pylist(), strict=True):
        if not shape or shape[0] is None or dtype not in ITEM_BYTES:
            values = f"text_shape {preview(shape)} and dtype {preview(dtype)}"
            raise TableError(f"{table.folder}: a row of texts has {values}; run its stage again")
        raw_bytes += (width * shape[0] + pooled) * ITEM_BYTES[dtype]
    for shard in table.shards("latents"):
        path = table.folder / shard["name"]
        try:  # all arrays of a shard have the same length: that of their column's type
            array_bytes = pq.read_schema(path).field("latent_mean").type.byte_width
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            raise TableError(f"{path} is not a shard of latents: {error}") from error
        raw_bytes += shard["rows"] * 2 * array_bytes
    files = sum(shard["bytes"] for shards in table.parts.values() for shard in shards)
    return {"bytes": files, "raw_bytes": raw_bytes}


def _count_tokens(table: Table, rows: pa.Table, longest: int) -> dict[str, Any]:
    """Return numbers about the tokens of captions that rows have; captions of full length were almost surely cut."""
    texts = table.read("texts", ("text_key", "tokens"))
    tokens = texts.filter(pc.is_in(texts["text_key"], pc.unique(rows["text_key"])))["tokens"]
    return {
        "captions": len(tokens),
        "tokens_mean": round(pc.mean(tokens).as_py() or 0, 1),
        "tokens_max": pc.max(tokens).as_py() or 0,
        "tokens_allowed": longest,
        "captions_cut": pc.sum(pc.equal(tokens, longest)).as_py() or 0,
    }


def _make_lines(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the lines of the summary: pairs of a label and its text."""
    rows, size, raw_size = numbers["rows"], numbers["bytes"], numbers["raw_bytes"]
    on_disk = f"{format_bytes(size)}, {format_bytes(size / max(1, rows))} a row"
    raw = f"; {size / raw_size:.0%} of {format_bytes(raw_size)} raw" if raw_size else ""
    tokens = f"mean {numbers['tokens_mean']}, most {numbers['tokens_max']} of {numbers['tokens_allowed']}"

    def join_pairs(pairs: dict[str, str] | None) -> str:
        texts = (f"{printable(name)} {printable(value, 64)}" for name, value in (pairs or {}).items())
        return ", ".join(texts) or "not recorded"

    return [
        ("rows", f"{rows:,} of {numbers['clips'] or rows:,} clips, {numbers['rejects']:,} rejected"),
        ("sources", f"{numbers['sources']:,}, {format_hours(numbers['hours'])} of video"),
        ("shapes", format_counts(numbers["buckets"])),
        ("on disk", on_disk + raw),
        ("stored as", f"{numbers['dtype']}, compression {numbers['compression']}, space {numbers['stored_space']}"),
        ("captions", f"{numbers['captions']:,}; tokens: {tokens}; {numbers['captions_cut']:,} cut"),
        ("weights", printable((numbers["weights"] or {}).get("weights", "not recorded"))),
        ("made with", join_pairs(numbers["made_with"])),
        ("packages", join_pairs(numbers["packages"])),
    ]
