import os
from pathlib import Path

import numpy as np
import pytest

from pusa.errors import Rejected
from pusa.manifest.models import Limits
from pusa.video.decoders import read_clip
from pusa.video.decoders.choice import DecoderChooser
from pusa.video.fit import compute_placement
from pusa.video.header import read_header
from pusa.video.survey import survey_video
from tests.helpers.media import MOVING, PICTURE, X264, encoded_video, ffmpeg

LIMITS = Limits()
KINDS = ["plain", "rotated90", "rotated180", "rotated270", "anamorphic", "odd", "hevc10", "av1", "vp9", "fullrange"]
KINDS += ["avi", "mkv", "ts", "mov"]


def header_reason(path, seconds=30):
    with pytest.raises(Rejected) as caught:
        read_header(path, seconds)
    return caught.value.reason


def test_a_header_has_size_rate_rotation_and_container(kinds):
    plain, turned, wide = (read_header(kinds[name], 30) for name in ("plain", "rotated270", "anamorphic"))
    assert (plain.codec, plain.width, plain.height, plain.fps, plain.duration) == ("h264", 160, 96, 24, 1)
    assert (plain.rotation, plain.pixel_aspect, plain.container, plain.is_only_stream) == (0, 1, "mov", True)
    assert (turned.rotation, turned.width, turned.height) == (270, 160, 96)
    assert (wide.width, wide.height, wide.pixel_aspect) == (80, 96, 2)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_tags_cannot_pretend_to_be_streams(tmp_path, moving, suffix):
    lie = "Stream #0:0: Video: h264, yuv420p, 9999x9999, 1 fps\n  Stream #0:0: Video: h264, yuv420p, 8x8, 1 fps"
    arguments = ("-metadata", f"title={lie}", "-metadata", f"{lie}=1", "-metadata", "Duration=9")
    ffmpeg("-i", moving, "-c", "copy", *arguments, tmp_path / f"a.{suffix}")
    header = read_header(tmp_path / f"a.{suffix}", 30)
    assert (header.width, header.height, header.duration) == (160, 96, 2)


