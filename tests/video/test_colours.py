"""Frames are sRGB, whatever the colours of a video are and wherever it states them.

The planes of each video come from the standards' formulas. Flat patches may be off by 4 levels.
"""

import io
import itertools
import subprocess
from dataclasses import asdict, replace

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from pusa.errors import Reason, Rejected
from pusa.manifest.models import Limits
from pusa.video import conversion as rules
from pusa.video.conversion import Conversion, choose_conversion
from pusa.video.decoders import read_clip
from pusa.video.media import read_frames
from pusa.video.survey import survey_video
from tests.helpers.colours import (
    ALPHA,
    AV1,
    BT2020,
    FFV1,
    GREY,
    P3,
    PATCHES,
    PRORES,
    RED,
    RED_BLUE_WEIGHTS,
    RGB,
    SRGB,
    VP9,
    X264,
    X265,
    as_srgb,
    assert_shows,
    over,
    patch_means,
    patch_video,
    to_xyz_d50,
    ycbcr,
)
from tests.helpers.media import ffmpeg

LIMITS = Limits()
BT709 = "colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", RED_BLUE_WEIGHTS)
def test_each_matrix_and_range_is_read_as_stated(tmp_path, matrix, full):
    codes, tags = ycbcr(RGB, matrix, full), f"colorspace={matrix}:range={'pc' if full else 'tv'}"
    video = patch_video(tmp_path / "a.mp4", codes, "yuv420p", *X264, tags=tags)
    survey, decoder = assert_shows(video, PATCHES)
    assert decoder == "decord"
    assert (survey.conversion.matrix, survey.conversion.range) == (matrix, "full" if full else "limited")
    with_ffmpeg = read_clip(video, [1], "ffmpeg", 30, conversion=survey.conversion)
    np.testing.assert_allclose(patch_means(with_ffmpeg), PATCHES, atol=4)


@pytest.mark.parametrize(
    ("size", "matrix"),
    [((64, 32), "smpte170m"), ((1280, 32), "bt709"), ((64, 720), "bt709"), ((1276, 716), "smpte170m")],
)
@pytest.mark.parametrize("bits", [8, 10])
def test_an_untagged_video_is_read_by_its_size(tmp_path, size, matrix, bits):
    pixels = "yuv420p" if bits == 8 else "yuv420p10le"
    video = patch_video(tmp_path / "a.mp4", ycbcr(RGB, matrix, bits=bits), pixels, *X264, size=size)
    survey, decoder = assert_shows(video, PATCHES)
    assert survey.conversion.matrix == matrix
    assert decoder == ("decord" if (matrix, bits) == ("smpte170m", 8) else "ffmpeg")


@pytest.mark.parametrize(("size", "matrix"), [((720, 32), "smpte170m"), ((32, 720), "bt709"), ((1280, 32), "bt709")])
def test_the_size_is_the_one_before_turning(tmp_path, size, matrix):
    video = patch_video(tmp_path / "a.mp4", ycbcr(RGB, matrix), "yuv420p", *X264, size=size)
    ffmpeg("-display_rotation", 90, "-i", video, "-c", "copy", tmp_path / "turned.mp4")
    survey = survey_video(tmp_path / "turned.mp4", LIMITS)
    assert (survey.width, survey.height) == size[::-1]
    upright = read_clip(tmp_path / "turned.mp4", [1], "ffmpeg", 30, conversion=survey.conversion)
    np.testing.assert_allclose(patch_means(np.rot90(upright, -1, (1, 2))), PATCHES, atol=4)


def grey_codes(full: bool, bits=8) -> np.ndarray:
    top = 2**bits - 1
    return (GREY[:, :1] / 255 * top if full else 2 ** (bits - 8) * (16 + 219 * GREY[:, :1] / 255)).round().astype(int)


@pytest.mark.parametrize(
    ("name", "pixels", "full", "words"),
    [("a.mkv", "gray", True, FFV1), ("b.mkv", "gray", False, FFV1), ("c.mkv", "gray10le", False, FFV1),
     ("d.mkv", "gray12le", True, FFV1), ("e.mkv", "gray12le", False, FFV1), ("f.mp4", "gray", True, X265),
     ("g.mp4", "gray", False, X265), ("h.mp4", "gray10le", False, X265), ("i.mp4", "gray", False, X264),
     ("j.mp4", "gray", True, X264)],
)  # fmt: skip
def test_grey_is_read_in_its_range(tmp_path, name, pixels, full, words):
    bits = int(pixels[4:6] or 8)
    tags = f"range={'pc' if full else 'tv'}"
    survey, _ = assert_shows(patch_video(tmp_path / name, grey_codes(full, bits), pixels, *words, tags=tags), GREY)
    assert survey.conversion.range == ("full" if full else "limited")


