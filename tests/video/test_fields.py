"""Woven fields become frames, film in fields becomes film again, and whole frames stay as they are."""

import numpy as np
import pytest

from pusa.errors import Rejected
from pusa.ingest.kinds import kinds_of
from pusa.manifest.models import Limits
from pusa.video.decoders import read_clip
from pusa.video.decoders.choice import DecoderChooser
from pusa.video.fields import FieldMarks, judge_pairs
from pusa.video.survey import survey_video
from tests.helpers.media import all_frames, encoded_video, ffmpeg

LIMITS = Limits()
H264 = ("-c:v", "libx264", "-preset", "veryfast", "-crf", "14", "-pix_fmt", "yuv420p")
# Flags do not depend on what the pictures show.
FLAGGED = {order: (*H264, "-flags", "+ildct+ilme", "-x264opts", f"{order}=1") for order in ("tff", "bff")}
MPEG2 = ("-c:v", "mpeg2video", "-q:v", "2", "-flags", "+ildct+ilme")
# 4 pixels a field: in thumbnails of 20 pixels each, the change repeats each five frames, as it does in film.
BAR = "color=gray:s=160x96:r=50:d=1.6,format=yuv444p,geq=lum='if(lt(mod(X-4*N+640,160),12),235,60)':cb=110:cr=140"
MANDELBROT = "mandelbrot=s=320x240:r={rate},trim=duration={seconds}"
STILL = "mandelbrot=s=320x240:r=1,trim=end_frame=1,loop=-1:1,setpts=N/60/TB,fps=60,trim=end_frame=80"
BALL = f"{STILL},format=gbrp,geq=r='if(lt(hypot(X-40-3*N,Y-120),10),255,r(X,Y))':g=g(X\\,Y):b=b(X\\,Y)"
WEAVE = "format=yuv420p,interlace=scan={}:lowpass=off"
TOP, BOTTOM = (f",{WEAVE.format(order)}" for order in ("tff", "bff"))
PULLDOWN = ",format=yuv420p,telecine=pattern={}:first_field={}"


def comb(frames):
    """Return how much neighbouring rows differ more than rows two apart: 0 for a smooth picture of one time."""
    red = frames[..., 0].astype(int)
    above, below = red[:, 1:-1] - red[:, :-2], red[:, 1:-1] - red[:, 2:]
    return np.clip(np.abs(above) + np.abs(below) - 2 * np.abs(above - below), 0, None).mean()


def read_all(path, survey):
    frames = list(range(len(survey.times)))
    decoder = DecoderChooser(path, survey, 30).choose(frames)
    return read_clip(path, frames, decoder, 30, start_time=float(survey.times[0]), conversion=survey.conversion)


WOVEN = {  # name -> (source, encoding, order of the pictures)
    "top.mp4": (BAR + TOP, FLAGGED["tff"], "top_first"),
    "bottom.mp4": (BAR + BOTTOM, FLAGGED["bff"], "bottom_first"),
    "unflagged.mp4": (BAR + TOP + ",setfield=prog", H264, "top_first"),
    "wrong_flag.mp4": (BAR + BOTTOM + ",setfield=tff", FLAGGED["tff"], "bottom_first"),
    "smoothed.mp4": (BAR + ",format=yuv420p,interlace=scan=tff", FLAGGED["tff"], "top_first"),
    "mpeg2.mpg": (BAR + TOP, MPEG2, "top_first"),
    "mpeg2.ts": (BAR + BOTTOM, MPEG2, "bottom_first"),
    "mjpeg.avi": (BAR + TOP, ("-c:v", "mjpeg", "-q:v", "2", "-pix_fmt", "yuvj420p"), "top_first"),
    "uncompressed.mov": (BAR + BOTTOM, ("-c:v", "rawvideo", "-pix_fmt", "uyvy422"), "bottom_first"),
    "odd_height.mkv": (
        BAR + ",crop=159:95:exact=1,format=yuv444p,interlace=scan=tff:lowpass=off",
        ("-c:v", "ffv1"),
        "top_first",
    ),
    "small_object.mp4": (BALL + TOP + ",setfield=prog", H264, "top_first"),
    "mostly_still.mp4": (BAR.replace("4*N", "4*max(0,N-60)") + TOP + ",setfield=prog", H264, "top_first"),
}


@pytest.mark.parametrize("name", WOVEN)
def test_woven_fields_become_frames_of_one_time(tmp_path, name):
    source, encoding, order = WOVEN[name]
    path = encoded_video(tmp_path / name, *encoding, source=source)
    survey = survey_video(path, LIMITS)
    assert (survey.conversion.deinterlace, survey.conversion.field_order) == ("bwdif", order)
    assert len(survey.times) == 40 and survey.usable.all() and "interlaced" in kinds_of(survey)
    frames = read_all(path, survey)
    woven = all_frames(path, *frames.shape[2:0:-1])
    assert comb(frames) < (0.99 if source.startswith(BALL) else 0.1) * comb(woven), "the fields are apart"


