"""The metrics of the quality report: what each means, and how it is read off one made video."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np

from pusa.backbones import find_family
from pusa.evaluate.quality import drift, flicker, jerk, largest, look, sharpness, shown, travel
from pusa.evaluate.unseen import Returned, Unseen
from pusa.tiny.shapes import NUM_FRAMES
from pusa.video.compare import psnr, seam

GEOMETRY = find_family().geometry
SEGMENT = 18  # frames that each segment of the long videos adds


@dataclass(frozen=True)
class Result:
    """A made video (T, H, W, 3) uint8, the clip that it was made for, and what the VAE returns of that clip.

    `given` are the frames of the video that stand for given ones, and `like` (len(given), H, W, 3) what they should be.
    """

    video: np.ndarray
    clip: Unseen
    back: Returned
    given: tuple[int, ...] = ()
    like: np.ndarray = field(default_factory=lambda: np.empty(0))
    cyclic: bool = False

    @cached_property
    def as_prompted(self) -> dict[str, bool]:
        """Property -> whether the video shows it."""
        return look(self.video).agrees(self.clip.scene)

    def edges(self, leaving: bool) -> list[int]:
        """The frames after which what is given ends (leaving), or begins again."""
        inside = [frame in self.given for frame in range(len(self.video))]
        return [i for i, (now, then) in enumerate(pairwise(inside)) if now != then and now == leaving]

    def kept(self, frames: Sequence[int]) -> float:
        """How like given `frames` of the video are, in dB."""
        return psnr(self.video[list(frames)], self.like[[self.given.index(frame) for frame in frames]])


@dataclass(frozen=True)
class Metric:
    """One row: a name, its meaning, how it is read off a video, and what stands for all clips."""

    name: str
    means: str
    of: Callable[[Result], float]
    over_clips: Literal["mean", "count", "worst"] = "mean"

    def told(self, results: Sequence[Result]) -> str:
        """The one entry of the table for all clips."""
        values = [self.of(result) for result in results]
        if self.over_clips == "count":
            return f"{sum(values):.0f}/{len(values)}"
        return f"{max(values) if self.over_clips == 'worst' else np.mean(values):.2f}"


def as_prompted(what: str) -> Metric:
    """Whether colour, ground, shape or motion is the prompt's."""
    means = f"In how many of the videos the {what} is what the prompt says."
    return Metric(f"{what} as prompted", means, lambda r: r.as_prompted[what], "count")


def against(name: str, frame: int, real: Callable[[Result], np.ndarray], means: str) -> Metric:
    """A single frame of the video, in dB against another (H, W, 3)."""
    return Metric(name, means, lambda r: psnr(r.video[frame], real(r)))


def _made(result: Result) -> float:
    made = [frame for frame in range(len(result.video)) if frame not in result.given]
    return psnr(result.video[made], result.clip.frames[made])


def _boundaries(latent_frames: int) -> list[int]:
    """The last frame of each latent frame of a clip but the last one."""
    return [GEOMETRY.num_frames(latent) - 1 for latent in range(1, latent_frames)]


def _ring_join(result: Result) -> float:
    count = len(result.video) // GEOMETRY.temporal
    ends = [GEOMETRY.frames_of_ring(latent, count)[-1] for latent in range(count)]
    return seam(result.video, ends[-1], among=ends[:-1], cyclic=True)


def _segments(result: Result) -> tuple[np.ndarray, np.ndarray]:
    return result.video[:SEGMENT], result.video[-SEGMENT:]


def _sharpness(result: Result) -> float:
    first, last = _segments(result)
    return sharpness(last) / max(sharpness(first), 1e-6)


