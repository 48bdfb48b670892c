"""HDR is tone-mapped to SDR by the formula of the rule, within 6 levels of flat patches, or rejected."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from pusa.data.reader import Table
from pusa.errors import Reason, Rejected
from pusa.ingest.stage import ingest
from pusa.manifest.models import IngestManifest, Limits
from pusa.precompute.frames import decode_clip
from pusa.video.survey import survey_video
from tests.helpers.colours import (
    ALPHA,
    AV1,
    FFV1,
    GREY,
    PATCHES,
    PRORES,
    RED,
    RGB,
    TO_BT709,
    VP9,
    X264,
    X265,
    assert_shows,
    decode_srgb,
    from_hlg,
    from_pq,
    from_ycbcr,
    hlg,
    over,
    patch_means,
    patch_video,
    pq,
    tone_map,
    ycbcr,
)
from tests.helpers.media import ffmpeg

LINEAR_2020 = decode_srgb(RGB) @ np.linalg.inv(TO_BT709).T
CURVES = {  # the values that store the patches, and what values show in nits
    "smpte2084": (pq(LINEAR_2020 * 203), from_pq),
    "arib-std-b67": (hlg(LINEAR_2020 * 0.2646), from_hlg),
}


def hdr_video(path, transfer, pixels, words, full=False, tags=None, alpha=None, scale=1.0):
    """Write patches in HDR, and return the path and how they look, by the codes that the file really stores."""
    values, show_nits = CURVES[transfer]
    values = pq(LINEAR_2020 * 203 * scale) if scale != 1 else values
    bits = int(pixels[-4:-2]) if pixels.endswith("le") else 8
    if pixels.startswith("gbr"):
        codes = (values * (2**bits - 1)).round().astype(int)
        stored = codes / (2**bits - 1)
    else:
        codes = ycbcr(values, "bt2020nc", full, bits)
        stored = from_ycbcr(codes, "bt2020nc", full, bits)
    if alpha is not None:
        codes = np.c_[codes, (alpha / 255 * (2**bits - 1)).round()]
    tags = tags or f"colorspace=bt2020nc:color_primaries=bt2020:color_trc={transfer}:range={'pc' if full else 'tv'}"
    return patch_video(path, codes, pixels, *words, tags=tags), tone_map(show_nits(stored))


@pytest.mark.parametrize("transfer", CURVES)
@pytest.mark.parametrize(
    ("name", "pixels", "words", "full"),
    [("a.mp4", "yuv420p10le", X265, False), ("a.mkv", "yuv420p12le", X265, False), ("a.ts", "yuv420p10le", X265, False),
     ("full.mov", "yuv444p10le", X265, True), ("eight.mp4", "yuv420p", X264, False), ("j.mp4", "yuv420p", X264, True),
     ("a.webm", "yuv420p10le", (*VP9, "-profile:v", 2), False), ("vp9.mp4", "yuv420p10le", (*VP9, "-profile:v", 2),
      False), ("av1.mp4", "yuv420p10le", AV1, False),
     ("prores.mov", "yuv422p10le", PRORES[:2], False), ("prores4.mov", "yuv444p10le", PRORES, False),
     ("ffv1.mkv", "yuv444p16le", FFV1, False)],
)  # fmt: skip
def test_hdr_is_tone_mapped(tmp_path, transfer, name, pixels, words, full):
    video, expected = hdr_video(tmp_path / name, transfer, pixels, words, full)
    survey, decoder = assert_shows(video, expected, tolerance=6)
    assert decoder == "ffmpeg"
    facts = asdict(survey.conversion)
    assert (facts["transfer"], facts["primaries"], facts["tone_map"]) == (transfer, "bt2020", "mobius203")


@pytest.mark.parametrize("transfer", CURVES)
def test_hdr_of_phones_that_is_turned_is_tone_mapped(tmp_path, transfer):
    video, expected = hdr_video(tmp_path / "a.mov", transfer, "yuv420p10le", X265)
    ffmpeg("-display_rotation", 180, "-i", video, "-c", "copy", tmp_path / "b.mov")
    assert_shows(tmp_path / "b.mov", expected[::-1], tolerance=6)


def test_highlights_are_compressed(tmp_path):
    video, expected = hdr_video(tmp_path / "a.mp4", "smpte2084", "yuv420p10le", X265, scale=3)
    assert_shows(video, expected, tolerance=6)


@pytest.mark.parametrize("transfer", CURVES)
@pytest.mark.parametrize(("pixels", "matrix"), [("yuv420p10le", "bt2020nc"), ("gbrp12le", "gbr")])
def test_hdr_that_states_only_its_curve_is_bt2020(tmp_path, transfer, pixels, matrix):
    video, expected = hdr_video(tmp_path / "a.mkv", transfer, pixels, FFV1, tags=f"color_trc={transfer}")
    survey, _ = assert_shows(video, expected, tolerance=6)
    assert (survey.conversion.matrix, survey.conversion.primaries) == (matrix, "bt2020")


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_hlg_that_sdr_players_may_show_is_hlg(tmp_path, suffix):
    words = (*X265[:-1], f"{X265[-1]}:atc-sei=18")
    tags = "colorspace=bt2020nc:color_primaries=bt2020:range=tv:color_trc=bt2020-10"
    video, expected = hdr_video(tmp_path / f"a.{suffix}", "arib-std-b67", "yuv420p10le", words, tags=tags)
    survey, _ = assert_shows(video, expected, tolerance=6)
    assert survey.conversion.transfer == "arib-std-b67"


@pytest.mark.parametrize("transfer", CURVES)
@pytest.mark.parametrize(("name", "pixels", "words"), [("a.mov", "yuva444p10le", PRORES), ("a.mkv", "gbrap12le", FFV1)])
def test_hdr_with_alpha_is_tone_mapped_and_then_laid_over_the_background(tmp_path, transfer, name, pixels, words):
    tags = f"color_primaries=bt2020:color_trc={transfer}" if pixels.startswith("gbr") else None
    video, expected = hdr_video(tmp_path / name, transfer, pixels, words, alpha=ALPHA, tags=tags)
    assert_shows(video, over(expected, ALPHA, RED), tolerance=6, background="red")


@pytest.mark.parametrize("full", [False, True])
def test_grey_hdr_is_tone_mapped(tmp_path, full):
    values = pq(decode_srgb(GREY[:, :1] / 255) * 203)
    codes = (1023 * values if full else 64 + 876 * values).round().astype(int)
    tags = f"color_primaries=bt2020:color_trc=smpte2084:range={'pc' if full else 'tv'}"
    expected = tone_map(decode_srgb(GREY / 255) * 203, np.eye(3))
    assert_shows(patch_video(tmp_path / "a.mkv", codes, "gray10le", *FFV1, tags=tags), expected, tolerance=6)


@pytest.mark.parametrize("transfer", CURVES)
def test_hdr_can_be_rejected(tmp_path, transfer):
    video, _ = hdr_video(tmp_path / "a.mp4", transfer, "yuv420p", X264)
    with pytest.raises(Rejected, match=f"HDR .*{transfer}") as reject:
        survey_video(video, Limits(), hdr="reject")
    assert reject.value.reason == Reason.HDR


def test_clips_of_a_table_have_the_colours_of_their_sources(tmp_path):
    """HDR, alpha and bars of the same background, a large untagged video and a small one; and `hdr: reject`."""
    (tmp_path / "videos").mkdir()
    codes = np.c_[ycbcr(RGB, "bt709"), ALPHA]
    expected = {"alpha": over(PATCHES, ALPHA, RED), "hd": PATCHES, "sd": PATCHES}
    patch_video(tmp_path / "videos/alpha.webm", codes, "yuva420p", *VP9, tags="colorspace=bt709:range=tv", count=8)
    patch_video(tmp_path / "videos/hd.mp4", ycbcr(RGB, "bt709"), "yuv420p", *X264, size=(1280, 640), count=8)
    patch_video(tmp_path / "videos/sd.mp4", ycbcr(RGB, "smpte170m"), "yuv420p", *X264, count=8)
    _, expected["hdr"] = hdr_video(tmp_path / "videos/hdr.mp4", "smpte2084", "yuv420p10le", X265)
    for name in expected:
        (tmp_path / f"videos/{name}.txt").write_text("patches")
    clips = {"num_frames": 1, "width": 64, "height": 64, "fit": "pad", "background": "red"}
    source = str(tmp_path / "videos")
    made = ingest(IngestManifest(source=source, clips={**clips, "windows": "first"}), tmp_path / "run")
    rows = Table.open(made.table).read("clips").to_pylist()
    assert {Path(row["source"]).stem for row in rows} == set(expected)
    for row in rows:
        frame = decode_clip(row, 30)[0]
        np.testing.assert_array_equal(frame[[2, 61], 32], [RED, RED])
        np.testing.assert_allclose(patch_means(frame[None, 16:48]), expected[Path(row["source"]).stem], atol=6)
    rejecting = IngestManifest(source=source, clips={**clips, "hdr": "reject"})
    rejects = Table.open(ingest(rejecting, tmp_path / "strict").table).read("rejects").to_pylist()
    assert [(Path(row["source"]).name, row["reason"]) for row in rejects] == [("hdr.mp4", "hdr")]