def test_grey_that_is_turned_is_read_in_its_range(tmp_path):
    whole = patch_video(tmp_path / "a.mov", grey_codes(False), "gray", *X265, tags="range=tv")
    ffmpeg("-display_rotation", 180, "-i", whole, "-c", "copy", tmp_path / "b.mov")
    assert_shows(tmp_path / "b.mov", GREY[::-1])


def test_grey_without_a_range_is_read_as_its_standard_says(tmp_path):
    header = survey_video(patch_video(tmp_path / "a.mp4", grey_codes(False), "gray", *X265), LIMITS).header
    for codec, expected in (("hevc", "limited"), ("ffv1", "full")):
        untagged = replace(header, range="unspecified", codec=codec)
        assert choose_conversion(tmp_path, untagged, "black", "tone_map").range == expected


RGBA = np.c_[PATCHES, ALPHA]
YUVA = {bits: np.c_[ycbcr(RGB, "bt709", bits=bits), (ALPHA / 255 * (2**bits - 1)).round()] for bits in (8, 10)}


@pytest.mark.parametrize(
    ("name", "codes", "pixels", "words"),
    [("h264.mp4", PATCHES, "rgb24", ("-c:v", "libx264rgb", "-qp", 0)),
     ("hevc.mp4", PATCHES, "gbrp", (*X265[:-1], "log-level=none:lossless=1")),
     ("qtrle.mov", PATCHES, "rgb24", ("-c:v", "qtrle")), ("png.mov", PATCHES, "rgb24", ("-c:v", "png")),
     ("raw.mov", PATCHES, "rgb24", ("-c:v", "rawvideo")), ("raw.avi", PATCHES, "bgr24", ("-c:v", "rawvideo")),
     ("deep.mkv", 4 * PATCHES, "gbrp10le", FFV1), ("utvideo.avi", PATCHES, "gbrp", ("-c:v", "utvideo")),
     ("r210.mov", 4 * PATCHES, "gbrp10le", ("-c:v", "r210")),
     ("mjpeg.mov", ycbcr(RGB, "bt470bg", True), "yuvj420p", ("-c:v", "mjpeg", "-q:v", 1)),
     ("mjpeg.avi", ycbcr(RGB, "bt470bg", True), "yuvj444p", ("-c:v", "mjpeg", "-q:v", 1)),
     ("high.mp4", ycbcr(RGB, "smpte170m"), "yuv444p", X264), ("v210.mov", ycbcr(RGB, "smpte170m", bits=10),
      "yuv422p10le", ("-c:v", "v210")), ("deep.mp4", ycbcr(RGB, "smpte170m", bits=12), "yuv420p12le", X265)],
)  # fmt: skip
def test_codecs_of_rgb_and_other_samplings_are_read(tmp_path, name, codes, pixels, words):
    survey, _ = assert_shows(patch_video(tmp_path / name, codes, pixels, *words), PATCHES)
    if survey.conversion.matrix == "gbr":
        assert survey.conversion.range == "full"


@pytest.mark.parametrize(
    ("name", "codes", "pixels", "words"),
    [("png.mov", RGBA, "rgba", ("-c:v", "png")), ("qtrle.mov", RGBA, "argb", ("-c:v", "qtrle")),
     ("raw.avi", RGBA, "bgra", ("-c:v", "rawvideo")), ("ffv1.mkv", RGBA, "bgra", FFV1),
     ("utvideo.avi", RGBA, "gbrap", ("-c:v", "utvideo")), ("magicyuv.mkv", RGBA, "gbrap", ("-c:v", "magicyuv")),
     ("vp8.webm", np.c_[ycbcr(RGB, "bt470bg"), ALPHA], "yuva420p",
      ("-c:v", "libvpx", "-crf", 4, "-b:v", "4M", "-auto-alt-ref", 0)),
     ("vp9.webm", YUVA[8], "yuva420p", VP9), ("ffv1_yuv.mkv", YUVA[8], "yuva420p", FFV1),
     ("prores.mov", YUVA[10], "yuva444p10le", PRORES), ("hevc.mov", YUVA[8], "yuva420p", X265),
     ("hevc.mkv", YUVA[8], "yuva420p", X265)],
)  # fmt: skip
def test_alpha_is_laid_over_the_background(tmp_path, name, codes, pixels, words):
    tags = "colorspace=bt709:range=tv" if pixels.startswith("yuv") and name != "vp8.webm" else ""
    video = patch_video(tmp_path / name, codes, pixels, *words, tags=tags)
    survey, _ = assert_shows(video, over(PATCHES, ALPHA, RED), background="red")
    assert survey.conversion.has_alpha
    blue = patch_means(read_frames(video, [1], "blue"))
    np.testing.assert_allclose(blue, over(PATCHES, ALPHA, (0, 0, 255)), atol=4)


