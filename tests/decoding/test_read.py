import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest

from pusa.decoding import DECODERS, read
from pusa.decoding.read import choose_decoder, difference, read_clip
from pusa.decoding.survey import survey
from pusa.errors import ManifestError, Rejected
from pusa.fitting import placement
from pusa.manifest import Limits
from pusa.video import probe, read_frames
from tests.decoding.made import MOVING, cut, frames_of, video

FRAMES = [3, 3, 4, 10, 11, 12, 30, 47]


@pytest.mark.parametrize("decoder", DECODERS)
def test_exactly_these_frames(moving, decoder):
    expected = frames_of(moving, 160, 96)
    np.testing.assert_array_equal(read_clip(moving, FRAMES, decoder, 30), expected[FRAMES])
    np.testing.assert_array_equal(read_clip(moving, [46], decoder, 30), expected[[46]])


@pytest.mark.parametrize("decoder", DECODERS)
def test_frames_are_fitted(moving, decoder):
    place = placement(160, 96, 1, 48, 48)
    expected = np.stack([place.apply(frame) for frame in frames_of(moving, 160, 96)[FRAMES]])
    np.testing.assert_array_equal(read_clip(moving, FRAMES, decoder, 30, place), expected)


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_refuses_by_the_same_names(moving, tmp_path, decoder):
    def reason(path, frames, seconds=30.0, place=None):
        with pytest.raises(Rejected) as caught:
            read_clip(path, frames, decoder, seconds, place)
        return caught.value.reason

    assert reason(moving, [0, 48]) == "damaged"
    assert reason(moving, [0, 47], seconds=0.001) == "timeout"
    assert reason(tmp_path / "gone.mp4", [0]) == "unreadable"
    assert reason(moving, [0], place=placement(320, 192, 1, 8, 8)) == "damaged"
    torn = cut(video(tmp_path / "a.mp4", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-movflags", "+faststart"), 0.6)
    assert reason(torn, range(48)) == "damaged"


def test_an_unknown_decoder_is_named(moving):
    with pytest.raises(ManifestError, match="'other'; allowed are decord, ffmpeg"):
        read_clip(moving, [0], "other", 30)


def doubts(path, found, frames, caplog) -> str:
    with caplog.at_level(logging.DEBUG, "pusa.decoding.read"):
        caplog.clear()
        assert choose_decoder(path, found, frames, 30) == "ffmpeg"
    return caplog.messages[-1]


def test_decord_is_taken_where_it_agrees(moving, kinds):
    assert choose_decoder(moving, survey(moving, Limits()), FRAMES, 30) == "decord"
    for kind in ("rotated90", "anamorphic", "odd", "fullrange", "hevc10"):
        assert choose_decoder(kinds[kind], survey(kinds[kind], Limits()), range(24), 30) == "decord"


def test_a_frame_taken_for_its_neighbour_is_noticed(moving, caplog):
    found = survey(moving, Limits())
    for shift in (-1, 1):
        shifted = dataclasses.replace(found, thumbnails=np.roll(found.thumbnails, shift, 0))
        assert "levels away" in doubts(moving, shifted, FRAMES, caplog)
    fewer = dataclasses.replace(found, times=found.times[:-1])
    assert "(48, 160, 96)" in doubts(moving, fewer, FRAMES, caplog)


def test_what_decord_cannot_do_goes_to_ffmpeg(moving, kinds, caplog, monkeypatch):
    found = survey(kinds["av1"], Limits())
    assert "cannot be opened" in doubts(kinds["av1"], found, [0], caplog)
    assert "does not seek well" in doubts(kinds["avi"], survey(kinds["avi"], Limits()), [0], caplog)
    found = survey(moving, Limits())
    for name, said in (("crash", "crashed"), ("hang", "timeout")):
        monkeypatch.setattr(read, "glance", lambda *given, name=name: misbehave(name))
        assert said in doubts(moving, found, [0], caplog)


def misbehave(name: str):
    from pusa.decoding.child import this_threads_child

    return this_threads_child().call(f"tests.decoding.made:{name}", {}, "a.mp4", 0.7)


def test_open_groups_of_pictures_which_decord_gets_wrong(tmp_path):
    """What x265 makes by itself. Which frames decord errs in is its own affair; that it is noticed is ours."""
    words = ("-c:v", "libx265", "-x265-params", "log-level=none:keyint=12:min-keyint=12", "-pix_fmt", "yuv420p")
    path = video(tmp_path / "a.mp4", *words)
    expected, found = frames_of(path, 160, 96), survey(path, Limits())
    np.testing.assert_array_equal(difference(found.thumbnails, found.thumbnails), 0)
    chosen = set()
    for frames in ([13, 14, 20], [23, 24, 25], [30], [35, 36], range(40, 48), range(48)):
        decoder = choose_decoder(path, found, frames, 30)
        clip = read_clip(path, frames, decoder, 30)
        assert np.abs(clip.astype(int) - expected[list(frames)]).mean((1, 2, 3)).max() < 1
        chosen.add(decoder)
    assert "ffmpeg" in chosen


def test_given_clips_are_read_right_whatever_they_are(kinds, tmp_path):
    for kind in ("av1", "avi", "rotated90", "hevc10"):
        facts = probe(kinds[kind])
        assert (facts.num_frames, facts.width, facts.height) == (24, 160, 96)
        assert read_frames(kinds[kind], [23, 0, 0]).shape == (3, 96, 160, 3)
    assert probe(kinds["anamorphic"]).pixel_aspect == 2


def test_a_given_clip_that_changed_is_looked_at_again(tmp_path):
    path = video(tmp_path / "a.mp4")
    assert probe(path).num_frames == 48
    video(path, source=MOVING.replace("duration=2", "duration=1"))
    assert probe(path).num_frames == 24
    with pytest.raises(Rejected, match="no file"):
        probe(Path(tmp_path))
