"""Threads that nobody waits for."""

import threading
from concurrent.futures import CancelledError
from contextlib import closing

import pytest

from pusa.system.threads import DaemonThreadPool


def test_results_and_errors_come_back_in_futures():
    with closing(DaemonThreadPool(2)) as pool:
        assert [pool.submit(pow, 2, n).result(5) for n in range(4)] == [1, 2, 4, 8]
        with pytest.raises(ZeroDivisionError):
            pool.submit(divmod, 1, 0).result(5)


def test_closed_it_begins_nothing_more():
    pool, begun, go = DaemonThreadPool(1), [], threading.Event()

    def work(number):
        begun.append(number)
        go.wait(5)

    futures = [pool.submit(work, number) for number in range(5)]
    while not begun:
        pass
    pool.close()
    go.set()
    futures[0].result(5)
    for future in futures[1:]:
        with pytest.raises(CancelledError):
            future.result(5)
    assert begun == [0]
