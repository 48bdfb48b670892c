"""Define the metrics of the quality report: the meaning of each, and how it is measured on one video."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np

from pusa.backbones.family import Geometry
from pusa.evaluate.pixels import (
    colour_drift,
    ground_flicker,
    largest_change,
    motion_range,
    recognize,
    share_as_captioned,
    sharpness,
    wrap_jerk,
)
from pusa.evaluate.unseen import RoundTrip, UnseenClip
from pusa.video.compare import psnr, seam

LONG_OVERLAP = 2  # latent frames that the segments of long videos share


@dataclass(frozen=True)
class Result:
    """A made video (T, H, W, 3) uint8, the clip that it was made for, and that clip after the model's VAE.

    `given` are the frames of the video that show given latent frames, and `expected` (len(given), H, W, 3) is how they
    look after the VAE.
    """

    video: np.ndarray
    clip: UnseenClip
    round_trip: RoundTrip
    geometry: Geometry
    given: tuple[int, ...] = ()
    expected: np.ndarray = field(default_factory=lambda: np.empty(0))
    cyclic: bool = False
    values: dict[str, float] = field(default_factory=dict)  # of the metrics that were measured, by their names

    @cached_property
    def as_prompted(self) -> dict[str, bool]:
        """Return for each property of the clip's scene whether the video shows it."""
        return recognize(self.video).matches(self.clip.scene)

    @property
    def before_made(self) -> int:
        """Return the last given frame before the first made one."""
        return self._edges(given=True)[0]

    @property
    def last_made(self) -> int:
        """Return the last made frame before given ones."""
        return self._edges(given=False)[-1]

    def _edges(self, given: bool) -> list[int]:
        """Return the frames after which given frames end, or if not `given`, after which made frames end."""
        inside = [frame in self.given for frame in range(len(self.video))]
        return [i for i, (now, then) in enumerate(pairwise(inside)) if now != then and now == given]

    def given_psnr(self, frames: Sequence[int]) -> float:
        """Return the PSNR in dB of given `frames` of the video against how they should look."""
        return psnr(self.video[list(frames)], self.expected[[self.given.index(frame) for frame in frames]])

    @property
    def made_psnr(self) -> float:
        """Return the PSNR in dB of all made frames against the real clip."""
        made = [frame for frame in range(len(self.video)) if frame not in self.given]
        return psnr(self.video[made], self.clip.frames[made])

    @property
    def segment_frames(self) -> int:
        """Return how many frames each segment of a long video adds; the first has a whole clip's."""
        return segment_frames(len(self.clip.frames), self.geometry)

    @property
    def first_segment(self) -> np.ndarray:
        """Return the first frames of a long video, as many as a segment adds."""
        return self.video[: self.segment_frames]

    @property
    def last_segment(self) -> np.ndarray:
        """Return the last frames of a long video, as many as a segment adds."""
        return self.video[-self.segment_frames :]


def segment_frames(window: int, geometry: Geometry) -> int:
    """Return how many frames each segment of a long video adds, if the model sees `window` frames at once."""
    return (geometry.latent_frames(window) - 1 - LONG_OVERLAP) * geometry.temporal


@dataclass(frozen=True)
class Metric:
    """A row of the report: its name and meaning, how one video is measured, and how the values are combined."""

    name: str
    meaning: str
    measure: Callable[[Result], float]
    over_clips: Literal["mean", "count", "worst"] = "mean"

    def summarize(self, results: Sequence[Result]) -> str:
        """Return the entry of the table for the measured results of all clips; "-" if there are none."""
        values = [result.values[self.name] for result in results]
        if not values:
            return "-"
        if self.over_clips == "count":
            return f"{sum(values):.0f}/{len(values)}"
        return f"{max(values) if self.over_clips == 'worst' else np.mean(values):.2f}"


def _as_prompted(what: str) -> Metric:
    meaning = f"The number of videos whose {what} is that of the prompt."
    return Metric(f"{what} as prompted", meaning, lambda r: r.as_prompted[what], "count")


