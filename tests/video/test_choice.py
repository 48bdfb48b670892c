import dataclasses
import logging
import time

import numpy as np
import pytest

from pusa.errors import Rejected
from pusa.manifest.models import Limits
from pusa.video.child import this_threads_child
from pusa.video.decoders import read_clip
from pusa.video.decoders.choice import THUMBNAIL_READERS, DecoderChooser, thumbnail_differences
from pusa.video.survey import survey_video
from tests.helpers.media import X264, all_frames, encoded_video, ffmpeg

FRAMES = [3, 3, 4, 10, 11, 12, 30, 47]
LONG = "testsrc2=size=160x96:rate=24:duration=8"
X265 = ("-c:v", "libx265", "-x265-params", "log-level=none:keyint=48:min-keyint=24", "-pix_fmt", "yuv420p")
SOUND = ("-f", "lavfi", "-i", "sine=d=8", "-c:a", "aac")
DEEP = range(100, 180, 3)


def objection(path, survey, frames, caplog) -> str:
    """Return why decord is not chosen for these frames."""
    with caplog.at_level(logging.DEBUG, "pusa.video.decoders.choice"):
        caplog.clear()
        assert DecoderChooser(path, survey, 30).choose(frames) == "ffmpeg"
    return caplog.messages[0]


def test_decord_is_chosen_where_it_agrees_with_the_survey(moving, kinds):
    assert DecoderChooser(moving, survey_video(moving, Limits()), 30).choose(FRAMES) == "decord"
    for kind in ("rotated90", "anamorphic", "odd", "fullrange", "hevc10"):
        expected = "ffmpeg" if kind == "hevc10" else "decord"  # it rounds 10 bits differently
        assert DecoderChooser(kinds[kind], survey_video(kinds[kind], Limits()), 30).choose(range(24)) == expected


def test_a_neighbour_of_the_right_frame_is_noticed(moving, caplog):
    survey = survey_video(moving, Limits())
    for shift in (-1, 1):
        shifted = dataclasses.replace(survey, thumbnails=np.roll(survey.thumbnails, shift, 0))
        assert "differs from the survey's by" in objection(moving, shifted, FRAMES, caplog)
    fewer = dataclasses.replace(survey, times=survey.times[:-1])
    assert "(48, 160, 96)" in objection(moving, fewer, FRAMES, caplog)


def test_what_decord_cannot_read_is_read_with_ffmpeg(kinds, caplog):
    survey = survey_video(kinds["av1"], Limits())
    assert "cannot be opened" in objection(kinds["av1"], survey, [0], caplog)
    assert "does not seek reliably in avi" in objection(kinds["avi"], survey_video(kinds["avi"], Limits()), [0], caplog)


@pytest.mark.parametrize(("name", "seconds"), [("abort", 120), ("hang", 0.5)])
def test_a_decoder_that_hangs_or_crashes_is_not_tried_again(moving, name, seconds):
    tried = []

    def read_thumbnails(path, frames, limit, survey):
        tried.append(frames)
        return this_threads_child().call(f"tests.helpers.decoder_stand_ins:{name}", {}, str(path), seconds).array

    survey = survey_video(moving, Limits())
    chooser = DecoderChooser(moving, survey, 30, {"decord": read_thumbnails, "ffmpeg_seek": read_thumbnails})
    assert [chooser.choose([start]) for start in range(20)] == ["ffmpeg"] * 20
    assert tried == [[0]], "only once: ffmpeg_seek is not tried near the start"


def test_each_clip_has_the_whole_time_limit(moving):
    survey, limits = survey_video(moving, Limits()), []

    def read_thumbnails(path, frames, seconds, survey):
        limits.append(seconds)
        time.sleep(0.01)  # 20 clips together take longer than the limit
        return survey.thumbnails[frames]

    chooser = DecoderChooser(moving, survey, 0.1, {"decord": read_thumbnails})
    assert [chooser.choose([start]) for start in range(20)] == ["decord"] * 20
    assert limits == [0.1] * 20


def test_twenty_clips_in_a_row_are_read_with_decord(moving):
    chooser = DecoderChooser(moving, survey_video(moving, Limits()), 30)
    assert [chooser.choose([start]) for start in range(20)] == ["decord"] * 20