def test_each_kind_of_unusable_file_has_its_header_reason(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is not a video")
    ffmpeg("-f", "lavfi", "-i", MOVING, "-frames:v", "1", tmp_path / "picture.png")
    (tmp_path / "picture.png").rename(tmp_path / "picture.mp4")
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", tmp_path / "sound.mp4")
    encoded_video(tmp_path / "whole.mp4")
    (tmp_path / "torn.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:-2000])  # with the index at its end
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    assert {path.stem: header_reason(path) for path in tmp_path.iterdir() if path.stem != "whole"} == {
        "empty": "empty_file",
        "text": "not_a_video",
        "picture": "not_a_video",
        "sound": "no_video_stream",
        "torn": "damaged",
        "pipe": "unreadable",
        "folder": "unreadable",
    }
    assert header_reason(tmp_path / "gone.mp4") == header_reason(tmp_path / ("x" * 300)) == "unreadable"


def test_a_file_without_read_permission_is_unreadable(tmp_path):
    path = encoded_video(tmp_path / "a.mp4")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert header_reason(path) == "unreadable"


def survey_reason(path, limits=LIMITS):
    with pytest.raises(Rejected) as caught:
        survey_video(path, limits)
    assert str(path) in caught.value.detail and "\n" not in caught.value.detail
    return caught.value.reason


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_is_surveyed_and_read_right(kinds, kind):
    path = kinds[kind]
    survey = survey_video(path, LIMITS, scenes=10)
    assert len(survey.times) == len(survey.thumbnails) == 24 and survey.scene_starts == ()
    np.testing.assert_allclose(np.diff(survey.times), 1 / 24, atol=2e-3)
    assert survey.fps == pytest.approx(24, rel=1e-3)
    frames = [0, 7, 7, 23]
    place = compute_placement(survey.width, survey.height, survey.pixel_aspect, 160, 96)
    decoder = DecoderChooser(path, survey, 30).choose(frames)
    clip = read_clip(path, frames, decoder, 30, place)
    assert clip.shape == (4, 96, 160, 3) and (clip[1] == clip[2]).all()
    red, white = clip[:, 8:40, 8:70].mean((0, 1, 2)), clip[:, 60:90, 8:60].mean((0, 1, 2))
    assert np.abs(red - (255, 0, 0)).max() < 12 and np.abs(white - 255).max() < 8, (red, white)
    green = (clip[1].astype(int) * (-1, 2, -1)).sum(-1) > 255
    rows, columns = green.any(1).sum(), green.any(0).sum()
    assert rows == pytest.approx(40, abs=4) and columns == pytest.approx(40, abs=4)  # the disc is round


def test_sizes_are_those_of_decoded_upright_frames(kinds):
    surveys = {name: survey_video(kinds[name], LIMITS) for name in ("plain", "rotated90", "anamorphic", "odd")}
    assert [(s.width, s.height, s.pixel_aspect) for s in surveys.values()] == [
        (160, 96, 1), (160, 96, 1), (80, 96, 2), (65, 49, pytest.approx(160 / 96 * 49 / 65, rel=1e-3))
    ]  # fmt: skip


def test_a_turned_anamorphic_picture_has_turned_pixels(kinds, tmp_path):
    ffmpeg("-display_rotation", 90, "-i", kinds["anamorphic"], "-c", "copy", tmp_path / "a.mp4")
    survey = survey_video(tmp_path / "a.mp4", LIMITS)
    assert (survey.width, survey.height, survey.pixel_aspect) == (96, 80, 0.5)


def test_times_follow_a_variable_frame_rate(tmp_path):
    arguments = ("-vf", "select='not(mod(n,3))+lt(n,20)'", "-fps_mode", "vfr", *X264)
    survey = survey_video(encoded_video(tmp_path / "a.mp4", *arguments), LIMITS)
    expected = [n / 24 for n in range(48) if n % 3 == 0 or n < 20]
    np.testing.assert_allclose(survey.times, expected, atol=1e-4)
    assert survey.fps == pytest.approx((len(expected) - 1) / expected[-1])


def test_scenes_begin_where_the_picture_changes(tmp_path):
    source = "color=red:size=64x48:rate=24:duration=0.5[a];testsrc2=size=64x48:rate=24:duration=0.5[b];[a][b]concat"
    path = encoded_video(tmp_path / "a.mp4", *X264, source=source)
    assert survey_video(path, LIMITS, scenes=10).scene_starts == (12,)
    assert survey_video(path, LIMITS).scene_starts == ()


def test_a_single_frame_is_a_video(tmp_path):
    survey = survey_video(encoded_video(tmp_path / "a.mp4", *X264, "-frames:v", "1"), LIMITS)
    assert len(survey.times) == 1 and survey.fps == 24


def test_longer_sound_and_cover_art_change_nothing(tmp_path, moving):
    ffmpeg("-i", moving, "-f", "lavfi", "-i", "sine=duration=4", "-c:v", "copy", tmp_path / "sound.mp4")
    ffmpeg("-i", moving, "-frames:v", "1", tmp_path / "cover.png")
    arguments = ("-map", "1", "-map", "0", "-c", "copy", "-disposition:v:0", "attached_pic")
    ffmpeg("-i", tmp_path / "sound.mp4", "-i", tmp_path / "cover.png", *arguments, tmp_path / "cover.mp4")
    for name in ("sound.mp4", "cover.mp4"):
        assert len(survey_video(tmp_path / name, LIMITS).times) == 48
    ffmpeg("-i", tmp_path / "cover.mp4", "-map", "0", "-map", "-0:V", "-c", "copy", tmp_path / "only.mp4")
    assert survey_reason(tmp_path / "only.mp4") == "no_video_stream"


def test_too_long_and_too_large_are_read_from_the_header(moving):
    assert survey_reason(moving, Limits(source_seconds=1, decoding_seconds=20)) == "too_long"
    assert survey_reason(moving, Limits(source_pixels=160 * 96 - 1)) == "too_large"


def test_too_long_is_noticed_without_a_duration_in_the_header(tmp_path):
    path = encoded_video(tmp_path / "a.mkv", *X264, "-live", "1")  # no duration is written
    assert len(survey_video(path, LIMITS).times) == 48
    assert survey_reason(path, Limits(source_seconds=1)) == "too_long"


def test_more_frames_than_any_clip_settings_can_use_are_too_long(tmp_path):
    path = encoded_video(tmp_path / "a.mp4", *X264, source="color=size=16x16:rate=10000:duration=1")
    assert survey_reason(path, Limits(source_seconds=2)) == "too_long"
    assert len(survey_video(path, Limits(source_seconds=50)).times) == 10_000


def test_the_time_limit_ends_a_survey(moving):
    assert survey_reason(moving, Limits(decoding_seconds=0.001)) == "timeout"


def test_no_file_and_no_process_is_left_open(moving, tmp_path):
    def open_files_and_children():
        children = "".join(task.read_text() for task in Path("/proc/self/task").glob("*/children"))
        return len(os.listdir("/proc/self/fd")), len(children.split())

    survey_video(moving, LIMITS)
    before = open_files_and_children()
    (tmp_path / "text.mp4").write_text("this is not a video")
    survey_reason(tmp_path / "text.mp4")
    survey_reason(tmp_path / "gone.mp4")
    survey_reason(moving, Limits(decoding_seconds=0.001))
    survey_reason(encoded_video(tmp_path / "a.mkv", *X264, "-live", "1"), Limits(source_seconds=1))
    survey_video(moving, LIMITS)
    assert open_files_and_children() == before


def test_wide_pixels_are_padded_to_the_right_shape(tmp_path):
    path = encoded_video(tmp_path / "a.mp4", *X264, source=f"{PICTURE},scale=80:96,setsar=2")
    survey = survey_video(path, LIMITS)
    place = compute_placement(survey.width, survey.height, survey.pixel_aspect, 96, 96, "pad", "blue")
    (frame,) = read_clip(path, [0], "ffmpeg", 30, place)
    assert frame[5, 5].tolist() == [0, 0, 255] and frame[-5, -5].tolist() == [0, 0, 255]
    assert frame[25, 20, 0] > 240 and frame[25, 20, 1] < 15  # 58 rows of picture, bars of 19
