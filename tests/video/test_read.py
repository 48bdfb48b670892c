from pathlib import Path

import numpy as np
import pytest

from pusa.errors import ManifestError, Rejected
from pusa.video.decoders import DECODERS, read_clip
from pusa.video.fit import compute_placement
from pusa.video.media import probe, read_frames
from tests.helpers.decoder_stand_ins import MOVING, cut, frames_of, video

FRAMES = [3, 3, 4, 10, 11, 12, 30, 47]


@pytest.mark.parametrize("decoder", DECODERS)
def test_exactly_these_frames(moving, decoder):
    expected = frames_of(moving, 160, 96)
    np.testing.assert_array_equal(read_clip(moving, FRAMES, decoder, 30), expected[FRAMES])
    np.testing.assert_array_equal(read_clip(moving, [46], decoder, 30), expected[[46]])
    late = [40, 42, 41, 42]
    np.testing.assert_array_equal(read_clip(moving, late, decoder, 30, start_time=40 / 24), expected[late])


@pytest.mark.parametrize("decoder", DECODERS)
def test_frames_are_fitted(moving, decoder):
    place = compute_placement(160, 96, 1, 48, 48)
    expected = np.stack([place.apply(frame) for frame in frames_of(moving, 160, 96)[FRAMES]])
    np.testing.assert_array_equal(read_clip(moving, FRAMES, decoder, 30, place), expected)


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_refuses_by_the_same_names(moving, tmp_path, decoder):
    def reason(path, frames, seconds=30.0, place=None):
        with pytest.raises(Rejected) as caught:
            read_clip(path, frames, decoder, seconds, place)
        return caught.value.reason

    assert reason(moving, [0, 48]) == "damaged"
    assert reason(moving, [0, 47], seconds=0.001) == "timeout"
    assert reason(tmp_path / "gone.mp4", [0]) == "unreadable"
    assert reason(moving, [0], place=compute_placement(320, 192, 1, 8, 8)) == "damaged"
    torn = cut(video(tmp_path / "a.mp4", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-movflags", "+faststart"), 0.6)
    assert reason(torn, range(48)) == "damaged"


def test_an_unknown_decoder_is_named(moving):
    with pytest.raises(ManifestError, match="'other'; allowed are decord, ffmpeg_seek, ffmpeg"):
        read_clip(moving, [0], "other", 30)


def test_given_clips_are_read_right_whatever_they_are(kinds, tmp_path):
    for kind in ("av1", "avi", "rotated90", "hevc10"):
        facts = probe(kinds[kind])
        assert (facts.num_frames, facts.width, facts.height) == (24, 160, 96)
        assert read_frames(kinds[kind], [23, 0, 0]).shape == (3, 96, 160, 3)
    assert probe(kinds["anamorphic"]).pixel_aspect == 2


def test_a_given_clip_that_changed_is_looked_at_again(tmp_path):
    path = video(tmp_path / "a.mp4")
    assert probe(path).num_frames == 48
    video(path, source=MOVING.replace("duration=2", "duration=1"))
    assert probe(path).num_frames == 24
    with pytest.raises(Rejected, match="no file"):
        probe(Path(tmp_path))