@pytest.mark.parametrize("suffix", [".mov", ".mkv"])
@pytest.mark.parametrize("mode", ["opaque", "transparent", "grey", "1"])
def test_palettes_and_their_alpha_are_read(tmp_path, mode, suffix):
    indices = np.arange(8, dtype=np.uint8).reshape(2, 4).repeat(16, 0).repeat(16, 1)
    expected, options = PATCHES, {}
    if mode == "1":
        picture = Image.fromarray(indices % 2 * 255).convert("1")
        expected = np.repeat(np.arange(8)[:, None] % 2, 3, 1) * 255
    elif mode == "grey":
        picture = Image.fromarray(np.c_[GREY[:, 0], ALPHA].astype(np.uint8)[indices], "LA")
        expected = over(GREY, ALPHA, RED)
    else:
        picture = Image.fromarray(indices, "P")
        picture.putpalette(PATCHES.astype(np.uint8).ravel().tolist())
    if mode == "transparent":
        options, expected = {"transparency": bytes(ALPHA.tolist())}, over(PATCHES, ALPHA, RED)
    file = io.BytesIO()
    picture.save(file, "PNG", **options)
    video = tmp_path / f"a{suffix}"
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-v",
        "error",
        "-f",
        "png_pipe",
        "-r",
        "24",
        "-i",
        "-",
        "-c",
        "copy",
        str(video),
    ]
    subprocess.run(command, input=file.getvalue() * 6, check=True)
    survey, decoder = assert_shows(video, expected, background="red")
    assert survey.conversion.has_alpha == (mode in ("transparent", "grey"))
    assert decoder == "ffmpeg" or not survey.conversion.has_alpha


UNSTATED = {
    "h264": "h264_metadata=colour_primaries=2:transfer_characteristics=2:matrix_coefficients=2",
    "hevc": "hevc_metadata=colour_primaries=2:transfer_characteristics=2:matrix_coefficients=2",
    "vp9": "vp9_metadata=color_space=unknown",
    "av1": "av1_metadata=color_primaries=2:transfer_characteristics=2:matrix_coefficients=2",
    "prores": "prores_metadata=color_primaries=unknown:color_trc=unknown:colorspace=unknown",
}


@pytest.mark.parametrize(
    ("suffix", "codec", "words"),
    [("mp4", "h264", X264), ("mkv", "h264", X264), ("mov", "hevc", X265), ("mp4", "vp9", VP9), ("webm", "vp9", VP9),
     ("mkv", "av1", AV1), ("mov", "prores", PRORES)],
)  # fmt: skip
def test_what_only_the_container_states_counts(tmp_path, suffix, codec, words):
    bits, pixels = (10, "yuv444p10le") if codec == "prores" else (8, "yuv420p")
    whole = patch_video(tmp_path / f"a.{suffix}", ycbcr(RGB, "bt709", bits=bits), pixels, *words, tags=BT709)
    ffmpeg("-i", whole, "-c", "copy", "-bsf:v", UNSTATED[codec], tmp_path / f"b.{suffix}")
    survey, decoder = assert_shows(tmp_path / f"b.{suffix}", PATCHES)
    assert survey.conversion.matrix == "bt709"
    assert decoder == "ffmpeg"


@pytest.mark.parametrize("code", [0, 3, 6, 77])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_tags_of_the_stream_outweigh_the_container_and_senseless_ones_state_nothing(tmp_path, suffix, code):
    """6 is BT.601. 0 is RGB, which YUV cannot be; 3 is reserved; 77 is not assigned: then the container's count."""
    matrix = "smpte170m" if code == 6 else "bt709"
    whole = patch_video(tmp_path / f"a.{suffix}", ycbcr(RGB, matrix), "yuv420p", *X264, tags=BT709)
    tags = f"matrix_coefficients={code}:colour_primaries={code or 3}:transfer_characteristics={code or 3}"
    ffmpeg("-i", whole, "-c", "copy", "-bsf:v", f"h264_metadata={tags}", tmp_path / f"b.{suffix}")
    survey, _ = assert_shows(tmp_path / f"b.{suffix}", PATCHES)
    assert survey.conversion.matrix == matrix


