"""Compare the memory that `pusa plan` plans for a training step with what a step takes, at Mochi's width, on a CPU.

    python tests/benchmarks/training_memory.py                   # a few settings, a minute each at most
    python tests/benchmarks/training_memory.py --heads 4         # a narrower transformer, in seconds

Each step (forward, backward, AdamW, moving average) runs in processes of its own and is sharded over them by FSDP2. The
memory taken is the peak of the resident set (VmHWM) above what was resident before the transformer was built, of the
process with the highest. Freed memory returns to the system immediately (MALLOC_MMAP_THRESHOLD_). Several processes take
more than planned, since gloo, their backend on a CPU, copies the gradients that it sums. Linux only.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from diffusers import MochiTransformer3DModel
from torch import nn

from pusa.backbones.dry_run import GIB
from pusa.backbones.mochi.backbone import Mochi
from pusa.finetune.loss import frame_errors
from pusa.finetune.parallel import LocalProcess, World, clip_gradients, process_group, shard
from pusa.finetune.plan import clips_per_process, plan
from pusa.finetune.state import Training
from pusa.finetune.trainable import configure
from pusa.manifest.models import Bucket, FinetuneManifest
from pusa.weights.load import build
from pusa.weights.resolve import locate_config

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
LORA = {"method": "lora", "rank": 64}
# blocks, frames of 416x240, manifest keys
SETTINGS: list[tuple[int, int, dict]] = [
    (2, 13, {}),
    (2, 13, {"activation_checkpointing": 1}),
    (2, 13, {"activation_checkpointing": 2, "ema_decay": 0.9}),
    (2, 7, {"batch_size": 2, "micro_batch_size": 1}),
    (2, 13, {"parallel": {"processes": 2}, "batch_size": 2}),
    (2, 13, {"parallel": {"processes": 2, "context": 2}}),
    (1, 37, {}),
    (1, 37, {"train": LORA}),
    (1, 37, {"train": LORA, "activation_checkpointing": 1}),
]


def write_config(folder: Path, blocks: int, heads: int) -> None:
    """Write a folder with the configuration of a Mochi of `blocks` blocks and `heads` heads, and no weights."""
    with torch.device("meta"):
        MochiTransformer3DModel(num_layers=blocks, num_attention_heads=heads).save_config(folder / "transformer")


def manifest_of(folder: Path, settings: dict) -> FinetuneManifest:
    """Return a manifest, with one clip per step by default."""
    return FinetuneManifest.model_validate({"base": {"weights": str(folder)}, "batch_size": 1, **settings})


def resident(field: str) -> int:
    """Return VmRSS (now) or VmHWM (the peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def prepare(manifest: FinetuneManifest, world: World) -> Training:
    """Return a transformer with random weights in training, and its optimizer."""
    transformer = build(Mochi(), locate_config(manifest.base, "transformer"))
    configure(transformer, manifest, world.context)
    shard(transformer, world, torch.float32)
    transformer.to_empty(device="cpu")
    for weight in transformer.parameters():
        nn.init.normal_(weight, std=0.02)
    return Training.start(transformer.train(), manifest)


def step(training: Training, shape: Bucket) -> None:
    """Compute the gradient one clip at a time, then make the optimizer step."""
    mochi = Mochi()
    z = torch.randn(1, *mochi.geometry.latent_shape(shape.width, shape.height, shape.num_frames))
    text = mochi.longest_text(training.transformer, 1)
    for _ in range(clips_per_process(training.manifest)[0]):
        velocity = mochi.predict(training.transformer, z, torch.full((1, z.shape[2]), 0.5), text)
        frame_errors(velocity, z).mean().backward()
        del velocity
    clip_gradients(training.transformer, 1.0)
    training.apply()


def taken(manifest: FinetuneManifest, shape: Bucket, store: Path, rank: int) -> int:
    """Return the peak memory of a real step in this process, in bytes."""
    with process_group(manifest.parallel, LocalProcess(rank, manifest.parallel.processes, store)) as world:
        nn.Linear(64, 64)(torch.randn(64, 64)).sum().backward()  # so that libraries allocate their workspaces
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        step(prepare(manifest, world), shape)
        return resident("VmHWM") - before


def compare(blocks: int, heads: int, shape: Bucket, settings: dict) -> tuple[int, int]:
    """Return the planned bytes, and those of the process that took most."""
    with TemporaryDirectory() as folder, patch.dict(os.environ, ENVIRONMENT):
        write_config(Path(folder), blocks, heads)
        manifest = manifest_of(Path(folder), settings)
        planned = plan(manifest, shape, torch.float32).total
        ranks = range(manifest.parallel.processes)
        with ProcessPoolExecutor(len(ranks), get_context("spawn")) as pool:
            return planned, max(pool.map(partial(taken, manifest, shape, Path(folder) / "store"), ranks))


def main() -> None:
    """Measure and print a line per setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=24, help="attention heads of 128 channels; Mochi has 24")
    options = parser.parse_args()
    print(f"{'blocks':>6} {'tokens':>7} {'planned':>9} {'taken':>9}")
    for blocks, frames, settings in SETTINGS:
        shape = Bucket(width=416, height=240, num_frames=frames)
        tokens = ((frames - 1) // 6 + 1) * (416 // 16) * (240 // 16)
        planned, real = compare(blocks, options.heads, shape, settings)
        print(f"{blocks:>6} {tokens:>7,} {planned / GIB:>5.2f} GiB {real / GIB:>5.2f} GiB "
              f"{planned / real - 1:>+6.1%}  {settings}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