PROMPTED = (as_prompted("colour"), as_prompted("ground"), as_prompted("shape"), as_prompted("motion"))
FOLLOWED = (as_prompted("colour"), as_prompted("shape"), as_prompted("motion"))
ROUND_TRIP = Metric(
    "round trip, dB", "The clip after the VAE against the clip: about the most that any dB against real frames can be.",
    lambda r: psnr(r.video, r.clip.frames),
)  # fmt: skip
FIRST_SEAM = Metric(
    "seam, first frame to second", "The change there over the mean change between neighbours.",
    lambda r: seam(r.video, 0),
)  # fmt: skip
BOUNDARIES = Metric(
    "seams between latent frames", "The mean change from one latent frame's last frame to the next one's first, over"
    " the mean change elsewhere: what any cut between latent frames has at least.",
    lambda r: seam(r.video, *_boundaries(GEOMETRY.latent_frames(len(r.video)))),
)  # fmt: skip
FLICKER = Metric(
    "flicker of the ground, levels", "The mean change of ground pixels between neighbours, in levels of 255;"
    " drawn ground stands still.", lambda r: flicker(r.video),
)  # fmt: skip
LARGEST = Metric(
    "largest change / mean change", "Between neighbours, in a loop from its last frame to its first too.",
    lambda r: largest(r.video, r.cyclic),
)  # fmt: skip
TRAVEL = Metric(
    "range of motion", "How far the shape's centre or radius ranges, whichever is most, in shares of the frame.",
    lambda r: travel(r.video),
)  # fmt: skip
KEPT = Metric(
    "given frames, dB", "The given frames of the video against what the VAE returns of them; 99 is equal.",
    lambda r: r.kept(r.given),
)  # fmt: skip
KEPT_FIRST = Metric(
    "given frames at the start, dB", "Those before the made frames against what the VAE returns of them.",
    lambda r: r.kept([frame for frame in r.given if frame <= r.edges(leaving=True)[0]]),
)  # fmt: skip
KEPT_LAST = Metric(
    "given frames at the end, dB", "Those after the made frames, likewise. The VAE decodes them after other frames"
    " than in their own clip, so that equal latents give less than 99.",
    lambda r: r.kept([frame for frame in r.given if frame > r.edges(leaving=False)[-1]]),
)  # fmt: skip
LEAVING = Metric(
    "seam, given to made", "The change from the last given frame to the first made one over the mean change elsewhere.",
    lambda r: seam(r.video, r.edges(leaving=True)[0]),
)  # fmt: skip
RETURNING = Metric(
    "seam, made to given", "The change from the last made frame to the first given one over the mean change elsewhere.",
    lambda r: seam(r.video, r.edges(leaving=False)[-1]),
)  # fmt: skip
FIRST_MADE = Metric(
    "first made frame, dB", "Against that frame of the real clip.",
    lambda r: psnr(r.video[r.edges(leaving=True)[0] + 1], r.clip.frames[r.edges(leaving=True)[0] + 1]),
)  # fmt: skip
MADE = Metric("made frames, dB", "All made frames against those of the real clip.", _made)
FIRST_PICTURE = against(
    "first picture, dB", 0, lambda r: r.back.first[0],
    "The video's first frame against what the VAE returns of the given picture; 99 is equal.",
)  # fmt: skip
LAST_PICTURE = against(
    "last picture, dB", -(GEOMETRY.temporal // 2), lambda r: r.back.last[0],
    "The picture given at the end, which becomes six frames: the middle one, against what the VAE returns of it.",
)  # fmt: skip
MIDDLE = against(
    "middle frame, dB", NUM_FRAMES // 2, lambda r: r.clip.frames[NUM_FRAMES // 2],
    "The frame half way against that of the real clip.",
)  # fmt: skip
WRAP = Metric(
    "seam, last to first", "The change from the loop's last frame to its first over the mean change elsewhere; 1.2 or"
    " less is wanted.", lambda r: seam(r.video, -1, cyclic=True),
)  # fmt: skip
WORST_WRAP = Metric("seam, last to first: worst clip", "The highest of all clips.", WRAP.of, "worst")
RING_JOIN = Metric(
    "join of the ring / other joins", "The change where the last latent frame meets the first one, over that where"
    " other latent frames meet.", _ring_join,
)  # fmt: skip
JERK = Metric(
    "jerk at the wrap", "The second difference at the loop's last and first frame over that elsewhere: 1 is the same"
    " motion.", lambda r: jerk(r.video),
)  # fmt: skip
SHOWN = Metric(
    "frames as captioned", "The share of frames that by themselves show the caption's colour and shape.",
    lambda r: shown(r.video, r.clip.scene),
)  # fmt: skip
SHOWN_FIRST = Metric(
    "frames as captioned, first segment", "That of the first 18 frames.",
    lambda r: shown(_segments(r)[0], r.clip.scene),
)  # fmt: skip
SHOWN_LAST = Metric(
    "frames as captioned, last segment", "That of the last 18 frames.",
    lambda r: shown(_segments(r)[1], r.clip.scene),
)  # fmt: skip
GROUND_DRIFT = Metric(
    "drift of the ground, levels", "How far its colour differs between the first and the last 18 frames.",
    lambda r: drift(*_segments(r))[0],
)  # fmt: skip
SHAPE_DRIFT = Metric(
    "drift of the shape's colour, levels", "How far the shape's differs; one that is gone counts as ground.",
    lambda r: drift(*_segments(r))[1],
)  # fmt: skip
SHARPNESS = Metric(
    "sharpness, last / first segment", "The gradient on contours, of the steepest hundredth of pixels.", _sharpness
)
TRAVEL_FIRST = Metric(
    "range of motion, first segment", "That of the first 18 frames.", lambda r: travel(_segments(r)[0])
)
TRAVEL_LAST = Metric("range of motion, last segment", "That of the last 18 frames.", lambda r: travel(_segments(r)[1]))
SEGMENT_SEAMS = Metric(
    "seams where segments meet", "The mean change there over the mean change elsewhere.",
    lambda r: seam(r.video, *range(NUM_FRAMES - 1, len(r.video) - 1, SEGMENT)),
)  # fmt: skip
