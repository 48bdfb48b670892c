"""Measure the peak memory of long videos: it must not grow with their length, but for the latents.

    python -m tests.benchmarks.long_videos

Each row is a process of its own that has made a short video before. Memory is the peak of the resident sets of this
process and of ffmpeg, every 5 ms, above its size when it began. Linux only.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from pusa.generate.decode import write_job_video
from pusa.generate.stage import generate
from pusa.manifest.models import GenerateManifest
from pusa.weights.model import Model

LENGTHS = (61, 601, 1201)  # frames
WARM_UP = 61
MIB = 2**20


def manifest_of(side: int, frames: int) -> GenerateManifest:
    """Return a manifest of one long video of the tiny model."""
    size = {"width": side, "height": side, "num_frames": frames, "steps": 1, "guidance": 1}
    job = {"id": "a", "task": "long_video", "prompt": "a red circle", "window": 31, "overlap": 2, **size}
    return GenerateManifest.model_validate({"model": {"weights": "builtin:tiny"}, "jobs": [job]})


def resident() -> float:
    """Return the MiB that this process and its children have in memory."""
    total = 0
    processes = [f"/proc/{os.getpid()}"]
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # a thread may end meanwhile, and so may a process
            processes += [f"/proc/{child}" for child in (task / "children").read_text().split()]
    for process in processes:
        with suppress(OSError):
            total += int(Path(process, "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total / MIB


@contextmanager
def peak() -> Iterator[Callable[[], float]]:
    """Yield a function that returns the peak since the context began, in MiB above its begin."""
    before = most = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, resident())
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: most - before
    finally:
        done.set()
        watcher.join()


def job_peak(side: int, frames: int) -> float:
    """Return the peak of a whole run of `generate`."""
    with TemporaryDirectory() as folder:
        generate(manifest_of(side, WARM_UP), Path(folder) / "warm")
        with peak() as measured:
            generate(manifest_of(side, frames), Path(folder) / "run").require_all()
            return measured()


def decode_peak(side: int, frames: int) -> float:
    """Return the peak of decoding random latents while ffmpeg writes the video."""
    model = Model(manifest_of(side, frames).model, "cpu")

    def write(num_frames: int) -> None:
        (job,) = manifest_of(side, num_frames).jobs
        z_CFhw = torch.randn(model.backbone.geometry.latent_shape(side, side, num_frames))
        with TemporaryDirectory() as folder:
            write_job_video(job, model, z_CFhw, Path(folder) / "a.mp4")()

    write(WARM_UP)
    with peak() as measured:
        write(frames)
        return measured()


def main() -> None:
    """Measure and print."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # the spawned processes return freed memory at once
    for name, measure, side in (("a whole run", job_peak, 64), ("decoding", decode_peak, 256)):
        for frames in LENGTHS:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                value = pool.submit(measure, side, frames).result()
            print(f"{name}, {side}x{side}, {frames:>5} frames: {value:>5.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
