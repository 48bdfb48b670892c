"""The processes that train together: who they are, who has which data, and the transformer sharded over them.

One process is a group of one, and takes the same path. Under torchrun there are as many as it started, on any machines.
"""

import os
import resource
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor

from pusa.backbones.context import ALONE, Context
from pusa.errors import TrainingError
from pusa.manifest.training import Parallel
from pusa.weights.model import default_device

Value = TypeVar("Value")
PATIENCE = timedelta(hours=6)  # with a process that hashes or writes files; the training itself waits for minutes


@dataclass(frozen=True)
class World:
    """One of the processes, seen from itself.

    `data_rank` of `data_ranks` says whose share of each batch it takes: those of one context take the same clips.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    context: Context
    files: dist.ProcessGroup | None  # for talk about files, which may take long, beside the training's own

    @property
    def data_ranks(self) -> int:
        """How many shares a batch has."""
        return self.size // self.context.size

    @property
    def data_rank(self) -> int:
        """Which of them is this process's."""
        return self.rank // self.context.size

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def share(self, batch_size: int) -> int:
        """Clips of a batch that a process takes.

        Raises:
            TrainingError: the batch does not come out even.
        """
        if batch_size % self.data_ranks:
            raise TrainingError(
                f"batch_size {batch_size} is not a multiple of the {self.data_ranks} processes with data"
            )
        return batch_size // self.data_ranks

    def peak_memory(self) -> int:
        """The most bytes in use on the GPU since this was last asked; on a CPU, by the process so far."""
        if self.device.type != "cuda":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def told(self, find: Callable[[], Value]) -> Value:
        """What the first process finds, in all of them: it is looked for once."""
        found: list[Any] = [find() if self.is_first else None]
        dist.broadcast_object_list(found, src=0, group=self.files)
        return found[0]

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums over all processes."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gathered(self, value: Value) -> list[Value]:
        """What each process has, in all of them."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.files)
        return found


@contextmanager
def join(parallel: Parallel) -> Iterator[World]:
    """Be one of the processes, from here to the end of the block. A process group that is there already is used.

    Raises:
        TrainingError: `context` does not divide their number, or there are fewer GPUs.
    """
    device = _own_device()
    with nullcontext() if dist.is_initialized() else _group(device):
        yield _world(device, parallel.context)


@contextmanager
def _group(device: torch.device) -> Iterator[None]:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    well = False
    try:
        yield
        well = True
    finally:
        if well or device.type == "cpu":  # on GPUs it would wait for what the others will never send
            dist.destroy_process_group()


def _own_device() -> torch.device:
    """Of several processes on a machine each has a GPU of its own."""
    device = default_device()
    if device.type == "cuda":
        number, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if number >= there:
            raise TrainingError(f"process {number} of this machine has no GPU, of which it has {there}; start fewer")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    return device


def _world(device: torch.device, context: int) -> World:
    rank, size = dist.get_rank(), dist.get_world_size()
    if size % context:
        raise TrainingError(f"parallel.context is {context}; it must divide the {size} processes")
    shared = ALONE
    if context > 1:
        axes = init_device_mesh(device.type, (size // context, context), mesh_dim_names=("data", "context"))
        shared = Context(rank % context, context, axes.get_group("context"))
    mesh = init_device_mesh(device.type, (size,))
    return World(rank, size, device, mesh, shared, dist.new_group(backend="gloo", timeout=PATIENCE))


def shard(transformer: Any, world: World, compute: torch.dtype) -> None:
    """Each process keeps a part of every weight (FSDP2), and has a block whole only while it is at work.

    Weights that learn are fp32 and computed with in `compute`; their gradients are summed in fp32. What goes into a
    block is not cast: levels and angles must stay exact.
    """
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing changes it in place
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*transformer.blocks, transformer):
        fully_shard(module, mesh=world.mesh, mp_policy=policy)


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that all have whole, shared out as `like` is."""
    assert hasattr(like, "device_mesh") and hasattr(like, "placements")
    full = full.to(like.device, like.dtype)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def whole(tensor: Any) -> Tensor:
    """A sharded tensor in one piece, in every process; all of them must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def clip_gradients(transformer: nn.Module, limit: float) -> float:
    """Scale the gradient down to the norm `limit`; its norm before."""
    norm = nn.utils.clip_grad_norm_([p for p in transformer.parameters() if p.requires_grad], limit)
    return float(whole(norm))
