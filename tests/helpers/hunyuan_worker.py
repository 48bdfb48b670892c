"""Compare a small HunyuanVideo whose frames or weights several processes share with a whole one, as one process.

    python -m tests.helpers.hunyuan_worker RANK SIZE FOLDER

Differences are relative to the largest value, by name. Each process writes its own to FOLDER/RANK.json. With shared
weights it also trains two steps, from the start and from a checkpoint after the first one.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pusa.backbones.context import Context
from pusa.backbones.hunyuan_video import FAMILY
from pusa.backbones.hunyuan_video.transformer import PusaHunyuanVideoTransformer3DModel
from pusa.finetune.checkpoint import Checkpoints
from pusa.finetune.parallel import LocalProcess, World, part_of, process_group, shard, whole
from pusa.finetune.state import Training
from pusa.finetune.trainable import configure
from pusa.manifest.models import FinetuneManifest
from pusa.manifest.training import Parallel
from pusa.weights.load import cast
from tests.helpers.small_hunyuan import TRANSFORMER, frame_levels, hunyuan_inputs

SETTINGS = {**TRANSFORMER, "num_attention_heads": 6}  # so that two and three processes can share them
LENGTHS = (5, 8, 8, 0, 2, 8)  # of the texts; one has no valid token
UNSEEN = "refiner_blocks.0.attn.to_k.bias"
LORA = {"method": "lora", "rank": 2}


def fill(model) -> None:
    """Give every weight, and every process's part of it, the same random values."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            full = torch.empty(weight.shape).normal_(std=0.15, generator=generator)
            weight.copy_(part_of(full, weight) if hasattr(weight, "placements") else full)


def network() -> PusaHunyuanVideoTransformer3DModel:
    model = PusaHunyuanVideoTransformer3DModel(**SETTINGS)
    fill(model)
    return model


def output_and_gradients(model, frames: int, samples: slice = slice(0, 6)) -> dict[str, Tensor]:
    """Return this process's output and gradients of a loss that weights every element apart."""
    given = {name: value[samples] for name, value in hunyuan_inputs(LENGTHS, frames).items()}
    out = model(timestep=frame_levels(6, frames)[samples], return_dict=False, **given)[0]
    weights = torch.randn(6, *out.shape[1:], generator=torch.Generator().manual_seed(3))[samples]
    (out * weights).sum().backward()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    # The refiner's keys have no norm, and softmax does not see what is added to all of them: rounding errors only.
    return {"output": out.detach(), **{n: w.grad for n, w in trained.items() if not n.endswith(UNSEEN)}}


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


def recipe(train: dict[str, object], **settings: object) -> FinetuneManifest:
    base = {"weights": "none", "backbone": FAMILY.name}
    return FinetuneManifest.model_validate({"base": base, "train": train, "learning_rate": 0.01, **settings})


def sharded_network(manifest: FinetuneManifest, world: World, compute: torch.dtype):
    """Return a transformer in training as the trainer builds it, but for its values."""
    with torch.device("meta"):
        sharded = PusaHunyuanVideoTransformer3DModel(**SETTINGS)
    configure(sharded, manifest, world.context)
    cast(sharded, compute)
    for weight in sharded.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    shard(sharded, world, compute)
    sharded.to_empty(device="cpu")
    fill(sharded)
    return sharded.train()


def with_shared_weights(manifest: FinetuneManifest, world: World) -> dict[str, float]:
    """Compute in bf16; return the differences from one process that has all weights."""
    sharded = sharded_network(manifest, world, torch.bfloat16)
    single = PusaHunyuanVideoTransformer3DModel(**SETTINGS)
    configure(single, manifest, Context(0, 1, None))
    fill(single)
    cast(single, torch.bfloat16)
    each = 6 // world.size
    own = slice(world.rank * each, (world.rank + 1) * each)
    ours = output_and_gradients(sharded, 3, own)
    ours = {n: value if n == "output" else world.size * whole(value) for n, value in ours.items()}  # FSDP2's is a mean
    theirs = output_and_gradients(single.train(), 3)
    theirs["output"] = theirs["output"][own]
    return differences(ours, theirs)


def resumed(manifest: FinetuneManifest, world: World, folder: Path) -> dict[str, float]:
    """Train two steps; return how far a training is from it that starts at the checkpoint of the first one."""
    trainings = [Training.start(sharded_network(manifest, world, torch.float32), manifest) for _ in range(2)]
    folder.mkdir(exist_ok=True)
    checkpoints = Checkpoints(folder, world, keep=1)
    for step in (1, 2):
        output_and_gradients(trainings[0].transformer, 3)
        trainings[0].apply()
        if step == 1:
            record = {"recipe": {}, "overrides": [], "skipped": 0, "step": step}
            checkpoints.save(trainings[0], record, torch.float32, lambda path, weights: None)
            checkpoints.wait()
    found = checkpoints.last()
    assert found is not None and found.step == 1
    checkpoints.restore(found, trainings[1])
    output_and_gradients(trainings[1].transformer, 3)
    trainings[1].apply()
    ours, theirs = ({name: whole(value) for name, value in t.tensors().items()} for t in reversed(trainings))
    return {name: float((ours[name] - theirs[name]).abs().max()) for name in theirs}


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    with process_group(Parallel(), LocalProcess(rank, size, folder / "store")) as world:
        found = {"context": {frames: with_shared_frames(frames) for frames in (3, 5)}}
        ways = {"full": recipe({"method": "full"}), "lora": recipe(LORA, activation_checkpointing=2)}
        found["sharded"] = {way: with_shared_weights(manifest, world) for way, manifest in ways.items()}
        continued = ways if size > 2 else {"full": ways["full"]}  # one way is enough where it is tested daily
        found["resumed"] = {way: resumed(manifest, world, folder / way) for way, manifest in continued.items()}
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
