"""Show a stage on Prefect's dashboard while it works: its progress, and its page (flows/report.py), kept up to date.

Each run has one artifact for either, which is replaced; all runs of a manifest in a folder share the keys, and so the
history. Of jobs that end, events are sent. All of it is done in a thread of its own, and costs the stage nothing: what
cannot be made or sent is a warning.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import copy_context
from threading import Event, Thread
from time import monotonic
from typing import Any, Protocol
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import ArtifactCreate
from prefect.context import FlowRunContext

from flows import events
from flows.report import Page
from flows.watch import client_that_asks_once
from pusa.system.progress import Listener, Progress, listening
from pusa.system.text import first_line

log = logging.getLogger("pusa.report")
FIRST_SECONDS = 2.0  # until the first look
LOOK_SECONDS, MOST_SECONDS = 10.0, 60.0  # between two looks, at least and at most
SHARE = 10  # after a look there is a pause of this many times its duration, within these limits
LAST_SECONDS = 60.0  # for the last look, which may have to decode some videos
INTERRUPTED_SECONDS = 2.0  # for that of a stage that is interrupted
LOOK_EVENTS, LAST_EVENTS = 200, 1000  # of jobs, that are sent at a look, and at the last one


class Board(Protocol):
    """Where artifacts are shown."""

    def put(self, key: str, kind: str, about: str, data: str | float) -> None:
        """Show an artifact in place of the last one of the same key."""


class PrefectBoard:
    """The artifacts of the present flow run."""

    def __init__(self, client: SyncPrefectClient, flow_run: UUID | None) -> None:
        self._client, self._flow_run = client, flow_run
        self._ids: dict[str, UUID] = {}

    def put(self, key: str, kind: str, about: str, data: str | float) -> None:
        """Create an artifact, or replace the data of the one that this run has created."""
        if id := self._ids.get(key):
            # Not by `update_artifact`: it sends an event with the whole page, which the server would keep for days.
            self._client.request("PATCH", "/artifacts/{id}", json={"data": data}, path_params={"id": id})
            return
        new = ArtifactCreate(key=key, type=kind, description=about, data=data, flow_run_id=self._flow_run)
        self._ids[key] = self._client.create_artifact(new).id


@contextmanager
def _prefect_board() -> Iterator[Board]:
    """Yield the board of the flow run of this context. A server that does not answer is not asked twice."""
    run = FlowRunContext.get()
    with client_that_asks_once() as client:
        yield PrefectBoard(client, run.flow_run.id if run and run.flow_run else None)


@contextmanager
def reporting(
    page: Page,
    open_board: Callable[[], AbstractContextManager[Board]] = _prefect_board,
    first_seconds: float = FIRST_SECONDS,
    seconds: float = LOOK_SECONDS,
) -> Iterator[None]:
    """Keep a page on the dashboard up to date, until the work of this context ends.

    Args:
        page: the page.
        open_board: opens where it is shown, in the thread that shows it.
        first_seconds: until the first look.
        seconds: between two looks, at least.
    """
    reporter = _Reporter(page, open_board, first_seconds, seconds)
    thread = Thread(target=copy_context().run, args=(reporter.run,), name="report", daemon=True)
    thread.start()
    try:
        with listening(reporter):
            yield
    except Exception as error:
        reporter.end(f"failed: {type(error).__name__}: {first_line(error)}")
        raise
    except BaseException:  # an interrupt, or Prefect's cancelling: whoever stops it waits
        reporter.end("interrupted")
        reporter.patience = INTERRUPTED_SECONDS
        raise
    else:
        reporter.end("ended")
    finally:
        thread.join(reporter.patience)


class _Reporter(Listener):
    """The thread that looks at a stage, and the listener of its work."""

    def __init__(
        self,
        page: Page,
        open_board: Callable[[], AbstractContextManager[Board]],
        first_seconds: float,
        seconds: float,
    ) -> None:
        self.patience = LAST_SECONDS
        self._page, self._open_board, self._first_seconds, self._seconds = page, open_board, first_seconds, seconds
        self._over = Event()
        self._outcome = ""
        self._jobs: deque[tuple[str, float | None, str]] = deque()  # that have ended: id, seconds, error
        self._shown: Any = None  # the facts of the page that is shown
        self._warned = False

    def begun(self, progress: Progress) -> None:
        """Let the page show this progress."""
        self._page.progress[progress.label] = progress

    def ended(self, id: str, seconds: float | None, error: str) -> None:
        """Have an event sent at the next look."""
        self._jobs.append((id, seconds, error))

    def end(self, outcome: str) -> None:
        """Have the last look made; `outcome` says how the work ended."""
        self._outcome = outcome
        self._over.set()

    def run(self) -> None:
        """Look at the stage now and then, and once more when it has ended."""
        try:
            with self._open_board() as board:
                pause, is_last = self._first_seconds, False
                while not is_last:
                    is_last = self._over.wait(pause)
                    started = monotonic()
                    self._try(board)
                    pause = max(self._seconds, min(MOST_SECONDS, SHARE * (monotonic() - started)))
        except Exception as error:  # noqa: BLE001  settings of Prefect's client
            self._warn(error)

    def _try(self, board: Board) -> None:
        """Make one look. If that fails, a warning is logged, the first time."""
        try:
            self._look(board)
            self._send_events()  # not to a server that is gone: Prefect would try for seconds to send each
        except Exception as error:  # noqa: BLE001  the server, its client, a file: nothing of it is worth a stage
            self._warn(error)

    def _look(self, board: Board) -> None:
        outcome, page = self._outcome, self._page
        look = page.look(outcome)
        if (facts := (look.facts, outcome)) == self._shown:
            return
        if look.percent is not None:
            board.put(f"{page.key}-progress", "progress", f"{page.stage}: percent done", round(look.percent, 1))
        board.put(page.key, "markdown", f"{page.stage}: progress and results", look.text())
        self._shown = facts

    def _send_events(self) -> None:
        """Send the events of jobs that have ended, of very many not all at once."""
        is_last = self._over.is_set()
        for _ in range(min(len(self._jobs), LAST_EVENTS if is_last else LOOK_EVENTS)):
            id, seconds, error = self._jobs.popleft()
            if error:
                events.job_failed(self._page.run_dir, id, error)
            else:
                events.job_made(self._page.run_dir, id, seconds)
        if is_last and self._jobs:
            log.warning(
                "the events of the last %d jobs are not sent, since so many ended at once; `pusa status` lists all",
                len(self._jobs),
            )

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            log.warning("the dashboard lacks %r: %s: %s", self._page.key, type(error).__name__, first_line(error))
