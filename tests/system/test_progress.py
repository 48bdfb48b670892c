"""The progress of long work: the time that is left, and who follows it."""

import io
import logging
import sys

import pytest

from pusa.system import progress
from pusa.system.progress import Listener, Progress, can_draw, listening, report_busy, report_end, short_time


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


def test_what_an_earlier_run_made_says_nothing_of_the_pace(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress, "monotonic", lambda: now)
    with progress.Progress("work", 100) as work:
        work.advance(20, earlier=True)
        assert work.seconds_each is None
        work.advance()
        work.advance(20, earlier=True)
        now = 10.0
        work.advance()
        assert (work.done, work.seconds_each, work.seconds_left) == (42, 10, 580)


class Noted(Listener):
    def __init__(self, draws=False):
        self.draws, self.notes = draws, []

    def begun(self, progress):
        self.notes.append(f"{progress.label} begun")

    def closed(self, progress):
        self.notes.append(f"{progress.label} {progress.done}/{progress.total} {progress.note}")

    def ended(self, id, seconds, error):
        self.notes.append(f"{id} ended")


def test_several_listeners_follow_the_same_work_by_the_methods_that_they_define(caplog):
    caplog.set_level(logging.INFO, "pusa")
    first, second = Noted(), Noted()
    with listening(first), listening(second), Progress("work", 2) as work:
        report_busy("cpu", ("a",), "denoising", 5)
        report_end("a", 1.0)
        work.advance(2, note="loss 1")
    report_end("b")
    assert first.notes == second.notes == ["work begun", "a ended", "work 2/2 loss 1"]
    assert [record.getMessage() for record in caplog.records] == ["work: 2/2 loss 1"]


def test_where_a_listener_draws_there_are_neither_lines_nor_a_bar(caplog, capsys):
    caplog.set_level(logging.INFO, "pusa")
    with listening(Noted(draws=True)), Progress("work", 1) as work:
        work.advance()
    assert not caplog.records and capsys.readouterr().err == ""


def test_the_pace_is_known_after_the_second_unit_that_was_not_done_before(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress, "monotonic", lambda: now)
    with Progress("work", 100, start=40) as work:
        work.advance()
        assert work.seconds_each is None
        now = 6.0
        work.advance(2)
        assert work.seconds_each == pytest.approx(3)


class OnTerminal(io.StringIO):
    def isatty(self):
        return True


class Cell(io.StringIO):
    __module__ = "ipykernel.iostream"


def test_a_terminal_and_a_cell_of_a_notebook_show_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for stream, can in ((OnTerminal(), True), (Cell(), True), (io.StringIO(), False), (None, False)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert can_draw() is can
    monkeypatch.setattr(sys, "stderr", OnTerminal())
    monkeypatch.setenv("TERM", "dumb")
    assert not can_draw()


def test_short_times():
    assert [short_time(seconds) for seconds in (0.2, 59.4, 59.6, 185, 7800)] == ["0s", "59s", "1m00s", "3m05s", "2h10m"]
