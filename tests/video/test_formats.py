"""Videos and their files in more formats: what they show, how fast, and what happens where one cannot be written."""

import errno
import os
import re
import struct
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from pusa.errors import MediaError
from pusa.system.files import sha256_file
from pusa.tasks.base import Format
from pusa.video import formats
from pusa.video.compare import psnr
from pusa.video.formats import FORMATS, beside, hash_output
from pusa.video.media import VideoWriter, read_frames
from tests.helpers.media import stream_facts

NOISE = np.random.default_rng(0).integers(0, 256, (11, 32, 48, 3), np.uint8)
ROWS, COLUMNS = np.mgrid[:32, :48]
SMOOTH = np.stack([np.stack([ROWS * 7, COLUMNS * 5, ROWS * 0 + 9 * i], -1) for i in range(11)]).astype(np.uint8)


def write(path, frames=SMOOTH, fps=24.0, names=tuple(FORMATS)):
    """Write frames in two chunks, and return the paths of all formats by name."""
    writer = VideoWriter(path, fps, names)
    try:
        for chunk in np.split(frames, [3]):
            writer.write(chunk)
        writer.finish()
    except BaseException:
        writer.abort()
        raise
    return {name: beside(path, name) for name in names}


def durations(gif):
    """Return how long each frame of a gif is shown, in milliseconds, and its frames."""
    with Image.open(gif) as image:
        shown = []
        for number in range(image.n_frames):
            image.seek(number)
            shown.append((image.info["duration"], np.asarray(image.convert("RGB"))))
    return [time for time, _ in shown], np.stack([frame for _, frame in shown])


@pytest.mark.parametrize("count", [1, 11])
@pytest.mark.parametrize("kind", ["noise", "smooth"])
def test_png_and_lossless_are_exact_and_the_others_are_near(tmp_path, kind, count):
    frames = (NOISE if kind == "noise" else SMOOTH)[:count]
    files = write(tmp_path / "a.mp4", frames)
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", *(path.name for path in files.values())}
    names = sorted(path.name for path in files["png"].iterdir())
    assert names == [f"{i:05d}.png" for i in range(count)]
    assert np.array_equal([np.asarray(Image.open(files["png"] / name)) for name in names], frames)
    assert np.array_equal(read_frames(files["lossless"], range(count)), frames)
    if kind == "smooth":
        assert psnr(read_frames(files["webm"], range(count)), frames) > 30
        assert psnr(durations(files["gif"])[1], frames) > 25


def test_more_formats_do_not_change_the_video_and_the_same_frames_give_the_same_bytes(tmp_path):
    write(tmp_path / "alone.mp4", names=())
    first, again = (write(tmp_path / f"{name}.mp4") for name in "ab")
    assert len({sha256_file(tmp_path / f"{name}.mp4") for name in ("alone", "a", "b")}) == 1
    assert [hash_output(path) for path in first.values()] == [hash_output(path) for path in again.values()]


@pytest.mark.parametrize("fps", [1, 12.5, 23.976, 24, 29.97, 50])
def test_all_files_have_the_right_pace_and_colours(tmp_path, fps):
    path = tmp_path / "a.mp4"
    files = write(path, fps=fps)
    for file in (path, files["webm"]):
        assert "yuv420p(tv, bt709, progressive), 48x32" in stream_facts(file)
    for file in (path, files["webm"], files["lossless"]):
        assert float(re.search(r"([\d.]+) fps", stream_facts(file))[1]) == pytest.approx(fps, abs=0.006)
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat"), "a browser would wait for the whole file"
    # The media's time scale, and the ticks of all frames: the rate is a ratio of whole numbers, and not rounded.
    scale = struct.unpack(">I", content[(mdhd := content.index(b"mdhd")) + 16 : mdhd + 20])[0]
    count, ticks = struct.unpack(">II", content[(stts := content.index(b"stts")) + 12 : stts + 20])
    assert count == len(SMOOTH) and Fraction(scale, ticks) == Fraction(fps).limit_denominator()
    times, _ = durations(files["gif"])
    assert min(times) >= 20 and abs(sum(times) - 1000 * len(SMOOTH) / fps) <= 10


def test_a_picture_that_does_not_move_keeps_all_its_frames(tmp_path):
    files = write(tmp_path / "a.mp4", np.full_like(SMOOTH, 90))
    times = np.frombuffer(b"".join(re.findall(rb"\x21\xf9\x04.(..)", files["gif"].read_bytes(), re.S)), "<u2")
    assert len(times) == 11 and abs(times.sum() - 100 * 11 / 24) <= 1
    assert len(read_frames(files["webm"], range(11))) == 11


@pytest.mark.parametrize("name", ["50% off: %d %05d", "with space 'quoted'", "\udce9"])
def test_folders_may_have_any_name(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    files = write(folder / "a.mp4")
    assert len(list(files["png"].iterdir())) == 11 and all(path.exists() for path in files.values())


@pytest.mark.parametrize("end", [".webm", ".gif", ".lossless.mkv", ".palette.png", ".frames/00007.png"])
def test_a_full_disk_at_any_of_the_files_is_told_from_other_errors_and_leaves_none(tmp_path, end, monkeypatch):
    (target := tmp_path / f"a{end}").parent.mkdir(exist_ok=True)
    target.symlink_to("/dev/full")
    if target.parent != tmp_path:
        monkeypatch.setattr(formats.Path, "mkdir", lambda self: None)  # the folder of frames is there
    with pytest.raises(OSError, match="No space left on device") as full:
        write(tmp_path / "a.mp4", np.concatenate([NOISE] * 4))
    assert full.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_an_ffmpeg_that_is_killed_leaves_no_file(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", 24, tuple(FORMATS))
    writer.write(SMOOTH)
    os.kill(writer._process.pid, 9)
    with pytest.raises(OSError, match="signal 9"):
        writer.finish()
    writer.abort()
    assert not list(tmp_path.iterdir())


def test_a_manifest_knows_all_formats():
    assert get_args(Format) == tuple(FORMATS)


def test_a_missing_encoder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "_encoders", lambda: frozenset({"png", "gif"}))
    with pytest.raises(MediaError, match=r"has no encoder libvpx-vp9 \(for webm\), ffv1 \(for lossless\); leave out"):
        write(tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    formats.require_encoders(FORMATS)


def test_black_and_white_stay_so_in_a_gif(tmp_path):
    frames = np.where(np.mgrid[:32, :48][1] < 24, 0, 255)[None, :, :, None] * np.ones((4, 1, 1, 3), int)
    files = write(tmp_path / "a.mp4", frames.astype(np.uint8), names=("gif",))
    assert np.array_equal(durations(files["gif"])[1], frames)
