"""Measure videos that were made: the numbers of a record, and what each of them means. No torch at the import."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pusa.backbones.family import Geometry
from pusa.diffusion.courses import SCHEDULE
from pusa.tasks.base import Job, resolve_positions, video_frames_of
from pusa.video.compare import LUMA, flicker, frame_changes, frame_colours, psnr, ssim

Frames = dict[int, np.ndarray]  # by its number in the video, (H, W, 3) uint8
CONSTANT = 2  # levels of 255 by which the pixels of a video may differ that shows nothing


@dataclass(frozen=True)
class Number:
    """What a number in a video's record means, its unit ("" for none), and which values are better; None: unknown."""

    meaning: str
    unit: str
    better: Literal["high", "low"] | None


_GIVEN = "whatever their multiplier: with one above 0 they may differ by design; at most 8 of them, evenly spread"
# Beside the numbers, where there are any: the stretches that `black_frames` and `frozen_frames` count, lists of [first
# frame, last frame].
STRETCHES = "black", "frozen"
# Of these a record has what applies to its video.
NUMBERS: dict[str, Number] = {
    "given_psnr": Number(f"PSNR of the given frames against the given pixels; {_GIVEN}", "dB", "high"),
    "given_ssim": Number(f"mean SSIM of the given frames against the given pixels; {_GIVEN}", "", "high"),
    "given_round_trip_psnr": Number(
        "PSNR of the given frames against what the VAE alone decodes of the given latents; as given_psnr",
        "dB",
        "high",
    ),
    "given_round_trip_ssim": Number(
        "mean SSIM of the given frames against the given latents decoded alone; as given_ssim", "", "high"
    ),
    "worst_seam": Number("the largest of `seams`: the change at a join, in mean changes elsewhere", "", "low"),
    "worst_colour_step": Number(
        "the largest of `colour_steps`: the change of the mean colour at a join", "levels", "low"
    ),
    "motion": Number("mean absolute change from a frame to the next", "levels", None),
    "vmaf_motion": Number(
        "mean motion of VMAF: the change of the luma from a frame to the next, blurred", "levels", None
    ),
    "spatial_information": Number("the largest spatial information of a frame, ITU-T P.910: how much detail", "", None),
    "temporal_information": Number(
        "the largest temporal information of a frame, ITU-T P.910: how much changes at once", "", None
    ),
    "flicker": Number("mean change of the mean luma that the next frame takes back", "levels", "low"),
    "loop_closure": Number("of a loop: the seam from its last frame to its first; 1 is seamless", "", "low"),
    "black_frames": Number("frames that are black", "frames", "low"),
    "frozen_frames": Number("frames in stretches that stand still", "frames", "low"),
}


@dataclass(frozen=True)
class Compared:
    """Given frames of a video, to compare: their pixels, which latents lack, and what the VAE decodes of their latents.

    `problem` says why one is missing.
    """

    pixels: Frames
    round_trip: Frames
    problem: str = ""


NOTHING = Compared({}, {})


