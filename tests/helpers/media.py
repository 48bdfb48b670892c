"""Small real videos of many kinds."""

import subprocess

import imageio_ffmpeg
import numpy as np

from pusa.video.media import write_video


def ffmpeg(*arguments):
    """Run ffmpeg, as a person would on the command line."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True)


def video(path, count=31, fps=24, size=(64, 64), seed=0, caption="a drawing"):
    """Noise that drifts: each seed looks different. With a caption beside it, unless that is None."""
    width, height = size
    big = np.random.default_rng(seed).integers(0, 256, (height // 16, width // 16 + 8, 3), np.uint8)
    big = big.repeat(16, 0).repeat(16, 1)
    write_video(path, np.stack([big[:, i % 64 : i % 64 + width] for i in range(count)]), fps)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def variable(path, stretches, size="64x64"):
    """Frames at other rates one after another: (seconds, frames a second) of each stretch."""
    inputs = [x for seconds, fps in stretches for x in ("-f", "lavfi", "-i", f"testsrc=s={size}:r={fps}:d={seconds}")]
    labels = "".join(f"[{i}:v]" for i in range(len(stretches)))
    graph = f"{labels}concat=n={len(stretches)}:v=1[v]"
    ffmpeg(*inputs, "-filter_complex", graph, "-map", "[v]", "-fps_mode", "vfr", "-video_track_timescale", 90000, path)
    return path


def sound(path):
    """A file that holds sound alone."""
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", "-c:a", "aac", path)
    return path
