"""The denoising loop over a matrix of levels: one row a step, one column a latent frame.

Shapes: z_BCFhw latents, x0_BCFhw the current estimate of the clean latents; levels_NF with N + 1 rows from the levels
at the start to all zero; sigma_BF one row of it; unknown_C1hw noise in place of an unknown latent frame.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from pusa.diffusion.courses import ROUNDING
from pusa.diffusion.timesteps import add_noise, over_frames
from pusa.diffusion.windows import Timeline, Window
from pusa.system.failures import is_out_of_memory

log = logging.getLogger(__name__)
Velocity = Callable[[Tensor, Tensor], Tensor]
OnStep = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class TextFeatures:
    """Hold the features of B texts.

    Attributes:
        features: of the tokens, (B, L, width).
        mask: which tokens are valid, (B, L).
        pooled: features of each text as a whole, (B, pooled width), of families that have them.
    """

    features: Tensor
    mask: Tensor
    pooled: Tensor | None = None

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "TextFeatures":
        """Return the same on a device, the features in `dtype` if one is given."""
        return self._each(lambda part: part.to(device, dtype if part.is_floating_point() else None))

    def split(self, size: int) -> "list[TextFeatures]":
        """Return the same in parts of `size` texts; the last may have fewer."""
        return [self[start : start + size] for start in range(0, len(self.mask), size)]

    def __getitem__(self, rows: slice) -> "TextFeatures":
        return self._each(lambda part: part[rows])

    @classmethod
    def cat(cls, texts: "Sequence[TextFeatures]") -> "TextFeatures":
        """Return the texts of several in one."""
        pooled = [text.pooled for text in texts if text.pooled is not None]
        assert len(pooled) in (0, len(texts)), "some texts lack the pooled features that others have"
        return cls(
            torch.cat([text.features for text in texts]),
            torch.cat([text.mask for text in texts]),
            torch.cat(pooled) if pooled else None,
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> "TextFeatures":
        pooled = None if self.pooled is None else change(self.pooled)
        return TextFeatures(change(self.features), change(self.mask), pooled)


Predict = Callable[[Tensor, Tensor, TextFeatures], Tensor]  # (z, sigma_BF, text) -> x0 - eps


@dataclass(frozen=True)
class Given:
    """Given latent frames x_CFhw in the transformer's space, their places in the result, and their multipliers."""

    latents: Tensor
    place: tuple[int, ...]
    multipliers: tuple[float, ...]


def start_state(given: Sequence[Given], noise_CFhw: Tensor) -> tuple[Tensor, Tensor]:
    """Return the start state (C, F, h, w) and the multipliers m (F,) of all frames.

    A given frame starts as (1 - m) * x + m * eps, noised once; a free frame (m = 1) as pure noise.
    """
    canvas = torch.zeros_like(noise_CFhw)
    for part in given:
        canvas[:, list(part.place)] = part.latents.to(canvas)
    multipliers = multipliers_of(given, noise_CFhw.shape[1])
    return add_noise(canvas, noise_CFhw, multipliers.to(canvas)), multipliers


def multipliers_of(given: Sequence[Given], frames: int) -> Tensor:
    """Return the multipliers (F,) of all latent frames of a run: 1 for those that are free."""
    multipliers = torch.ones(frames)
    for part in given:
        multipliers[list(part.place)] = torch.tensor(part.multipliers)
    return multipliers


def delayed(levels_NF: Tensor, starts: Sequence[int]) -> Tensor:
    """Return levels (N + max(starts) + 1, F) in which each frame stays at its first level until its own start step."""
    waits_F = torch.tensor(starts)
    rows_MF = torch.arange(len(levels_NF) + max(starts))[:, None] - waits_F
    return levels_NF.gather(0, rows_MF.clamp(0, len(levels_NF) - 1))


