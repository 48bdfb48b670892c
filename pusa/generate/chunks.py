"""Decide which jobs go next into which slot: chunks of batches, in the order of the jobs, each after those it reads.

A chunk lasts about `CHUNK_SECONDS`, so that the parts of the model are not moved for each job, and other processes and
slots can still share the work. What a worker was doing when it died is tried again, job by job, `MAX_CRASHES` times.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from math import inf
from threading import Condition, Lock
from time import monotonic

from pusa.errors import StageError
from pusa.generate.timings import Timings
from pusa.system.slots import WorkerDied
from pusa.system.text import join_ranges
from pusa.tasks.base import Job

CHUNK_SECONDS, CHUNK_SECONDS_OFFLOADED = 40.0, 300.0  # with `offload`, each chunk moves the parts of the model
CHUNK_JOBS = 100  # at most; a worker holds a lock for each
MAX_CRASHES = 3  # of its worker, after which a job is not tried again
SECONDS_BETWEEN_LOOKS = 1.0  # at jobs that another process holds

Batch = tuple[Job, ...]


@dataclass(frozen=True)
class Chunk:
    """Batches that one slot makes together. `todo` has the ids of the jobs to make; the others share their batch."""

    batches: tuple[Batch, ...]
    todo: frozenset[str]

    @property
    def jobs(self) -> list[Job]:
        """Return the jobs of all batches."""
        return [job for batch in self.batches for job in batch]

    def describe(self, positions: Mapping[str, int]) -> str:
        """Return a name for people: "image_to_video 848x480x163, jobs 64-71", or with the id of a single job.

        Args:
            positions: the place of each job in the manifest, by id.
        """
        kinds = Counter(f"{job.task} {job.width}x{job.height}x{job.num_frames}" for job in self.jobs)
        (kind, _), *others = kinds.most_common()
        kind += f" and {len(others)} other kind{'s' * (len(others) > 1)}" if others else ""
        numbers = [positions[job.id] for job in self.jobs]
        if len(numbers) == 1:
            return f"{kind}, job {numbers[0]} ({self.jobs[0].id})"
        return f"{kind}, jobs {join_ranges(numbers)}"


def next_time(time_of_day: str, now: float) -> float:
    """Return when it is "HH:MM" next on this machine's clock, after `now`; both in seconds since the epoch."""
    hour, minute = map(int, time_of_day.split(":"))
    today = datetime.fromtimestamp(now).replace(hour=hour, minute=minute, second=0, microsecond=0)
    # Of a local time that a change of the clocks repeats, the first counts.
    return next(at for days in range(3) if (at := (today + timedelta(days)).timestamp()) > now)


