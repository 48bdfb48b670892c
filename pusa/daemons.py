"""Threads that nobody waits for: an interrupt ends the program although one of them is still at work."""

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

Result = TypeVar("Result")


class Daemons:
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
