"""Run work in daemon threads, so that an interrupt ends the program even while one of them is busy."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from typing import Any, TypeVar

Result = TypeVar("Result")
Item = TypeVar("Item")


class DaemonThreadPool:
    """A thread pool that the interpreter does not wait for when it exits.

    `concurrent.futures.ThreadPoolExecutor` joins its threads at exit, so a blocked thread would delay an interrupt.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        for _ in range(threads):
            Thread(target=self._run_calls, daemon=True).start()

    def submit(self, call: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Queue a call and return a future that holds its result or its exception."""
        future: Future[Result] = Future()
        self._calls.put((future, lambda: call(*arguments)))
        return future

    def close(self) -> None:
        """Cancel the calls that have not started; each thread ends after its current call."""
        with suppress(Empty):
            while (item := self._calls.get_nowait()) is not None:
                item[0].cancel()
        for _ in range(self._threads):
            self._calls.put(None)

    def _run_calls(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # noqa: BLE001  it is raised where the result is asked for
                    future.set_exception(error)
            del item, future, call  # or the thread would keep their objects alive until its next call


def run_in_threads(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int, patience: float
) -> Iterator[Result | None]:
    """Yield the results of `work` in the order they are ready, and None whenever `patience` seconds pass without one.

    An exception of `work` is raised here, and no further item is started. The threads are daemons: an interrupt does
    not wait for the items that are being worked on.
    """
    feed, lock, stopped = iter(items), Lock(), Event()
    outcomes: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()  # a result, or an exception

    def run() -> None:
        while not stopped.is_set():
            with lock:
                batch = list(zip(range(1), feed, strict=False))  # the next item, or nothing
            if not batch:
                return
            try:
                outcome: tuple[Any, BaseException | None] = (work(batch[0][1]), None)
            except BaseException as error:  # noqa: BLE001  it is raised by the generator
                outcome = (None, error)
            outcomes.put(outcome)

    for _ in range(min(workers, len(items))):
        Thread(target=run, daemon=True).start()
    remaining = len(items)
    try:
        while remaining:
            try:
                result, error = outcomes.get(timeout=patience)
            except Empty:
                yield None
                continue
            if error is not None:
                raise error
            remaining -= 1
            yield result
    finally:
        stopped.set()
