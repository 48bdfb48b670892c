"""Run the jobs of JOBS.json, one after the other, as one of the processes that torchrun starts.

{"manifest": ..., "run_dir": ...} fine-tunes; an error is written beside the run's folder.
{"context": FILE} compares a small model whose frames are shared among the processes with one that has all frames.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from pusa.backbones.context import Context
from pusa.backbones.mochi.transformer import PusaMochiTransformer3DModel
from pusa.errors import PusaError
from pusa.finetune.stage import finetune
from pusa.manifest.models import FinetuneManifest
from tests.conftest import SMALL


def run(job) -> None:
    manifest = FinetuneManifest.model_validate(job["manifest"])
    try:
        finetune(manifest, Path(job["run_dir"]))
    except PusaError as error:
        Path(f"{job['run_dir']}.{os.environ['RANK']}.error").write_text(str(error))


def network() -> PusaMochiTransformer3DModel:
    torch.manual_seed(0)
    model = PusaMochiTransformer3DModel(**SMALL)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return model


def output_and_gradients(model, frames: int, share: int) -> dict[str, torch.Tensor]:
    """Return the output, and the mean gradients over `share` processes of a loss that weights every element apart."""
    generator = torch.Generator().manual_seed(1)
    z, text = torch.randn(2, 12, frames, 4, 6, generator=generator), torch.randn(2, 8, 16, generator=generator)
    mask = torch.arange(8) < torch.tensor([[5], [8]])  # texts of two lengths make two calls of attention
    out = model(z, text, 1000 * torch.rand(2, frames, generator=generator), mask, return_dict=False)[0]
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    tensors = {"output": out.detach()}
    for name, weight in model.named_parameters():
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        if share > 1:
            dist.all_reduce(gradient)
        tensors[name] = gradient / share
    return tensors


def context_differences(path: str) -> None:
    """Write the differences by name, relative to the largest value; 5 frames cannot be divided evenly."""
    shared = network()
    shared.share_frames(Context(dist.get_rank(), dist.get_world_size(), dist.group.WORLD))
    for frames in (4, 5):
        ours = output_and_gradients(shared, frames, dist.get_world_size())
        shared.zero_grad()
        theirs = output_and_gradients(network(), frames, 1)
        differences = {name: float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in ours}
        Path(f"{path}.{frames}.{dist.get_rank()}").write_text(json.dumps(differences))


if __name__ == "__main__":
    dist.init_process_group("gloo")  # one for all jobs: torchrun's store serves a single group
    for job in json.loads(Path(sys.argv[1]).read_text()):
        context_differences(job["context"]) if "context" in job else run(job)
