"""A damaged video gives the frames that are as they were, and a sentence about the others."""

import re
from itertools import pairwise

import numpy as np
import pytest

from pusa.errors import MediaError, Rejected
from pusa.manifest.models import Limits
from pusa.video.child import this_threads_child
from pusa.video.decoders import read_clip
from pusa.video.decoders.choice import DecoderChooser
from pusa.video.media import probe
from pusa.video.survey import survey_video
from tests.helpers.media import MOVING, X264, all_frames, encoded_video, ffmpeg, truncate

LIMITS = Limits()
GROUPS = (*X264, "-g", "12")
ENCODINGS = {
    "faststart.mp4": (*X264, "-movflags", "+faststart"),
    "a.mkv": X264,
    "a.avi": ("-c:v", "mpeg4"),
    "a.webm": ("-c:v", "libvpx-vp9", "-deadline", "realtime"),
    "sound.mkv": ("-f", "lavfi", "-i", "sine=duration=2", *X264),
    "fragments.mp4": (*GROUPS, "-movflags", "frag_keyframe+empty_moov"),
    "a.ts": GROUPS,
    "a.mpg": ("-c:v", "mpeg2video", "-g", "12"),
    "a.flv": X264,
}


def usable_frames(path, whole):
    """Return the survey, and the numbers in `whole` of the usable frames, which must be equal to those."""
    survey = survey_video(path, LIMITS)
    frames = np.flatnonzero(survey.usable).tolist()
    decoder = DecoderChooser(path, survey, 30).choose(frames)
    assert decoder == "ffmpeg"
    clip = read_clip(path, frames, decoder, 30, conversion=survey.conversion)
    numbers = [int(np.abs(whole.astype(int) - frame).mean((1, 2, 3)).argmin()) for frame in clip]
    np.testing.assert_array_equal(clip, whole[numbers])
    return survey, numbers


@pytest.mark.parametrize("name", ENCODINGS)
def test_the_first_part_of_a_file_can_be_used(tmp_path, name):
    path = encoded_video(tmp_path / name, *ENCODINGS[name])
    survey, whole = survey_video(path, LIMITS), all_frames(path, 160, 96)
    assert len(survey.times) == 48 and survey.usable.all() and survey.damage == ""
    survey, numbers = usable_frames(truncate(path, 0.7), whole)
    assert numbers[:20] == list(range(20)) and max(numbers) < 40 and "\n" not in survey.damage
    assert survey.damage, "the loss is told"
    with pytest.raises(MediaError, match="is damaged"):
        probe(truncate(path, 0.7))


def test_an_index_at_the_end_is_missed(tmp_path):
    with pytest.raises(Rejected, match="lacks its index") as caught:
        survey_video(truncate(encoded_video(tmp_path / "a.mp4"), 0.9), LIMITS)
    assert caught.value.reason == "damaged"


