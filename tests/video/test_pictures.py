"""Still pictures: turned upright, made opaque and fitted to a size; other kinds of files are rejected."""

import numpy as np
import pytest
from PIL import Image

from pusa.errors import MediaError
from pusa.video.fit import fit_frames
from pusa.video.media import read_image


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pictures_are_turned_upright(tmp_path, kind):
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:20] = 255
    exif = Image.Exif()
    exif[0x112] = 8  # to be shown turned by 90 degrees to the left
    Image.fromarray(picture).save(tmp_path / "a", kind, exif=exif, quality=95)
    (upright,) = read_image(tmp_path / "a")
    assert upright.shape == (60, 40, 3)
    assert upright[:, :18].mean() > 240 and upright[:, 22:].mean() < 15


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_show_the_background(tmp_path, mode):
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 8, 16))
    (image.convert("LA").convert("RGBA").convert("P") if mode == "P" else image.convert(mode)).save(
        tmp_path / "a.png", **({"transparency": 0} if mode == "P" else {})
    )
    left = read_image(tmp_path / "a.png", "white")[0][:, :8]
    assert (left == 255).all() and (read_image(tmp_path / "a.png")[0] == 0).all()
    if mode != "P":
        assert (read_image(tmp_path / "a.png", "white")[0][:, 8:] == 0).all()
    assert (read_image(tmp_path / "a.png", "#ff0000")[0][0, 0] == (255, 0, 0)).all()


def test_sixteen_bits_become_eight(tmp_path):
    Image.fromarray((np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png")[0, ..., 0].reshape(-1) == np.arange(256)).all()


def test_files_of_other_kinds_are_rejected_as_pictures(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.gif")
    (tmp_path / "b.png").write_text("%!PS-Adobe-3.0 EPSF-3.0")
    for name in ("a.gif", "b.png"):
        with pytest.raises(MediaError, match="is not a picture; expected PNG, JPEG, WEBP"):
            read_image(tmp_path / name)
    with pytest.raises(MediaError, match=r"none\.png cannot be read"):
        read_image(tmp_path / "none.png")


def test_fit_crops_pads_and_stretches():
    wide = np.zeros((1, 20, 40, 3), np.uint8)
    wide[:, :, 10:30] = 255
    crop, pad, stretch = (fit_frames(wide, 20, 20, how, "red")[0] for how in ("crop", "pad", "stretch"))
    assert (crop == 255).all()
    assert (pad[:4] == (255, 0, 0)).all() and (pad[-4:] == (255, 0, 0)).all() and (pad[8:12, 8:12] == 255).all()
    assert (stretch[:, :2] == 0).all() and (stretch[:, 8:12] == 255).all() and (stretch[:, -2:] == 0).all()
