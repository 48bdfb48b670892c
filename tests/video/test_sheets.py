"""Strips and sheets of any shape and number fit into a JPEG file, and their labels are drawn whatever they hold."""

import numpy as np
import pytest

from pusa.video.media import write_image
from pusa.video.sheets import (
    GAP,
    LABEL_WIDTH,
    SHEET_PIXELS,
    SHEET_SIDE,
    STRIP_HEIGHT,
    STRIP_WIDTH,
    film_strip,
    labelled_strip,
    stack_pictures,
    text_banner,
)

SHAPES = [(8, 16, 4096), (8, 1, 9000), (8, 4096, 16), (3, 9000, 1), (1, 1, 1), (1, 2, 60_000)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_strip_of_any_shape_fits_into_a_jpeg(tmp_path, shape):
    strip = labelled_strip("a", np.zeros((*shape, 3), np.uint8))
    assert strip.shape[0] == STRIP_HEIGHT and strip.shape[1] <= LABEL_WIDTH + STRIP_WIDTH + shape[0]
    write_image(tmp_path / "a.jpg", stack_pictures([strip, strip]))


def test_a_strip_keeps_the_shape_of_its_frames():
    assert film_strip(np.zeros((8, 64, 96, 3), np.uint8)).shape == (96, 8 * 144, 3)
    assert film_strip(np.zeros((8, 16, 4096, 3), np.uint8)).shape == (2, 4096, 3)


@pytest.mark.parametrize("shape, count", [((200, 9), 400), ((1, 70_000), 3), ((3000, 3000), 6)])
def test_a_sheet_that_would_be_too_large_is_scaled_down(shape, count):
    sheet = stack_pictures([np.zeros((*shape, 3), np.uint8)] * count)
    assert max(sheet.shape) <= SHEET_SIDE and sheet.shape[0] * sheet.shape[1] <= 1.01 * SHEET_PIXELS


def test_a_sheet_that_fits_is_not_scaled():
    pictures = [np.full((3, 5, 3), 10, np.uint8), np.full((2, 4, 3), 20, np.uint8)]
    sheet = stack_pictures(pictures)
    assert sheet.shape == (3 + GAP + 2 + GAP, 5, 3)
    assert (sheet[:3] == 10).all() and (sheet[3 + GAP : 5 + GAP, :4] == 20).all() and (sheet[3:, 4] == 255).all()


@pytest.mark.parametrize("text", ["", "\x00\x1b[2J\u202e\ud800", "x" * 1_000_000, "a\n" * 100_000, "日本 \U0001f600"])
def test_a_label_of_any_text_is_drawn(text):
    assert labelled_strip(text, np.zeros((2, 8, 8, 3), np.uint8)).shape == (96, 150 + 2 * 96, 3)
    assert text_banner(text, 800).shape[0] <= 82