def _latent_seams(result: Result) -> float:
    """Return the seam from the last frame of each latent frame to the first of the next."""
    geometry = result.geometry
    ends = [geometry.num_frames(latent) - 1 for latent in range(1, geometry.latent_frames(len(result.video)))]
    return seam(result.video, *ends)


def _ring_join(result: Result) -> float:
    """Return the seam from the last latent frame of a loop to the first, relative to those of the other ones."""
    count = len(result.video) // result.geometry.temporal
    ends = [result.geometry.frames_of_ring(latent, count)[-1] for latent in range(count)]
    return seam(result.video, ends[-1], among=ends[:-1], cyclic=True)


PROMPTED = (_as_prompted("colour"), _as_prompted("ground"), _as_prompted("shape"), _as_prompted("motion"))
FOLLOWED = (_as_prompted("colour"), _as_prompted("shape"), _as_prompted("motion"))
ROUND_TRIP_PSNR = Metric(
    "round trip, dB", "PSNR of the clip after the VAE against the clip; about the limit of any PSNR against real"
    " frames.", lambda r: psnr(r.video, r.clip.frames),
)  # fmt: skip
FIRST_SEAM = Metric(
    "seam, first frame to second", "The change between these two, divided by the mean change between neighbours.",
    lambda r: seam(r.video, 0),
)  # fmt: skip
LATENT_SEAMS = Metric(
    "seams between latent frames", "The mean change from the last frame of each latent frame to the first of the next,"
    " divided by the mean change elsewhere. Any cut between latent frames has at least this.", _latent_seams,
)  # fmt: skip
GROUND_FLICKER = Metric(
    "flicker of the ground, levels", "The mean change of ground pixels between neighbours, in levels of 255; the drawn"
    " ground does not change.", lambda r: ground_flicker(r.video),
)  # fmt: skip
LARGEST_CHANGE = Metric(
    "largest change / mean change", "Of the changes between neighbours; in a loop also from the last frame to the"
    " first.", lambda r: largest_change(r.video, r.cyclic),
)  # fmt: skip
MOTION_RANGE = Metric(
    "range of motion", "The range of the shape's centre or radius, whichever is larger, as a share of the frame.",
    lambda r: motion_range(r.video),
)  # fmt: skip
GIVEN_PSNR = Metric(
    "given frames, dB", "PSNR of the given frames in the video against the same frames after the VAE; 99 is equal.",
    lambda r: r.given_psnr(r.given),
)  # fmt: skip
GIVEN_PSNR_START = Metric(
    "given frames at the start, dB", "PSNR of the given frames before the made ones against the same frames after the"
    " VAE; 99 is equal.",
    lambda r: r.given_psnr([frame for frame in r.given if frame <= r.before_made]),
)  # fmt: skip
GIVEN_PSNR_END = Metric(
    "given frames at the end, dB", "PSNR of the given frames after the made ones, likewise. The VAE decodes them after"
    " other frames than in their own clip, so equal latents give less than 99.",
    lambda r: r.given_psnr([frame for frame in r.given if frame > r.last_made]),
)  # fmt: skip
SEAM_TO_MADE = Metric(
    "seam, given to made", "The change from the last given frame to the first made one, divided by the mean change"
    " elsewhere.", lambda r: seam(r.video, r.before_made),
)  # fmt: skip
SEAM_TO_GIVEN = Metric(
    "seam, made to given", "The change from the last made frame to the first given one, divided by the mean change"
    " elsewhere.", lambda r: seam(r.video, r.last_made),
)  # fmt: skip
FIRST_MADE_PSNR = Metric(
    "first made frame, dB", "PSNR against the same frame of the real clip.",
    lambda r: psnr(r.video[r.before_made + 1], r.clip.frames[r.before_made + 1]),
)  # fmt: skip
MADE_PSNR = Metric("made frames, dB", "PSNR of all made frames against the real clip.", lambda r: r.made_psnr)
FIRST_PICTURE_PSNR = Metric(
    "first picture, dB", "PSNR of the video's first frame against the given picture after the VAE; 99 is equal.",
    lambda r: psnr(r.video[0], r.round_trip.first[0]),
)  # fmt: skip
LAST_PICTURE_PSNR = Metric(
    "last picture, dB", "The picture given at the end fills all frames of the last latent frame: PSNR of the middle one"
    " against the picture after the VAE.",
    lambda r: psnr(r.video[-(r.geometry.temporal // 2)], r.round_trip.last[0]),
)  # fmt: skip
MIDDLE_PSNR = Metric(
    "middle frame, dB", "PSNR of the middle frame against that of the real clip.",
    lambda r: psnr(r.video[len(r.clip.frames) // 2], r.clip.frames[len(r.clip.frames) // 2]),
)  # fmt: skip
LOOP_SEAM = Metric(
    "seam, last to first", "The change from the loop's last frame to its first, divided by the mean change elsewhere;"
    " the goal is 1.2 or less.", lambda r: seam(r.video, -1, cyclic=True),
)  # fmt: skip
WORST_LOOP_SEAM = Metric(
    "seam, last to first: worst clip", "The highest value of all clips.", LOOP_SEAM.measure, "worst"
)
RING_JOIN = Metric(
    "join of the ring / other joins", "The change where the last latent frame meets the first, divided by the mean"
    " change where other latent frames meet.", _ring_join,
)  # fmt: skip
WRAP_JERK = Metric(
    "jerk at the wrap", "The second difference at the loop's last and first frame, divided by that elsewhere; 1 is"
    " unbroken motion.", lambda r: wrap_jerk(r.video),
)  # fmt: skip
AS_CAPTIONED = Metric(
    "frames as captioned", "The share of frames that, each by itself, show the caption's colour and shape.",
    lambda r: share_as_captioned(r.video, r.clip.scene),
)  # fmt: skip
AS_CAPTIONED_START = Metric(
    "frames as captioned, first segment", "The share of frames as captioned among the first frames, as many as each"
    " segment adds.",
    lambda r: share_as_captioned(r.first_segment, r.clip.scene),
)  # fmt: skip
AS_CAPTIONED_END = Metric(
    "frames as captioned, last segment", "The share of frames as captioned in the last segment.",
    lambda r: share_as_captioned(r.last_segment, r.clip.scene),
)  # fmt: skip
GROUND_DRIFT = Metric(
    "drift of the ground, levels", "The difference of the ground's colour between the first and the last frames, as"
    " many as each segment adds.", lambda r: colour_drift(r.first_segment, r.last_segment)[0],
)  # fmt: skip
SHAPE_DRIFT = Metric(
    "drift of the shape's colour, levels", "The difference of the shape's colour between the same frames; a shape"
    " that has disappeared counts as ground.", lambda r: colour_drift(r.first_segment, r.last_segment)[1],
)  # fmt: skip
SHARPNESS = Metric(
    "sharpness, last / first segment", "The mean gradient of the steepest hundredth of pixels, which lie on contours:"
    " last frames over first frames.", lambda r: sharpness(r.last_segment) / max(sharpness(r.first_segment), 1e-6),
)  # fmt: skip
MOTION_RANGE_START = Metric(
    "range of motion, first segment", "The range of motion in the first frames, as many as each segment adds.",
    lambda r: motion_range(r.first_segment),
)  # fmt: skip
MOTION_RANGE_END = Metric(
    "range of motion, last segment", "The range of motion in the last segment.",
    lambda r: motion_range(r.last_segment),
)  # fmt: skip
SEGMENT_SEAMS = Metric(
    "seams where segments meet", "The mean change from the last frame of a segment to the next frame, divided by the"
    " mean change elsewhere.",
    lambda r: seam(r.video, *range(len(r.clip.frames) - 1, len(r.video) - 1, r.segment_frames)),
)  # fmt: skip
