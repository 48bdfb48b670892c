import os
import socket
import subprocess
import sys
import threading

import pytest

from pusa.errors import Rejected
from pusa.video.header import read_header
from tests.helpers.media import encoded_video

NAMES = ["-i.mp4", "new\nline.mp4", "\n[error] no.mp4", 'it\'s "so".mp4', "100%d.mp4", "http:a.mp4", "a[1]*?{b}.mp4"]
NAMES += ["concat:a|b.mp4", "ä ö.mp4", "pipe:0", os.fsdecode(b"\xff.mp4"), "a.png", "$(touch x).mp4", "a\\b,c;d=e.mp4"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_ffmpeg_takes_any_name_as_a_plain_file(tmp_path, moving, name):
    os.link(moving, tmp_path / name)
    assert read_header(tmp_path / name, 30).width == 160


class Server:
    """Listens on this machine, and notes whether anybody connects."""

    def __enter__(self):
        self.was_contacted = False
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/other.ts"
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def _listen(self):
        try:
            self.socket.accept()
            self.was_contacted = True
        except OSError:
            pass

    def __exit__(self, *exception):
        self.socket.close()


def test_a_file_cannot_make_ffmpeg_open_another(tmp_path):
    encoded_video(tmp_path / "other.ts")
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
                    with pytest.raises(Rejected) as caught:
                        read_header(path, 30)
                    assert caught.value.reason == "not_a_video", path
        assert not server.was_contacted


@pytest.mark.parametrize(
    ("script", "seconds", "message"),
    [("kill -SEGV $$", 120, "signal 11"), ("sleep 3600 & sleep 3600", 1, "took longer than 1 s")],
    ids=["dies", "hangs"],
)
def test_an_ffmpeg_that_hangs_or_dies_is_a_reject(tmp_path, moving, script, seconds, message):
    """A script stands in for ffmpeg. It needs a process of its own, because imageio-ffmpeg looks for ffmpeg once."""
    stand_in = tmp_path / "ffmpeg"
    stand_in.write_text(f"#!/bin/sh\n{script}\n")
    stand_in.chmod(0o755)
    code = (
        "import sys; from pathlib import Path; from pusa.video.decoders.with_ffmpeg import read\n"
        "from pusa.errors import Rejected\n"
        "try: read(Path(sys.argv[1]), [0], float(sys.argv[2]))\n"
        "except Rejected as rejected: sys.exit(rejected.detail)"
    )
    env = {**os.environ, "IMAGEIO_FFMPEG_EXE": str(stand_in), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, moving, str(seconds)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert message in done.stderr
