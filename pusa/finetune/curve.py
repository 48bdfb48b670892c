"""Draw the loss of a run: every step faint, the running mean strong, skipped steps as marks at the bottom.

However long the run is, at most two points for each pixel column are drawn.
"""

import math
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:  # matplotlib is imported when a picture is made, and not before
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (960, 360)  # pixels
DPI = 100
POINT = 72 / DPI  # a pixel, in the unit of matplotlib's widths
MARGINS = (64, 34, 30, 44)  # pixels left, above, right and below of the axes
BUCKETS = SIZE[0]  # of a long run; more points would fall on the same pixels
MEAN_SHARE = 40  # the running mean is over one part in 40 of the steps
INK, GRID, FAINT, STRONG, BAD = (85, 85, 85), (226, 226, 226), (168, 196, 232), (24, 82, 168), (200, 40, 40)


def loss_curve(steps: np.ndarray, losses: np.ndarray, buckets: int = BUCKETS) -> Image.Image:
    """Return the picture of `loss_figure`, RGB, of the size `SIZE`."""
    buffer = BytesIO()
    loss_figure(steps, losses, buckets).savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def loss_figure(steps: np.ndarray, losses: np.ndarray, buckets: int = BUCKETS) -> "Figure":
    """Draw the losses over the steps.

    Args:
        steps: numbers of the steps, (N,).
        losses: their losses, (N,), NaN where a step was skipped.
        buckets: the curves show the lowest and the highest loss of this many parts of the run.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a display
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    width, height = SIZE
    left, top, right, bottom = MARGINS
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    )
    half = len(steps) // MEAN_SHARE // 2
    means = running_mean(losses, half)
    skipped = np.flatnonzero(~np.isfinite(losses))
    last = float(steps.max(initial=1))
    axes.set_xlim(min(float(steps.min(initial=1)), last - 1), last)
    axes.set_ylim(*_visible_range(losses, means))
    _draw_line(axes, steps, losses, buckets, FAINT, 1, "each step" if half else None)
    _draw_line(axes, steps, means, buckets, STRONG, 2, f"mean of {2 * half + 1:,} steps" if half else "each step")
    if len(skipped):
        _, first = np.unique(skipped * BUCKETS // len(losses), return_index=True)  # one mark for each pixel column
        axes.vlines(
            steps[skipped[first]], 0, 0.035, _colour(BAD), label=f"{len(skipped):,} skipped", linewidth=POINT,
            antialiased=False, transform=axes.get_xaxis_transform(), clip_on=False, zorder=4,
        )  # fmt: skip

    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:.4g}"))
    axes.tick_params(colors=_colour(INK), labelsize=9, length=3)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color=_colour(GRID), linewidth=POINT)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_colour(INK))
    axes.set_xlabel("step", color=_colour(INK), fontsize=9, loc="right", labelpad=2)
    axes.set_ylabel("loss", color=_colour(INK), fontsize=9, rotation=0)
    axes.yaxis.set_label_coords(-6 / (width - left - right), 1.05)
    if len(skipped) == len(losses):
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no step has a finite loss", color=_colour(INK), ha="center", transform=axes.transAxes)
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 1.005), borderaxespad=0, ncols=3, frameon=False, fontsize=9,
        labelcolor=_colour(INK), borderpad=0.2, handlelength=1.6,
    )  # fmt: skip
    return figure


def extremes(values: np.ndarray, buckets: int = BUCKETS) -> np.ndarray:
    """Return the indices of the lowest and the highest value of each bucket, in order, or all if there are few.

    A bucket of NaN alone gives one index.
    """
    if len(values) <= 2 * buckets:
        return np.arange(len(values))
    length = -(-len(values) // buckets)
    padded = np.pad(values, (0, -len(values) % length), constant_values=math.nan).reshape(-1, length)
    finite = np.isfinite(padded)
    lowest, highest = np.where(finite, padded, math.inf).argmin(1), np.where(finite, padded, -math.inf).argmax(1)
    return np.unique(np.stack([lowest, highest]) + np.arange(len(padded)) * length)


def running_mean(losses: np.ndarray, half: int) -> np.ndarray:
    """Return the mean of each step and the `half` steps before and after it; NaN where none of them has a loss."""
    finite = np.isfinite(losses)
    sums, counts = (np.concatenate([[0.0], np.cumsum(terms)]) for terms in (np.where(finite, losses, 0), finite))
    indices = np.arange(len(losses))
    first, end = np.maximum(indices - half, 0), np.minimum(indices + half + 1, len(losses))
    count = counts[end] - counts[first]
    return np.where(count > 0, sums[end] - sums[first], math.nan) / np.maximum(count, 1)


def _visible_range(losses: np.ndarray, means: np.ndarray) -> tuple[float, float]:
    """Return the limits of the loss axis.

    They hold all of the mean and 98 % of the steps, so that one wild step does not squeeze the rest.
    """
    finite = losses[np.isfinite(losses)]
    if not len(finite):
        return 0.0, 1.0
    usual = np.concatenate([np.percentile(finite, (1, 99)), means[np.isfinite(means)]])
    low, high = float(usual.min()), float(usual.max())
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    return low - margin, high + margin


def _draw_line(
    axes: "Axes",
    steps: np.ndarray,
    values: np.ndarray,
    buckets: int,
    colour: tuple[int, int, int],
    width: float,
    label: str | None,
) -> None:
    """Draw a line that is broken where there is no value; a value between two such gaps is a dot."""
    shown = extremes(values, buckets)
    x, y = steps[shown], np.clip(values[shown], *axes.get_ylim())  # a value outside is drawn at the edge
    finite = np.concatenate([[False], np.isfinite(y), [False]])
    alone = finite[1:-1] & ~finite[:-2] & ~finite[2:]
    ink = _colour(colour)
    axes.plot(x, y, color=ink, linewidth=width * POINT, label=label, solid_capstyle="round", zorder=3)
    axes.plot(x[alone], y[alone], ".", color=ink, markersize=(3 + 2 * width) * POINT, zorder=3, clip_on=False)


def _colour(rgb: tuple[int, int, int]) -> tuple[float, float, float]:
    red, green, blue = rgb
    return red / 255, green / 255, blue / 255
