"""The group of processes that train together, each one's share of the data, and the sharded transformer.

A single process is a group of one and takes the same path. Several processes on one machine are started by
flows/launch.py and meet at a file; on several machines torchrun starts them, and its environment says where they meet.
"""

import logging
import resource
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor

from pusa.backbones.context import ALONE, Context
from pusa.errors import TrainingError
from pusa.finetune.torchrun import Torchrun
from pusa.manifest.training import Parallel
from pusa.system.text import first_line
from pusa.weights.load import dtype_of
from pusa.weights.model import default_device

log = logging.getLogger(__name__)
Value = TypeVar("Value")
# How long processes wait for one that hashes or writes files. The training's own group waits for minutes.
FILES_TIMEOUT = timedelta(hours=6)


@dataclass(frozen=True)
class LocalProcess:
    """One of `size` processes on this machine that meet at the file `store`, which must be new for each start."""

    rank: int
    size: int
    store: Path


@dataclass(frozen=True)
class World:
    """The process group as one of its processes sees it.

    Each batch is divided into `data_ranks` shares, of which this process takes number `data_rank`. The processes of one
    context take the same clips.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    context: Context
    files: dist.ProcessGroup | None  # a second group, for messages about files, which may take hours

    @property
    def data_ranks(self) -> int:
        """Return the number of shares of a batch."""
        return self.size // self.context.size

    @property
    def data_rank(self) -> int:
        """Return the number of this process's share of a batch."""
        return self.rank // self.context.size

    @property
    def is_first(self) -> bool:
        """Return whether this process writes the files that are written once."""
        return self.rank == 0

    def share(self, batch_size: int) -> int:
        """Return how many clips of a batch each process takes.

        Raises:
            TrainingError: the batch cannot be divided evenly.
        """
        if batch_size % self.data_ranks:
            raise TrainingError(
                f"batch_size {batch_size} is not a multiple of the {self.data_ranks} processes with data"
            )
        return batch_size // self.data_ranks

    def peak_memory(self) -> int:
        """Return the peak memory in bytes: on a GPU since the last call, on a CPU since the process started."""
        if self.device.type != "cuda":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def broadcast(self, make: Callable[[], Value]) -> Value:
        """Call `make` in the first process and return its value in every process."""
        values: list[Any] = [make() if self.is_first else None]
        dist.broadcast_object_list(values, src=0, group=self.files)
        return values[0]

    def all_reduce(self, values: Sequence[float]) -> list[float]:
        """Return the sums of the values over all processes."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def all_gather(self, value: Value) -> list[Value]:
        """Return the values of all processes, in the order of their ranks."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.files)
        return values


@contextmanager
def process_group(parallel: Parallel, local: LocalProcess | None = None) -> Iterator[World]:
    """Join the process group for the length of the block. A group that was initialised before is used and kept.

    Args:
        parallel: how many processes share the frames of a clip.
        local: which process this is, of those that were started on this machine. Without it torchrun's environment
            says so. Without both the process is alone.

    Raises:
        TrainingError: `parallel.context` does not divide the number of processes, this process has no GPU, torchrun's
            environment is incomplete, or the other processes cannot be reached or are gone.
    """
    try:
        with _process_group(parallel, local) as world:
            yield world
    except dist.DistError as error:
        raise TrainingError(
            f"the processes that train together cannot reach each other: {first_line(error)}; see the log of each of "
            "them, then run the same command again to resume"
        ) from error


@contextmanager
def _process_group(parallel: Parallel, local: LocalProcess | None) -> Iterator[World]:
    torchrun = None if local else Torchrun.find()
    device = _choose_device(local.rank if local else torchrun.local_rank if torchrun else 0)
    if dist.is_initialized():
        yield _world(device, parallel.context)
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if local:
        store = dist.FileStore(str(local.store), local.size)
        dist.init_process_group(backend, store=store, rank=local.rank, world_size=local.size)
    elif torchrun:
        if torchrun.size > 1:
            log.info("process %d of %d: meeting the others at %s", torchrun.rank, torchrun.size, torchrun.address)
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    succeeded = False
    try:
        yield _world(device, parallel.context)
        succeeded = True
    finally:
        if succeeded or device.type == "cpu":  # NCCL would wait for messages that the other processes never send
            dist.destroy_process_group()


def _choose_device(local_rank: int) -> torch.device:
    """Return this process's device; each process of a machine has a GPU of its own."""
    device = default_device()
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise TrainingError(
                f"process {local_rank} of this machine has no GPU: the machine has {count}, and each process needs one"
            )
        device = torch.device("cuda", local_rank)
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
    return World(rank, size, device, mesh, shared, dist.new_group(backend="gloo", timeout=FILES_TIMEOUT))


def shard(transformer: Any, world: World, compute: torch.dtype) -> None:
    """Shard the weights over the processes with FSDP2; a block is gathered whole only while it computes.

    Trainable weights are fp32 and computed with in `compute`; their gradients are summed in fp32. The inputs of a block
    are not cast, since levels and angles must stay exact.

    The weights that a model keeps in fp32 are computed with in fp32, as in inference. They are a group of their own,
    since one policy holds for a whole group: their block's, whose other layers are sharded one by one.
    """
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # no code changes it in place
    policies = {
        dtype: MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for dtype in (compute, torch.float32)
    }
    for module in (*transformer.blocks, transformer):
        kept = {w for name, w in transformer.named_parameters() if dtype_of(transformer, name, compute) != compute}
        dtype = compute
        if kept.intersection(module.parameters()):
            dtype = torch.float32
            for layer in list(_layers_without(module, kept)):
                fully_shard(layer, mesh=world.mesh, mp_policy=policies[compute])
        fully_shard(module, mesh=world.mesh, mp_policy=policies[dtype])


def _layers_without(module: nn.Module, kept: set[nn.Parameter]) -> Iterator[nn.Module]:
    """Yield the largest modules inside a module that have weights, none of `kept`, and are not sharded yet."""
    for child in module.children():
        weights = set(child.parameters())
        if not weights or isinstance(child, FSDPModule):
            continue
        if weights.isdisjoint(kept):
            yield child
        else:
            yield from _layers_without(child, kept)


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """Return this process's shard of a tensor that every process has whole, placed as `like` is."""
    assert hasattr(like, "device_mesh") and hasattr(like, "placements")
    full = full.to(like.device, like.dtype)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def whole(tensor: Any) -> Tensor:
    """Return a sharded tensor whole, in every process; all processes must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def reshard(transformer: nn.Module) -> None:
    """Free the weights that are gathered, as after a backward pass."""
    for module in transformer.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def clip_gradients(transformer: nn.Module, limit: float) -> float:
    """Scale the gradient down to the norm `limit` and return its norm before."""
    norm = nn.utils.clip_grad_norm_([p for p in transformer.parameters() if p.requires_grad], limit)
    return float(whole(norm))
