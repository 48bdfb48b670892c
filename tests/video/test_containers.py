"""The right stream is read, whatever lies beside it, and what a container states wrongly or lacks does no harm."""

import struct
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest

from pusa.errors import Rejected
from pusa.ingest.kinds import kinds_of
from pusa.manifest.models import Limits
from pusa.video.decoders import read_clip
from pusa.video.decoders.choice import DecoderChooser
from pusa.video.survey import survey_video
from tests.helpers.media import MOVING, X264, all_frames, encoded_video, ffmpeg

LIMITS = Limits()
SHORT = LIMITS.model_copy(update={"source_seconds": 5.0})
GROUPS = (*X264, "-g", "12")
RED = "color=red:size=96x160:rate=24:duration=2"
SOUND = ("-f", "lavfi", "-i", "sine=duration=2")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """48 frames of 160x96, with a keyframe in 12."""
    return encoded_video(tmp_path_factory.mktemp("containers") / "plain.mp4", *GROUPS)


@pytest.fixture(scope="module")
def with_sound(plain):
    path = plain.with_name("sound.mp4")
    ffmpeg("-i", plain, *SOUND, "-c:v", "copy", "-c:a", "aac", path)
    return path


@pytest.fixture(scope="module")
def cover(plain):
    path = plain.with_name("cover.png")
    ffmpeg("-f", "lavfi", "-i", "color=blue:size=200x200", "-frames:v", 1, path)
    return path


def usable_clip(path, survey):
    frames = np.flatnonzero(survey.usable).tolist()
    decoder = DecoderChooser(path, survey, 30).choose(frames)
    start = float(survey.times[frames[0]])
    return read_clip(path, frames, decoder, 30, start_time=start, conversion=survey.conversion)


