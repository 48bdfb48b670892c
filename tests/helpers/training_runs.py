"""Helpers for tests of the trainer: a small recipe, runs on two processes, and the results of runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from pusa.manifest.models import FinetuneManifest, ModelSpec

ROOT = Path(__file__).parents[2]
TINY = ModelSpec(weights="builtin:tiny")


def recipe(run_dir: Path, **changes) -> FinetuneManifest:
    settings = {"steps": 4, "batch_size": 2, "learning_rate": 1e-5, "checkpoint_every": 2, "density": "uniform"}
    return FinetuneManifest.model_validate(
        {"latents": run_dir / "latents", "base": TINY.model_dump(), **settings, **changes}
    )


def job(manifest: FinetuneManifest, run_dir: Path) -> dict:
    return {"manifest": manifest.model_dump(mode="json"), "run_dir": str(run_dir)}


def on_two_processes(folder: Path, jobs: list[dict]) -> None:
    """Run jobs one after the other in the same two processes: their start takes longer than a job."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = [*torchrun, "-m", "tests.helpers.training_worker", str(path)]
    stacks = {"PYTHONFAULTHANDLER": "1"}  # of all threads, if native code crashes
    done = subprocess.run(worker, capture_output=True, text=True, timeout=600, cwd=ROOT, env={**os.environ, **stacks})
    assert done.returncode == 0, done.stderr[-20_000:]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    (file,) = (run / f"checkpoints/{step:08d}").glob("[tl]*/*.safetensors")
    return {name: tensor.clone() for name, tensor in load_file(file).items()}  # or they change with the file


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)