def test_an_avi_that_ends_between_two_frames_is_short(tmp_path):
    path = encoded_video(tmp_path / "a.avi", "-c:v", "mjpeg")
    data, whole = path.read_bytes(), all_frames(path, 160, 96)
    path.write_bytes(data[: data.index(b"00dc", len(data) // 2)])
    survey, numbers = usable_frames(path, whole)
    assert numbers == list(range(len(numbers))) and 10 < len(numbers) < 35
    assert "it ends after" in survey.damage or "of the file are missing" in survey.damage


@pytest.mark.parametrize("stated", [0, 2**32 - 1])
def test_a_length_that_a_streaming_writer_never_filled_in_is_no_damage(tmp_path, stated):
    path = encoded_video(tmp_path / "a.avi", "-c:v", "mjpeg")
    data = bytearray(path.read_bytes())
    data[4:8] = stated.to_bytes(4, "little")
    path.write_bytes(data)
    survey = survey_video(path, LIMITS)
    assert len(survey.times) == 48 and survey.damage == ""


def test_an_flv_that_ends_between_two_frames_is_short(tmp_path):
    data = encoded_video(tmp_path / "a.flv", *X264).read_bytes()
    end = 13
    while end < len(data) * 0.6:
        end += 15 + int.from_bytes(data[end + 1 : end + 4])
    (tmp_path / "torn.flv").write_bytes(data[:end])
    survey = survey_video(tmp_path / "torn.flv", LIMITS)
    assert survey.usable.all() and 20 < len(survey.times) < 40 and "it ends after" in survey.damage


def test_between_flipped_bytes_and_the_next_keyframe_frames_are_lost(tmp_path):
    path = encoded_video(tmp_path / "a.ts", *GROUPS)
    whole, data = all_frames(path, 160, 96), bytearray(path.read_bytes())
    for place in range(len(data) // 3, len(data) // 3 + 400, 40):
        data[place] ^= 0xFF
    path.write_bytes(data)
    survey, numbers = usable_frames(path, whole)
    lost = sorted(set(range(48)) - set(numbers))
    assert 0 < len(lost) <= 12 and lost == list(range(lost[0], lost[-1] + 1)) and (lost[-1] + 1) % 12 == 0
    assert "cannot be decoded" in survey.damage


def test_packets_that_are_missing_are_damage_although_all_others_can_be_decoded(tmp_path):
    path = encoded_video(tmp_path / "a.ts", *GROUPS)
    whole, data = all_frames(path, 160, 96), path.read_bytes()
    third = len(data) // 3 // 188 * 188
    path.write_bytes(data[:third] + data[third + 188 * 20 :])
    survey, numbers = usable_frames(path, whole)
    assert 24 <= len(numbers) < 45 and numbers[:9] == list(range(9)) and numbers[-12:] == list(range(36, 48))
    assert survey.damage


def test_a_recording_that_starts_between_two_keyframes_starts_at_the_first_one(tmp_path):
    path = encoded_video(tmp_path / "a.ts", *GROUPS)
    whole, data = all_frames(path, 160, 96), path.read_bytes()
    path.write_bytes(data[len(data) // 3 // 188 * 188 :])
    survey, numbers = usable_frames(path, whole)
    assert numbers == list(range(numbers[0], 48)) and numbers[0] % 12 == 0
    assert "it starts between two keyframes" in survey.damage


def test_frames_up_to_a_change_of_size_can_be_used(tmp_path):
    for name, size in (("a", "160x96"), ("b", "96x160")):
        encoded_video(tmp_path / f"{name}.ts", *X264, source=f"testsrc2=size={size}:rate=24:duration=1")
    joined = tmp_path / "joined.ts"
    joined.write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    survey, numbers = usable_frames(joined, all_frames(tmp_path / "a.ts", 160, 96))
    assert numbers == list(range(len(numbers))) and 20 <= len(numbers) <= 23, "the last one's time may be wrong"
    assert "another size" in survey.damage or "is at" in survey.damage


def test_frames_that_change_from_one_decoding_to_the_next_are_not_used(tmp_path):
    path = truncate(encoded_video(tmp_path / "a.ts", *GROUPS), 0.7)
    survey = survey_video(path, LIMITS)
    chooser = DecoderChooser(path, survey, 30)
    chooser._readers = {"ffmpeg": lambda path, frames, seconds, survey: 255 - survey.thumbnails[frames]}
    with pytest.raises(Rejected, match="differs from the survey's"):
        chooser.choose([0, 1])


def test_damage_is_noticed_beside_another_stream_of_the_same_codec(tmp_path):
    """ffmpeg's log names the codec and not the stream."""
    path = tmp_path / "a.mkv"
    small = ("-f", "lavfi", "-i", "color=gray:size=64x64:rate=24:duration=2")
    ffmpeg("-f", "lavfi", "-i", MOVING, *small, "-map", 0, "-map", 1, "-c:v", "mjpeg", "-q:v", 5, path)
    survey, whole = survey_video(path, LIMITS), all_frames(path, 160, 96)
    assert survey.header.other_codecs == ("mjpeg",) and survey.damage == "" and survey.usable.all()
    data = bytearray(path.read_bytes())
    starts = [match.start() for match in re.finditer(b"\xff\xd8\xff", data)]
    length, start = max((end - start, start) for start, end in pairwise(starts[20:]))  # a picture of the large stream
    data[start + length // 2 : start + length // 2 + 40 : 10] = b"\xff\xfe\xff\xfe"
    path.write_bytes(data)
    survey, numbers = usable_frames(path, whole)
    assert survey.damage and 45 <= len(numbers) < 48


@pytest.mark.parametrize("name", ["abort", "hang"])
def test_a_damaged_source_that_could_not_be_decoded_in_time_is_tried_again_by_the_next_run(tmp_path, name):
    path = truncate(encoded_video(tmp_path / "a.mkv", *X264), 0.7)
    chooser = DecoderChooser(path, survey_video(path, LIMITS), 30)
    seconds = 0.5 if name == "hang" else 120

    def read_thumbnails(path, frames, limit, survey):
        return this_threads_child().call(f"tests.helpers.decoder_stand_ins:{name}", {}, str(path), seconds).array

    chooser._readers = {"ffmpeg": read_thumbnails}
    with pytest.raises(Rejected) as caught:
        chooser.choose([0, 1])
    assert caught.value.reason == {"hang": "timeout", "abort": "crashed"}[name]
