"""Make small real videos with ffmpeg: drifting noise, variable frame rates, sound, and the first part of a file."""

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from pusa.video.media import write_video

# White with a red upper left quarter, and a green disc of 40 pixels in diameter that moves. Upright, 160x96.
PICTURE = (
    "color=white:size=160x96:rate=24:duration=1,format=gbrp,"
    "geq=r='if(lt(X,80)*lt(Y,48),255,if(lt(hypot(X-110-20*sin(N/3),Y-48),20),0,255))':"
    "g='if(lt(X,80)*lt(Y,48),0,255)':"
    "b='if(lt(X,80)*lt(Y,48),0,if(lt(hypot(X-110-20*sin(N/3),Y-48),20),0,255))'"
)
MOVING = "testsrc2=size=160x96:rate=24:duration=2"
X264 = ("-c:v", "libx264", "-crf", "12", "-pix_fmt", "yuv420p")


def ffmpeg(*arguments) -> None:
    """Run ffmpeg as a user would on the command line. Existing files are overwritten."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def video(path: Path, count=31, fps=24, size=(64, 64), seed=0, caption: str | None = "a drawing") -> Path:
    """Write drifting noise, which looks different for each seed, and the caption beside it unless it is None."""
    width, height = size
    big = np.random.default_rng(seed).integers(0, 256, (height // 16, width // 16 + 8, 3), np.uint8)
    big = big.repeat(16, 0).repeat(16, 1)
    write_video(path, np.stack([big[:, i % 64 : i % 64 + width] for i in range(count)]), fps)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def encoded_video(path: Path, *arguments, source: str = MOVING) -> Path:
    """Write a video from a source of ffmpeg's lavfi, with these arguments or else as H.264."""
    ffmpeg("-f", "lavfi", "-i", source, *(arguments or X264), path)
    return path


def variable(path: Path, stretches, size="64x64") -> Path:
    """Write a video whose frame rate changes. `stretches` are (seconds, frames per second), one after another."""
    inputs = [x for seconds, fps in stretches for x in ("-f", "lavfi", "-i", f"testsrc=s={size}:r={fps}:d={seconds}")]
    labels = "".join(f"[{i}:v]" for i in range(len(stretches)))
    graph = f"{labels}concat=n={len(stretches)}:v=1[v]"
    ffmpeg(*inputs, "-filter_complex", graph, "-map", "[v]", "-fps_mode", "vfr", "-video_track_timescale", 90000, path)
    return path


def sound(path: Path) -> Path:
    """Write a file that holds only sound."""
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", "-c:a", "aac", path)
    return path


def truncate(path: Path, share: float) -> Path:
    """Write the first part of a file beside it, and return the new file."""
    torn = path.with_name(f"torn-{path.name}")
    torn.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return torn


def raw_video(path: Path, *arguments) -> np.ndarray:
    """Return all frames as ffmpeg alone decodes them: the bytes of their planes, or of what these arguments ask for."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path, "-map", "0:V:0", "-fps_mode", "passthrough"]
    raw = subprocess.run([*command, "-f", "rawvideo", *arguments, "-"], capture_output=True, check=True)
    return np.frombuffer(raw.stdout, np.uint8)


def all_frames(path: Path, width: int, height: int) -> np.ndarray:
    """Return all frames (T, height, width, 3) as ffmpeg alone decodes them."""
    return raw_video(path, "-pix_fmt", "rgb24").reshape(-1, height, width, 3)


def stream_facts(path: Path) -> str:
    """Return ffmpeg's line about the video stream of a file."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", path]
    lines = subprocess.run(command, capture_output=True, text=True).stderr.splitlines()
    return next(line for line in lines if "Video:" in line)
