"""A stage is shown while it works, in a thread that neither delays nor fails it, whatever the dashboard does."""

import logging
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Event

import pytest

from flows import events, live
from flows.handover import ManifestFile
from flows.live import LAST_EVENTS, LOOK_EVENTS, reporting
from flows.report import GeneratePage, Look, Page
from pusa.errors import TableError
from pusa.generate.stage import generate
from pusa.system.progress import Progress, report_end
from tests.helpers.processes import wait_for
from tests.helpers.stub_model import StubModel, manifest_of

FILE = ManifestFile(path=Path("/manifests/night/generate.yaml"))


class Pinned:
    """A board that keeps what is put on it."""

    def __init__(self) -> None:
        self.put_on: list[tuple[str, str, object]] = []

    def put(self, key, kind, about, data) -> None:
        self.put_on.append((key, kind, data))

    def pages(self) -> list[object]:
        return [data for _, kind, data in self.put_on if kind == "markdown"]


class Counted(Page):
    """A page that shows a number."""

    stage = "ingest"
    value, looks = 0, 0

    def look(self, outcome: str) -> Look:
        self.looks += 1
        value = self.value
        return Look(value, float(value), lambda: f"{value} {outcome}".strip())


@pytest.fixture
def page(tmp_path) -> Counted:
    return Counted(FILE, tmp_path)


@pytest.fixture
def sent(monkeypatch) -> list[tuple]:
    """The events that were sent, in place of Prefect."""
    sent: list[tuple] = []
    monkeypatch.setattr(events, "job_made", lambda *of: sent.append(("made", *of)))
    monkeypatch.setattr(events, "job_failed", lambda *of: sent.append(("failed", *of)))
    return sent


def shown_on(board, page):
    """Return the reporting of a page on a board, without pauses."""
    return reporting(page, lambda: nullcontext(board), first_seconds=0, seconds=0.001)


def test_a_page_is_shown_when_it_changes_and_at_the_end(page):
    board = Pinned()
    with shown_on(board, page):
        wait_for(lambda: page.looks > 3)
        page.value = 50
        wait_for(lambda: "50" in board.pages())
        assert board.pages() == ["0", "50"]
    assert board.pages() == ["0", "50", "50 ended"]
    progress = [(key, data) for key, kind, data in board.put_on if kind == "progress"]
    assert progress == [(f"{page.key}-progress", value) for value in (0.0, 50.0, 50.0)]


def test_the_error_of_a_stage_is_shown_and_raised(page):
    board = Pinned()
    with pytest.raises(TableError, match="no clips"), shown_on(board, page):
        raise TableError("no clips")
    assert board.pages()[-1] == "0 failed: TableError: no clips"
    with pytest.raises(KeyboardInterrupt), shown_on(board, page):
        raise KeyboardInterrupt
    wait_for(lambda: board.pages()[-1] == "0 interrupted")  # an interrupt waits for the page a short time only


@contextmanager
def refusing():
    raise ValueError("the settings\nare wrong")
    yield


class Broken:
    def put(self, *of) -> None:
        raise ConnectionError("no server")


@pytest.mark.parametrize("board", [refusing, lambda: nullcontext(Broken())])
def test_a_dashboard_that_fails_costs_one_warning_and_no_stage(page, sent, caplog, board):
    with caplog.at_level(logging.WARNING, "pusa.report"), reporting(page, board, 0, 0.001):
        report_end("a", 1.0)
        wait_for(lambda: caplog.records and (page.looks > 3 or board is refusing))
    (record,) = caplog.records
    assert record.getMessage().startswith(f"the dashboard lacks {page.key!r}: ") and not sent


def test_a_server_that_does_not_answer_is_not_waited_for_longer_than_the_limit(page, monkeypatch):
    monkeypatch.setattr(live, "LAST_SECONDS", 0.05)
    asked, answers = Event(), Event()

    class Mute:
        def put(self, *of) -> None:
            asked.set()
            answers.wait()

    with reporting(page, lambda: nullcontext(Mute()), 0, 0.001):
        wait_for(asked.is_set)
    assert not answers.is_set()  # it is still waited for, in a thread that holds up nothing
    answers.set()


def test_the_jobs_of_a_run_are_followed_with_their_events_and_their_progress(tmp_path, sent):
    """The stage itself tells the listener, in the threads of its slots too."""
    bad = {"id": "c", "task": "image_to_video", "image": tmp_path / "none.png"}
    page, board = GeneratePage(FILE, tmp_path, ["a", "b", "c"]), Pinned()
    with shown_on(board, page):
        generate(manifest_of({"id": "a"}, {"id": "b"}, bad), tmp_path, StubModel)
    made = {of[2]: of for of in sent if of[0] == "made"}
    assert sorted(made) == ["a", "b"] and all(of[1] == tmp_path and of[3] > 0 for of in made.values())
    (failed,) = (of for of in sent if of[0] == "failed")
    assert failed[2] == "c" and "none.png" in failed[3] and len(sent) == 3
    assert "3 jobs\\: 2 done\\, 1 failed" in board.pages()[-1]
    assert page.progress["denoising steps"].done == page.progress["denoising steps"].total > 0
    sent.clear()
    with shown_on(Pinned(), page):
        generate(manifest_of({"id": "a"}, {"id": "b"}), tmp_path, StubModel)
    assert not sent  # nothing was made


def test_very_many_events_are_sent_a_few_at_a_time_and_in_the_end_left_out(page, sent, caplog):
    board = Pinned()
    with shown_on(board, page):
        for number in range(LOOK_EVENTS + 1):
            report_end(f"{number}", 1.0)
        wait_for(lambda: len(sent) > LOOK_EVENTS)
    sent.clear()
    with (
        caplog.at_level(logging.WARNING, "pusa.report"),
        reporting(page, lambda: nullcontext(board), first_seconds=1000),
    ):
        for number in range(10_000):
            report_end(f"{number}", error="no")
    assert len(sent) == LAST_EVENTS
    assert "the events of the last 9000 jobs are not sent" in caplog.text


def test_work_that_nobody_follows_is_done_all_the_same():
    report_end("a", 1.0)
    assert Progress("ingest", 3).total == 3
