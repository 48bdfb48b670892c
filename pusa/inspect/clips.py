"""A clips table in numbers."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pusa.data.reader import Table
from pusa.inspect.facts import ClipsFacts, facts_of, read_part
from pusa.inspect.summary import Summary, by_reason, counted, hours, lasting, rejects_of, tally
from pusa.system.text import printable

COLUMNS = ("source", "bucket", "fps", "fit", "decoder", "retimed_frames")
OF_SOURCES = ("source_width", "source_height", "source_fps")


def summarize_clips(table: Table) -> Summary:
    """Count what a clips table holds.

    Raises:
        TableError: a shard is missing or damaged, or the table does not say what it is to say.
    """
    clips, rejects = read_part(table, "clips", (*COLUMNS, *OF_SOURCES)), rejects_of(table)
    numbers = _numbers(table, clips) | {"rejects": len(rejects), "rejects_by_reason": by_reason(rejects)}
    title = f"{printable(table.folder)}: clips"
    return Summary(title, numbers, _lines(numbers), rejects)


def _numbers(table: Table, clips: pa.Table) -> dict[str, Any]:
    facts = facts_of(table, ClipsFacts)
    sources = clips.group_by("source").aggregate([(name, "max") for name in OF_SOURCES])
    return {
        "table": str(table.folder),
        "kind": "clips",
        "sources": facts.sources,
        "sources_with_clips": facts.sources_with_clips,
        "clips": clips.num_rows,
        "hours": round(hours(clips), 6),
        "buckets": tally(clips["bucket"]),
        "fps": tally(clips["fps"]),
        "fit": tally(clips["fit"]),
        "source_sizes": _sizes(sources),
        "source_fps": tally(sources["source_fps_max"]),
        "frames": _frames(clips),
        "retimed_frames": pc.sum(clips["retimed_frames"]).as_py() or 0,
        "retimed_sources": facts.retimed_sources,
        "duplicates": facts.duplicates,
        "near_duplicates": facts.near_duplicates,
        "near_pairs": facts.near_pairs,
        "unlisted": facts.unlisted,
        "decoders": tally(clips["decoder"]),
        "rule": facts.rule,
    }


def _sizes(sources: pa.Table) -> dict[str, int]:
    width, height = (sources[f"source_{side}_max"].cast(pa.string()) for side in ("width", "height"))
    return tally(pc.binary_join_element_wise(width, height, "x"))


def _frames(clips: pa.Table) -> int:
    return sum(int(name.rpartition("x")[2]) * count for name, count in tally(clips["bucket"]).items())


def _lines(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    retimed, frames = numbers["retimed_frames"], numbers["frames"]
    sources, used = numbers["sources"], numbers["sources_with_clips"]
    return [
        ("sources", f"{sources:,}: {used:,} with clips, {numbers['rejects']:,} rejected"),
        ("clips", f"{numbers['clips']:,}, {lasting(numbers['hours'])} of video"),
        ("shapes", counted(numbers["buckets"])),
        ("rates", f"{counted(numbers['fps'])} frames a second"),
        ("fitted", counted(numbers["fit"])),
        ("sources' sizes", counted(numbers["source_sizes"])),
        ("sources' rates", f"{counted(numbers['source_fps'])} frames a second"),
        ("retimed frames", f"{retimed:,} of {frames:,}, of {_known(numbers['retimed_sources'])} sources"),
        ("duplicates", f"{_known(numbers['duplicates'])}, near-duplicates {_known(numbers['near_duplicates'])}"),
        ("decoders", counted(numbers["decoders"])),
        ("unlisted files", _known(numbers["unlisted"])),
    ]


def _known(value: int | None) -> str:
    return "not recorded" if value is None else f"{value:,}"
