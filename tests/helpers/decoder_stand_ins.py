"""Small real videos of every kind, made with ffmpeg; and functions for a child process to suffer from."""

import os
import subprocess
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from pusa.errors import MediaError, Rejected

# White but for a red left upper quarter, and a green disc of 40 pixels across that moves: upright, 160x96.
PICTURE = (
    "color=white:size=160x96:rate=24:duration=1,format=gbrp,"
    "geq=r='if(lt(X,80)*lt(Y,48),255,if(lt(hypot(X-110-20*sin(N/3),Y-48),20),0,255))':"
    "g='if(lt(X,80)*lt(Y,48),0,255)':"
    "b='if(lt(X,80)*lt(Y,48),0,if(lt(hypot(X-110-20*sin(N/3),Y-48),20),0,255))'"
)
MOVING = "testsrc2=size=160x96:rate=24:duration=2"
X264 = ("-c:v", "libx264", "-crf", "12", "-pix_fmt", "yuv420p")


def ffmpeg(*words) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-hide_banner", "-loglevel", "error", *map(str, words)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def video(path: Path, *words, source: str = MOVING) -> Path:
    ffmpeg("-f", "lavfi", "-i", source, *(words or X264), path)
    return path


def frames_of(path: Path, width: int, height: int) -> np.ndarray:
    """All frames as ffmpeg alone decodes them."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path, "-map", "0:V:0", "-fps_mode", "passthrough"]
    raw = subprocess.run([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], capture_output=True, check=True)
    return np.frombuffer(raw.stdout, np.uint8).reshape(-1, height, width, 3)


def cut(path: Path, share: float) -> Path:
    """The first part of a file."""
    torn = path.with_name(f"torn-{path.name}")
    torn.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return torn


def twice(path):
    return {"path": path, "pid": os.getpid()}, np.arange(12, dtype=np.int16).reshape(3, 4) * 2


def nothing():
    return {"pid": os.getpid()}, None


def empty():
    return {}, np.zeros((0, 8, 8, 3), np.uint8)


def hang():
    time.sleep(600)


def hang_with_a_child():
    subprocess.run(["sleep", "600"], check=True)


def crash():
    os.abort()


def leave():
    os._exit(3)


def err():
    raise ZeroDivisionError("our own fault")


def refuse():
    raise Rejected("damaged", "it is torn")


def complain():
    raise MediaError("no good")
