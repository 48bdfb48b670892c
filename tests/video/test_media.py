import resource
from pathlib import Path

import numpy as np
import pytest

from pusa.errors import Rejected
from pusa.video.media import probe, read_frames, write_video
from tests.helpers.media import MOVING, encoded_video, raw_video, stream_facts

COLOURS = [
    (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255), (200, 30, 30), (30, 160, 40),
    (40, 50, 210), (128, 128, 128), (0, 0, 0), (255, 255, 255), (16, 16, 16), (235, 235, 235), (190, 60, 180),
    (1, 4, 2),
]  # fmt: skip


def test_clips_of_all_kinds_are_probed_and_read(kinds):
    for kind in ("av1", "avi", "rotated90", "hevc10"):
        facts = probe(kinds[kind])
        assert (facts.num_frames, facts.width, facts.height) == (24, 160, 96)
        assert read_frames(kinds[kind], [23, 0, 0]).shape == (3, 96, 160, 3)
    assert probe(kinds["anamorphic"]).pixel_aspect == 2


def test_a_changed_clip_is_probed_again(tmp_path):
    path = encoded_video(tmp_path / "a.mp4")
    assert probe(path).num_frames == 48
    encoded_video(path, source=MOVING.replace("duration=2", "duration=1"))
    assert probe(path).num_frames == 24
    with pytest.raises(Rejected, match="is not a regular file"):
        probe(Path(tmp_path))


@pytest.mark.parametrize("size", [(64, 64), (256, 144), (848, 480), (1280, 720), (144, 1000)])
def test_written_colours_are_bt709_in_limited_range_and_said_to_be(tmp_path, size):
    width, height = size
    squares_44C = np.array(COLOURS, np.uint8).reshape(4, 4, 3)
    frame = squares_44C.repeat(-(-height // 4), 0).repeat(-(-width // 4), 1)[:height, :width]
    path = tmp_path / "a.mp4"
    write_video(path, np.repeat(frame[None], 3, 0), 24)

    planes = raw_video(path).reshape(3, -1).astype(float)  # as the file stores them: no conversion by ffmpeg
    luma, blue, red = np.split(planes, [width * height, width * height * 5 // 4], 1)
    luma = (luma.reshape(3, height, width) - 16) / 219
    blue, red = ((x.reshape(3, height // 2, width // 2).repeat(2, 1).repeat(2, 2) - 128) / 224 for x in (blue, red))
    r, b = luma + 2 * (1 - 0.2126) * red, luma + 2 * (1 - 0.0722) * blue
    shown = np.stack([r, (luma - 0.2126 * r - 0.0722 * b) / 0.7152, b], -1) * 255
    rows, columns = ((np.arange(4) * 2 + 1) * n // 8 for n in (height, width))  # the middles of the squares
    assert np.abs(shown[:, rows[:, None], columns] - squares_44C).max() < 3

    assert "(tv, bt709," in stream_facts(path)  # range; matrix, primaries and transfer, as they are the same
    assert b"colrnclx" + bytes([0, 1, 0, 1, 0, 1, 0]) in path.read_bytes()
    assert np.abs(read_frames(path, [2])[0, rows[:, None], columns].astype(int) - squares_44C).max() < 3


def test_a_video_that_was_not_written_whole_is_deleted(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (31, 64, 64, 3), np.uint8)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"written completely|ffmpeg"):
            write_video(tmp_path / "a.mp4", frames, 24)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert not list(tmp_path.iterdir())
