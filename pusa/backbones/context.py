"""Split the latent frames of one clip over processes (context parallelism); in attention they trade frames for heads.

The scheme is DeepSpeed Ulysses' (Jacobs et al. 2023, arXiv:2309.14509). Outside attention a process has all heads of
the tokens of its own frames; inside attention it has its own heads of all tokens. Text is short: every process computes
all of it. The only communication is all-to-all, whose transpose is all-to-all, so gradients summed over the processes
are the gradients of the sum of their losses.

Shapes: B batch, N video tokens of all frames, n of this process's frames, L text tokens, H heads, h = H / size, K head
width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_to_all_single

from pusa.errors import ConditionError


@dataclass(frozen=True)
class Context:
    """This process's rank among the `size` processes that share the latent frames of a clip."""

    rank: int
    size: int
    group: ProcessGroup | None

    def require_even(self, heads: int) -> None:
        """Check that the processes can share this number of attention heads evenly.

        Raises:
            ConditionError: names the numbers of processes that can.
        """
        if heads % self.size:
            legal = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
            raise ConditionError(f"{self.size} processes cannot split {heads} heads evenly; allowed are {legal}")

    def counts(self, frames: int) -> list[int]:
        """Return how many frames each process has; if the split is uneven, the first ones have one more."""
        each, more = divmod(frames, self.size)
        return [each + (rank < more) for rank in range(self.size)]

    def part(self, frames: int) -> slice:
        """Return the slice of the frames that this process has."""
        counts = self.counts(frames)
        start = sum(counts[: self.rank])
        return slice(start, start + counts[self.rank])

    def to_heads(self, x_BnHK: Tensor, tokens: Sequence[int]) -> Tensor:
        """Exchange (B, n, H, K), all heads of own tokens, for (B, N, h, K); `tokens` counts each process's tokens."""
        parts = x_BnHK.unflatten(2, (self.size, -1)).permute(2, 1, 0, 3, 4).flatten(0, 1)
        return self.exchange(parts, [x_BnHK.shape[1]] * self.size, tokens).transpose(0, 1)

    def to_frames(self, x_BNhK: Tensor, tokens: Sequence[int]) -> Tensor:
        """Invert `to_heads`."""
        own = tokens[self.rank]
        x = self.exchange(x_BNhK.transpose(0, 1), tokens, [own] * self.size).unflatten(0, (self.size, own))
        return x.permute(2, 1, 0, 3, 4).flatten(2, 3)

    def own_heads(self, x_BLHK: Tensor) -> Tensor:
        """Return this process's heads (B, L, h, K) of a tensor that every process has whole."""
        return x_BLHK.unflatten(2, (self.size, -1))[:, :, self.rank]

    def gather(self, x: Tensor, dim: int, counts: Sequence[int]) -> Tensor:
        """Gather every process's part and join them along `dim`; `counts` are their sizes in that dimension."""
        if self.size == 1:
            return x
        copies = x.movedim(dim, 0).repeat(self.size, *[1] * (x.ndim - 1))
        return self.exchange(copies, [counts[self.rank]] * self.size, counts).movedim(0, dim)

    def exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Run all-to-all along dimension 0; `sent` and `received` count the entries to and from each process."""
        assert self.group is not None
        return all_to_all_single(x.contiguous(), list(received), list(sent), self.group)


ALONE = Context(0, 1, None)


class MetaContext(Context):
    """A context on the meta device, without other processes: for plans."""

    def exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Return a tensor of the size that would be received."""
        return _MetaExchange.apply(x.contiguous(), sum(received))


class _MetaExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, entries: int) -> Tensor:
        ctx.shape = x.shape
        return x.new_empty(entries, *x.shape[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].new_empty(ctx.shape), None
