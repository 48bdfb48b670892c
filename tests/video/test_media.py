from pathlib import Path

import pytest

from pusa.errors import Rejected
from pusa.video.media import probe, read_frames
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
