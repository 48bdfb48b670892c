import dataclasses
import logging
import time

import numpy as np
import pytest

from pusa.manifest.models import Limits
from pusa.video.child import this_threads_child
from pusa.video.decoders import choice, read_clip
from pusa.video.decoders.choice import DecoderChooser
from pusa.video.survey import survey_video
from tests.helpers.decoder_stand_ins import X264, ffmpeg, frames_of, video

FRAMES = [3, 3, 4, 10, 11, 12, 30, 47]
LONG = "testsrc2=size=160x96:rate=24:duration=8"
X265 = ("-c:v", "libx265", "-x265-params", "log-level=none:keyint=48:min-keyint=24", "-pix_fmt", "yuv420p")
SOUND = ("-f", "lavfi", "-i", "sine=d=8", "-c:a", "aac")
DEEP = range(100, 180, 3)


def doubts(path, found, frames, caplog) -> str:
    with caplog.at_level(logging.DEBUG, "pusa.video.decoders.choice"):
        caplog.clear()
        assert DecoderChooser(path, found, 30).choose(frames) == "ffmpeg"
    return caplog.messages[0]


def test_decord_is_taken_where_it_agrees(moving, kinds):
    assert DecoderChooser(moving, survey_video(moving, Limits()), 30).choose(FRAMES) == "decord"
    for kind in ("rotated90", "anamorphic", "odd", "fullrange", "hevc10"):
        expected = "ffmpeg" if kind == "hevc10" else "decord"  # 10 bits it rounds wrong
        assert DecoderChooser(kinds[kind], survey_video(kinds[kind], Limits()), 30).choose(range(24)) == expected


def test_a_frame_taken_for_its_neighbour_is_noticed(moving, caplog):
    found = survey_video(moving, Limits())
    for shift in (-1, 1):
        shifted = dataclasses.replace(found, thumbnails=np.roll(found.thumbnails, shift, 0))
        assert "levels away" in doubts(moving, shifted, FRAMES, caplog)
    fewer = dataclasses.replace(found, times=found.times[:-1])
    assert "(48, 160, 96)" in doubts(moving, fewer, FRAMES, caplog)


def test_what_decord_cannot_do_goes_to_ffmpeg(kinds, caplog):
    found = survey_video(kinds["av1"], Limits())
    assert "cannot be opened" in doubts(kinds["av1"], found, [0], caplog)
    assert "does not seek well" in doubts(kinds["avi"], survey_video(kinds["avi"], Limits()), [0], caplog)


def misbehave(name: str, seconds: float):
    return this_threads_child().call(f"tests.helpers.decoder_stand_ins:{name}", {}, "a.mp4", seconds)


@pytest.mark.parametrize("name", ["crash", "hang"])
def test_who_hangs_or_crashes_is_not_asked_again(moving, caplog, monkeypatch, name):
    asked = []
    monkeypatch.setattr(choice.with_decord, "glance", lambda *given: (asked.append(given), misbehave(name, 0.5)))
    chosen = DecoderChooser(moving, survey_video(moving, Limits()), 30)
    began = time.monotonic()
    assert [chooser.choose([start]) for start in range(20)] == ["ffmpeg"] * 20
    assert len(asked) == 1 and time.monotonic() - began < 8


def test_many_clips_are_all_compared(moving, monkeypatch):
    glance = choice.with_decord.glance
    monkeypatch.setattr(choice.with_decord, "glance", lambda *words: (time.sleep(0.1), glance(*words))[1])
    chosen = DecoderChooser(moving, survey_video(moving, Limits()), 1.0)
    assert [chooser.choose([start]) for start in range(20)] == ["decord"] * 20  # together longer than one may take


def test_open_groups_of_pictures_which_decord_gets_wrong(tmp_path):
    """What x265 makes by itself. Which frames decord errs in is its own affair; that it is noticed is ours."""
    words = ("-c:v", "libx265", "-x265-params", "log-level=none:keyint=12:min-keyint=12", "-pix_fmt", "yuv420p")
    path = video(tmp_path / "a.mp4", *words)
    expected, found = frames_of(path, 160, 96), survey_video(path, Limits())
    np.testing.assert_array_equal(difference(found.thumbnails, found.thumbnails), 0)
    chosen = set()
    for frames in ([13, 14, 20], [23, 24, 25], [30], [35, 36], range(40, 48), range(48)):
        decoder = DecoderChooser(path, found, 30).choose(frames)
        clip = read_clip(path, frames, decoder, 30)
        assert np.abs(clip.astype(int) - expected[list(frames)]).mean((1, 2, 3)).max() < 1
        chosen.add(decoder)
    assert "ffmpeg" in chosen


B_FRAMES = (*X264, "-g", "48", "-bf", "3")
DEEP_KINDS = {
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


def read_deep(path, frames):
    found = survey_video(path, Limits())
    decoder = DecoderChooser(path, found, 30).choose(frames)
    return decoder, read_clip(path, frames, decoder, 30, start_time=found.times[frames[0]])


@pytest.mark.parametrize("kind", DEEP_KINDS)
def test_deep_in_a_source_ffmpeg_seeks_and_finds_the_very_frames(tmp_path, kind):
    name, words = DEEP_KINDS[kind]
    path = video(tmp_path / name, *words, source=LONG)
    expected = frames_of(path, 160, 96)
    frames = [frame for frame in DEEP if frame < len(expected)]
    decoder, clip = read_deep(path, frames)
    assert decoder == "ffmpeg_seek"
    np.testing.assert_array_equal(clip, expected[frames])
    assert read_deep(path, range(9))[0] == "ffmpeg", "near the start there is nothing to gain"


def test_behind_an_edit_list_it_finds_them_too(tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "SEEKABLE", ())
    whole = video(tmp_path / "whole.mp4", *B_FRAMES, source=LONG)
    path = tmp_path / "a.mp4"
    ffmpeg("-ss", "1.3", "-i", whole, "-c", "copy", path)
    decoder, clip = read_deep(path, range(100, 131))
    assert decoder == "ffmpeg_seek"
    np.testing.assert_array_equal(clip, frames_of(path, 160, 96)[100:131])


def test_where_a_picture_is_built_up_bit_by_bit_it_is_noticed(tmp_path):
    """No frame of it can be decoded alone: who seeks gets grey."""
    words = (*X264, "-x264-params", "intra-refresh=1:keyint=48:bframes=0")
    path = video(tmp_path / "a.mkv", *words, source=LONG)
    expected = frames_of(path, 160, 96)
    decoders = set()
    for start in range(80, 170, 10):
        decoder, clip = read_deep(path, [start, start + 5])
        np.testing.assert_array_equal(clip, expected[[start, start + 5]])
        decoders.add(decoder)
    assert "ffmpeg" in decoders


def test_a_frame_that_is_not_there_is_not_replaced_by_the_next(tmp_path):
    path = video(tmp_path / "a.mkv", *B_FRAMES, source=LONG)
    with pytest.raises(choice.Rejected, match="0 of 1 could be decoded"):
        read_clip(path, [120], "ffmpeg_seek", 30, start_time=5.01)
