"""In what order a fine-tune sees the rows of a table: a plain function of the step, so a resumed run needs no memory.

Every row is shown once an epoch, epochs follow each other without a gap, and each has an order of its own. A batch has
one shape, so each shape's rows are a stream of their own, and the streams take turns in proportion to their rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pusa.system.files import derived_seed


@dataclass(frozen=True)
class Order:
    """Which rows each step takes.

    A round is a pass over the table in which shape s gives the batches that its rows filled since the last round:
    floor((r + 1) n_s / B) - floor(r n_s / B) of them, in an order of the round's own.

    Args:
        buckets: the rows of each shape.
        batch_size: B, over all ranks together.
        seed: of all orders.
    """

    buckets: Mapping[str, Sequence[int]]
    batch_size: int
    seed: int

    def rows(self, step: int) -> list[int]:
        """The rows of a step, from 0 on, all of one shape."""
        round_ = self._round(step)
        turns = self._turns(round_)
        place = step - self._steps_before(round_)
        bucket = turns[place]
        batch = self._batches(bucket, round_) + turns[:place].count(bucket)
        return list(self._stream(bucket, batch * self.batch_size))

    def share(self, step: int, rank: int, ranks: int) -> list[int]:
        """The rows that one of several processes takes; together they take those of `rows`, in order."""
        each, rest = divmod(self.batch_size, ranks)
        assert rest == 0, f"batch {self.batch_size} over {ranks} processes"
        return self.rows(step)[rank * each : (rank + 1) * each]

    def _stream(self, bucket: str, start: int) -> Iterator[int]:
        rows = self.buckets[bucket]
        for position in range(start, start + self.batch_size):
            epoch, place = divmod(position, len(rows))
            yield rows[_order(len(rows), derived_seed("epoch", self.seed, bucket, epoch))[place]]

    def _batches(self, bucket: str, rounds: int) -> int:
        """How many batches a shape gave in so many rounds."""
        return rounds * len(self.buckets[bucket]) // self.batch_size

    def _steps_before(self, round_: int) -> int:
        return sum(self._batches(bucket, round_) for bucket in self.buckets)

    def _round(self, step: int) -> int:
        """The round that a step is in: the last that begins at or before it and has steps."""
        low, high = 0, 1
        while self._steps_before(high) <= step:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._steps_before(middle) <= step else (low, middle)
        return low

    def _turns(self, round_: int) -> tuple[str, ...]:
        counts = tuple(
            (name, self._batches(name, round_ + 1) - self._batches(name, round_)) for name in sorted(self.buckets)
        )
        return _shuffled(counts, derived_seed("turns", self.seed, round_))


@lru_cache(maxsize=64)
def _order(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count)


@lru_cache(maxsize=4)
def _shuffled(counts: tuple[tuple[str, int], ...], seed: int) -> tuple[str, ...]:
    turns = np.repeat([name for name, _ in counts], [count for _, count in counts])
    return tuple(np.random.default_rng(seed).permutation(turns).tolist())
