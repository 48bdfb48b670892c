"""Summarize a clips table in numbers."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pusa.data.reader import Table
from pusa.ingest.kinds import describe_kinds
from pusa.inspect.facts import ClipsFacts, read_facts
from pusa.inspect.formatting import format_counts, format_hours, format_optional_count
from pusa.inspect.summary import Summary, count_reasons, count_values, read_rejects, total_hours
from pusa.system.text import printable

COLUMNS = ("source", "bucket", "fps", "fit", "decoder", "retimed_frames", "kinds")
COLOURS = ("matrix", "primaries", "transfer", "range")
SOURCE_COLUMNS = ("source_width", "source_height", "source_fps", "field_order", *COLOURS)


def summarize_clips(table: Table) -> Summary:
    """Count the content of a clips table.

    Raises:
        TableError: a shard is missing or damaged, or a fact of the index is missing or invalid.
    """
    clips, rejects = table.read("clips", (*COLUMNS, *SOURCE_COLUMNS)), read_rejects(table)
    facts = read_facts(table, ClipsFacts)
    sources = clips.group_by("source").aggregate([(name, "max") for name in SOURCE_COLUMNS])
    width, height = (sources[f"source_{side}_max"].cast(pa.string()) for side in ("width", "height"))
    colours = pc.binary_join_element_wise(*(sources[f"{name}_max"] for name in COLOURS), " ")
    kinds_of = dict(zip(clips["source"].to_pylist(), clips["kinds"].to_pylist(), strict=True))
    kinds = Counter(kind for kinds in kinds_of.values() for kind in kinds)
    buckets = count_values(clips["bucket"])
    numbers = {
        "table": str(table.folder),
        "kind": "clips",
        "sources": facts.sources,
        "sources_with_clips": facts.sources_with_clips,
        "clips": clips.num_rows,
        "hours": round(total_hours(clips), 6),
        "buckets": buckets,
        "fps": count_values(clips["fps"]),
        "fit": count_values(clips["fit"]),
        "source_sizes": count_values(pc.binary_join_element_wise(width, height, "x")),
        "source_fps": count_values(sources["source_fps_max"]),
        "source_colours": count_values(colours),
        "source_field_orders": count_values(sources["field_order_max"]),
        "kinds": dict(kinds),
        "losses": facts.losses,
        "frames": sum(int(name.rpartition("x")[2]) * count for name, count in buckets.items()),
        "retimed_frames": pc.sum(clips["retimed_frames"]).as_py() or 0,
        "retimed_sources": facts.retimed_sources,
        "duplicates": facts.duplicates,
        "near_duplicates": facts.near_duplicates,
        "near_pairs": facts.near_pairs,
        "unlisted": facts.unlisted,
        "decoders": count_values(clips["decoder"]),
        "rule": facts.rule,
        "rejects": len(rejects),
        "rejects_by_reason": count_reasons(rejects),
    }
    return Summary(f"{printable(table.folder)}: clips", numbers, _lines(numbers, kinds), rejects)


def _lines(numbers: Mapping[str, Any], kinds: Mapping[str, int]) -> list[tuple[str, str]]:
    used = f"{numbers['sources_with_clips']:,} with clips, {numbers['rejects']:,} rejected"
    retimed_sources, near = (format_optional_count(numbers[name]) for name in ("retimed_sources", "near_duplicates"))
    return [
        ("sources", f"{numbers['sources']:,}: {used}"),
        ("clips", f"{numbers['clips']:,}, {format_hours(numbers['hours'])} of video"),
        ("shapes", format_counts(numbers["buckets"])),
        ("rates", f"{format_counts(numbers['fps'])} frames a second"),
        ("fitted", format_counts(numbers["fit"])),
        ("sources' sizes", format_counts(numbers["source_sizes"])),
        ("sources' rates", f"{format_counts(numbers['source_fps'])} frames a second"),
        ("sources' colours", format_counts(numbers["source_colours"])),
        ("sources' fields", format_counts(numbers["source_field_orders"])),
        *describe_kinds(kinds).items(),
        ("retimed frames", f"{numbers['retimed_frames']:,} of {numbers['frames']:,}, of {retimed_sources} sources"),
        ("duplicates", f"{format_optional_count(numbers['duplicates'])}, near-duplicates {near}"),
        ("decoders", format_counts(numbers["decoders"])),
        ("unlisted files", format_optional_count(numbers["unlisted"])),
    ]
