"""What FSDP2 holds beside the activations, moment by moment, told to a count of memory: nothing is sharded here.

As torch.distributed.fsdp works on a block: it is whole while it computes; on several processes the next one is being
gathered meanwhile. When the last of its gradients has come, they are copied into one fp32 tensor, which is summed over
the processes, and of which each keeps its part; the tensor itself is kept until the next block has got so far. What is
in no block is whole all the time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from pusa.backbones.dry_run import PeakMemory

FLOAT32 = 4  # bytes; what gradients are summed in


@dataclass
class _Group:
    """Weights that are gathered, and whose gradients are summed, together: of all, and of those that learn."""

    size: int
    learning: list[nn.Parameter]
    came: int = 0


class Sharding:
    """Told of each gradient as it comes, it lets the gradient go and holds what FSDP2 would.

    Args:
        transformer: with `blocks`; in the dtype that is computed with.
        processes: that share the weights.
        again: there are gradients already, of clips before, which the next ones are added to.
        memory: what is told.
    """

    def __init__(self, transformer: Any, processes: int, again: bool, memory: PeakMemory) -> None:
        self.processes, self.again, self.memory = processes, again, memory
        blocks = [list(block.parameters()) for block in transformer.blocks]
        inside = {id(weight) for block in blocks for weight in block}
        self.rest = _group([weight for weight in transformer.parameters() if id(weight) not in inside])
        self.blocks = [_group(block) for block in blocks]
        self.ahead = min(1, processes - 1)  # blocks that are gathered while another is at work
        self.whole = self.rest.size + max(block.size for block in self.blocks) * min(1 + self.ahead, len(blocks))
        self._held = self._summing = 0  # bytes of what is whole now, and of the last block's fp32 gradients
        memory.hold(sum(self._part(group) for group in (*self.blocks, self.rest)) if again else 0)
        self._hold_whole(self.whole)
        for index, group in enumerate((*self.blocks, self.rest)):
            for weight in group.learning:
                weight.register_post_accumulate_grad_hook(partial(self._arrived, group, index))

    def _arrived(self, group: _Group, index: int, _: Tensor) -> None:
        group.came += 1
        if group.came < len(group.learning):
            return
        self._hold_whole(self._needed(index, self.ahead))
        self.memory.hold(self._part(group, 1) - self._summing)
        for weight in group.learning:
            weight.grad = None
        self.memory.hold(self._part(group))
        if self.again:
            self.memory.hold(-self._part(group))
        self._hold_whole(self._needed(index, 1 + self.ahead))
        self._summing = self._part(group, 1)

    def _part(self, group: _Group, processes: int = 0) -> int:
        """Bytes of a group's gradients in each of so many processes; default all there are."""
        return FLOAT32 * sum(weight.numel() for weight in group.learning) // (processes or self.processes)

    def _needed(self, index: int, blocks: int) -> int:
        """Bytes that are whole where the group `index` has gone, and so many blocks before it are there."""
        if index == len(self.blocks):
            return 0
        return self.rest.size + sum(block.size for block in self.blocks[max(0, index - blocks) : index])

    def _hold_whole(self, size: int) -> None:
        self.memory.hold(size - self._held)
        self._held = size


def _group(weights: Sequence[nn.Parameter]) -> _Group:
    return _Group(sum(weight.nbytes for weight in weights), [weight for weight in weights if weight.requires_grad])
