import threading
import time

import pytest

from pusa.system.threads import run_in_threads


def test_everything_is_done_once_and_so_many_at_a_time():
    running, most, lock = [0], [0], threading.Lock()

    def work(number):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.01)
        with lock:
            running[0] -= 1
        return number * 2

    results = [result for result in run_in_threads(work, range(20), 4, 10) if result is not None]
    assert sorted(results) == list(range(0, 40, 2)) and most == [4]
    assert list(run_in_threads(work, [], 4, 10)) == []


def test_what_is_raised_is_raised_here_and_no_more_is_begun():
    begun = []

    def work(number):
        begun.append(number)
        if number == 1:
            raise ZeroDivisionError
        time.sleep(0.02)
        return number

    with pytest.raises(ZeroDivisionError):
        list(run_in_threads(work, range(1000), 2, 10))
    time.sleep(0.1)
    assert len(begun) < 10


def test_it_says_that_nothing_came():
    results = list(run_in_threads(lambda number: time.sleep(0.1) or number, [5], 1, 0.02))
    assert results[-1] == 5 and results[0] is None
