"""ffmpeg's filters find what was drawn: stretches to the frame, detail, motion; what fails is one sentence."""

import logging
import subprocess

import numpy as np
import pytest

from pusa.errors import MediaError
from pusa.video import numbers
from pusa.video.media import write_video
from pusa.video.numbers import STILL, filters_of, measure_file
from tests.helpers.drawn_videos import moving


def measured(path, frames, fps=24.0):
    write_video(path / "a.mp4", frames, fps)
    return measure_file(path / "a.mp4", len(frames), fps)


@pytest.mark.parametrize(("first", "last"), [(0, 4), (10, 14), (25, 29), (10, 13), (26, 29), (0, 3), (0, 29)])
def test_a_frozen_stretch_is_found_to_the_frame(tmp_path, first, last):
    video = moving()
    video[first : last + 1] = video[first]
    found = measured(tmp_path, video)
    assert found["frozen"] == [[first, last]] and found["frozen_frames"] == last - first + 1
    assert found["black_frames"] == 0 and "black" not in found


@pytest.mark.parametrize("first", [0, 10, 30 - STILL + 1])
def test_a_shorter_stretch_is_not_frozen(tmp_path, first):
    video = moving()
    video[first : first + STILL - 1] = video[first]
    assert (found := measured(tmp_path, video))["frozen_frames"] == 0 and "frozen" not in found


@pytest.mark.parametrize("fps", [1.0, 23.976, 240.0])
def test_the_frame_rate_changes_no_stretch(tmp_path, fps):
    video = moving()
    video[10:15] = video[10]
    video[20], video[25:] = 0, 0
    found = measured(tmp_path, video, fps)
    assert found["frozen"] == [[10, 14], [25, 29]] and found["black"] == [[20, 20], [25, 29]]
    assert (found["frozen_frames"], found["black_frames"]) == (10, 6)


def test_a_video_of_one_frame_has_no_motion_and_one_of_black_is_all_black(tmp_path):
    assert measured(tmp_path, moving(1)).keys() == {"spatial_information", "black_frames"}
    found = measured(tmp_path, np.zeros((9, 32, 48, 3), np.uint8))
    still = {"vmaf_motion": 0, "spatial_information": 0, "temporal_information": 0}
    assert found == still | {"black_frames": 9, "black": [[0, 8]], "frozen_frames": 9, "frozen": [[0, 8]]}


def test_more_detail_and_more_motion_are_larger_numbers(tmp_path):
    plain, moved = measured(tmp_path, moving()), measured(tmp_path, moving(60)[::2])
    assert moved["vmaf_motion"] > 1.2 * plain["vmaf_motion"] > 1
    assert moved["temporal_information"] > 1.2 * plain["temporal_information"] > 1
    soft = (moving() // 4 + 96).astype(np.uint8)
    assert measured(tmp_path, soft)["spatial_information"] < 0.3 * plain["spatial_information"]


def test_the_largest_change_is_one_at_a_cut_and_the_first_frame_counts_as_none(tmp_path):
    video = np.full((20, 32, 32, 3), 100, np.uint8)
    video[10:, :16] = 140  # the luma changes by 0, and by 40 * 219 / 255, in equal parts: a deviation of 17
    found = measured(tmp_path, video)
    assert found["temporal_information"] == pytest.approx(20, abs=3.5)
    assert found["vmaf_motion"] == pytest.approx(20 * 219 / 255 / 19, rel=0.1)


def test_a_lacking_filter_is_logged_once(caplog):
    filters_of.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert filters_of(frozenset({"siti", "nosuch"})) == filters_of(frozenset({"siti", "nosuch"})) == {"siti"}
    assert len(caplog.records) == 1 and "lacks the filters nosuch" in caplog.text


def test_without_a_filter_its_numbers_are_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(numbers, "filters_of", lambda names: names - {"siti", "freezedetect"})
    assert measured(tmp_path, moving()).keys() == {"vmaf_motion", "black_frames"}
    monkeypatch.setattr(numbers, "filters_of", lambda names: frozenset())
    assert measured(tmp_path, moving()) == {}


def test_what_cannot_be_measured_is_said_in_a_sentence(tmp_path):
    write_video(path := tmp_path / "a.mp4", moving(), 24)
    with pytest.raises(MediaError, match="it showed 30 of 31 frames"):
        measure_file(path, 31, 24)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(MediaError, match=r"a\.mp4 could not be measured; ffmpeg: .*"):
        measure_file(path, 30, 24)
    path.unlink()
    with pytest.raises(MediaError, match="cannot be read: No such file"):
        measure_file(path, 30, 24)


def test_a_killed_ffmpeg_is_an_error(tmp_path, monkeypatch):
    write_video(path := tmp_path / "a.mp4", moving(), 24)
    start = subprocess.Popen

    def start_and_kill(*arguments, **options):
        process = start(*arguments, **options)
        process.kill()
        return process

    filters_of(frozenset({"blackdetect", "freezedetect", "siti", "vmafmotion"}))
    monkeypatch.setattr("pusa.video.ffmpeg.subprocess.Popen", start_and_kill)
    with pytest.raises(MediaError, match=r"ffmpeg died \(.*\) on .*a\.mp4"):
        measure_file(path, 30, 24)
