import numpy as np
import pytest

from pusa.errors import ManifestError, Rejected
from pusa.video.decoders import DECODERS, read_clip
from pusa.video.fit import compute_placement
from tests.helpers.media import all_frames, encoded_video, truncate

FRAMES = [3, 3, 4, 10, 11, 12, 30, 47]


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_decoder_returns_exactly_these_frames(moving, decoder):
    expected = all_frames(moving, 160, 96)
    np.testing.assert_array_equal(read_clip(moving, FRAMES, decoder, 30), expected[FRAMES])
    np.testing.assert_array_equal(read_clip(moving, [46], decoder, 30), expected[[46]])
    late = [40, 42, 41, 42]
    np.testing.assert_array_equal(read_clip(moving, late, decoder, 30, start_time=40 / 24), expected[late])


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_decoder_fits_the_frames(moving, decoder):
    place = compute_placement(160, 96, 1, 48, 48)
    expected = np.stack([place.apply(frame) for frame in all_frames(moving, 160, 96)[FRAMES]])
    np.testing.assert_array_equal(read_clip(moving, FRAMES, decoder, 30, place), expected)


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_rejects_with_the_same_reasons(moving, tmp_path, decoder):
    def reason(path, frames, seconds=30.0, place=None):
        with pytest.raises(Rejected) as caught:
            read_clip(path, frames, decoder, seconds, place)
        return caught.value.reason

    assert reason(moving, [0, 48]) == "damaged"
    assert reason(moving, [0, 47], seconds=0.001) == "timeout"
    assert reason(tmp_path / "gone.mp4", [0]) == "unreadable"
    assert reason(moving, [0], place=compute_placement(320, 192, 1, 8, 8)) == "damaged"
    torn = truncate(
        encoded_video(tmp_path / "a.mp4", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-movflags", "+faststart"), 0.6
    )
    assert reason(torn, range(48)) == "damaged"


def test_an_unknown_decoder_is_refused_with_the_known_names(moving):
    with pytest.raises(ManifestError, match="'other'; allowed are decord, ffmpeg_seek, ffmpeg"):
        read_clip(moving, [0], "other", 30)
