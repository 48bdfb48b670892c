"""Name the kinds of sources that need more than a plain reading, so that a report says what was done to the data."""

from collections.abc import Mapping

import numpy as np

from pusa.ingest.cutting import FLOAT_NOISE, TIMESTAMP_ROUNDING, snap_to_even_grid
from pusa.video.conversion import HDR_TRANSFERS, NONE, WIDE_PRIMARIES
from pusa.video.header import UNSPECIFIED
from pusa.video.survey import Survey

KINDS = {  # kind -> what was done
    "hdr": "tone-mapped to SDR",
    "wide_gamut": "converted to the colours of BT.709",
    "untagged_hd": "states no colour matrix: read as BT.709, because it is large",
    "untagged_sd": "states no colour matrix: read as BT.601, because it is small",
    "high_bit_depth": "rounded to 8 bits a colour",
    "interlaced": "deinterlaced (bwdif)",
    "film_in_fields": "fields matched, repeated frames removed",
    "fields_of_one_time": "states fields, but shows whole frames: read as it is",
    "alpha": "laid over the background colour",
    "variable_rate": "shown at an even rate",
    "rotated": "turned upright",
    "wide_pixels": "resampled to square pixels",
    "odd_size": "an odd number of pixels a side: resampled",
    "several_videos": "the default video stream is read",
    "damaged": "the rest that can be decoded is used",
}


def describe_kinds(counts: Mapping[str, int]) -> dict[str, str]:
    """Return for each kind how many sources are of it and what was done to them, from their counts."""
    return {
        kind: f"{counts[kind]:,} source{'s' * (counts[kind] != 1)}: {KINDS[kind]}" for kind in KINDS if counts.get(kind)
    }


def kinds_of(survey: Survey) -> list[str]:
    """Return the keys of `KINDS` that apply to a source, in their order."""
    header, conversion = survey.header, survey.conversion
    is_untagged = header.matrix == UNSPECIFIED and conversion.matrix not in ("gbr", "gray")
    intervals = np.diff(snap_to_even_grid(survey.times, survey.fps))
    found = {
        "hdr": conversion.transfer in HDR_TRANSFERS,
        "wide_gamut": conversion.transfer not in HDR_TRANSFERS and conversion.primaries in WIDE_PRIMARIES,
        "untagged_hd": is_untagged and conversion.matrix == "bt709",
        "untagged_sd": is_untagged and conversion.matrix == "smpte170m",
        "high_bit_depth": header.bit_depth > 8,
        "interlaced": conversion.deinterlace.startswith("bwdif"),
        "film_in_fields": conversion.deinterlace == "film",
        "fields_of_one_time": conversion.deinterlace == NONE and conversion.field_order != "progressive",
        "alpha": conversion.has_alpha,
        "variable_rate": len(intervals) > 0 and np.ptp(intervals) > 2 * TIMESTAMP_ROUNDING + FLOAT_NOISE,
        "rotated": header.rotation != 0,
        "wide_pixels": abs(header.pixel_aspect - 1) > 1e-3,
        "odd_size": header.width % 2 == 1 or header.height % 2 == 1,
        "several_videos": header.video_streams > 1,
        "damaged": bool(survey.damage),
    }
    return [kind for kind in KINDS if found[kind]]
