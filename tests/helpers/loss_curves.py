"""Losses of a run that never was, and where a picture has a colour."""

import numpy as np
from PIL import Image

LEGEND_ROWS = 30


def noisy(count: int, skipped=()) -> list[tuple[int, float | None]]:
    """Return steps with noisy, falling losses; None for the skipped ones, counted from 0."""
    dice = np.random.default_rng(0)
    losses = 0.4 + np.exp(-np.arange(count) / count) + 0.1 * dice.standard_normal(count)
    return [(i + 1, None if i in skipped else float(loss)) for i, loss in enumerate(losses)]


def inked(picture: Image.Image, colour) -> np.ndarray:
    """Return the columns and rows, (N, 2), of the pixels below the legend that are close to a colour."""
    near = np.abs(np.asarray(picture.convert("RGB"), int) - colour).sum(-1) < 40
    near[:LEGEND_ROWS] = False
    return np.argwhere(near)[:, ::-1]
