"""The loss curve: what it shows, of runs of any length."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pusa.finetune.curve import BAD, BUCKETS, FAINT, SIZE, STRONG, extremes, loss_curve, loss_figure, running_mean
from tests.helpers.loss_curves import inked, noisy


def drawn(points, buckets: int = BUCKETS) -> Image.Image:
    steps, losses = np.array([(step, np.nan if loss is None else loss) for step, loss in points]).T
    return loss_curve(steps, losses, buckets)


def test_the_curve_falls_where_the_loss_falls():
    places = inked(drawn(noisy(1000)), STRONG)
    left, right = (places[order][:, 1].mean() for order in (places[:, 0] < 200, places[:, 0] > 800))
    assert right > left + 100  # pixels are counted from the top


def test_one_wild_step_does_not_squeeze_the_rest():
    wild = noisy(1000)
    wild[500] = (501, 50.0)
    heights = [np.ptp(inked(drawn(points), FAINT)[:, 1]) for points in (noisy(1000), wild)]
    assert heights[1] > 0.9 * heights[0] > 200


def test_the_line_is_broken_where_steps_were_skipped():
    picture = drawn(noisy(300, range(100, 200)))
    columns = set(inked(picture, STRONG)[:, 0].tolist())
    assert not columns & set(range(380, 600)) and {200, 800} & columns


def test_a_long_run_is_drawn_from_a_bounded_number_of_points_with_its_outliers():
    losses = np.random.default_rng(0).random(300_001)
    losses[[7, 123_456, 300_000]] = 5, -3, 9
    seen = extremes(losses)
    assert len(seen) <= 2 * BUCKETS and (np.diff(seen) > 0).all()
    assert {7, 123_456, 300_000} <= set(seen.tolist())
    losses[100_000:200_000] = np.nan
    assert not np.isfinite(losses[extremes(losses)]).all()
    assert extremes(losses[: 2 * BUCKETS]).tolist() == list(range(2 * BUCKETS))


def test_a_long_run_looks_the_same_as_with_every_step_drawn():
    count = 20 * BUCKETS
    points = noisy(count, {9, *range(count // 2, count // 2 + count // 10)})
    short = drawn(points)
    whole = drawn(points, buckets=count)
    assert np.abs(np.asarray(short, int) - np.asarray(whole)).mean() < 2
    columns = [set(inked(picture, BAD)[:, 0].tolist()) for picture in (short, whole)]
    assert columns[0] == columns[1] and len(columns[0]) > SIZE[0] / 20


def test_the_running_mean_leaves_out_skipped_steps():
    losses = np.array([1.0, 3.0, np.nan, 5.0, 7.0, np.nan, np.nan, np.nan])
    expected = [2.0, 2.0, 4.0, 6.0, 6.0, 7.0, np.nan, np.nan]
    np.testing.assert_allclose(running_mean(losses, 1), expected)
    np.testing.assert_allclose(running_mean(losses, 0), losses)


@pytest.mark.parametrize("low, high", [(0, 1), (0.31, 0.36), (-2, 1), (1, 163), (0, 1e-9), (1e6, 3e6), (0, 9.99)])
def test_ticks_are_few_and_within_the_labelled_axes(low, high):
    steps = np.arange(1.0, 201)
    (axes,) = loss_figure(steps, np.linspace(low, high, 200)).axes
    for axis, (first, last) in ((axes.yaxis, axes.get_ylim()), (axes.xaxis, axes.get_xlim())):
        ticks = np.array([tick for tick in axis.get_ticklocs() if first <= tick <= last])
        assert 2 <= len(ticks) <= 9
        np.testing.assert_allclose(np.diff(ticks), ticks[1] - ticks[0])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss")


def test_the_legend_names_the_lines_and_the_skipped_steps():
    (axes,) = loss_figure(np.arange(1.0, 401), np.where(np.arange(400) % 100, 0.5, np.nan)).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["each step", "mean of 11 steps", "4 skipped"]


def test_matplotlib_is_imported_only_for_a_picture():
    script = "import sys, pusa.finetune.curve; assert not any(name.startswith('matplotlib') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
