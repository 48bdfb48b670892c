"""The progress of long work: the time that is left."""

import pytest

from pusa.system import progress


def test_the_time_before_the_first_unit_says_nothing_of_the_pace(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress, "monotonic", lambda: now)
    with progress.Progress("work", 10) as work:
        now = 1000.0
        work.advance()
        assert work.seconds_left == 0
        now = 1020.0
        work.advance(2)
        assert work.seconds_left == pytest.approx(70)
