"""Summarize a clips table in numbers."""

import pyarrow as pa
import pyarrow.compute as pc

from pusa.data.reader import Table
from pusa.inspect.facts import ClipsFacts, read_facts, read_part
from pusa.inspect.formatting import format_counts, format_hours, format_optional_count
from pusa.inspect.summary import Summary, count_reasons, count_values, read_rejects, total_hours
from pusa.system.text import printable

COLUMNS = ("source", "bucket", "fps", "fit", "decoder", "retimed_frames")
SOURCE_COLUMNS = ("source_width", "source_height", "source_fps")


def summarize_clips(table: Table) -> Summary:
    """Count the content of a clips table.

    Raises:
        TableError: a shard is missing or damaged, or a fact of the index is missing or invalid.
    """
    clips, rejects = read_part(table, "clips", (*COLUMNS, *SOURCE_COLUMNS)), read_rejects(table)
    facts = read_facts(table, ClipsFacts)
    sources = clips.group_by("source").aggregate([(name, "max") for name in SOURCE_COLUMNS])
    width, height = (sources[f"source_{side}_max"].cast(pa.string()) for side in ("width", "height"))
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
    sources_used = f"{facts.sources:,}: {facts.sources_with_clips:,} with clips, {len(rejects):,} rejected"
    retimed = f"{numbers['retimed_frames']:,} of {numbers['frames']:,}"
    near_duplicates = format_optional_count(facts.near_duplicates)
    lines = [
        ("sources", sources_used),
        ("clips", f"{clips.num_rows:,}, {format_hours(numbers['hours'])} of video"),
        ("shapes", format_counts(buckets)),
        ("rates", f"{format_counts(numbers['fps'])} frames a second"),
        ("fitted", format_counts(numbers["fit"])),
        ("sources' sizes", format_counts(numbers["source_sizes"])),
        ("sources' rates", f"{format_counts(numbers['source_fps'])} frames a second"),
        ("retimed frames", f"{retimed}, of {format_optional_count(facts.retimed_sources)} sources"),
        ("duplicates", f"{format_optional_count(facts.duplicates)}, near-duplicates {near_duplicates}"),
        ("decoders", format_counts(numbers["decoders"])),
        ("unlisted files", format_optional_count(facts.unlisted)),
    ]
    return Summary(f"{printable(table.folder)}: clips", numbers, lines, rejects)
