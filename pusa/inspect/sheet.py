"""The contact sheet: how clips were cut from their sources, what latents decode to, and all that was rejected."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from PIL import Image

from pusa.data.reader import Table
from pusa.errors import Rejected
from pusa.inspect.facts import read_part
from pusa.inspect.page import LONGEST, Html, cards, heading, pairs, paragraph, section, strip, table
from pusa.inspect.pictures import as_cut, read_source
from pusa.inspect.summary import Reject, Summary, between, decibels, spread
from pusa.system.progress import track

if TYPE_CHECKING:
    from pusa.inspect.decode import Decoded

MOST_REJECTS = 1000
Clip = Mapping[str, Any]


def clips_sheet(rows: Table, part: str, limit: int) -> Html:
    """Of up to `limit` rows, evenly spread, the first, middle and last frame of the source, with the cut in it."""
    count = rows.rows(part)
    chosen = read_part(rows, part).take(pa.array(spread(count, limit), pa.int64())).to_pylist()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pictures = list(track(pool.map(_pictures, chosen), "pictures", len(chosen)))
    title = f"Clips: {len(chosen):,} of {count:,}" + ", evenly spread" * (len(chosen) < count)
    legend = paragraph(
        "First, middle and last frame of each clip, as its source shows them. What was cut away is dark, what is kept "
        "is outlined; bars within the outline were added.",
        quiet=True,
    )
    return section(title, legend, cards(map(_clip, chosen, pictures)))


def decoded_sheet(decoded: Sequence["Decoded"], count: int) -> Html:
    """Of each row a strip of what it decodes to, and below it one of its source."""
    legend = paragraph("Above what the latents decode to, below the frames they were made from.", quiet=True)
    return section(f"Decoded: {len(decoded):,} of {count:,} rows", legend, cards(map(_row, decoded), wide=True))


def endings(summary: Summary) -> list[Html]:
    """The rejects, and the sources that look alike, where there are any."""
    parts = [_rejects(summary.rejects)] if summary.rejects else []
    if near := summary.numbers.get("near_pairs"):
        title = f"Sources that look alike: {len(near):,} of {summary.numbers['near_duplicates']:,}"
        parts.append(section(title, table(("source", "looks like"), near)))
    return parts


def _rejects(rejects: Sequence[Reject]) -> Html:
    some = rejects[:MOST_REJECTS]
    title = f"Rejected: {len(rejects):,}" + f", of which the first {len(some):,}" * (len(some) < len(rejects))
    rows = ((reject["reason"], reject["detail"], reject["source"]) for reject in some)
    return section(title, table(("reason", "what is wrong", "source"), rows))


def _pictures(clip: Clip) -> list[Image.Image] | str:
    """Three pictures, or why there are none."""
    frames = clip["frames"]
    chosen = [frames[place] for place in spread(len(frames), 3)]
    try:
        return [as_cut(frame, clip) for frame in read_source(clip, chosen)]
    except Rejected as reject:
        return reject.detail


def _clip(clip: Clip, pictures: list[Image.Image] | str) -> Html:
    shown = paragraph(f"no picture: {pictures}", bad=True) if isinstance(pictures, str) else strip(pictures)
    caption = paragraph(clip["caption"] or "(empty caption)", longest=LONGEST)
    return Html(heading(clip["clip_id"]) + shown + caption + pairs(_told(clip)))


def _told(clip: Clip) -> list[tuple[str, str]]:
    frames = clip["frames"]
    source = f"{clip['source_width']}x{clip['source_height']}, " if "source_width" in clip else ""
    count = f" of {clip['source_frames']}" if "source_frames" in clip else ""
    retimed = f", {clip['retimed_frames']} frames retimed" if "retimed_frames" in clip else ""
    aspect = f", pixels {clip['pixel_aspect']:.4g}:1" if clip["pixel_aspect"] != 1 else ""
    rates = f"{clip['source_fps']:.5g} -> {clip['fps']:.5g} frames a second{retimed}"
    return [
        ("kept", f"{source}{clip['fit']} -> {clip['width']}x{clip['height']}{aspect}"),
        ("frames", f"{len(frames)}, the source's {min(frames, default=0)}..{max(frames, default=0)}{count}; {rates}"),
        ("caption from", clip["caption_from"]),
        ("file", clip["source"]),
        ("decoder", clip["decoder"]),
    ]


def _row(row: "Decoded") -> Html:
    ranges = row.ranges
    numbers = [
        ("PSNR", f"{decibels(row.psnr)}, worst frame {decibels(row.worst_frame_psnr)}"),
        ("mean", f"{between(ranges.mean_min, ranges.mean_max)} normalised, std {ranges.told_std}"),
        ("logvar", between(ranges.logvar_min, ranges.logvar_max)),
    ]
    problems = [paragraph(problem, bad=True) for problem in (*ranges.flags, row.note) if problem]
    strips = [strip([image]) for image in row.strips]
    caption = paragraph(row.caption or "(empty caption)", longest=LONGEST)
    return Html("".join([heading(row.clip_id), *strips, *problems, caption, pairs(numbers)]))