class Schedule:
    """The jobs that are left, shared by the threads of all slots.

    Args:
        batches: the batches, the first ones first.
        todo: the ids of the jobs to make; a batch may have others beside them.
        reads: for each job the ids of the jobs whose results it reads.
        slots: the number of slots.
        timings: how long jobs take, as far as that is known.
        seconds: how long a chunk should last.
        look: called with a batch before it is given out. It settles the jobs that need no work, and returns whether no
            other process holds the lock of one.
        on_wait: called before a wait.
        seconds_left: returns the seconds in which work may still be started.
    """

    def __init__(
        self,
        batches: Iterable[Batch],
        todo: Iterable[str],
        reads: Mapping[str, Sequence[str]],
        slots: int,
        timings: Timings,
        seconds: float,
        look: Callable[[Batch], bool],
        on_wait: Callable[[], None] = lambda: None,
        seconds_left: Callable[[], float] = lambda: inf,
    ) -> None:
        self._waiting = list(batches)
        self._reads, self._slots, self._timings, self._seconds, self._look = reads, slots, timings, seconds, look
        self._on_wait, self._seconds_left = on_wait, seconds_left
        self._open = set(todo)  # those that are neither made nor failed
        self._in_hand: set[str] = set()
        self._crashes: Counter[str] = Counter()
        self._changed = Condition()

    def is_left(self, id: str) -> bool:
        """Return whether a job is neither made nor failed."""
        with self._changed:
            return id in self._open

    def settle(self, id: str) -> None:
        """Note that a job is made, or failed."""
        with self._changed:
            self._open.discard(id)
            self._changed.notify_all()

    def end(self) -> None:
        """Give out nothing more."""
        with self._changed:
            self._open.clear()
            self._changed.notify_all()

    def add_time(self, job: Job, seconds: float) -> None:
        """Note how long a job took."""
        with self._changed:
            self._timings.add(job, seconds)

    def take(self) -> Chunk | None:
        """Return the next chunk; None if all jobs are settled or the time is over. Wait while others have the rest."""
        with self._changed:
            while self._open and self._seconds_left() > 0:
                if batches := self._choose():
                    ids = {job.id for batch in batches for job in batch}
                    self._in_hand |= ids
                    return Chunk(tuple(batches), frozenset(ids & self._open))
                if self._open:
                    self._on_wait()
                    self._changed.wait(SECONDS_BETWEEN_LOOKS)
            self._changed.notify_all()
            return None

    def give_back(self, chunk: Chunk) -> None:
        """Take a chunk back whose work has ended; jobs of it that are not settled are given out again."""
        with self._changed:
            self._in_hand -= {job.id for job in chunk.jobs}
            self._changed.notify_all()

    def crashed(self, chunk: Chunk, at_work: Iterable[str]) -> list[Job]:
        """Note which jobs of a chunk a worker was busy with when it died; return those that are not to be tried again.

        They are made after all others: first as before, since a worker may die without their fault, and other company
        changes the last bits of a result; after a second death each alone, so that one does not take others with it.
        Of these, the one with the most deaths comes first, so that one is given up before all are tried as often.
        """
        with self._changed:
            jobs = {job.id: job for job in chunk.jobs}
            suspects = {id for id in at_work if id in jobs} or jobs.keys()
            self._crashes.update(list(suspects))
            first: list[Batch] = []
            last: list[Batch] = []
            for batch in self._waiting:
                crashes = max(self._crashes[job.id] if job.id in suspects else 0 for job in batch)
                last += [] if not crashes else [batch] if crashes == 1 else [(job,) for job in batch]
                first += [] if crashes else [batch]
            self._waiting = sorted(first + last, key=self._turn)
            return [job for id, job in jobs.items() if id in suspects and self._crashes[id] >= MAX_CRASHES]

    def _turn(self, batch: Batch) -> tuple[bool, int]:
        """Return the place of a batch in an order: those whose workers died last, and of these the worst first."""
        deaths = max(self._crashes[job.id] for job in batch)
        return deaths > 0, -deaths

    def _choose(self) -> list[Batch]:
        """Return the batches of a chunk, the first ones that are ready; an empty list if others have all of them."""
        self._waiting = [batch for batch in self._waiting if any(job.id in self._open for job in batch)]
        limit, started = self._limit(), monotonic()
        chosen: list[Batch] = []
        jobs, seconds = 0, 0.0
        for place, batch in enumerate(self._waiting):
            if not self._is_ready(batch):
                continue
            if not self._look(batch):
                # Locks are looked at only so long, since others may hold thousands; the next look begins with the rest.
                if monotonic() - started > SECONDS_BETWEEN_LOOKS:
                    self._waiting = self._waiting[place + 1 :] + self._waiting[: place + 1]
                    break
                continue
            if all(job.id not in self._open for job in batch):  # the look has settled them
                continue
            suspect = any(self._crashes[job.id] for job in batch)
            estimates = [self._timings.seconds(job) for job in batch]
            total = sum(estimate or 0.0 for estimate in estimates)
            if chosen and (suspect or jobs + len(batch) > CHUNK_JOBS or seconds + total > limit):
                break
            chosen.append(batch)
            jobs, seconds = jobs + len(batch), seconds + total
            if suspect or None in estimates:  # nothing of this shape was timed yet: one batch shows how long it takes
                break
        return chosen

    def _is_ready(self, batch: Batch) -> bool:
        mine = {job.id for job in batch}
        if mine & self._in_hand or not mine & self._open:
            return False
        return not any(read in self._open for id in mine for read in self._reads.get(id, ()))

    def _limit(self) -> float:
        """Return the seconds that a chunk may last now: towards the end less, so that all slots end together."""
        return min(self._limit_of_work(), self._seconds_left())

    def _limit_of_work(self) -> float:
        if self._slots == 1:
            return self._seconds
        left, enough = 0.0, 2 * self._slots * self._seconds
        for job in (job for batch in self._waiting for job in batch):
            if job.id in self._open and job.id not in self._in_hand:
                if (estimate := self._timings.seconds(job)) is None:
                    return self._seconds
                left += estimate
                if left >= enough:  # there may be thousands more
                    break
        return min(self._seconds, left / (2 * self._slots))


class Deaths:
    """The deaths of the workers of a run. A worker may die without a job's fault; where all do, the run ends.

    Args:
        slots: the number of slots, which may each give up a job before one is made.
    """

    def __init__(self, slots: int) -> None:
        self._most = 2 * MAX_CRASHES * slots
        self._all = self._idle = 0  # idle: before the worker began a job, since a job ended
        self._counting = Lock()

    def job_ended(self) -> None:
        """Note that a worker has ended a job: workers do begin."""
        self._idle = 0

    def add(self, error: WorkerDied, at_work: Sequence[str], is_stuck: bool) -> None:
        """Note a death.

        Args:
            error: how the worker died.
            at_work: the ids of the jobs that it was busy with.
            is_stuck: whether there are jobs left, and none was made.

        Raises:
            StageError: workers die whatever they do.
        """
        with self._counting:
            self._all += 1
            self._idle += not at_work
            deaths, idle = self._all, self._idle
        if idle >= self._most:
            raise StageError(
                f"workers died {idle} times before they began a job ({error.how}): out of memory?"
            ) from error
        if is_stuck and deaths >= self._most:
            raise StageError(f"workers died {deaths} times, and no job was made ({error.how}); see the log") from error
