"""Measure what `generate` adds to the time that its models take, with the tiny model on a CPU.

    python -m tests.benchmarks.generate_rate {outside,rivals,done,batches} [--jobs 200] [--steps 8]

outside: the share of a run in which no part of the model computes. rivals: eight jobs in one run, in eight runs, and in
eight processes. done: a run with nothing left to do. batches: jobs that share batches against jobs that do not.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from pusa.generate.latents import read_latents
from pusa.generate.ledger import InputHashes, Ledger
from pusa.generate.stage import generate
from pusa.manifest.models import GenerateManifest, ModelSpec
from pusa.system.files import read_object
from pusa.weights.model import Model

SIZE = {"width": 64, "height": 64, "num_frames": 31, "steps": 8}
PICTURES = 4
MODEL = {"weights": "builtin:tiny"}
spent: dict[str, float] = defaultdict(float)  # seconds by part of the model
spent_cpu: dict[str, float] = defaultdict(float)  # those of them in which this thread had a core


def timed(what: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a call, and add its time to `spent`."""
    started, cpu_started = time.perf_counter(), time.thread_time()
    result = call(*arguments)
    spent[what] += time.perf_counter() - started
    spent_cpu[what] += time.thread_time() - cpu_started
    return result


class TimedModel(Model):
    """A model of which the work of each part is timed, and the loading."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec, "cpu")
        decode_video = self.backbone.decode_video

        def decode(*arguments: Any) -> Iterator[Tensor]:
            pieces = decode_video(*arguments)
            while (piece := timed("decode_video", next, pieces, None)) is not None:
                yield piece

        for name in ("encode_text", "encode_video", "predict"):
            setattr(self.backbone, name, partial(timed, name, getattr(self.backbone, name)))
        self.backbone.decode_video = decode  # type: ignore[assignment, method-assign]

    def _on_device(self, part: str) -> Any:
        load = super()._on_device
        return load(part) if part in self._loaded else timed("loading", load, part)


def manifest_of(jobs: list[dict[str, Any]], **keys: Any) -> GenerateManifest:
    """Return a manifest of jobs of the tiny model."""
    return GenerateManifest.model_validate({"model": MODEL, "jobs": jobs, **keys})


def jobs_of(count: int, folder: Path) -> list[dict[str, Any]]:
    """Return jobs of which every other continues one of a few pictures. Four of them share a prompt."""
    for number in range(PICTURES):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8).repeat(24, 0).repeat(24, 1)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    kinds: list[dict[str, Any]] = [{"task": "text_to_video"}]
    kinds += [{"task": "image_to_video", "image": str(folder / f"{number}.png")} for number in range(PICTURES)]
    return [
        {"id": f"job{i:05d}", "prompt": f"a red circle, take {i // 4}", "seed": i, **SIZE, **kinds[i % 2 * (1 + i // 2 % PICTURES)]}
        for i in range(count)
    ]  # fmt: skip


@contextmanager
def fresh_folder() -> Iterator[Path]:
    """Yield an empty folder, which also keeps the encodings."""
    with TemporaryDirectory() as name:
        os.environ["PUSA_CACHE"] = f"{name}/cache"
        yield Path(name)


def measured(work: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds that some work takes, and those in which this thread had a core. `spent` is of it alone."""
    spent.clear()
    spent_cpu.clear()
    started, cpu_started = time.perf_counter(), time.thread_time()
    work()
    return time.perf_counter() - started, time.thread_time() - cpu_started


def outside(count: int) -> None:
    """Print where the time of one run goes."""
    with fresh_folder() as folder:
        jobs = jobs_of(count + 1, folder)
        generate(manifest_of(jobs[count:]), folder / "first")  # loads the libraries
        manifest = manifest_of(jobs[:count])
        whole, cpu = measured(lambda: generate(manifest, folder / "run", TimedModel).require_all())
    loading, cpu_loading = spent.pop("loading"), spent_cpu.pop("loading")
    whole, cpu = whole - loading, cpu - cpu_loading
    parts = ", ".join(f"{part} {seconds / whole:.1%}" for part, seconds in spent.items())
    print(
        f"{count} jobs in {whole:.0f} s: outside the models {1 - sum(spent.values()) / whole:.1%} of the time, "
        f"{1 - sum(spent_cpu.values()) / cpu:.1%} of the thread's time on a core ({cpu:.0f} s); {parts}"
    )