def test_wrong_frames_of_open_groups_of_pictures_are_noticed(tmp_path):
    """x265 makes open groups by default. Which frames decord gets wrong is unspecified; each must be noticed."""
    arguments = ("-c:v", "libx265", "-x265-params", "log-level=none:keyint=12:min-keyint=12", "-pix_fmt", "yuv420p")
    path = encoded_video(tmp_path / "a.mp4", *arguments)
    expected, survey = all_frames(path, 160, 96), survey_video(path, Limits())
    np.testing.assert_array_equal(thumbnail_differences(survey.thumbnails, survey.thumbnails), 0)
    chosen = set()
    for frames in ([13, 14, 20], [23, 24, 25], [30], [35, 36], range(40, 48), range(48)):
        decoder = DecoderChooser(path, survey, 30).choose(frames)
        clip = read_clip(path, frames, decoder, 30)
        assert np.abs(clip.astype(int) - expected[list(frames)]).mean((1, 2, 3)).max() < 1
        chosen.add(decoder)
    assert "ffmpeg" in chosen


B_FRAMES = (*X264, "-g", "48", "-bf", "3")
DEEP_SOURCES = {
    "mkv": ("a.mkv", B_FRAMES),
    "late mkv": ("a.mkv", (*B_FRAMES, "-output_ts_offset", "7.3")),
    "mkv beside sound": ("a.mkv", (*SOUND, *B_FRAMES)),
    "open groups": ("a.mkv", (*X264, "-g", "48", "-x264-params", "open-gop=1:bframes=3")),
    "hevc": ("a.mkv", X265),
    "vp9": ("a.webm", ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-g", "48")),
    "av1": ("a.mp4", ("-c:v", "libsvtav1", "-preset", "12", "-g", "48")),
    "avi": ("a.avi", ("-c:v", "mpeg4", "-bf", "2", "-g", "48")),
    "variable": ("a.mkv", ("-vf", "select='not(mod(n,3))+lt(n,150)'", "-fps_mode", "vfr", *B_FRAMES)),
}


def read_with_chosen(path, frames, readers=THUMBNAIL_READERS):
    survey = survey_video(path, Limits())
    decoder = DecoderChooser(path, survey, 30, readers).choose(frames)
    return decoder, read_clip(path, frames, decoder, 30, start_time=survey.times[frames[0]])


@pytest.mark.parametrize("kind", DEEP_SOURCES)
def test_ffmpeg_seeks_to_the_right_frames_deep_in_a_source(tmp_path, kind):
    name, arguments = DEEP_SOURCES[kind]
    path = encoded_video(tmp_path / name, *arguments, source=LONG)
    expected = all_frames(path, 160, 96)
    frames = [frame for frame in DEEP if frame < len(expected)]
    decoder, clip = read_with_chosen(path, frames)
    assert decoder == "ffmpeg_seek"
    np.testing.assert_array_equal(clip, expected[frames])
    assert read_with_chosen(path, range(9))[0] == "ffmpeg", "near the start, seeking saves no time"


def test_ffmpeg_seeks_to_the_right_frames_behind_an_edit_list(tmp_path):
    whole = encoded_video(tmp_path / "whole.mp4", *B_FRAMES, source=LONG)
    path = tmp_path / "a.mp4"
    ffmpeg("-ss", "1.3", "-i", whole, "-c", "copy", path)
    decoder, clip = read_with_chosen(path, range(100, 131), {"ffmpeg_seek": THUMBNAIL_READERS["ffmpeg_seek"]})
    assert decoder == "ffmpeg_seek"
    np.testing.assert_array_equal(clip, all_frames(path, 160, 96)[100:131])


def test_grey_frames_after_a_seek_with_intra_refresh_are_noticed(tmp_path):
    """No frame can be decoded on its own, so a decoder that seeks shows grey."""
    arguments = (*X264, "-x264-params", "intra-refresh=1:keyint=48:bframes=0")
    path = encoded_video(tmp_path / "a.mkv", *arguments, source=LONG)
    expected = all_frames(path, 160, 96)
    decoders = set()
    for start in range(80, 170, 10):
        decoder, clip = read_with_chosen(path, [start, start + 5])
        np.testing.assert_array_equal(clip, expected[[start, start + 5]])
        decoders.add(decoder)
    assert "ffmpeg" in decoders


def test_a_missing_start_time_is_not_replaced_by_the_next_frame(tmp_path):
    path = encoded_video(tmp_path / "a.mkv", *B_FRAMES, source=LONG)
    with pytest.raises(Rejected, match=r"0 of 1 frames in 120\.\.120 could be decoded"):
        read_clip(path, [120], "ffmpeg_seek", 30, start_time=5.01)
