"""Estimate how long jobs take from those that were timed: of equal shape and steps, or else of the nearest size.

Times are those of sampling and decoding, as records keep them, in seconds.
"""

import math
from bisect import bisect, insort
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any, TypeGuard

from pusa.tasks.base import Job

RECENT = 20  # times of one shape that are kept: the last ones, since the machine may have become busier
LARGEST = 1e12  # of a number in a record, which anybody may have edited
KEYS = ("width", "height", "num_frames", "steps")

Shape = tuple[int, int, int, int]  # the values of `KEYS`


class Timings:
    """The times of jobs that were made, without regard to their tasks. One with guidance counts twice."""

    def __init__(self) -> None:
        self._times: dict[Shape, deque[float]] = {}  # of a job without guidance
        self._medians: dict[Shape, float] = {}
        self._by_cost: list[tuple[float, Shape]] = []  # in order

    @classmethod
    def of_records(cls, records: Iterable[Mapping[str, Any]]) -> "Timings":
        """Return the times that records of jobs hold. Records without usable ones are ignored."""
        timings = cls()
        for record in records:
            settings, seconds = record.get("job"), seconds_of(record)
            if seconds is not None and isinstance(settings, Mapping):
                timings.add(settings, seconds)
        return timings

    def add(self, job: Job | Mapping[str, Any], seconds: float) -> None:
        """Note that a job, or one of these settings, took `seconds`. Settings that are not a job's are ignored."""
        shape, weight = _shape_of(job)
        if shape is None:
            return
        if shape not in self._times:
            self._times[shape] = deque(maxlen=RECENT)
            insort(self._by_cost, (math.prod(shape), shape))
        self._times[shape].append(seconds / weight)
        self._medians[shape] = median(self._times[shape])

    def seconds(self, job: Job | Mapping[str, Any]) -> float | None:
        """Return the seconds that a job, or one of these settings, should take; None if nothing was timed yet.

        A shape that was not timed takes as long as the nearest, scaled by pixels, frames and steps.
        """
        shape, weight = _shape_of(job)
        if shape is None or not self._by_cost:
            return None
        if shape in self._medians:
            return self._medians[shape] * weight
        cost = math.prod(shape)
        place = bisect(self._by_cost, (cost, shape))
        around = self._by_cost[max(0, place - 1) : place + 1]
        nearest_cost, nearest = min(around, key=lambda known: abs(math.log(known[0] / cost)))
        return self._medians[nearest] * cost / nearest_cost * weight


def seconds_of(record: Mapping[str, Any]) -> float | None:
    """Return how long the job of a record took; None if the record does not hold it, as those of earlier versions."""
    parts = record.get("seconds")
    if not isinstance(parts, Mapping):
        return None
    sample, decode = parts.get("sample"), parts.get("decode")
    return float(sample + decode) if _is_number(sample) and _is_number(decode) else None


def _shape_of(job: Job | Mapping[str, Any]) -> tuple[Shape | None, float]:
    """Return a job's shape, None if the settings lack it, and 2 if it has guidance, else 1."""
    settings = job if isinstance(job, Mapping) else vars(job)
    width, height, frames, steps = (settings.get(key) for key in KEYS)
    if not all(isinstance(value, int) and _is_number(value) and value > 0 for value in (width, height, frames, steps)):
        return None, 1.0
    shape: Any = width, height, frames, steps
    return shape, 1.0 if settings.get("guidance") == 1 else 2.0


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= LARGEST