def rivals(count: int) -> None:
    """Print the time of eight jobs: in one run and in eight, in one process, and in a process for each run."""

    def in_this(run: Path, jobs: list[dict[str, Any]]) -> None:
        generate(manifest_of(jobs), run)

    def in_another(run: Path, jobs: list[dict[str, Any]]) -> None:
        path = run.with_suffix(".yaml")
        path.write_text(yaml.safe_dump({"kind": "generate", "model": MODEL, "jobs": jobs}))
        command = [sys.executable, "-m", "flows", "generate", str(path), "--run-dir", str(run), "--no-prefect"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    with fresh_folder() as folder:
        jobs = jobs_of(8, folder)
        os.environ |= {"PUSA_CACHE": "", "OMP_NUM_THREADS": "1"}  # none finds what another has encoded
        in_this(folder / "first", jobs[:1])  # loads the libraries
        for make in (in_this, in_another):
            together, _ = measured(partial(make, folder / f"{make.__name__}-all", jobs))
            alone = sum(measured(partial(make, folder / f"{make.__name__}-{job['id']}", [job]))[0] for job in jobs)
            print(
                f"8 jobs {make.__name__} process: eight runs / one {alone / together:.2f} ({alone:.1f} s, {together:.1f} s)"
            )


def done(count: int) -> None:
    """Print the time of a run whose jobs are made. Their files are copies, with records of their own."""
    with fresh_folder() as folder:
        run, manifest = folder / "run", manifest_of(jobs_of(count, folder))
        generate(manifest_of(jobs_of(1, folder)), run, TimedModel).require_all()
        first = run / "videos/job00000"
        facts = read_object(first.with_suffix(".json"))
        model = TimedModel(manifest.model)
        ledger = Ledger(run / "videos", model.backbone.geometry, facts["weights"], InputHashes())
        z_CFhw = read_latents(first.with_suffix(".latents.safetensors"))
        with patch("os.fsync"):
            for job in manifest.resolve_paths(run).jobs[1:]:
                keys, video = ledger.keys_of(job), ledger.work(f"{job.id}.mp4")
                ledger.save_sampled(job, keys, z_CFhw, {"latent_space": model.space_name, "cyclic": "false"})
                shutil.copyfile(first.with_suffix(".mp4"), video)
                ledger.publish(job, keys, video, {key: facts[key] for key in ("given", "video_sha256", "seconds")})
        whole, cpu = measured(lambda: generate(manifest, run, TimedModel))
        assert not spent, "a part of the model was loaded, or used"
    print(f"{count} jobs that are made: {whole:.1f} s, {cpu:.1f} s on a core")


def batches(count: int) -> None:
    """Print what batches gain, in two rounds."""
    for _ in range(2):
        wholes, insides = [], []
        for keys in ({"batch_tokens": 0}, {}):
            with fresh_folder() as folder:
                jobs = [{**job, "task": "text_to_video"} for job in jobs_of(128, folder)[::2]]
                run = partial(generate, manifest_of(jobs, **keys), folder / "run", TimedModel)
                wholes.append(measured(run)[0])
            insides.append(spent["predict"])
        ratio, inside = wholes[0] / wholes[1], insides[0] / insides[1]
        print(f"64 jobs, alone / in batches: {ratio:.2f} of the time, {inside:.2f} of that in the transformer")


PARTS = {"outside": outside, "rivals": rivals, "done": done, "batches": batches}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--jobs", type=int, default=200, help="of `outside` and `done`")
    parser.add_argument("--steps", type=int, default=8, help="of each job; the shipped manifest has 30")
    options = parser.parse_args()
    SIZE["steps"] = options.steps
    torch.set_num_threads(1)  # as in the tests: several would wait for each other where the cores are busy
    PARTS[options.part](options.jobs)


if __name__ == "__main__":
    main()
