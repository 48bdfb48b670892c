"""Context parallelism: processes that share the latent frames of one clip. Attention trades frames for heads.

DeepSpeed Ulysses' scheme (Jacobs et al. 2023, arXiv:2309.14509): outside attention a process has all heads of its own
frames' tokens, inside it all tokens of its own heads. Text is short, and every process computes all of it. The only
communication is all-to-all, whose transpose is all-to-all; so gradients summed over the processes are those of the sum
of their losses.

Shapes: B batch, N video tokens of all frames, n of this process's, L text tokens, H heads, h = H / size, K head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_to_all_single


@dataclass(frozen=True)
class Context:
    """This process's place among the `size` that share a clip's latent frames."""

    rank: int
    size: int
    group: ProcessGroup | None

    def counts(self, frames: int) -> list[int]:
        """How many of the frames each process has; the first ones have one more where they do not come out even."""
        each, more = divmod(frames, self.size)
        return [each + (rank < more) for rank in range(self.size)]

    def part(self, frames: int) -> slice:
        """Which of the frames are this process's."""
        counts = self.counts(frames)
        start = sum(counts[: self.rank])
        return slice(start, start + counts[self.rank])

    def to_heads(self, x_BnHK: Tensor, tokens: Sequence[int]) -> Tensor:
        """(B, n, H, K) of this process's tokens -> (B, N, h, K) of its heads; `tokens` are each process's."""
        parts = x_BnHK.unflatten(2, (self.size, -1)).permute(2, 1, 0, 3, 4).flatten(0, 1)
        return self.exchange(parts, [x_BnHK.shape[1]] * self.size, tokens).transpose(0, 1)

    def to_frames(self, x_BNhK: Tensor, tokens: Sequence[int]) -> Tensor:
        """The inverse of `to_heads`."""
        own = tokens[self.rank]
        x = self.exchange(x_BNhK.transpose(0, 1), tokens, [own] * self.size).unflatten(0, (self.size, own))
        return x.permute(2, 1, 0, 3, 4).flatten(2, 3)

    def own_heads(self, x_BLHK: Tensor) -> Tensor:
        """(B, L, h, K): this process's heads of what every process has whole."""
        return x_BLHK.unflatten(2, (self.size, -1))[:, :, self.rank]

    def gather(self, x: Tensor, dim: int, counts: Sequence[int]) -> Tensor:
        """Every process's part, joined along `dim`; `counts` are their sizes there."""
        if self.size == 1:
            return x
        copies = x.movedim(dim, 0).repeat(self.size, *[1] * (x.ndim - 1))
        return self.exchange(copies, [counts[self.rank]] * self.size, counts).movedim(0, dim)

    def exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """All-to-all along the first dimension: so many of its entries to each process, so many from each."""
        assert self.group is not None
        return all_to_all_single(x.contiguous(), list(received), list(sent), self.group)


ALONE = Context(0, 1, None)


class Imagined(Context):
    """The same on the meta device, where nobody is there to answer: for plans."""

    def exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """A tensor of the size that would come."""
        return _Arrived.apply(x.contiguous(), sum(received))


class _Arrived(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, entries: int) -> Tensor:
        ctx.shape = x.shape
        return x.new_empty(entries, *x.shape[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].new_empty(ctx.shape), None
