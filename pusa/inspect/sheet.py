"""Make the contact sheet: how clips were cut from their sources, the frames that latents decode to, and the rejects."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pyarrow as pa
from PIL import Image

from pusa.data.reader import Table
from pusa.errors import Rejected
from pusa.inspect.formatting import format_decibels, format_number, format_range
from pusa.inspect.page import LONGEST, Html, cards, heading, pairs, paragraph, section, strip, table
from pusa.inspect.pictures import draw_cut, read_source, spread_indices
from pusa.inspect.summary import Summary
from pusa.precompute.frames import ClipRow
from pusa.system.progress import track
from pusa.video.conversion import NONE

if TYPE_CHECKING:
    from pusa.inspect.decode import DecodedRow

MAX_ROWS = 1000  # of a table


def clips_section(rows: Table, part: str, limit: int) -> Html:
    """Show up to `limit` evenly spread rows: the first, middle and last frame of their sources, with the cut."""
    count = rows.rows(part)
    clips = rows.read(part).take(pa.array(spread_indices(count, limit), pa.int64())).to_pylist()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pictures = list(track(pool.map(_draw_clip, clips), "pictures", len(clips)))
    title = f"Clips: {len(clips):,} of {count:,}" + ", evenly spread" * (len(clips) < count)
    legend = paragraph(
        "First, middle and last frame of each clip's source. The part that was cut away is dark, the part that is kept "
        "is outlined; bars inside the outline were added.",
        quiet=True,
    )
    return section(title, legend, cards(map(_clip_card, clips, pictures)))


def _draw_clip(clip: ClipRow) -> list[Image.Image] | str:
    """Return three pictures of a clip, or why there are none."""
    frames = clip["frames"]
    chosen = [frames[index] for index in spread_indices(len(frames), 3)]
    try:
        return [draw_cut(frame, clip) for frame in read_source(clip, chosen)]
    except Rejected as reject:
        return reject.detail


def _clip_card(clip: ClipRow, pictures: list[Image.Image] | str) -> Html:
    frames = clip["frames"]
    source = f"{clip['source_width']}x{clip['source_height']}, " if "source_width" in clip else ""
    count = f" of {clip['source_frames']}" if "source_frames" in clip else ""
    retimed = f", {clip['retimed_frames']} frames retimed" if "retimed_frames" in clip else ""
    aspect = f", pixels {clip['pixel_aspect']:.4g}:1" if clip["pixel_aspect"] != 1 else ""
    rates = f"{clip['source_fps']:.5g} -> {clip['fps']:.5g} frames a second{retimed}"
    facts = [
        ("kept", f"{source}{clip['fit']} -> {clip['width']}x{clip['height']}{aspect}"),
        ("frames", f"{len(frames)}, the source's {min(frames, default=0)}..{max(frames, default=0)}{count}; {rates}"),
        ("caption from", clip["caption_from"]),
        ("file", clip["source"]),
        ("decoder", clip["decoder"]),
        ("read as", _describe_conversion(clip)),
        *([("damage", clip["damage"])] if clip.get("damage") else []),
    ]
    image = paragraph(f"no picture: {pictures}", bad=True) if isinstance(pictures, str) else strip(pictures)
    caption = paragraph(clip["caption"] or "(empty caption)", longest=LONGEST)
    return Html(heading(clip["clip_id"]) + image + caption + pairs(facts))


def _describe_conversion(clip: ClipRow) -> str:
    """Return the colours and fields of a clip's source, and what was done to them."""
    colours = ", ".join(f"{name} {clip[name]}" for name in ("matrix", "primaries", "transfer", "range", "field_order"))
    done = [f"{name} {clip[name]}" for name in ("tone_map", "deinterlace") if clip[name] != NONE]
    done += [f"over {clip['background']}"] if clip["alpha"] != NONE else []
    return f"{colours}{' -> ' * bool(done)}{', '.join(done)}".replace("_", " ")


def decoded_section(decoded: Sequence["DecodedRow"], count: int) -> Html:
    """Show for each row a strip of decoded frames, and below it a strip of its source."""
    legend = paragraph("Above the decoded latents, below the frames they were made from.", quiet=True)
    return section(
        f"Decoded: {len(decoded):,} of {count:,} rows", legend, cards(map(_decoded_card, decoded), wide=True)
    )


def _decoded_card(row: "DecodedRow") -> Html:
    ranges = row.ranges
    std = format_number(ranges.mean_std)
    numbers = [
        ("PSNR", f"{format_decibels(row.psnr)}, worst frame {format_decibels(row.worst_frame_psnr)}"),
        ("mean", f"{format_range(ranges.mean_min, ranges.mean_max)} normalised, std {std}"),
        ("logvar", format_range(ranges.logvar_min, ranges.logvar_max)),
    ]
    problems = [paragraph(problem, bad=True) for problem in (*ranges.flags, row.note) if problem]
    strips = [strip([image]) for image in row.strips]
    caption = paragraph(row.caption or "(empty caption)", longest=LONGEST)
    return Html("".join([heading(row.clip_id), *strips, *problems, caption, pairs(numbers)]))


def reject_sections(summary: Summary) -> list[Html]:
    """Return the sections of rejects and of sources that look alike, if there are any, with `MAX_ROWS` rows each."""
    numbers = summary.numbers
    rejects = [(reject["reason"], reject["detail"], reject["source"]) for reject in summary.rejects]
    losses, near = numbers.get("losses") or [], numbers.get("near_pairs") or []
    damaged, alike = numbers.get("kinds", {}).get("damaged", 0), numbers.get("near_duplicates") or 0
    return [
        *_listing("Rejected", ("reason", "what is wrong", "source"), rejects, len(rejects)),
        *_listing("Damaged, and used in part", ("source", "what is lost"), losses, damaged),
        *_listing("Sources that look alike", ("source", "looks like"), near, alike),
    ]


def _listing(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], count: int) -> list[Html]:
    """Return a section with the first of the rows, which are of `count` in all; none without rows."""
    listed = rows[:MAX_ROWS]
    cut = f", of which the first {len(listed):,} are listed" * (len(listed) < count)
    return [section(f"{title}: {count:,}{cut}", table(head, listed))] if listed else []