def piped(path, source, container, *arguments):
    """Write a stream, whose writer can not go back to fill in lengths."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", source, "-c", "copy", *arguments]
    done = subprocess.run([*command, "-f", container, "pipe:1"], check=True, capture_output=True)
    path.write_bytes(done.stdout)
    return path


def rejection(path, limits=LIMITS):
    with pytest.raises(Rejected) as caught:
        survey_video(path, limits)
    assert str(path) in caught.value.detail and "\n" not in caught.value.detail
    return caught.value.reason


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize("default", [(0, 1), (1, 0), (1, 1), (0, 0)])
def test_of_several_videos_the_default_one_is_read_or_else_the_first(tmp_path, plain, suffix, default):
    red, path = encoded_video(tmp_path / "red.mp4", *X264, source=RED), tmp_path / f"a.{suffix}"
    flags = [word for i in (0, 1) for word in (f"-disposition:v:{i}", "default" if default[i] else "0")]
    ffmpeg("-i", plain, "-i", red, "-map", 0, "-map", 1, "-c", "copy", *flags, path)
    survey = survey_video(path, LIMITS)
    clip, expected = usable_clip(path, survey), all_frames(red if default == (0, 1) else plain, *survey_size(survey))
    np.testing.assert_array_equal(clip, expected)
    assert survey.header.stream == int(default == (0, 1)) and "several_videos" in kinds_of(survey)


def survey_size(survey):
    return survey.width, survey.height


ADDED = {  # name -> arguments; {plain}, {sound} and {cover} stand for files
    "tmcd.mov": ("-i", "{plain}", "-c", "copy", "-timecode", "01:00:00:00"),
    "tmcd_and_sound.mov": ("-i", "{sound}", "-c", "copy", "-timecode", "01:00:00:00"),
    "cover_first.mp4": ("-i", "{cover}", "-i", "{sound}", "-map", "0", "-map", "1", "-c", "copy",
                        "-disposition:v:0", "attached_pic"),
    "cover_last.mp4": ("-i", "{plain}", "-i", "{cover}", "-map", "0", "-map", "1", "-c", "copy",
                       "-disposition:v:1", "attached_pic"),
    "attachment.mkv": ("-i", "{sound}", "-c", "copy", "-attach", "{cover}", "-metadata:s:t", "mimetype=image/png"),
    "subtitles.mkv": ("-i", "{text}", "-i", "{sound}", "-map", "0", "-map", "1", "-c", "copy"),
    "subtitles.mp4": ("-i", "{text}", "-i", "{sound}", "-map", "0", "-map", "1", "-c", "copy", "-c:s", "mov_text"),
    "programs.ts": ("-i", "{plain}", *SOUND, "-map", "0", "-map", "1", "-c:v", "copy", "-c:a", "mp2",
                    "-program", "title=a:st=1", "-program", "title=b:st=0"),
}  # fmt: skip


@pytest.mark.parametrize("name", ADDED)
def test_what_lies_beside_the_video_changes_nothing(tmp_path, plain, with_sound, cover, name):
    text, path = tmp_path / "a.srt", tmp_path / name
    text.write_text("1\n00:00:00,000 --> 00:00:01,000\nStream #0:0: Video: h264, 9x9\n")
    files = {"plain": plain, "sound": with_sound, "cover": cover, "text": text}
    ffmpeg(*(word.format(**files) for word in ADDED[name]), path)
    survey = survey_video(path, LIMITS)
    assert survey.damage == "" and survey.usable.all() and survey.header.video_streams == 1
    np.testing.assert_array_equal(usable_clip(path, survey), all_frames(plain, 160, 96))


def test_sound_with_a_picture_is_no_video(tmp_path, cover):
    ffmpeg("-i", cover, *SOUND, "-map", 0, "-map", 1, "-c:v", "copy", "-disposition:v:0", "attached_pic",
           tmp_path / "a.m4a")  # fmt: skip
    ffmpeg(*SOUND, "-attach", cover, "-metadata:s:t", "mimetype=image/png", tmp_path / "a.mkv")
    assert rejection(tmp_path / "a.m4a") == rejection(tmp_path / "a.mkv") == "no_video_stream"


def test_a_codec_that_nobody_knows_is_refused(tmp_path, plain):
    path, data = tmp_path / "a.mp4", bytearray(plain.read_bytes())
    place = data.index(b"avc1", data.index(b"stsd"))
    data[place : place + 4] = b"QqZ9"
    path.write_bytes(data)
    assert rejection(path) == "not_a_video"


STREAMED = {
    "a.flv": ("flv",),
    "a.mkv": ("matroska", "-live", "1"),
    "b.mkv": ("matroska",),
    "a.mp4": ("mp4", "-movflags", "frag_keyframe+empty_moov+default_base_moof"),
    "a.avi": ("avi",),
    "a.ts": ("mpegts",),
}


@pytest.mark.parametrize("sounds", [False, True])
@pytest.mark.parametrize("name", STREAMED)
def test_a_stream_whose_length_was_never_filled_in_is_whole_and_not_too_long(tmp_path, plain, with_sound, name, sounds):
    path = piped(tmp_path / name, with_sound if sounds else plain, *STREAMED[name])
    survey = survey_video(path, SHORT)
    assert survey.damage == "" and survey.usable.all()
    np.testing.assert_array_equal(usable_clip(path, survey), all_frames(plain, 160, 96))


@pytest.mark.parametrize("duration", [0, 2**31 - 1, 2**32 - 1])
@pytest.mark.parametrize("fragmented", [False, True])
def test_a_duration_that_is_a_placeholder_does_no_harm(tmp_path, plain, fragmented, duration):
    source = piped(tmp_path / "b.mp4", plain, *STREAMED["a.mp4"]) if fragmented else plain
    data = bytearray(source.read_bytes())
    for box in (b"mvhd", b"tkhd", b"mdhd"):
        place = data.index(box) + (24 if box == b"tkhd" else 20)
        data[place : place + 4] = duration.to_bytes(4, "big")
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    survey = survey_video(path, SHORT)
    assert len(survey.times) == 48 and survey.usable.all() and survey.damage == ""


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_a_video_that_is_too_long_is_refused_by_its_header(tmp_path, plain, name):
    path = tmp_path / name
    ffmpeg("-i", plain, "-c", "copy", path)
    assert rejection(path, LIMITS.model_copy(update={"source_seconds": 1.0})) == "too_long"


def test_a_video_may_begin_long_after_the_sound(tmp_path, plain):
    path = tmp_path / "a.ts"
    ffmpeg("-f", "lavfi", "-i", "sine=duration=40", "-itsoffset", 36, "-i", plain, "-map", 0, "-map", 1,
           "-c:v", "copy", "-c:a", "mp2", path)  # fmt: skip
    survey = survey_video(path, LIMITS)
    assert len(survey.times) == 48 and survey.usable.all()


def test_a_recording_may_begin_far_before_its_first_keyframe(tmp_path):
    noise = "color=gray:size=640x480:rate=25,trim=end_frame=90,noise=alls=100:allf=t"
    encoding = ("-c:v", "mpeg2video", "-qscale:v", "1", "-g", "60", "-sc_threshold", "1000000000", "-bf", "0")
    path = encoded_video(tmp_path / "a.ts", *encoding, source=noise)
    data = path.read_bytes()
    assert len(data) > 10_000_000, "libav looks for a size in 5 million bytes"
    path.write_bytes(data[188 * 1000 :])
    survey = survey_video(path, LIMITS)
    assert survey.usable.sum() == 30 and (survey.width, survey.height) == (640, 480)


def test_a_part_without_a_keyframe_is_damaged(tmp_path):
    path = encoded_video(tmp_path / "a.ts", *X264, "-g", "100")
    data = path.read_bytes()
    path.write_bytes(data[len(data) // 2 // 188 * 188 :])
    assert rejection(path) == "damaged"


TORN = {  # name -> (encoding, the part of the bytes that is lost, what the report says)
    "a.ts": (GROUPS, (0.7, 1.0), "within a packet|cannot be decoded"),
    "a.ogv": (("-c:v", "libtheora", "-q:v", "9", "-g", "12"), (0.7, 1.0), "last page"),
    "a.mp4": ((*GROUPS, "-movflags", "frag_keyframe+empty_moov"), (0.3, 0.55), "fragments after byte|cannot be"),
    "b.mp4": ((*GROUPS, "-movflags", "+faststart"), (0.7, 1.0), "cannot be decoded|it ends after"),
    "a.mpg": (("-c:v", "mpeg2video", "-g", "12", "-bf", "0"), (0.4, 0.55), "cannot be decoded"),
    "sound.ts": ((*SOUND, *GROUPS, "-c:a", "mp2"), (0.4, 0.6), "marked as corrupt|within a packet"),
    "sound.mpg": ((*SOUND, "-c:v", "mpeg2video", "-g", "12", "-c:a", "mp2"), (0.4, 0.6), "cannot be decoded"),
    "a.flv": (GROUPS, (0.4, 0.5), "cannot be decoded"),
    "a.mkv": (GROUPS, (0.4, 0.5), "cannot be decoded"),
}


@pytest.mark.parametrize("name", TORN)
def test_the_rest_of_a_torn_file_is_used_and_the_loss_told(tmp_path, name):
    encoding, (first, last), message = TORN[name]
    path = encoded_video(tmp_path / name, *encoding, source=MOVING)
    whole, data = all_frames(path, 160, 96), path.read_bytes()
    assert survey_video(path, LIMITS).damage == ""
    path.write_bytes(data[: int(len(data) * first)] + data[int(len(data) * last) + 3 :])
    survey = survey_video(path, LIMITS)
    assert survey.damage and any(part in survey.damage for part in message.split("|")), survey.damage
    clip = usable_clip(path, survey)
    small = whole[:, ::3, ::3].astype(int)
    numbers = [int(np.abs(small - frame[::3, ::3]).mean((1, 2, 3)).argmin()) for frame in clip]
    np.testing.assert_array_equal(clip, whole[numbers])
    assert 10 <= len(clip) < 46 and np.diff(numbers).min() > 0


def with_clean_aperture(data: bytes, path: tuple[bytes, ...], width: int, height: int) -> bytes:
    """Return boxes of a QuickTime movie with a `clap` box in the box at `path`: the part that is to be shown."""
    boxes, start = b"", 0
    while start + 8 <= len(data):
        length, name = int.from_bytes(data[start : start + 4]), data[start + 4 : start + 8]
        body = data[start + 8 : start + length]
        if name == path[0]:
            if len(path) == 1:
                body += struct.pack(">I4s8I", 40, b"clap", width, 1, height, 1, 0, 1, 0, 1)
            else:
                skipped = 8 if name == b"stsd" else 0
                body = body[:skipped] + with_clean_aperture(body[skipped:], path[1:], width, height)
        boxes += (len(body) + 8).to_bytes(4) + name + body
        start += length
    return boxes


def test_a_part_that_a_container_wants_shown_is_not_cut_out_by_one_reader_alone(tmp_path):
    path = encoded_video(tmp_path / "a.mov", *X264)
    data, whole = path.read_bytes(), all_frames(path, 160, 96)
    index = data.rindex(b"moov") - 4  # at the end, so that the pictures stay in their places
    boxes = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1")
    path.write_bytes(data[:index] + with_clean_aperture(data[index:], boxes, 80, 96))
    survey = survey_video(path, Limits())
    assert (survey.width, survey.height) == (160, 96)
    for decoder in ("ffmpeg", DecoderChooser(path, survey, 30).choose([0, 5])):
        clip = read_clip(path, [0, 5], decoder, 30, conversion=survey.conversion)
        np.testing.assert_array_equal(clip, whole[[0, 5]])
