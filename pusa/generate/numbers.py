"""Measure videos that were made: what each number means, in which unit, and whether more or less of it is better."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Number:
    """What a number in a video's record means, its unit ("" for none), and which values are better, if that is known."""

    meaning: str
    unit: str
    better: Literal["high", "low"] | None


_GIVEN = "given frames count whatever their multiplier: with one above 0 they may differ by design"
# A record has those that apply to its video, and beside them, where there are any, the stretches that `black_frames`
# and `frozen_frames` count: `black` and `frozen`, lists of [first frame, last frame].
NUMBERS: dict[str, Number] = {
    "given_psnr": Number(f"PSNR of the given frames against the given pixels; {_GIVEN}", "dB", "high"),
    "given_ssim": Number(f"mean SSIM of the given frames against the given pixels; {_GIVEN}", "", "high"),
    "given_round_trip_psnr": Number(
        "PSNR of the given frames against the given latents decoded alone, so without what the VAE loses; as given_psnr",
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
