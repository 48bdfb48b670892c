"""A video becomes a small picture that moves, with as many frames as a number of bytes holds."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from pusa.errors import MediaError
from pusa.video.animations import BOX, FRAMES, Animation
from pusa.video.media import write_video


def opened(webp: bytes) -> Image.Image:
    return Image.open(BytesIO(webp))


@pytest.mark.parametrize("size, small", [((64, 96), (160, 107)), ((96, 64), (160, 240)), ((16, 320), (160, 8))])
def test_a_video_keeps_its_shape_and_its_duration(tmp_path, size, small):
    frames = np.linspace(0, 255, 31).astype(np.uint8)[:, None, None, None] * np.ones((1, *size, 3), np.uint8)
    write_video(tmp_path / "a.mp4", frames, fps=24)
    webp = opened(Animation.read(tmp_path / "a.mp4").webp(10**6))
    assert (webp.format, webp.size) == ("WEBP", small) and 5 < webp.n_frames <= FRAMES[0]  # equal frames become one
    assert webp.size[0] <= BOX[0] and webp.size[1] <= BOX[1]
    shades, milliseconds = [], 0
    for i in range(webp.n_frames):
        webp.seek(i)
        shades.append(np.asarray(webp.convert("RGB")).mean())
        milliseconds += webp.info["duration"]
    assert shades == sorted(shades) and shades[0] < 20 and shades[-1] > 220
    assert milliseconds == pytest.approx(31 / 24 * 1000, abs=FRAMES[0])


def test_frames_are_left_out_until_the_picture_is_small_enough():
    noise = np.random.default_rng(0).integers(0, 256, (24, 30, 40, 3), np.uint8)
    animation = Animation(noise, 1.0)
    sizes = [len(animation.webp(10**7))]
    while (webp := animation.webp(sizes[-1] - 1)) is not None:
        sizes.append(len(webp))
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == len(FRAMES)
    assert animation.webp(sizes[-1]) is not None and animation.webp(0) is None


def test_a_file_that_is_no_video_is_refused(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(MediaError):
        Animation.read(tmp_path / "a.mp4")