@dataclass(frozen=True)
class Pinned:
    """Given frames that are exact at the end, although the network sees them noisy before: with the same noise always.

    Attributes:
        clean_BCFhw: the given latent frames, at their places.
        noise_BCFhw: their noise.
        mask_BF: which frames are given like this.
    """

    clean_BCFhw: Tensor
    noise_BCFhw: Tensor
    mask_BF: Tensor

    def to(self, device: torch.device | str) -> "Pinned":
        """Return the same on a device."""
        return Pinned(self.clean_BCFhw.to(device), self.noise_BCFhw.to(device), self.mask_BF.to(device))

    def at(self, z_BCFhw: Tensor, sigma_BF: Tensor) -> Tensor:
        """Return a state with these frames noised to their levels; level 0 is the given frame, bit for bit."""
        noised = add_noise(self.clean_BCFhw, self.noise_BCFhw, sigma_BF)
        return torch.where(over_frames(self.mask_BF), noised, z_BCFhw)


def deciding_levels(levels_NF: Tensor, pinned_F: Tensor) -> Tensor:
    """Return a matrix of levels (N + 1, F) with 0 where a frame is not denoised in the step that begins there.

    The highest of a row decides which of two transformers makes the step. A step in which no frame is denoised belongs
    to the one for the highest level of all.
    """
    moves_NF = (levels_NF[:-1] > levels_NF[1:]) & ~pinned_F
    counts_NF = moves_NF | ~moves_NF.any(1, keepdim=True)
    return torch.cat([levels_NF[:-1].where(counts_NF, 0.0), levels_NF[-1:]])


class Phase(NamedTuple):
    """Steps in a row that one transformer makes. Of two transformers, 0 is the expert for high levels, 1 for low."""

    expert: int
    steps: range


def split_phases(levels_NF: Tensor, timeline: Timeline, boundary: float | None) -> list[Phase]:
    """Return which transformer makes which steps of a run: that of high levels from `boundary` up, else the other.

    The schedule's own level decides, and never a frame's: a given frame of multiplier 0.2 is far below the boundary all
    the time. (Only where a job has a matrix, `deciding_levels` are its frames' own.)
    Where frames start at different steps, the highest own level decides, of the frames that the network sees
    and the step denoises: frames that wait or are finished do not count.

    Args:
        levels_NF: the schedule's levels (N + 1, F) for frames of multiplier 1.
        timeline: when each frame starts, and what the network sees.
        boundary: None for a model of one transformer, which makes all steps.
    """
    steps, starts = len(levels_NF) - 1, timeline.starts
    if boundary is None:
        return [Phase(0, range(steps + timeline.delay))]
    own_NF = delayed(levels_NF, starts).tolist()

    def is_low(step: int) -> bool:
        seen = {frame for window in timeline.windows(step) for frame in window if frame is not None}
        highest = max(own_NF[step][frame] for frame in seen if starts[frame] <= step < starts[frame] + steps)
        return highest < boundary - ROUNDING  # a level this close to the boundary lies on it

    groups = groupby(range(steps + timeline.delay), is_low)
    runs = [(is_low, list(group)) for is_low, group in groups]
    return [Phase(int(is_low), range(run[0], run[-1] + 1)) for is_low, run in runs]


def sample(
    velocity: Velocity,
    z_BCFhw: Tensor,
    levels_NF: Tensor,
    on_step: OnStep = lambda step, x0: None,
    steps: range | None = None,
) -> Tensor:
    """Integrate from the first row of levels to the last; a frame whose level stays 0 does not change at all.

    Args:
        velocity: (z, sigma_BF) -> x0 - eps.
        z_BCFhw: the start state.
        levels_NF: (N + 1, F), or (N + 1, B, F) where jobs of different levels share a batch.
        on_step: called after each step with its number and the current estimate of the clean latents, e.g. for a
            preview; an exception raised in it cancels sampling.
        steps: the steps to make, as for `denoise`.
    """
    for step, next_BCFhw, x0_BCFhw in denoise(velocity, z_BCFhw, levels_NF, steps):
        z_BCFhw = next_BCFhw
        on_step(step, x0_BCFhw)
    return z_BCFhw


