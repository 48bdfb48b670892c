"""Batches of a latents table, read ahead by worker processes: which rows, is the order's to say, and for each rank."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pusa.data.latents import Latents
from pusa.data.order import Order


@dataclass(frozen=True)
class Rows:
    """Posterior mean and log-variance (B, C, F, h, w), text features (B, L, width) and mask (B, L) of some rows."""

    indices: list[int]
    mean: Tensor
    logvar: Tensor
    features: Tensor
    mask: Tensor


class _Batches(Dataset[Rows]):
    """A batch is an item: the sampler hands out lists of rows."""

    def __init__(self, latents: Latents) -> None:
        self.latents = latents

    def __getitem__(self, indices: Any) -> Rows:
        return read_rows(self.latents, indices)


@dataclass(frozen=True)
class _Shares:
    order: Order
    steps: range
    rank: int
    ranks: int

    def __iter__(self) -> Iterator[list[int]]:
        return (self.order.share(step, self.rank, self.ranks) for step in self.steps)

    def __len__(self) -> int:
        return len(self.steps)


def read_rows(latents: Latents, indices: Sequence[int]) -> Rows:
    """Some rows of one shape.

    Raises:
        TableError: they have several, or cannot be read.
    """
    return Rows(list(indices), *latents.posterior(indices), *latents.text(indices))


def load(
    latents: Latents, order: Order, steps: range, rank: int = 0, ranks: int = 1, workers: int = 0
) -> Iterator[Rows]:
    """The batches of these steps, one after the other; to go on from step n, begin with n.

    Args:
        latents: the table.
        order: which rows each step takes.
        steps: which steps.
        rank: which of the processes that train together this is.
        ranks: how many they are; each takes its share of every batch.
        workers: processes that read ahead; 0 reads in this one.
    """
    shares = _Shares(order, steps, rank, ranks)
    return iter(DataLoader(_Batches(latents), sampler=shares, batch_size=None, num_workers=workers))