class Measures:
    """What a job's frames show, measured chunk by chunk.

    Args:
        job: the job.
        geometry: of its model.
        compared: the given frames that those of the video are compared with.
    """

    def __init__(self, job: Job, geometry: Geometry, compared: Compared = NOTHING) -> None:
        self.cyclic, self.joins = job.cyclic, find_joins(job, geometry)
        self._compared = compared
        self._shown: Frames = {}  # the compared frames, as the video has them
        self._changes: list[float] = []  # from each frame to the next
        self._colours: list[np.ndarray] = []  # the mean colour of each frame
        self._edges: list[np.ndarray] = []  # the first frame and the last one so far
        self._lowest, self._highest = np.full(3, 255), np.zeros(3, int)

    def add(self, frames_THWC: np.ndarray) -> None:
        """Measure the next frames (t, H, W, 3) uint8."""
        start = len(self._colours)
        for frame in self._compared.pixels.keys() | self._compared.round_trip.keys():
            if start <= frame < start + len(frames_THWC):
                self._shown[frame] = frames_THWC[frame - start].copy()
        self._colours.extend(frame_colours(frames_THWC))
        self._changes.extend(frame_changes([*self._edges[1:], *frames_THWC]))
        first = self._edges[0] if self._edges else frames_THWC[0].copy()
        self._edges = [first, frames_THWC[-1].copy()]
        if (self._highest - self._lowest).max() <= CONSTANT:
            # Columns last: in one call, numpy would reduce the three colours of each pixel by themselves.
            self._lowest = np.minimum(self._lowest, frames_THWC.min((0, 1)).min(0))
            self._highest = np.maximum(self._highest, frames_THWC.max((0, 1)).max(0))

    def seams(self) -> dict[str, float]:
        """Return the seam at each join of the video, by the number of the frame before it.

        A seam is the change from this frame to the next, divided by the mean change between all other neighbours.
        """
        changes = self._all_changes()
        others = np.delete(changes, self.joins)
        mean = max(float(others.mean()) if len(others) else 0.0, 1e-6)
        return {str(frame): round(float(changes[frame]) / mean, 3) for frame in self.joins}

    def colour_steps(self) -> dict[str, float]:
        """Return the change of the mean colour at each join, by the number of the frame before it.

        It is that of the colour (red, green or blue) that changes most, in levels of 255.
        """
        following = np.roll(self._colours, -1, 0)  # the frame after the last one of a loop is the first
        steps = abs(following - np.array(self._colours)).max(1)
        return {str(frame): round(float(steps[frame]), 3) for frame in self.joins}

    def numbers(self) -> dict[str, float]:
        """Return those of `NUMBERS` that apply to the video and need its frames, to four decimals."""
        numbers: dict[str, float] = {}
        for name, given in (("given", self._compared.pixels), ("given_round_trip", self._compared.round_trip)):
            if pairs := [(self._shown[frame], given[frame]) for frame in sorted(given)]:
                shown, expected = map(np.stack, zip(*pairs, strict=True))
                numbers |= {f"{name}_psnr": psnr(shown, expected), f"{name}_ssim": ssim(shown, expected)}
        if seams := self.seams():
            numbers |= {"worst_seam": max(seams.values()), "worst_colour_step": max(self.colour_steps().values())}
        if len(changes := self._all_changes()):
            numbers["motion"] = float(changes.mean())
        lumas = [float(colour @ LUMA) for colour in self._colours]
        if len(lumas) > 2:
            numbers["flicker"] = flicker([*lumas, *lumas[: 2 * self.cyclic]])
        if self.cyclic:
            numbers["loop_closure"] = seams[str(self.joins[-1])]
        return {name: round(value, 4) for name, value in numbers.items()}

    def _all_changes(self) -> np.ndarray:
        """Return the change from each frame to the next, (T - 1,); of a loop also from the last to the first, (T,)."""
        return np.array([*self._changes, *(frame_changes(self._edges[::-1]) if self.cyclic else ())])

    def fault(self) -> str:
        """Return a warning if the video shows nothing, else "": all its pixels have one colour."""
        if (self._highest - self._lowest).max() > CONSTANT:
            return ""
        colour = tuple(int(level) for level in self._lowest)
        return f"the whole video has one colour, {colour}, as if the model had failed"


def find_joins(job: Job, geometry: Geometry) -> list[int]:
    """Return the frames of a job's video after which a part ends.

    Parts are runs of given latent frames, segments (latent frames that start at the same step), and one turn of a loop.
    """
    run = job.passes(geometry)[-1]
    starts = run.timeline.starts
    frames = len(starts)
    # No segments: no two latent frames start together, or the job has levels, so all are seen together.
    staggered = len(set(starts)) == frames or job.levels != SCHEDULE
    given = {p for c in run.conditions for p in resolve_positions(c.place, frames, "position")}
    parts = [(frame in given, 0 if staggered else start) for frame, start in enumerate(starts)]
    ends = [frame for frame in range(frames - (not job.cyclic)) if parts[frame] != parts[(frame + 1) % frames]]
    wrap = {frames * geometry.temporal - 1} if job.cyclic else set()
    return sorted({video_frames_of(frame, frames, job, geometry)[-1] for frame in ends} | wrap)