@pytest.mark.parametrize(("rotation", "flag"), [(90, True), (270, True), (90, False), (180, False)])
def test_fields_of_a_turned_picture_are_columns_or_change_places(tmp_path, rotation, flag):
    upright = encoded_video(tmp_path / "a.mp4", *(FLAGGED["tff"] if flag else H264), source=BAR + TOP)
    path = tmp_path / "turned.mp4"
    ffmpeg("-display_rotation", rotation, "-i", upright, "-c", "copy", path)
    survey = survey_video(path, LIMITS)
    assert survey.conversion.deinterlace == ("bwdif" if rotation == 180 else "bwdif_turned")
    assert {"interlaced", "rotated"} <= set(kinds_of(survey))
    assert comb(np.rot90(read_all(path, survey), -rotation // 90, (1, 2))) < 0.1


WHOLE = {  # name -> (source, encoding)
    "pattern.mp4": ("testsrc2=s=160x96:r=24:d=1", H264),
    "poor_pattern.mp4": ("testsrc2=s=160x96:r=24:d=2", (*H264, "-crf", "34")),
    "poor_pattern.avi": ("testsrc2=s=160x120:r=30:d=1", ("-c:v", "mpeg4")),
    "small_pattern.mp4": ("testsrc2=s=64x64:r=24:d=2", H264),
    "clock.mp4": ("testsrc=s=320x240:r=24:d=2", H264),
    "scroll.mp4": (STILL.replace("fps=60", "fps=24") + ",scroll=v=0.0083", H264),
    "lines.mp4": ("color=gray:s=160x96:r=24:d=1,format=gbrp,geq=r='255*mod(Y+N,2)':g='99*mod(Y,2)':b=80", H264),
    "noise.mp4": ("color=gray:s=160x96:r=24:d=1,noise=alls=60:allf=t", H264),
    "repeated_frames.mp4": ("testsrc2=s=160x96:r=24:d=2,fps=30", H264),
}
ONE_TIME = {
    "pattern.mp4": "testsrc2=s=160x96:r=25:d=1.6",
    "fine_detail.mp4": MANDELBROT.format(rate=25, seconds=1.6),
    "film_at_25.mp4": BAR.replace("r=50", "r=25") + PULLDOWN.format(2, "top"),
    "cuts.mp4": "testsrc2=s=160x96:r=25:d=1.6,hue=h='90*floor(n/8)'",
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_frames_stay_as_they_are(tmp_path, name):
    source, encoding = WHOLE[name]
    survey = survey_video(encoded_video(tmp_path / name, *encoding, source=source), LIMITS)
    assert (survey.conversion.deinterlace, survey.conversion.field_order) == ("none", "progressive")
    assert not {"interlaced", "film_in_fields", "fields_of_one_time"} & set(kinds_of(survey))


@pytest.mark.parametrize("name", ONE_TIME)
def test_whole_frames_that_are_flagged_as_fields_stay_as_they_are(tmp_path, name):
    source = f"{ONE_TIME[name]},format=yuv420p,setfield=tff"
    path = encoded_video(tmp_path / name, *FLAGGED["tff"], source=source)
    survey = survey_video(path, LIMITS, interlaced="reject")
    assert (survey.conversion.deinterlace, survey.header.field_order) == ("none", "top_first")
    assert "fields_of_one_time" in kinds_of(survey)
    np.testing.assert_array_equal(read_all(path, survey), all_frames(path, survey.width, survey.height))


FILM_BAR = BAR.replace("r=50:d=1.6", "r=24:d=3").replace("4*N", "7*N")
FILM = {  # name -> (source of whole frames, pattern, first field, what follows, encoding)
    "top.mp4": (FILM_BAR, 23, "top", "", FLAGGED["tff"]),
    "bottom.mp4": (FILM_BAR, 23, "bottom", "", FLAGGED["bff"]),
    "unflagged.mp4": (FILM_BAR, 23, "top", ",setfield=prog", H264),
    "mpeg2.ts": (FILM_BAR, 23, "bottom", "", MPEG2),
    "fine_detail.mp4": (MANDELBROT.format(rate=24, seconds=1.6), 23, "top", "", FLAGGED["tff"]),
    "advanced.mp4": (FILM_BAR, 2332, "top", "", FLAGGED["tff"]),
    "small_object.mp4": (BALL.replace("fps=60", "fps=24").replace("80", "40"), 23, "top", ",setfield=prog", H264),
    "cut_later.mp4": (FILM_BAR, 23, "top", ",select='not(between(n,37,39))',setpts=N/29.97/TB", FLAGGED["tff"]),
}


@pytest.mark.parametrize("name", FILM)
def test_film_in_fields_becomes_the_film(tmp_path, name):
    source, pattern, first, more, encoding = FILM[name]
    path = encoded_video(tmp_path / name, *encoding, source=source + PULLDOWN.format(pattern, first) + more)
    survey = survey_video(path, LIMITS)
    assert (survey.conversion.deinterlace, survey.conversion.field_order) == ("film", f"{first}_first")
    assert survey.fps == pytest.approx(24, rel=0.03) and "film_in_fields" in kinds_of(survey)
    frames = read_all(path, survey)[:, ::5].astype(int)
    whole = encoded_video(tmp_path / "film.mkv", "-c:v", "ffv1", source=f"{source},format=yuv420p")
    film = all_frames(whole, survey.width, survey.height)[:, ::5].astype(int)
    best = [int(np.abs(film - frame).mean((1, 2, 3)).argmin()) for frame in frames]
    assert np.abs(film[best] - frames).mean() < 4
    if name != "cut_later.mp4":  # a cycle with a cut may lose another frame
        assert np.mean(np.diff(best) == 1) > 0.85 and min(np.diff(best)) >= 0, f"each frame of the film once: {best}"


def test_fields_are_refused_if_asked(tmp_path):
    for name, source in (("video.mp4", BAR + TOP), ("film.mp4", FILM_BAR + PULLDOWN.format(23, "top"))):
        path = encoded_video(tmp_path / name, *FLAGGED["tff"], source=source)
        with pytest.raises(Rejected, match=r"is interlaced \(top_first") as caught:
            survey_video(path, LIMITS, interlaced="reject")
        assert caught.value.reason == "interlaced"


@pytest.mark.parametrize("suffix", ["mp4", "ts", "mkv", "mpg"])
def test_frames_deep_in_a_file_are_made_of_the_same_fields_after_a_seek(tmp_path, suffix):
    encoding = MPEG2 if suffix == "mpg" else (*FLAGGED["tff"], "-g", "25")
    source = BAR.replace("d=1.6", "d=6") + TOP
    path = encoded_video(tmp_path / f"a.{suffix}", *encoding, source=source)
    survey = survey_video(path, LIMITS)
    frames = list(range(120, 140))
    chosen = DecoderChooser(path, survey, 30).choose(frames)
    start = float(survey.times[120])
    clips = [read_clip(path, frames, name, 30, start_time=start, conversion=survey.conversion)
             for name in ("ffmpeg", chosen)]  # fmt: skip
    np.testing.assert_array_equal(*clips)
    assert chosen == "ffmpeg_seek"


def test_damaged_fields_give_the_rest(tmp_path):
    path = encoded_video(tmp_path / "a.ts", *FLAGGED["tff"], "-g", "10", source=BAR + TOP)
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 2, len(data) // 2 + 400, 40):
        data[place] ^= 0xFF
    path.write_bytes(data)
    survey = survey_video(path, LIMITS)
    assert survey.conversion.deinterlace == "bwdif" and {"interlaced", "damaged"} <= set(kinds_of(survey))
    assert 20 <= survey.usable.sum() < 40


def test_marks_of_film_need_both_fields_at_one_place_and_whole_frames():
    def order(kinds, repeats):
        return FieldMarks(list(kinds), list(repeats)).film_order()

    film = ["neither", "neither", "top", "neither", "bottom"]
    kinds = ["progressive", "tff", "tff", "tff", "tff"]
    assert order(kinds * 6, film * 6) == "top_first"
    assert order(kinds * 6, (film[1:] + film[:1]) * 6) == "top_first", "the place does not matter"
    swapped = [{"top": "bottom", "bottom": "top"}.get(mark, mark) for mark in film]
    assert order(kinds * 6, swapped * 6) == "bottom_first"
    assert order(["tff"] * 30, film * 6) == "progressive", "a video whose speed varies"
    assert order(kinds * 6, ["neither", "neither", "top", "neither", "neither"] * 6) == "progressive"
    assert order(kinds * 2, film * 2) == order([], []) == "progressive", "too short to tell"


def test_pairs_without_motion_or_of_noise_do_not_tell():
    still = np.random.default_rng(0).integers(0, 256, (3, 1, 48, 64), np.uint8).repeat(2, 1)
    noise = np.random.default_rng(0).integers(0, 256, (3, 2, 48, 64), np.uint8)
    assert judge_pairs(still, True, True) == judge_pairs(noise, True, True) == judge_pairs(noise[:0], False, True) == ""
