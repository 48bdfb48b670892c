"""Read batches of a latents table ahead in worker processes. `Order` picks each rank's rows."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pusa.data.latents import Latents
from pusa.data.order import Order
from pusa.diffusion.sampler import TextFeatures
from pusa.errors import PusaError, StageError
from pusa.system.text import first_line

Prepared = TypeVar("Prepared")
SECONDS_OF_SIGNAL = 0.2  # until the signal of a process that has ended is here


@dataclass(frozen=True)
class MicroBatch:
    """The part of a step's batch that is processed at a time: its places in the batch, and their rows of the table."""

    step: int
    places: range
    indices: list[int]


@dataclass(frozen=True)
class Rows:
    """Rows of the table: posterior mean and log-variance (B, C, F, h, w), and the features of B texts."""

    indices: list[int]
    mean: Tensor
    logvar: Tensor
    text: TextFeatures


def read_rows(latents: Latents, indices: Sequence[int]) -> Rows:
    """Read rows of one shape.

    Raises:
        TableError: the rows have several shapes, or cannot be read.
    """
    return Rows(list(indices), *latents.posterior(indices), latents.text(indices))


def keep_rows(micro_batch: MicroBatch, rows: Rows) -> Rows:
    """Return the rows unchanged."""
    return rows


@dataclass(frozen=True)
class _Failed:
    """An error of a worker. torch would raise one that has the worker's whole traceback as its message."""

    error: PusaError | OSError


class _Batches(Dataset[Prepared | _Failed], Generic[Prepared]):
    """The data set that torch's loader reads: its sampler yields micro batches, which take the place of indices."""

    def __init__(self, latents: Latents, prepare: Callable[[MicroBatch, Rows], Prepared]) -> None:
        self.latents, self.prepare = latents, prepare

    def __getitem__(self, micro_batch: Any) -> Prepared | _Failed:
        try:
            return self.prepare(micro_batch, read_rows(self.latents, micro_batch.indices))
        except (PusaError, OSError) as error:
            return _Failed(error)


@dataclass(frozen=True)
class _MicroBatches:
    """The micro batches of one rank, step by step."""

    order: Order
    steps: range
    rank: int
    ranks: int
    size: int

    def __iter__(self) -> Iterator[MicroBatch]:
        for step in self.steps:
            share = self.order.share(step, self.rank, self.ranks)
            first = self.rank * len(share)
            for start in range(0, len(share), self.size):
                indices = share[start : start + self.size]
                yield MicroBatch(step, range(first + start, first + start + len(indices)), indices)

    def __len__(self) -> int:
        return len(self.steps) * -(-self.order.batch_size // self.ranks // self.size)


def load(
    latents: Latents,
    order: Order,
    steps: range,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
    micro_batch_size: int | None = None,
    prepare: Callable[[MicroBatch, Rows], Any] = keep_rows,
) -> Iterator[Any]:
    """Return an iterator over the batches of the given steps; to resume at step n, begin `steps` with n.

    Args:
        latents: the table.
        order: picks the rows of each step.
        steps: the steps, counted from 0.
        rank: the number of this process among those that train together.
        ranks: the number of these processes; each reads its share of every batch.
        workers: the number of processes that read ahead; with 0, this process reads.
        micro_batch_size: how many clips of the share are read at a time; all by default.
        prepare: called with each micro batch and its rows in the process that read them; its results are yielded.

    Raises, as the batch is asked for:
        TableError: its rows cannot be read.
        StageError: a worker is gone.
    """
    micro_batches = _MicroBatches(order, steps, rank, ranks, micro_batch_size or order.batch_size)
    loader = DataLoader(
        _Batches(latents, prepare),
        sampler=micro_batches,
        batch_size=None,
        num_workers=workers,
        # Not the default: in a rank that was spawned it is "spawn", which cannot send `prepare` to the workers.
        multiprocessing_context="fork" if workers else None,
    )
    return _raise_failed(iter(loader), workers)  # the workers start here, before the caller starts threads


def _raise_failed(batches: Iterator[Any], workers: int) -> Iterator[Any]:
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (EOFError, OSError, RuntimeError) as error:  # a pipe or a file that the worker no longer hands over
            if not workers or str(error).startswith("Caught "):  # an error of `prepare`
                raise
            raise _worker_ended(error) from error
        if isinstance(batch, _Failed):
            raise batch.error
        yield batch


@contextmanager
def worker_deaths() -> Iterator[None]:
    """Raise the death of a worker of `load`, which torch may report from any line, as a `StageError`."""
    try:
        yield
    except RuntimeError as error:
        if not re.match(r"DataLoader worker \(pid", str(error)):
            raise
        raise _worker_ended(error) from error


def _worker_ended(error: BaseException) -> StageError:
    with suppress(RuntimeError):  # of torch's handler of signals, which else might raise in any line that follows
        time.sleep(SECONDS_OF_SIGNAL)
    return StageError(
        f"a process that reads data ahead ended: {first_line(error).rstrip('. ')}; run the same command again to "
        "resume; if memory was short, with fewer loader_workers"
    )
