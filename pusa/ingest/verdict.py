"""The verdict on a source: decoded whole, it gives clips, or it is refused with a reason."""

from pathlib import Path
from typing import Any

import numpy as np

from pusa.errors import Reason, Rejected
from pusa.ingest.cutting import Clip, Timing, cut
from pusa.ingest.ledger import OF_CLIP, OF_SOURCE, Verdict
from pusa.ingest.sources import Source
from pusa.manifest.models import ClipSettings, Limits
from pusa.system.files import sha256_file, stamp_of
from pusa.video.decoders.choice import Choice
from pusa.video.fit import placement
from pusa.video.survey import Survey, survey

PLACES = (1 / 6, 1 / 2, 5 / 6)  # of a source's frames, of which its signature is made


def judge(source: Source, rule: ClipSettings, limits: Limits) -> Verdict:
    """Decode a source and decide what becomes of it. Nothing is raised but what is no fault of the source."""
    facts: dict[str, Any] = dict.fromkeys(OF_SOURCE) | {"reason": None, "detail": None, "signature": None, "clips": []}
    try:
        facts |= _examine(source.path, rule, limits)
        if stamp_of(source.path) != source.stamp:
            raise Rejected(Reason.CHANGED, f"{source.path} changed while it was decoded, or is gone")
    except Rejected as reject:
        facts |= {"reason": str(reject.reason), "detail": reject.detail, "clips": []}
    size, mtime_ns = source.stamp
    return {"path": str(source.path), "size": size, "mtime_ns": mtime_ns, **facts}


def _examine(path: Path, rule: ClipSettings, limits: Limits) -> dict[str, Any]:
    found = survey(path, limits, rule.scenes)
    timing = Timing(found.times, found.fps, found.scene_starts)
    clips = cut(timing, found.width * found.pixel_aspect, found.height, rule)
    choice = Choice(path, found, limits.decoding_seconds)
    rows = [_row(clip, found, rule.fit, choice.decoder(clip.frames.tolist())) for clip in clips]
    try:
        content = sha256_file(path)
    except OSError as error:
        raise Rejected(Reason.UNREADABLE, f"{path} cannot be read: {error.strerror}") from error
    of_source = (content, found.pixel_aspect, found.width, found.height, len(found.times), found.fps)
    return {
        **dict(zip(OF_SOURCE, of_source, strict=True)),
        "signature": _signature(found.thumbnails),
        "clips": rows,
    }


def _row(clip: Clip, found: Survey, fit: str, decoder: str) -> dict[str, Any]:
    shape, start = clip.shape, float(found.times[clip.frames[0]])
    placed = placement(found.width, found.height, found.pixel_aspect, shape.width, shape.height, fit)
    bucket = f"{shape.width}x{shape.height}x{shape.num_frames}"
    of_clip = (clip.frames, decoder, start, shape.width, shape.height, fit, placed.box, bucket, clip.fps, clip.retimed)
    return dict(zip(OF_CLIP, of_clip, strict=True))


def _signature(thumbnails: np.ndarray) -> bytes:
    """Three small pictures (3, 8, 8, 3) uint8: alike for what looks alike, whatever its size and encoding."""
    return thumbnails[[int(len(thumbnails) * place) for place in PLACES]].tobytes()
