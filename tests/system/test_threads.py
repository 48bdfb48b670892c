"""Daemon threads: results and errors arrive in order of completion, and nothing starts after a stop."""

import threading
from concurrent.futures import CancelledError
from contextlib import closing

import pytest

from pusa.system.threads import DaemonThreadPool, run_in_threads

BOUND = 60  # seconds to wait for something that takes milliseconds


def test_results_and_errors_arrive_in_futures():
    with closing(DaemonThreadPool(2)) as pool:
        assert [pool.submit(pow, 2, n).result(BOUND) for n in range(4)] == [1, 2, 4, 8]
        with pytest.raises(ZeroDivisionError):
            pool.submit(divmod, 1, 0).result(BOUND)


def test_a_closed_pool_starts_no_more_calls():
    pool, started, first_started, release = DaemonThreadPool(1), [], threading.Event(), threading.Event()

    def work(number):
        started.append(number)
        first_started.set()
        release.wait(BOUND)

    futures = [pool.submit(work, number) for number in range(5)]
    assert first_started.wait(BOUND)
    pool.close()
    release.set()
    futures[0].result(BOUND)
    for future in futures[1:]:
        with pytest.raises(CancelledError):
            future.result(BOUND)
    assert started == [0]


def test_every_item_is_done_once_and_as_many_at_a_time_as_there_are_workers():
    running, most, lock = [0], [0], threading.Lock()
    together = threading.Barrier(4)  # is passed only if four items are worked on at the same time

    def work(number):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        together.wait(BOUND)
        with lock:
            running[0] -= 1
        return number * 2

    results = [result for result in run_in_threads(work, range(20), 4, 10) if result is not None]
    assert sorted(results) == list(range(0, 40, 2)) and most == [4]
    assert list(run_in_threads(work, [], 4, 10)) == []


def test_an_exception_is_raised_to_the_caller_and_no_more_items_start():
    started, failed = [], threading.Event()
    threads_before = set(threading.enumerate())

    def work(number):
        started.append(number)
        if number == 1:
            raise ZeroDivisionError
        assert failed.wait(BOUND)
        return number

    with pytest.raises(ZeroDivisionError):
        list(run_in_threads(work, range(1000), 2, 10))
    failed.set()
    for thread in set(threading.enumerate()) - threads_before:
        thread.join(BOUND)
        assert not thread.is_alive()
    assert len(started) < 10


def test_none_is_yielded_while_no_result_is_ready():
    release = threading.Event()
    results = run_in_threads(lambda number: release.wait(BOUND) and number, [5], 1, 0.02)
    assert next(results) is None
    release.set()
    assert list(results)[-1] == 5
