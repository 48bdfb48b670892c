import resource
from pathlib import Path

import numpy as np
import pytest

from pusa.errors import Rejected
from pusa.video.media import probe, read_frames, write_video
from tests.helpers.media import MOVING, encoded_video


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