@torch.no_grad()
def denoise(
    velocity: Velocity,
    z_BCFhw: Tensor,
    levels_NF: Tensor,
    steps: range | None = None,
    pinned: Pinned | None = None,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Make steps, by default all. Yield after each its number, the state, and the estimate of x0.

    A run that continues from a state that was yielded gives the same bits: its `steps` begin with the number after
    that state's. The other arguments are those of `sample`. Frames that are `pinned` are at their level in each state,
    and clean in each estimate.
    """
    levels_NF = levels_NF.to(z_BCFhw.device)
    for step in range(len(levels_NF) - 1) if steps is None else steps:
        now_F, then_F = levels_NF[step], levels_NF[step + 1]
        v = velocity(z_BCFhw, now_F.expand(len(z_BCFhw), -1))
        z_BCFhw = z_BCFhw + over_frames(now_F - then_F) * v
        x0_BCFhw = z_BCFhw + over_frames(then_F) * v
        if pinned:
            z_BCFhw, x0_BCFhw = pinned.at(z_BCFhw, then_F), pinned.at(x0_BCFhw, torch.zeros_like(then_F))
        yield step, z_BCFhw, x0_BCFhw


def windowed(velocity: Velocity, windows: Iterator[Sequence[Window]], unknown_C1hw: Tensor) -> Velocity:
    """Return a velocity whose network sees windows of the latent frames; each call uses the next item of `windows`.

    Where windows overlap, their mean is taken; frames in no window have velocity 0. None in a window stands for
    `unknown_C1hw`, at level 1.
    """

    def seen(z_BCFhw: Tensor, sigma_BF: Tensor) -> Tensor:
        total, count_F = torch.zeros_like(z_BCFhw), z_BCFhw.new_zeros(z_BCFhw.shape[2])
        for window in next(windows):
            frames = [frame for frame in window if frame is not None]
            head = len(window) - len(frames)
            before = unknown_C1hw.to(z_BCFhw).expand(len(z_BCFhw), -1, head, -1, -1)
            v = velocity(
                torch.cat([before, z_BCFhw[:, :, frames]], 2),
                torch.cat([sigma_BF.new_ones(len(sigma_BF), head), sigma_BF[:, frames]], 1),
            )
            total[:, :, frames] += v[:, :, head:]
            count_F[frames] += 1
        return total / over_frames(count_F.clamp(min=1))

    return seen


def guided(predict: Predict, text: TextFeatures, null: TextFeatures, guidance: float | Tensor) -> Velocity:
    """Return v_null + g * (v_text - v_null), both computed in one call; g = 1 leaves the null pass out.

    `guidance` is a number for all samples, or a tensor (B,) of numbers other than 1.
    """
    if isinstance(guidance, Tensor):
        guidance = guidance[:, None, None, None, None]
    elif guidance == 1:
        return lambda z, sigma: predict(z, sigma, text)
    both = TextFeatures.cat([null, text])

    def velocity(z_BCFhw: Tensor, sigma_BF: Tensor) -> Tensor:
        twice = predict(torch.cat([z_BCFhw] * 2), torch.cat([sigma_BF] * 2), both)
        v_null, v_text = twice.chunk(2)
        return v_null + guidance * (v_text - v_null)

    return velocity


def within_memory(predict: Predict) -> Predict:
    """Return `predict` for batches that may not fit in memory: where it runs out, halves are computed one by one.

    What fitted is kept for the next calls. The null and the text half of guidance are samples of the batch, too.

    Raises:
        Exception: that of `predict`, where one sample does not fit.
    """
    largest = sys.maxsize  # samples that are computed at once

    def smaller(z_BCFhw: Tensor, sigma_BF: Tensor, text: TextFeatures) -> Tensor:
        nonlocal largest
        while True:
            try:
                if len(z_BCFhw) <= largest:
                    return predict(z_BCFhw, sigma_BF, text)
                parts = zip(z_BCFhw.split(largest), sigma_BF.split(largest), text.split(largest), strict=True)
                return torch.cat([predict(*part) for part in parts])
            except Exception as error:
                samples = min(len(z_BCFhw), largest)
                if samples == 1 or not is_out_of_memory(error):
                    raise
                largest = (samples + 1) // 2
                log.warning("out of memory with %d samples in a batch: trying %d at a time", samples, largest)
            torch.cuda.empty_cache()  # here, where the error no longer holds what did not fit

    return smaller
