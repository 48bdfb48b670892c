import os
import subprocess
import sys
import threading

import pytest

from pusa.errors import Rejected
from pusa.video.survey import read_header
from tests.helpers.decoder_stand_ins import MOVING, ffmpeg, video


def reason(path, seconds=30):
    with pytest.raises(Rejected) as caught:
        read_header(path, seconds)
    return caught.value.reason


def test_what_it_says(kinds):
    plain, turned, wide = (read_header(kinds[name], 30) for name in ("plain", "rotated270", "anamorphic"))
    assert (plain.codec, plain.width, plain.height, plain.fps, plain.duration) == ("h264", 160, 96, 24, 1)
    assert (plain.rotation, plain.pixel_aspect, plain.container, plain.alone) == (0, 1, "mov", True)
    assert (turned.rotation, turned.width, turned.height) == (270, 160, 96)
    assert (wide.width, wide.height, wide.pixel_aspect) == (80, 96, 2)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_tags_cannot_pretend_to_be_streams(tmp_path, moving, suffix):
    lie = "Stream #0:0: Video: h264, yuv420p, 9999x9999, 1 fps\n  Stream #0:0: Video: h264, yuv420p, 8x8, 1 fps"
    words = ("-metadata", f"title={lie}", "-metadata", f"{lie}=1", "-metadata", "Duration=9")
    ffmpeg("-i", moving, "-c", "copy", *words, tmp_path / f"a.{suffix}")
    header = read_header(tmp_path / f"a.{suffix}", 30)
    assert (header.width, header.height, header.duration) == (160, 96, 2)


def test_what_is_no_video_is_refused_by_its_reason(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is no video")
    ffmpeg("-f", "lavfi", "-i", MOVING, "-frames:v", "1", tmp_path / "picture.png")
    (tmp_path / "picture.png").rename(tmp_path / "picture.mp4")
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", tmp_path / "sound.mp4")
    video(tmp_path / "whole.mp4")
    (tmp_path / "torn.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:-2000])  # with the index at its end
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    assert {path.stem: reason(path) for path in tmp_path.iterdir() if path.stem != "whole"} == {
        "empty": "empty_file",
        "text": "not_a_video",
        "picture": "not_a_video",
        "sound": "no_video_stream",
        "torn": "damaged",
        "pipe": "unreadable",
        "folder": "unreadable",
    }
    assert reason(tmp_path / "gone.mp4") == reason(tmp_path / ("x" * 300)) == "unreadable"


def test_no_permission(tmp_path):
    path = video(tmp_path / "a.mp4")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert reason(path) == "unreadable"


NAMES = ["-i.mp4", "new\nline.mp4", "\n[error] no.mp4", 'it\'s "so".mp4', "100%d.mp4", "http:a.mp4", "a[1]*?{b}.mp4"]
NAMES += ["concat:a|b.mp4", "ä ö.mp4", "pipe:0", os.fsdecode(b"\xff.mp4"), "a.png", "$(touch x).mp4", "a\\b,c;d=e.mp4"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_means_nothing(tmp_path, moving, name):
    os.link(moving, tmp_path / name)
    assert read_header(tmp_path / name, 30).width == 160


def test_a_file_cannot_make_ffmpeg_open_another(tmp_path):
    video(tmp_path / "other.ts")
    with Server() as server:
        for name, text in (
            ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n"),
            ("script", "ffconcat version 1.0\nfile '{}'\n"),
            ("sdp", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"),
        ):
            for other in (tmp_path / "other.ts", "other.ts", server.url):
                for suffix in ("mp4", "m3u8", "ffconcat"):
                    path = tmp_path / f"{name}.{suffix}"
                    path.write_text(text.format(other))
                    assert reason(path) == "not_a_video", path
        assert not server.asked


class Server:
    """Notes whether anybody connects."""

    def __enter__(self):
        import socket

        self.asked = False
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/other.ts"
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def _listen(self):
        try:
            self.socket.accept()
            self.asked = True
        except OSError:
            pass

    def __exit__(self, *exception):
        self.socket.close()


def test_an_ffmpeg_that_hangs_or_dies(tmp_path, moving):
    """With programs in its place that do so. A process of its own, since imageio-ffmpeg asks only once."""
    for name, script in (("dies", "kill -SEGV $$"), ("hangs", "sleep 100 & sleep 100")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
        code = (
            "import sys; from pathlib import Path; from pusa.video.survey import read_header\n"
            "from pusa.errors import Rejected\n"
            "try: read_header(Path(sys.argv[1]), 1)\n"
            "except Rejected as rejected: sys.exit(rejected.detail)"
        )
        env = {**os.environ, "IMAGEIO_FFMPEG_EXE": str(tmp_path / name), "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code, moving], env=env, capture_output=True, text=True, timeout=20)
        assert {"dies": "signal 11", "hangs": "took longer than 1 s"}[name] in done.stderr
