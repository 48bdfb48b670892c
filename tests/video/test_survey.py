import os
from pathlib import Path

import numpy as np
import pytest

from pusa.errors import Rejected
from pusa.manifest.models import Limits
from pusa.video.decoders import read_clip
from pusa.video.decoders.choice import DecoderChooser
from pusa.video.fit import compute_placement
from pusa.video.survey import survey_video
from tests.helpers.decoder_stand_ins import PICTURE, X264, cut, ffmpeg, video

LIMITS = Limits()
KINDS = ["plain", "rotated90", "rotated180", "rotated270", "anamorphic", "odd", "hevc10", "av1", "vp9", "fullrange"]
KINDS += ["avi", "mkv", "ts", "mov"]


def reason(path, limits=LIMITS):
    with pytest.raises(Rejected) as caught:
        survey_video(path, limits)
    assert str(path) in caught.value.detail and "\n" not in caught.value.detail
    return caught.value.reason


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_out_right(kinds, kind):
    path = kinds[kind]
    found = survey_video(path, LIMITS, scenes=10)
    assert len(found.times) == len(found.thumbnails) == 24 and found.scene_starts == ()
    np.testing.assert_allclose(np.diff(found.times), 1 / 24, atol=2e-3)
    assert found.fps == pytest.approx(24, rel=1e-3)
    frames = [0, 7, 7, 23]
    place = compute_placement(found.width, found.height, found.pixel_aspect, 160, 96)
    decoder = DecoderChooser(path, found, 30).choose(frames)
    clip = read_clip(path, frames, decoder, 30, place)
    assert clip.shape == (4, 96, 160, 3) and (clip[1] == clip[2]).all()
    red, white = clip[:, 8:40, 8:70].mean((0, 1, 2)), clip[:, 60:90, 8:60].mean((0, 1, 2))
    assert np.abs(red - (255, 0, 0)).max() < 12 and np.abs(white - 255).max() < 8, (red, white)
    green = (clip[1].astype(int) * (-1, 2, -1)).sum(-1) > 255
    rows, columns = green.any(1).sum(), green.any(0).sum()
    assert rows == pytest.approx(40, abs=4) and columns == pytest.approx(40, abs=4)  # the disc is round


def test_the_size_is_told_as_it_is_decoded_and_upright(kinds):
    seen = {name: survey_video(kinds[name], LIMITS) for name in ("plain", "rotated90", "anamorphic", "odd")}
    assert [(s.width, s.height, s.pixel_aspect) for s in seen.values()] == [
        (160, 96, 1), (160, 96, 1), (80, 96, 2), (65, 49, pytest.approx(160 / 96 * 49 / 65, rel=1e-3))
    ]  # fmt: skip


def test_a_turned_anamorphic_picture_has_turned_pixels(kinds, tmp_path):
    ffmpeg("-display_rotation", 90, "-i", kinds["anamorphic"], "-c", "copy", tmp_path / "a.mp4")
    found = survey_video(tmp_path / "a.mp4", LIMITS)
    assert (found.width, found.height, found.pixel_aspect) == (96, 80, 0.5)


def test_times_are_those_of_a_variable_rate(tmp_path):
    words = ("-vf", "select='not(mod(n,3))+lt(n,20)'", "-fps_mode", "vfr", *X264)
    found = survey_video(video(tmp_path / "a.mp4", *words), LIMITS)
    expected = [n / 24 for n in range(48) if n % 3 == 0 or n < 20]
    np.testing.assert_allclose(found.times, expected, atol=1e-4)
    assert found.fps == pytest.approx((len(expected) - 1) / expected[-1])


def test_scenes_begin_where_the_picture_changes(tmp_path):
    source = "color=red:size=64x48:rate=24:duration=0.5[a];testsrc2=size=64x48:rate=24:duration=0.5[b];[a][b]concat"
    path = video(tmp_path / "a.mp4", *X264, source=source)
    assert survey_video(path, LIMITS, scenes=10).scene_starts == (12,)
    assert survey_video(path, LIMITS).scene_starts == ()


def test_one_frame_is_a_video(tmp_path):
    found = survey_video(video(tmp_path / "a.mp4", *X264, "-frames:v", "1"), LIMITS)
    assert len(found.times) == 1 and found.fps == 24


def test_sound_that_lasts_longer_and_cover_art_do_no_harm(tmp_path, moving):
    ffmpeg("-i", moving, "-f", "lavfi", "-i", "sine=duration=4", "-c:v", "copy", tmp_path / "sound.mp4")
    ffmpeg("-i", moving, "-frames:v", "1", tmp_path / "cover.png")
    words = ("-map", "1", "-map", "0", "-c", "copy", "-disposition:v:0", "attached_pic")
    ffmpeg("-i", tmp_path / "sound.mp4", "-i", tmp_path / "cover.png", *words, tmp_path / "cover.mp4")
    for name in ("sound.mp4", "cover.mp4"):
        assert len(survey_video(tmp_path / name, LIMITS).times) == 48
    ffmpeg("-i", tmp_path / "cover.mp4", "-map", "0", "-map", "-0:V", "-c", "copy", tmp_path / "only.mp4")
    assert reason(tmp_path / "only.mp4") == "no_video_stream"