@pytest.mark.parametrize("transfer", ["bt709", "iec61966-2-1", "unknown", "bt2020-10"])
@pytest.mark.parametrize(("primaries", "space"), [("bt2020", BT2020), ("smpte432", P3)])
def test_wide_gamuts_are_converted_with_their_own_curve(tmp_path, primaries, space, transfer):
    matrix = "bt2020nc" if primaries == "bt2020" else "bt709"
    tags = f"colorspace={matrix}:color_primaries={primaries}:color_trc={transfer}:range=tv"
    if transfer == "iec61966-2-1":
        expected = as_srgb(PATCHES.astype(np.uint8), space)
    else:  # shown with a gamma of 2.4 (BT.1886), before and after
        linear = RGB**2.4 @ (np.linalg.inv(to_xyz_d50(SRGB)) @ to_xyz_d50(space)).T
        expected = 255 * linear.clip(0, 1) ** (1 / 2.4)
    assert_shows(patch_video(tmp_path / "a.mp4", ycbcr(RGB, matrix), "yuv420p", *X264, tags=tags), expected)
    rgba = ("rgba", "-c:v", "png")
    video = patch_video(tmp_path / "a.mov", RGBA, *rgba, tags=f"color_primaries={primaries}:color_trc={transfer}")
    assert_shows(video, over(expected, ALPHA, RED), background="red")


def test_a_matrix_that_only_zscale_knows_is_read(tmp_path):
    y, cg, co = np.array([(1 / 4, 1 / 2, 1 / 4), (-1 / 4, 1 / 2, -1 / 4), (1 / 2, 0, -1 / 2)]) @ RGB.T
    codes = np.stack([16 + 219 * y, 128 + 224 * cg, 128 + 224 * co], -1).round()
    assert_shows(patch_video(tmp_path / "a.mp4", codes, "yuv420p", *X264, tags="colorspace=ycgco:range=tv"), PATCHES)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "a.mp4"
    path = patch_video(path, ycbcr(RGB, "bt709"), "yuv420p", *X264, tags=BT709, count=1)
    return path, survey_video(path, LIMITS)


def combinations():
    """Yield (matrix, primaries, transfer) in which each value occurs with SDR and with HDR, or with a wide gamut."""
    transfers = (*rules.SDR_TRANSFERS, *rules.HDR_TRANSFERS)
    yield from itertools.product(rules.ZSCALE_MATRICES[:-1], ("bt2020",), ("bt709", "smpte2084"))
    yield from itertools.product(
        ("bt709",), (*rules.NEAR_PRIMARIES, *rules.WIDE_PRIMARIES), ("unspecified", "smpte2084")
    )
    yield from itertools.product(("bt709", "bt2020c"), ("bt2020",), transfers)


def test_colours_are_either_converted_or_rejected_by_name(plain):
    path, survey = plain
    rejected = set()
    for matrix, primaries, transfer in combinations():
        stated = replace(survey.header, matrix=matrix, primaries=primaries, transfer=transfer)
        try:
            conversion = choose_conversion(path, stated, "black", "tone_map")
        except Rejected as reject:
            assert reject.reason == Reason.UNKNOWN_COLOURS
            rejected.add(matrix)
        else:
            assert read_clip(path, [0], "ffmpeg", 30, conversion=conversion).shape == (1, 32, 64, 3)
    assert rejected == {"ictcp", "bt2020c"}


@pytest.mark.parametrize(
    ("field", "value"), [("transfer", "linear"), ("primaries", "smpte428"), ("matrix", "unknown (15)")]
)
def test_colours_that_nothing_converts_are_rejected(plain, field, value):
    path, survey = plain
    with pytest.raises(Rejected, match=value.partition(" ")[0]) as reject:
        choose_conversion(path, replace(survey.header, **{field: value}), "black", "tone_map")
    assert reject.value.reason == Reason.UNKNOWN_COLOURS


@pytest.mark.parametrize(
    "value", ["bt709,movie=/etc/passwd", "bt709:range=full", "none[a];[a]null", "", "BT709", "unknown"]
)
def test_no_value_of_a_row_becomes_a_part_of_a_filter(plain, value):
    path, survey = plain
    row = {"source": str(path), **asdict(survey.conversion)}
    assert Conversion.of_row(row) == survey.conversion
    for column, known in row.items():
        if isinstance(known, str) and column != "source":
            with pytest.raises(Rejected, match=column) as reject:
                Conversion.of_row({**row, column: value})
            assert reject.value.reason == Reason.DAMAGED
