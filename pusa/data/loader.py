"""Batches of a latents table, read ahead by worker processes: which rows, is the order's to say, and for each rank."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pusa.data.latents import Latents
from pusa.data.order import Order

Prepared = TypeVar("Prepared")


@dataclass(frozen=True)
class MicroBatch:
    """Some places in a step's batch, and the rows of the table that are shown there."""

    step: int
    places: range
    indices: list[int]


@dataclass(frozen=True)
class Rows:
    """Posterior mean and log-variance (B, C, F, h, w), text features (B, L, width) and mask (B, L) of some rows."""

    indices: list[int]
    mean: Tensor
    logvar: Tensor
    features: Tensor
    mask: Tensor


def read_rows(latents: Latents, indices: Sequence[int]) -> Rows:
    """Some rows of one shape.

    Raises:
        TableError: they have several, or cannot be read.
    """
    return Rows(list(indices), *latents.posterior(indices), *latents.text(indices))


def as_read(take: MicroBatch, rows: Rows) -> Rows:
    """Nothing is prepared."""
    return rows


class _Batches(Dataset[Prepared], Generic[Prepared]):
    """A batch is an item: the sampler says which places of which step."""

    def __init__(self, latents: Latents, prepare: Callable[[MicroBatch, Rows], Prepared]) -> None:
        self.latents, self.prepare = latents, prepare

    def __getitem__(self, take: Any) -> Prepared:
        return self.prepare(take, read_rows(self.latents, take.indices))


@dataclass(frozen=True)
class _Takes:
    order: Order
    steps: range
    rank: int
    ranks: int
    at_once: int

    def __iter__(self) -> Iterator[MicroBatch]:
        for step in self.steps:
            indices = self.order.share(step, self.rank, self.ranks)
            first = self.rank * len(indices)
            for start in range(0, len(indices), self.at_once):
                some = indices[start : start + self.at_once]
                yield MicroBatch(step, range(first + start, first + start + len(some)), some)

    def __len__(self) -> int:
        return len(self.steps) * -(-self.order.batch_size // self.ranks // self.at_once)


def load(
    latents: Latents,
    order: Order,
    steps: range,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
    at_once: int | None = None,
    prepare: Callable[[MicroBatch, Rows], Any] = as_read,
) -> Iterator[Any]:
    """The batches of these steps, one after the other; to go on from step n, begin with n.

    Args:
        latents: the table.
        order: which rows each step takes.
        steps: which steps.
        rank: which of the processes that train together this is.
        ranks: how many they are; each takes its share of every batch.
        workers: processes that read ahead; 0 reads in this one.
        at_once: so many clips of the share at a time; default all.
        prepare: made of the rows, where they are read.
    """
    takes = _Takes(order, steps, rank, ranks, at_once or order.batch_size)
    return iter(DataLoader(_Batches(latents, prepare), sampler=takes, batch_size=None, num_workers=workers))
