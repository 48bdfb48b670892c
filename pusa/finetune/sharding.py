"""Count the memory that FSDP2 would hold besides activations, moment by moment, without sharding anything.

torch.distributed.fsdp works block by block. A block is whole while it computes, and with several processes the next one
is gathered meanwhile. When the last of a block's gradients is computed, they are copied into one fp32 tensor, which is
summed over the processes, and each process keeps its shard. The fp32 tensor is freed only when the next block reaches
the same point. Weights outside the blocks are whole all the time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from pusa.backbones.dry_run import PeakMemory

FLOAT32 = 4  # bytes; gradients are summed in fp32


@dataclass
class _Group:
    """Weights that are gathered together, and whose gradients are summed together."""

    size: int  # bytes of all weights
    trainable: list[nn.Parameter]
    gradients: int = 0  # how many are computed

    @classmethod
    def of(cls, weights: Sequence[nn.Parameter]) -> "_Group":
        """Return a group of these weights."""
        return cls(sum(weight.nbytes for weight in weights), [weight for weight in weights if weight.requires_grad])

    def gradient_bytes(self, processes: int) -> int:
        """Return the bytes of the group's fp32 gradients in each of `processes`."""
        return FLOAT32 * sum(weight.numel() for weight in self.trainable) // processes


class Sharding:
    """Follow the backward pass by hooks: free each gradient when it is computed, and count what FSDP2 would hold.

    Args:
        transformer: a `TrainableTransformer` in the dtype of the arithmetic.
        processes: the number that share the weights.
        accumulates: whether gradients of an earlier micro-batch exist, to which the new ones are added.
        memory: counts the bytes.
    """

    def __init__(self, transformer: Any, processes: int, accumulates: bool, memory: PeakMemory) -> None:
        self.processes, self.accumulates, self.memory = processes, accumulates, memory
        blocks = [list(block.parameters()) for block in transformer.blocks]
        inside = {id(weight) for block in blocks for weight in block}
        self.rest = _Group.of([weight for weight in transformer.parameters() if id(weight) not in inside])
        self.blocks = [_Group.of(block) for block in blocks]
        self.prefetched = min(1, processes - 1)  # blocks that are gathered while another computes
        largest = max(block.size for block in self.blocks)
        self.gathered = self.rest.size + largest * min(1 + self.prefetched, len(blocks))
        self._whole = 0  # bytes of the weights that are whole now
        self._summing = 0  # bytes of the fp32 gradients of the block before
        groups = (*self.blocks, self.rest)
        memory.hold(sum(group.gradient_bytes(processes) for group in groups) if accumulates else 0)
        self._hold_whole(self.gathered)
        for index, group in enumerate(groups):
            for weight in group.trainable:
                weight.register_post_accumulate_grad_hook(partial(self._count_gradient, group, index))

    def _count_gradient(self, group: _Group, index: int, _: Tensor) -> None:
        group.gradients += 1
        if group.gradients < len(group.trainable):
            return
        self._hold_whole(self._whole_before(index, self.prefetched))
        self.memory.hold(group.gradient_bytes(1) - self._summing)
        for weight in group.trainable:
            weight.grad = None
        shard = group.gradient_bytes(self.processes)
        self.memory.hold(shard)
        if self.accumulates:  # added to the shard from before, and freed
            self.memory.hold(-shard)
        self._hold_whole(self._whole_before(index, 1 + self.prefetched))
        self._summing = group.gradient_bytes(1)

    def _whole_before(self, index: int, count: int) -> int:
        """Return the bytes that are whole once group `index` is freed and the `count` blocks before it are gathered."""
        if index == len(self.blocks):
            return 0
        return self.rest.size + sum(block.size for block in self.blocks[max(0, index - count) : index])

    def _hold_whole(self, size: int) -> None:
        self.memory.hold(size - self._whole)
        self._whole = size
