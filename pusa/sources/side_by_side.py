"""Work on several things at once, where the work itself is done in processes that the work starts."""

from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from typing import Any, Generic, Self, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int, patience: float
) -> Iterator[Result | None]:
    """Yield what `work` gives for each item, as it comes; None whenever `patience` seconds went by without any.

    What `work` raises is raised here, and no further item is begun. An interrupt is not kept waiting by what is begun,
    as it would be by an executor of the standard library, whose threads are joined at the end.
    """
    feed, lock, stopped = iter(items), Lock(), Event()
    outcomes: SimpleQueue[_Outcome[Result]] = SimpleQueue()

    def run() -> None:
        while not stopped.is_set():
            with lock:
                rest = list(zip(range(1), feed, strict=False))
            if not rest:
                return
            with _Outcome[Result]() as outcome:
                outcome.value = work(rest[0][1])
            outcomes.put(outcome)

    for _ in range(min(workers, len(items))):
        Thread(target=run, daemon=True).start()
    try:
        yield from _outcomes(outcomes, len(items), patience)
    finally:
        stopped.set()


def _outcomes(outcomes: "SimpleQueue[_Outcome[Result]]", count: int, patience: float) -> Iterator[Result | None]:
    while count:
        try:
            outcome = outcomes.get(timeout=patience)
        except Empty:
            yield None
            continue
        if outcome.error is not None:
            raise outcome.error
        count -= 1
        yield outcome.value


class _Outcome(Generic[Result]):
    """What a call gave, or raised."""

    value: Result
    error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        self.error = error
        return True
