"""Threads that nobody waits for: an interrupt ends the program although one of them is still at work."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from typing import Any, Generic, Self, TypeVar

Result = TypeVar("Result")


class DaemonThreadPool:
    """As much of the standard library's executor as is needed, whose own threads are joined at the program's end."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        for _ in range(threads):
            Thread(target=self._serve, daemon=True).start()

    def submit(self, call: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Have a call made; what it gives or raises is in the future."""
        future: Future[Result] = Future()
        self._calls.put((future, lambda: call(*arguments)))
        return future

    def close(self) -> None:
        """Cancel what was not begun; the threads end with what they are at."""
        with suppress(Empty):
            while (item := self._calls.get_nowait()) is not None:
                item[0].cancel()
        for _ in range(self._threads):
            self._calls.put(None)

    def _serve(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # noqa: BLE001  it is raised where the result is asked for
                    future.set_exception(error)
            del item, future, call  # or the thread would hold what they hold until the next call


Item = TypeVar("Item")


def run_in_threads(
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
