"""Compare a small Wan whose frames or weights several processes share with a whole one, as one of the processes.

    python -m tests.helpers.wan_worker RANK SIZE FOLDER

Differences are relative to the largest value, by name. Each process writes its own to FOLDER/RANK.json.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pusa.backbones.context import Context
from pusa.backbones.wan.transformer import PusaWanTransformer3DModel
from pusa.finetune.parallel import LocalProcess, World, part_of, process_group, shard, whole
from pusa.manifest.training import Parallel
from pusa.weights.load import cast
from tests.helpers.small_wan import TEXT_WIDTH, TRANSFORMER

SETTINGS = {**TRANSFORMER, "num_attention_heads": 6}  # so that two and three processes can share them


def network() -> PusaWanTransformer3DModel:
    torch.manual_seed(0)
    model = PusaWanTransformer3DModel(**SETTINGS)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.15)
    return model


def output_and_gradients(model, frames: int, samples: slice = slice(0, 6)) -> dict[str, Tensor]:
    """Return this process's output and gradients of a loss that weights every element apart."""
    generator = torch.Generator().manual_seed(1)
    shape = (6, 16, frames, 4, 6)
    z, weights = (torch.randn(shape, generator=generator)[samples] for _ in range(2))
    text = torch.randn(6, 8, TEXT_WIDTH, generator=generator)[samples]
    t_BF = 1000 * torch.rand(6, frames, generator=generator)[samples]
    out = model(z, t_BF, text, return_dict=False)[0]
    (out * weights).sum().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    return {"output": out.detach(), **gradients}


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    return {n: float((ours[n].float() - theirs[n].float()).abs().max() / theirs[n].abs().max()) for n in theirs}


def with_shared_frames(frames: int) -> dict[str, float]:
    size = dist.get_world_size()
    shared = network()
    shared.share_frames(Context(dist.get_rank(), size, dist.group.WORLD))
    ours = output_and_gradients(shared, frames)
    for name, gradient in ours.items():
        if name != "output":
            dist.all_reduce(gradient)
            gradient /= size
    return differences(ours, output_and_gradients(network(), frames))


def train(model, method: str) -> None:
    """Make all weights trainable, in fp32, or a few."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(method == "full" or "attn1.to_q" in name)


def with_shared_weights(world: World, method: str, checkpointing: bool) -> tuple[dict[str, float], dict[str, str]]:
    """Compute in bf16; return the differences and the dtypes that some weights are computed with."""
    with torch.device("meta"):
        sharded = PusaWanTransformer3DModel(**SETTINGS)
    cast(sharded, torch.bfloat16)
    train(sharded, method)
    for weight in sharded.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    if checkpointing:
        sharded.enable_gradient_checkpointing()
    shard(sharded, world, torch.bfloat16)
    sharded.to_empty(device="cpu")
    sharded.remake_rope()
    single = network()
    values = dict(single.named_parameters())
    with torch.no_grad():
        for name, weight in sharded.named_parameters():
            weight.copy_(part_of(values[name], weight))
    cast(single, torch.bfloat16)
    train(single, method)

    dtypes = {}
    for name in ("blocks.0", "blocks.0.ffn.net.2", "condition_embedder.time_embedder.linear_1", "proj_out"):
        sharded.get_submodule(name).register_forward_pre_hook(
            lambda module, _, name=name: dtypes.update({name: str(next(module.parameters(recurse=False)).dtype)})
        )
    each = 6 // world.size
    own = slice(world.rank * each, (world.rank + 1) * each)
    ours = output_and_gradients(sharded.train(), 3, own)
    ours = {n: value if n == "output" else world.size * whole(value) for n, value in ours.items()}  # FSDP2's is a mean
    theirs = output_and_gradients(single, 3)
    theirs["output"] = theirs["output"][own]
    return differences(ours, theirs), dtypes


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    with process_group(Parallel(), LocalProcess(rank, size, folder / "store")) as world:
        found = {"context": {frames: with_shared_frames(frames) for frames in (3, 5)}, "sharded": {}}
        for method, checkpointing in (("full", False), ("few", True)):
            way = f"{method}, checkpointing {checkpointing}"
            found["sharded"][way], found["dtypes"] = with_shared_weights(world, method, checkpointing)
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
