"""A loss curve as a picture: every step faint, their running mean strong, skipped steps as marks at the bottom."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pusa.video.fit import LANCZOS

SIZE = (960, 360)  # pixels
FINER = 2  # drawn so much larger, then made smaller: smooth lines
MARGINS = (64, 34, 30, 40)  # left, top, right, bottom of the axes
BUCKETS = SIZE[0]  # of a long run: more could not be seen
SHARE = 40  # the running mean is over this part of the steps
INK, GRID, FAINT, STRONG, BAD = (85, 85, 85), (226, 226, 226), (168, 196, 232), (24, 82, 168), (200, 40, 40)
Range = tuple[float, float]


@dataclass(frozen=True)
class Axes:
    """Where steps and losses lie on a canvas."""

    canvas: ImageDraw.ImageDraw
    steps: Range
    losses: Range

    def x(self, step: float) -> float:
        """The pixel of a step."""
        return FINER * (MARGINS[0] + _share(step, self.steps) * (SIZE[0] - MARGINS[0] - MARGINS[2]))

    def y(self, loss: float) -> float:
        """The pixel of a loss; what lies outside the axes goes to their edge."""
        share = min(1.0, max(0.0, _share(loss, self.losses)))
        return FINER * (SIZE[1] - MARGINS[3] - share * (SIZE[1] - MARGINS[1] - MARGINS[3]))

    def text(self, x: float, y: float, words: str, anchor: str, ink: tuple[int, int, int] = INK) -> None:
        """Words at a pixel of the canvas."""
        self.canvas.text((x, y), words, ink, ImageFont.load_default(13 * FINER), anchor=anchor)

    def curve(self, steps: np.ndarray, losses: np.ndarray, ink: tuple[int, int, int], width: float) -> None:
        """A line from step to step, broken where there is no loss."""
        for run in _runs(np.isfinite(losses)):
            places = [(self.x(steps[i]), self.y(losses[i])) for i in run]
            self.canvas.line(places, ink, round(width * FINER), "curve")
            for x, y in (places[0], places[-1]):
                radius = width * FINER
                self.canvas.ellipse((x - radius, y - radius, x + radius, y + radius), ink)


def loss_curve(steps: np.ndarray, losses: np.ndarray) -> Image.Image:
    """A picture of `SIZE`.

    Args:
        steps: which were made, (N,).
        losses: theirs, (N,), NaN where a step was skipped.
    """
    half = len(steps) // SHARE // 2
    means = running_mean(losses, half)
    skipped = np.flatnonzero(~np.isfinite(losses))
    picture = Image.new("RGB", (SIZE[0] * FINER, SIZE[1] * FINER), "white")
    last = float(steps.max(initial=1))
    axes = Axes(ImageDraw.Draw(picture), (min(float(steps.min(initial=1)), last - 1), last), _range(losses, means))
    _draw_axes(axes, len(skipped) < len(losses))
    for values, ink, width in ((losses, FAINT, 1), (means, STRONG, 2)):
        seen = extremes(values)
        axes.curve(steps[seen], values[seen], ink, width)
    _, first = np.unique(skipped * BUCKETS // max(1, len(losses)), return_index=True)
    _draw_skipped(axes, steps[skipped[first]])
    _draw_legend(axes, 2 * half + 1, len(skipped))
    return picture.resize(SIZE, LANCZOS)


def extremes(values: np.ndarray, buckets: int = BUCKETS) -> np.ndarray:
    """Where the least and the greatest of each of so many stretches are, in order; all places where they are few.

    A stretch of NaN alone gives one of them.
    """
    if len(values) <= 2 * buckets:
        return np.arange(len(values))
    length = -(-len(values) // buckets)
    padded = np.pad(values, (0, -len(values) % length), constant_values=math.nan).reshape(-1, length)
    known = np.isfinite(padded)
    least, greatest = np.where(known, padded, math.inf).argmin(1), np.where(known, padded, -math.inf).argmax(1)
    return np.unique(np.stack([least, greatest]) + np.arange(len(padded)) * length)


def running_mean(losses: np.ndarray, half: int) -> np.ndarray:
    """Of each step and the `half` before and after it, those without a loss left out; NaN where no loss is near."""
    known = np.isfinite(losses)
    sums, counts = (np.concatenate([[0.0], np.cumsum(some)]) for some in (np.where(known, losses, 0), known))
    places = np.arange(len(losses))
    first, end = np.maximum(places - half, 0), np.minimum(places + half + 1, len(losses))
    count = counts[end] - counts[first]
    return np.where(count > 0, sums[end] - sums[first], math.nan) / np.maximum(count, 1)


def ticks(values: Range, most: int = 6) -> list[float]:
    """Round numbers within a range: multiples of 1, 2 or 5 times a power of ten."""
    low, high = values
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if (high - low) / (factor * power) < most)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _range(losses: np.ndarray, means: np.ndarray) -> Range:
    """What the axis shows: all of the mean, and of the single steps all but the few that would squeeze the rest."""
    known = losses[np.isfinite(losses)]
    if not len(known):
        return 0.0, 1.0
    usual = np.concatenate([np.percentile(known, (1, 99)), means[np.isfinite(means)]])
    low, high = float(usual.min()), float(usual.max())
    edge = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    return low - edge, high + edge


def _draw_axes(axes: Axes, any_loss: bool) -> None:
    left, right = axes.x(axes.steps[0]), axes.x(axes.steps[1])
    bottom, top = axes.y(axes.losses[0]), axes.y(axes.losses[1])
    for loss in ticks(axes.losses) if any_loss else ():
        axes.canvas.line((left, axes.y(loss), right, axes.y(loss)), GRID, FINER)
        axes.text(left - 6 * FINER, axes.y(loss), f"{loss:.4g}", "rm")
    for step in ticks(axes.steps, 10):
        if step == int(step):
            axes.canvas.line((axes.x(step), bottom, axes.x(step), bottom + 4 * FINER), INK, FINER)
            axes.text(axes.x(step), bottom + 8 * FINER, f"{step:.0f}", "mt")
    axes.canvas.line((left, top, left, bottom, right, bottom), INK, FINER)
    axes.text(left, 8 * FINER, "loss", "rt")
    axes.text(right, bottom + 24 * FINER, "step", "rt")
    if not any_loss:
        axes.text((left + right) / 2, (top + bottom) / 2, "no step has a finite loss", "mm")


def _draw_skipped(axes: Axes, steps: np.ndarray) -> None:
    bottom = axes.y(axes.losses[0])
    for step in steps:
        axes.canvas.line((axes.x(step), bottom - 10 * FINER, axes.x(step), bottom), BAD, FINER)


def _draw_legend(axes: Axes, window: int, skipped: int) -> None:
    x = axes.x(axes.steps[1])
    entries = [("each step", STRONG)] if window == 1 else [(f"mean of {window} steps", STRONG), ("each step", FAINT)]
    for words, ink in [(f"{skipped} skipped", BAD)] * (skipped > 0) + entries:
        axes.text(x, 8 * FINER, words, "rt")
        x -= ImageFont.load_default(13 * FINER).getlength(words) + 6 * FINER
        axes.canvas.line((x - 18 * FINER, 16 * FINER, x, 16 * FINER), ink, 3 * FINER)
        x -= 36 * FINER


def _share(value: float, whole: Range) -> float:
    return (float(value) - whole[0]) / (whole[1] - whole[0])


def _runs(known: np.ndarray) -> Iterator[range]:
    """The stretches of places that are known."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], known, [False]])))
    return (range(start, end) for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
