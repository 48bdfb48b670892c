"""Measure `pusa check` and `pusa plan` on generate manifests of 10,000 jobs, each in a process of its own.

Printed are the time on the clock, that of the processor, and the peak of memory. A processor that others use too makes
the first longer.

    .venv/bin/python tests/benchmarks/many_jobs.py [--jobs 10000] [--size 64x64] [--only list ...]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HEAD = """kind: generate
model: {weights: "builtin:tiny"}
defaults: {width: 64, height: 64, num_frames: 7, steps: 4}
jobs:
"""
PROMPT = "a ball that rolls over a table and falls, " * 20
Rows = list[str]


def listed(folder: Path, count: int, size: str) -> Rows:
    """A prompt of 840 characters in each job."""
    return [f'{{id: j{i}, task: text_to_video, prompt: "{PROMPT}", seed: {i}}}' for i in range(count)]


def swept(folder: Path, count: int, size: str) -> Rows:
    """One job with a sweep of two keys."""
    seeds = list(range(count // 4))
    return [f"{{id: a, task: text_to_video, prompt: x, sweep: {{seed: {seeds}, guidance: [1, 2, 3, 4.5]}}}}"]


def prompt_files(folder: Path, count: int, size: str) -> Rows:
    """One job with a glob of texts."""
    for i in range(count):
        (folder / f"p{i:05}.txt").write_text(f"a ball {i}")
    return ['{id: a, task: text_to_video, prompt_file: "p*.txt"}']


def globbed(folder: Path, count: int, size: str) -> Rows:
    """One job with a glob of pictures, all different."""
    import numpy as np
    from PIL import Image

    width, height = map(int, size.split("x"))
    drawn = np.random.default_rng(0)
    smooth = Image.fromarray(drawn.integers(0, 255, (12, 20, 3), dtype=np.uint8)).resize((width, height))
    for i in range(count):
        smooth.putpixel((i % width, i // width % height), (i % 256, 0, 0))
        smooth.save(folder / f"p{i:05}.jpg")
    return ['{id: a, task: image_to_video, image: "p*.jpg"}']


def pictures(folder: Path, count: int, size: str) -> Rows:
    """A job for each picture, all different."""
    globbed(folder, count, size)
    return [f"{{id: j{i}, task: image_to_video, image: p{i:05}.jpg}}" for i in range(count)]


def same_picture(folder: Path, count: int, size: str) -> Rows:
    """A job for each seed, with the same picture."""
    globbed(folder, 1, size)
    return [f"{{id: j{i}, task: image_to_video, image: p00000.jpg, seed: {i}}}" for i in range(count)]


def chained(folder: Path, count: int, size: str) -> Rows:
    """Each job continues the video of the next one in the manifest."""
    chain = [f"{{id: j{i}, task: extension, given: [0], video: 'job:j{i + 1}'}}" for i in range(count - 1)]
    return [*chain, f"{{id: j{count - 1}, task: text_to_video}}"]


KINDS: dict[str, Callable[[Path, int, str], Rows]] = {
    "list": listed, "sweep": swept, "prompt files": prompt_files, "glob of pictures": globbed,
    "list of pictures": pictures, "one picture": same_picture, "chain": chained,
}  # fmt: skip


def measure(*arguments: str) -> str:
    """Run `pusa` and return its times and its peak of memory."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen([sys.executable, "-m", "flows", *arguments], stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        output.seek(0)
        if status:
            sys.exit(output.read().decode()[-2000:])
    seconds = time.monotonic() - start
    return f"{seconds:5.1f} s, cpu {usage.ru_utime + usage.ru_stime:5.1f} s, {usage.ru_maxrss / 2**10:4.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--size", default="64x64", help="of the pictures")
    parser.add_argument("--only", nargs="*", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    for kind in options.only:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            rows = KINDS[kind](folder, options.jobs, options.size)
            path = folder / "generate.yaml"
            path.write_text(HEAD + "".join(f"  - {row}\n" for row in rows))
            for command in ("check", "plan"):
                result = measure(command, str(path), "--run-dir", str(folder / "run"))
                print(f"{kind:<18}{command:<7}{result}", flush=True)


if __name__ == "__main__":
    main()
