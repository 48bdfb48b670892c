"""Compare the throughput of ingest on plain H.264 files with that of another checkout, alternately in one run.

python tests/benchmarks/ingest_rate.py OTHER_CHECKOUT [--files 200] [--rounds 3]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import imageio_ffmpeg

HERE = Path(__file__).resolve().parents[2]
SIZES = ("640x360", "848x480", "1280x720")
TAGS = "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
MANIFEST = "kind: ingest\nsource: videos\nclips: {num_frames: 61, width: 848, height: 480, fps: 24}\n"


def draw_videos(folder: Path, files: int) -> None:
    """Write different videos of three seconds, with captions."""
    folder.mkdir()
    for number in range(files):
        source = f"mandelbrot=size={SIZES[number % 3]}:rate=24:start_scale={1 + number / 50}"
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", source, "-frames:v", "72"]
        command += ["-vf", f"hue=h={number * 7},{TAGS},format=yuv420p", "-c:v", "libx264", "-preset", "ultrafast"]
        subprocess.run(
            [*command, "-crf", "26", "-g", "48", folder / f"{number}.mp4"], check=True, stdin=subprocess.DEVNULL
        )
        (folder / f"{number}.txt").write_text(f"video {number}")


def ingest_seconds(checkout: Path, manifest: Path, run_dir: Path) -> float:
    """Return how long a checkout's `pusa ingest` takes in a fresh run folder."""
    env = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-P", "-m", "flows", "ingest", manifest, "--run-dir", run_dir, "--no-prefect"]
    start = time.perf_counter()
    subprocess.run(command, check=True, cwd=checkout, env=env, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Print the seconds of each round, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="a checkout of another commit, for example a git worktree")
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    checkouts = {"this": HERE, "other": options.other.resolve()}
    seconds: dict[str, list[float]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder, "ingest.yaml")
        manifest.write_text(MANIFEST)
        draw_videos(Path(folder, "videos"), options.files)
        for number in range(options.rounds):
            for name, checkout in checkouts.items():
                seconds[name].append(ingest_seconds(checkout, manifest, Path(folder, f"{name}-{number}")))
            print("  ".join(f"{name} {times[-1]:.1f} s" for name, times in seconds.items()), flush=True)
    ratios = [this / other for this, other in zip(seconds["this"], seconds["other"], strict=True)]
    print(f"this / other: {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")


if __name__ == "__main__":
    main()
