"""Make a video into a small picture that moves, for pages that show no videos: animated WebP."""

from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from pusa.video.media import probe, read_fitted

BOX = (160, 240)  # pixels at most, width and height
FRAMES = (24, 12, 6, 3, 1)  # how many are tried, until the picture is small enough
QUALITY = 55  # of WebP, of 100


@dataclass(frozen=True)
class Animation:
    """Some frames of a video (T, h, w, 3), made small, that are shown over its `seconds`."""

    frames: np.ndarray
    seconds: float
    _known: dict[int, bytes] = field(default_factory=dict)  # the pictures that were made, by their number of frames

    @classmethod
    def read(cls, path: Path) -> "Animation":
        """Read a video's frames, evenly spaced.

        Raises:
            MediaError: the video is missing or cannot be decoded.
        """
        facts = probe(path)
        width, height = facts.width * facts.pixel_aspect, facts.height
        scale = min(BOX[0] / width, BOX[1] / height)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        frames = read_fitted(path, _spread(facts.num_frames, FRAMES[0]), *size)
        return cls(frames, facts.num_frames / facts.fps)

    def webp(self, max_bytes: int) -> bytes | None:
        """Return the picture with as many frames as `max_bytes` hold; None if they hold none."""
        for count in FRAMES:
            if count not in self._known:
                self._known[count] = self._encode(count)
            if len(self._known[count]) <= max_bytes:
                return self._known[count]
        return None

    def _encode(self, count: int) -> bytes:
        pictures = [Image.fromarray(self.frames[i]) for i in _spread(len(self.frames), count)]
        milliseconds = max(1, round(1000 * self.seconds / len(pictures)))
        buffer = BytesIO()
        pictures[0].save(
            buffer, "WEBP", save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0, quality=QUALITY
        )
        return buffer.getvalue()


def _spread(length: int, count: int) -> list[int]:
    """Return the indices of at most `count` of `length` frames, which are shown for equal times."""
    count = min(length, count)
    return [i * length // count for i in range(count)]
