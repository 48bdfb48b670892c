"""Choose the rows that a fine-tune reads at each step. The choice depends on the step only, so resuming needs no state.

Every row is read once an epoch, epochs follow each other without a gap, and each epoch has its own order. All rows of a
batch have one shape. So the rows of each shape form their own stream, and the streams take turns in proportion to their
numbers of rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pusa.system.files import derived_seed

SEEDS = 16**15  # `derived_seed` returns a smaller number


Buckets = Mapping[str, Sequence[int]]  # the rows of each shape, WIDTHxHEIGHTxFRAMES


def split(buckets: Buckets, clip_ids: Sequence[str], share: float) -> tuple[Buckets, Buckets]:
    """Return the rows that train, and those that are held out: about `share` of all, without shapes that have none.

    A clip's id alone decides on which side it is, so clips that are added to a table never move another one.

    Args:
        buckets: the rows of each shape.
        clip_ids: the id of each row of the table.
        share: in [0, 1].
    """
    sides: tuple[dict[str, list[int]], dict[str, list[int]]] = ({}, {})
    for shape, rows in buckets.items():
        for row in rows:
            sides[is_held_out(clip_ids[row], share)].setdefault(shape, []).append(row)
    return sides


def is_held_out(clip_id: str, share: float) -> bool:
    """Return whether a clip is in the share of all clips that never trains."""
    return hash_of(clip_id) < share


def hash_of(clip_id: str) -> float:
    """Return a number in [0, 1) that is drawn from a clip's id."""
    return derived_seed("held out", clip_id) / SEEDS


@dataclass(frozen=True)
class Order:
    """The rows of each step.

    Steps are grouped in rounds, each about one pass over the table. In round r, shape s with n_s rows gives
    floor((r + 1) n_s / B) - floor(r n_s / B) batches; the order of a round's batches is shuffled.

    Args:
        buckets: the rows of each shape.
        batch_size: B, over all ranks together.
        seed: the seed of all shuffles.
    """

    buckets: Buckets
    batch_size: int
    seed: int

    def rows(self, step: int) -> list[int]:
        """Return the rows of a step, counted from 0; all have one shape."""
        round_ = self._find_round(step)
        turns = _shuffle_turns(
            tuple(
                (name, self._batches(name, round_ + 1) - self._batches(name, round_)) for name in sorted(self.buckets)
            ),
            derived_seed("turns", self.seed, round_),
        )
        turn = step - self._steps_before(round_)
        bucket = turns[turn]
        batch = self._batches(bucket, round_) + turns[:turn].count(bucket)
        bucket_rows, rows = self.buckets[bucket], []
        for position in range(batch * self.batch_size, (batch + 1) * self.batch_size):
            epoch, place = divmod(position, len(bucket_rows))
            rows.append(
                bucket_rows[_permutation(len(bucket_rows), derived_seed("epoch", self.seed, bucket, epoch))[place]]
            )
        return rows

    def share(self, step: int, rank: int, ranks: int) -> list[int]:
        """Return the rows of a step for one of `ranks` processes; joined in order, the shares are `rows(step)`."""
        each, rest = divmod(self.batch_size, ranks)
        assert rest == 0, f"batch {self.batch_size} over {ranks} processes"
        return self.rows(step)[rank * each : (rank + 1) * each]

    def _batches(self, bucket: str, rounds: int) -> int:
        """Return the number of batches of a shape in the first `rounds` rounds."""
        return rounds * len(self.buckets[bucket]) // self.batch_size

    def _steps_before(self, round_: int) -> int:
        return sum(self._batches(bucket, round_) for bucket in self.buckets)

    def _find_round(self, step: int) -> int:
        """Return the round of a step, by bisection: the last round that begins at or before it and is not empty."""
        low, high = 0, 1
        while self._steps_before(high) <= step:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._steps_before(middle) <= step else (low, middle)
        return low


@lru_cache(maxsize=64)
def _permutation(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count)


@lru_cache(maxsize=4)
def _shuffle_turns(counts: tuple[tuple[str, int], ...], seed: int) -> tuple[str, ...]:
    """Return each name as often as it counts, in random order."""
    turns = np.repeat([name for name, _ in counts], [count for _, count in counts])
    return tuple(np.random.default_rng(seed).permutation(turns).tolist())