@pytest.mark.parametrize("name", ["faststart.mp4", "a.mp4", "a.mkv", "a.avi", "a.webm", "sound.mkv", "fragments.mp4"])
def test_the_end_is_missing(tmp_path, name):
    words = {
        "faststart.mp4": (*X264, "-movflags", "+faststart"),
        "a.avi": ("-c:v", "mpeg4"),
        "a.webm": ("-c:v", "libvpx-vp9", "-deadline", "realtime"),
        "sound.mkv": ("-f", "lavfi", "-i", "sine=duration=2", *X264),
        "fragments.mp4": (*X264, "-g", "12", "-movflags", "frag_keyframe+empty_moov"),
    }
    path = video(tmp_path / name, *words.get(name, X264))
    assert len(survey_video(path, LIMITS).times) == 48
    for share in (0.5, 0.9):
        assert reason(cut(path, share)) == "damaged"


def test_an_avi_that_ends_between_two_frames(tmp_path):
    path = video(tmp_path / "a.avi", "-c:v", "mjpeg")
    data = path.read_bytes()
    middle = data.index(b"00dc", len(data) // 2)
    path.write_bytes(data[:middle])
    assert reason(path) == "damaged"


def test_an_flv_that_ends_between_two_frames(tmp_path):
    data = video(tmp_path / "a.flv", *X264).read_bytes()
    assert len(survey_video(tmp_path / "a.flv", LIMITS).times) == 48
    end = 13
    while end < len(data) * 0.6:
        end += 15 + int.from_bytes(data[end + 1 : end + 4])
    (tmp_path / "a.flv").write_bytes(data[:end])
    assert reason(tmp_path / "a.flv") == "damaged"


def test_bytes_that_flipped(tmp_path, moving):
    data = bytearray(moving.read_bytes())
    for place in range(len(data) // 3, len(data) // 2, 40):
        data[place] ^= 0xFF
    (tmp_path / "a.mp4").write_bytes(data)
    assert reason(tmp_path / "a.mp4") == "damaged"


def test_frames_that_change_their_size(tmp_path):
    for name, size in (("a", "160x96"), ("b", "96x160")):
        video(tmp_path / f"{name}.ts", *X264, source=f"testsrc2=size={size}:rate=24:duration=1")
    joined = tmp_path / "joined.ts"
    joined.write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    with pytest.raises(Rejected, match=r"another size|is at"):
        survey_video(joined, LIMITS)


def test_too_long_and_too_large_are_seen_before_anything_is_decoded(moving):
    assert reason(moving, Limits(source_seconds=1, decoding_seconds=20)) == "too_long"
    assert reason(moving, Limits(source_pixels=160 * 96 - 1)) == "too_large"


def test_too_long_is_seen_where_no_header_says_so(tmp_path):
    path = video(tmp_path / "a.mkv", *X264, "-live", "1")  # no duration is written
    assert len(survey_video(path, LIMITS).times) == 48
    assert reason(path, Limits(source_seconds=1)) == "too_long"


def test_more_frames_than_any_rule_asks_for_are_too_long(tmp_path):
    path = video(tmp_path / "a.mp4", *X264, source="color=size=16x16:rate=10000:duration=1")
    assert reason(path, Limits(source_seconds=2)) == "too_long"
    assert len(survey_video(path, Limits(source_seconds=50)).times) == 10_000


def test_time_runs_out(moving):
    assert reason(moving, Limits(decoding_seconds=0.001)) == "timeout"


def test_nothing_is_left_open_or_running(moving, tmp_path):
    def left():
        children = "".join(task.read_text() for task in Path("/proc/self/task").glob("*/children"))
        return len(os.listdir("/proc/self/fd")), children.split()

    survey_video(moving, LIMITS)
    before = left()
    (tmp_path / "text.mp4").write_text("this is no video")
    reason(tmp_path / "text.mp4")
    reason(tmp_path / "gone.mp4")
    reason(moving, Limits(decoding_seconds=0.001))
    reason(video(tmp_path / "a.mkv", *X264, "-live", "1"), Limits(source_seconds=1))
    survey_video(moving, LIMITS)
    assert left() == before


def test_a_wide_picture_keeps_its_shape(tmp_path):
    path = video(tmp_path / "a.mp4", *X264, source=f"{PICTURE},scale=80:96,setsar=2")
    found = survey_video(path, LIMITS)
    place = compute_placement(found.width, found.height, found.pixel_aspect, 96, 96, "pad", "blue")
    (frame,) = read_clip(path, [0], "ffmpeg", 30, place)
    assert frame[5, 5].tolist() == [0, 0, 255] and frame[-5, -5].tolist() == [0, 0, 255]
    assert frame[25, 20, 0] > 240 and frame[25, 20, 1] < 15  # 58 rows of picture, bars of 19
