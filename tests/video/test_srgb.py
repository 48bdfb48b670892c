"""Still pictures are converted to sRGB from the colour space that they state; expected colours are from its formula."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from pusa.errors import MediaError
from pusa.video.media import read_image, write_video
from tests.helpers import colours
from tests.helpers.colours import ADOBE, BT2020, D65, P3, PROPHOTO, as_srgb, chrm, gama, iccp, png
from tests.helpers.media import ffmpeg

CODES = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
CODES[0, :8] = [
    (0, 0, 0),
    (255, 255, 255),
    (1, 1, 1),
    (2, 0, 9),
    (128, 128, 128),
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
]
DEEP = np.random.default_rng(1).integers(0, 2**16, (24, 24, 3), np.uint16)
DEEP[:4] //= 64  # where eight bits of linear colours are too few
GREY, DEEP_GREY = CODES[..., :1], DEEP[..., :1]
MUTED = (DEEP_GREY * [0.9, 0.8, 0.7]).astype(np.uint16)  # in the gamut of sRGB, whatever their space
SRGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
WIDE = colours.rgb_profile(P3, 2.2)


def read(tmp_path, data: bytes, background="black") -> np.ndarray:
    (tmp_path / "a").write_bytes(data)
    return read_image(tmp_path / "a", background)[0].astype(int)


def saved(codes: np.ndarray, kind="JPEG", **options) -> bytes:
    """Return a file that holds these colours exactly, or nearly so as a JPEG."""
    buffer = io.BytesIO()
    mode = "CMYK" if codes.shape[-1] == 4 else None
    image = Image.frombytes(mode, codes.shape[1::-1], codes.tobytes()) if mode else Image.fromarray(codes.squeeze())
    image.save(
        buffer, kind, **{"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}[kind], **options
    )
    return buffer.getvalue()


def exif(space: int, index: str) -> Image.Exif:
    """Return Exif of a colour space and an interoperability index: 1 is sRGB, R03 is Adobe RGB."""
    values = Image.Exif()
    values[0x8769] = {0xA001: space, 0xA005: {1: index}}
    return values


@pytest.mark.parametrize(
    ("data", "codes", "space", "exponent"),
    [
        pytest.param(png(CODES, [iccp(WIDE)]), CODES, P3, 2.2, id="profile"),
        pytest.param(saved(CODES, "WEBP", icc_profile=WIDE), CODES, P3, 2.2, id="profile of WebP"),
        pytest.param(png(CODES, [iccp(colours.rgb_profile(PROPHOTO, 1.8))]), CODES, PROPHOTO, 1.8, id="D50"),
        pytest.param(png(CODES, [iccp(WIDE), gama(1), (b"sRGB", b"\0")]), CODES, P3, 2.2, id="profile before others"),
        pytest.param(png(DEEP, [iccp(WIDE)]), DEEP, P3, 2.2, id="profile, 16 bits"),
        pytest.param(png(MUTED, [iccp(colours.rgb_profile(P3, 1))]), MUTED, P3, 1, id="linear profile, 16 bits"),
        pytest.param(png(CODES, [gama(1)]), CODES, colours.SRGB, 1, id="linear"),
        pytest.param(png(DEEP, [gama(1)]), DEEP, colours.SRGB, 1, id="linear, 16 bits"),
        pytest.param(png(CODES, [gama(1 / 1.8), chrm(ADOBE)]), CODES, ADOBE, 1.8, id="gamma and primaries"),
        pytest.param(png(CODES, [chrm(PROPHOTO)]), CODES, PROPHOTO, None, id="primaries alone"),
        pytest.param(png(CODES, [(b"cICP", bytes([12, 13, 0, 1])), iccp(WIDE)]), CODES, P3, None, id="cICP first"),
        pytest.param(png(DEEP, [(b"cICP", bytes([9, 8, 0, 1]))]), DEEP, BT2020, 1, id="cICP, linear"),
        pytest.param(saved(CODES, "WEBP", exif=exif(65535, "R03")), CODES, ADOBE, 563 / 256, id="Exif of Adobe RGB"),
        pytest.param(
            saved(CODES, "WEBP", exif=exif(2, "")), CODES, ADOBE, 563 / 256, id="Exif as some cameras write it"
        ),
        pytest.param(png(GREY, [gama(1)]), GREY, colours.SRGB, 1, id="grey, linear"),
        pytest.param(png(DEEP_GREY, [gama(1)]), DEEP_GREY, colours.SRGB, 1, id="grey, linear, 16 bits"),
        pytest.param(png(GREY, [iccp(colours.grey_profile(1.8))]), GREY, colours.SRGB, 1.8, id="grey profile"),
        pytest.param(
            png(DEEP_GREY, [iccp(colours.grey_profile(1))]), DEEP_GREY, colours.SRGB, 1, id="the same, 16 bits"
        ),
        pytest.param(
            png(GREY, [iccp(colours.rgb_profile(P3, 1.8))]), GREY, P3, 1.8, id="RGB profile of a grey picture"
        ),
    ],
)
def test_colours_are_converted_by_the_formula(tmp_path, data, codes, space, exponent):
    expected = as_srgb(np.repeat(codes, 3, 2) if codes.shape[2] == 1 else codes, space, exponent)
    assert np.abs(read(tmp_path, data) - expected).max() < 2
    assert np.abs(expected - (codes / np.iinfo(codes.dtype).max * 255)).max() > 15  # there is something to convert


def test_the_colours_of_a_jpeg_are_converted(tmp_path):
    flat = np.full((16, 16, 3), (200, 120, 60), np.uint8)
    for options, space, exponent in (
        ({"icc_profile": WIDE}, P3, 2.2),
        ({"icc_profile": colours.rgb_profile(P3, 2.2, more=[(b"pads", bytes(150_000))])}, P3, 2.2),  # in three segments
        ({"exif": exif(65535, "R03")}, ADOBE, 563 / 256),
    ):
        assert np.abs(read(tmp_path, saved(flat, **options)) - as_srgb(flat, space, exponent)).max() < 4


def test_inks_are_converted_by_their_profile(tmp_path, caplog):
    shown = np.random.default_rng(2).integers(30, 226, (2, 2, 2, 2, 3))
    shown[0, 0, 0, 0], shown[..., 1, :] = 255, 0  # paper, and black ink
    inks = np.stack(np.meshgrid(*[[0, 255]] * 4, indexing="ij"), -1).astype(np.uint8)
    for index in np.ndindex(2, 2, 2, 2):
        flat = np.broadcast_to(inks[index], (8, 8, 4))
        got = read(tmp_path, saved(flat, icc_profile=colours.cmyk_profile(shown)))
        assert np.abs(got - shown[index]).max() <= 3, index
    assert not caplog.records
    assert np.abs(read(tmp_path, saved(np.full((8, 8, 4), (255, 0, 0, 0), np.uint8))) - (0, 255, 255)).max() <= 2
    assert "is CMYK without a colour profile" in caplog.text


@pytest.mark.parametrize(
    "chunks",
    [
        [iccp(SRGB_PROFILE)],
        [(b"sRGB", b"\0"), gama(1), chrm(P3)],
        [gama(0.45455), chrm(colours.SRGB)],
        [(b"cICP", bytes([1, 13, 0, 1])), iccp(WIDE)],
        [(b"cICP", bytes([1, 1, 0, 1])), gama(1 / 1.961)],  # ffmpeg's frame of a BT.709 video
        [gama(1 / 1.961), chrm(colours.SRGB)],  # and an older ffmpeg's
        [(b"eXIf", exif(1, "R98").tobytes()[6:])],
    ],
    ids=lambda chunks: "+".join(name.decode() for name, _ in chunks),
)
def test_pictures_in_srgb_are_not_changed(tmp_path, chunks):
    for codes in (CODES, GREY, DEEP, DEEP_GREY):
        expected = (codes >> 8 if codes.dtype == np.uint16 else codes) + np.zeros(3, int)
        assert (read(tmp_path, png(codes, chunks)) == expected).all()


def test_a_frame_that_ffmpeg_takes_from_a_written_video_is_the_same_picture(tmp_path):
    flat = np.full((3, 64, 64, 3), (200, 60, 30), np.uint8)
    write_video(tmp_path / "a.mp4", flat, 24)
    ffmpeg("-i", tmp_path / "a.mp4", "-frames:v", 1, tmp_path / "a.png")
    assert np.abs(read_image(tmp_path / "a.png").astype(int) - flat[0]).max() <= 3


def test_a_profile_for_other_pixels_is_ignored_and_logged(tmp_path, caplog):
    inks = colours.cmyk_profile(np.zeros((2, 2, 2, 2, 3)))
    cases = [(CODES, inks, "CMYK"), (GREY, inks, "CMYK"), (CODES, colours.grey_profile(1.8), "GRAY")]
    for codes, profile, kind in cases:
        caplog.clear()
        assert (read(tmp_path, png(codes, [iccp(profile)])) == codes).all()
        assert f"{tmp_path / 'a'} has a colour profile for {kind}, which is not what it holds" in caplog.text


CUT = saved(CODES, icc_profile=colours.rgb_profile(P3, 2.2, more=[(b"pads", bytes(150_000))]))
REFUSED = {
    "bad zlib": (png(CODES, [(b"iCCP", b"Test\0\0" + b"no zlib")]), "profile that is damaged or incomplete"),
    "a part missing": (CUT.replace(b"ICC_PROFILE\0\2", b"OTHER_THING\0\2"), "profile that is damaged or incomplete"),
    "cut": (png(CODES, [iccp(WIDE[:300])]), "profile that cannot be used"),
    "no profile": (saved(CODES, "WEBP", icc_profile=b"not a profile"), "profile that cannot be used"),
    "too large": (
        png(CODES, [iccp(WIDE + bytes(2_000_000))]),
        "cannot be read as a picture: Decompressed data too large",
    ),
    "PQ": (png(DEEP, [(b"cICP", bytes([9, 16, 0, 1]))]), r"is HDR \(PQ, by its cICP chunk\)"),
    "HLG": (png(DEEP, [(b"cICP", bytes([9, 18, 0, 1]))]), r"is HDR \(HLG, by its cICP chunk\)"),
    "PQ by name": (png(CODES, [iccp(WIDE, b"ITUR_2100_PQ_FULL")]), r"is HDR \(PQ, by its colour profile's name\)"),
    "HLG by description": (
        saved(CODES, icc_profile=colours.rgb_profile(BT2020, 2.2, "Rec. ITU-R BT.2100 HLG")),
        r"is HDR \(HLG, by its colour profile\)",
    ),
    "PQ by tag": (
        saved(CODES, icc_profile=colours.rgb_profile(BT2020, 2.2, more=[(b"cicp", b"cicp\0\0\0\0\x09\x10\0\1")])),
        r"is HDR \(PQ, by its colour profile\)",
    ),
    "limited range": (png(CODES, [(b"cICP", bytes([1, 1, 0, 0]))]), "unknown kind, 1/1/0/0 by its cICP chunk"),
    "unknown primaries": (png(CODES, [(b"cICP", bytes([99, 1, 0, 1]))]), "unknown kind, 99/1/0/1"),
    "short cICP": (png(CODES, [(b"cICP", b"\1")]), "cICP chunk of 1 bytes; expected 4"),
    "no gamma": (png(CODES, [gama(0)]), r"gAMA chunk of 0\.0; expected 0\.1 to 10"),
    "no primaries": (png(CODES, [chrm([(0, 0)] * 4)]), "cHRM chunk that gives no colours"),
    "one primary": (png(CODES, [chrm([D65] * 4)]), "cHRM chunk that gives no colours"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_pictures_with_damaged_or_unknown_colours_are_refused(tmp_path, case):
    data, message = REFUSED[case]
    with pytest.raises(MediaError, match=message) as error:
        read(tmp_path, data)
    assert str(error.value).startswith(f"{tmp_path / 'a'} ")


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_transparent_pixels_show_the_background_as_it_is_in_srgb(tmp_path, kind):
    top = np.iinfo(kind).max
    codes = np.full((8, 8, 4), np.array([200, 40, 90, 0]) * (top // 255), kind)
    codes[:, 2:4, 3], codes[:, 4:, 3] = top // 3, top
    expected = as_srgb(codes[..., :3], P3, 2.2)
    share = codes[..., 3:] / top
    got = read(tmp_path, png(codes, [iccp(WIDE)]), "#c86432")
    assert np.abs(got - (share * expected + (1 - share) * (0xC8, 0x64, 0x32))).max() < 3
    greys = codes[..., 1:3][..., [1, 1]].copy()
    greys[..., 1] = codes[..., 3]
    expected = as_srgb(np.repeat(greys[..., :1], 3, 2), exponent=1)
    got = read(tmp_path, png(greys, [gama(1)]), "#c86432")
    assert np.abs(got - (share * expected + (1 - share) * (0xC8, 0x64, 0x32))).max() < 3


def test_a_transparent_colour_is_compared_before_it_is_converted(tmp_path):
    for codes in (CODES, GREY, DEEP, DEEP_GREY):
        colour = struct.pack(f">{codes.shape[2]}H", *codes[5, 5].tolist())
        hidden = (codes == codes[5, 5]).all(-1)
        plain = read(tmp_path, png(codes, [gama(1)]))
        got = read(tmp_path, png(codes, [gama(1), (b"tRNS", colour)]), "red")
        assert (got[hidden] == (255, 0, 0)).all() and (got[~hidden] == plain[~hidden]).all()


def test_a_palette_is_converted_and_keeps_its_transparency(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 40, 90])
    image.paste(0, (0, 0, 4, 8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", icc_profile=WIDE, transparency=0)
    got = read(tmp_path, buffer.getvalue(), "red")
    assert (got[:, :4] == (255, 0, 0)).all()
    assert np.abs(got[:, 4:] - as_srgb(np.array([200, 40, 90], np.uint8), P3, 2.2)).max() < 2


def test_converted_pictures_are_turned_upright(tmp_path):
    turned = Image.Exif()
    turned[0x112] = 6  # to be shown turned by 90 degrees to the right
    for codes in (CODES[:9], DEEP[:9]):
        got = read(tmp_path, png(codes, [iccp(WIDE), (b"eXIf", turned.tobytes()[6:])]))
        assert np.abs(got - np.rot90(as_srgb(codes, P3, 2.2), -1)).max() < 2
