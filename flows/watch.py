"""Watch the server that a run reports to: a run that is cancelled there ends, and so does one whose server has died.

The latter ends in a sentence, after the step that works.
Prefect's client repeats each request to a dead server for a minute, and a flow makes several before it fails.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from threading import Event, Lock, Thread
from time import monotonic
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelled

from flows.console import flush_streams, print_error
from flows.settings import WITHOUT
from pusa.system.processes import identity
from pusa.system.text import first_line

log = logging.getLogger("pusa.server")
LOOK_SECONDS = 2.0  # between questions to the server
ANSWER_SECONDS = 10.0  # for its answer
GONE_SECONDS = 10.0  # that nothing listens at its address; a server that is started again takes less
MUTE_SECONDS = 60.0  # that it does not answer; it may have much to do
FAILED, INTERRUPTED = 1, 130  # exit codes

_lock = Lock()
_working = 0
_runs: set[UUID] = set()  # the flow runs that had a step in this process


@contextmanager
def client_that_asks_once() -> Iterator[SyncPrefectClient]:
    """Yield a client of the run's server that waits up to 10 s for each answer, and repeats no request."""
    patience = {PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: ANSWER_SECONDS}
    with temporary_settings(patience), get_client(sync_client=True) as client:
        yield client


@contextmanager
def at_work() -> Iterator[None]:
    """Mark a step whose work must not be ended because its server has died.

    An error whose message no server takes, with a file name that is not UTF-8, becomes a RuntimeError that one takes.
    """
    global _working
    context = FlowRunContext.get()
    with _lock:
        _working += 1
        if context is not None and context.flow_run is not None:
            _runs.add(context.flow_run.id)
    try:
        yield
    except Exception as error:
        message = str(error)
        if message != (sent := message.encode("utf-8", "backslashreplace").decode()):
            raise RuntimeError(f"{type(error).__name__}: {sent}") from error
        raise
    finally:
        with _lock:
            _working -= 1


def _end_run(problem: str) -> None:
    """End this process with a sentence, without Prefect's reports, which would wait for the server."""
    print_error(problem)
    flush_streams()
    os._exit(FAILED)


def _end_cancelled(problem: str) -> None:
    """End this process as one that was interrupted. What it started ends with it, also in the middle of a step."""
    print_error(problem)
    flush_streams()
    os._exit(INTERRUPTED)


@contextmanager
def watched(
    server: str,
    end: Callable[[str], None] = _end_run,
    cancelled: Callable[[str], None] | None = _end_cancelled,
    then: str = f"run the same command again to resume, {WITHOUT}",
) -> Iterator[None]:
    """Call `end` with a sentence if the server is lost while no step works.

    Args:
        server: the server's name, for the sentence.
        end: ends the run.
        cancelled: ends the run after it was cancelled on the server; None: another process looks after that.
        then: how the run is resumed, as the end of the sentence.
    """
    done = Event()
    thread = Thread(target=copy_context().run, args=(_watch, server, end, cancelled, then, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        _runs.clear()


def _watch(
    server: str, end: Callable[[str], None], cancelled: Callable[[str], None] | None, then: str, done: Event
) -> None:
    """Ask the server whether it is well, until `done` is set or the run is ended."""
    answered, warned = monotonic(), False
    with client_that_asks_once() as client:
        while not done.wait(LOOK_SECONDS):
            error = client.api_healthcheck()
            if error is None or (isinstance(error, httpx.HTTPStatusError) and not error.response.is_server_error):
                if warned:
                    log.info("%s answers again", server)
                    logging.raiseExceptions = True
                answered, warned = monotonic(), False
                if cancelled and (name := _cancelled_run(client)):
                    cancelled(f"{name} was cancelled; all finished work is kept: run the same command again to resume")
                    return
                continue
            silent = monotonic() - answered
            limit = GONE_SECONDS if isinstance(error, httpx.ConnectError) else MUTE_SECONDS
            problem = f"{server} has not answered for {silent:.0f} s ({first_line(error)})"
            if silent >= limit and not _working:
                end(f"{problem}; all finished work is kept: {then}")
                return
            if silent >= GONE_SECONDS and not warned:
                when = "after this step, whose work continues" if _working else f"after {limit:.0f} s"
                log.warning("%s; unless it answers again, the run ends %s", problem, when)
                logging.raiseExceptions, warned = False, True  # or Prefect prints an error for each group of log lines


def _cancelled_run(client: SyncPrefectClient) -> str:
    """Return the name of a run of this process that is to be cancelled, once the server has it as Cancelled; else "".

    The server gets the process of each run, so that `pusa cancel` finds out whether it has died.
    """
    with suppress(httpx.HTTPError, ObjectNotFound):
        runs = [client.read_flow_run(id) for id in tuple(_runs)]
        for run in list(runs):
            if run.parent_task_run_id:  # a stage of a pipeline
                parent = client.read_task_run(run.parent_task_run_id).flow_run_id
                if parent and parent not in [known.id for known in runs]:
                    runs.append(client.read_flow_run(parent))
        for run in runs:
            if not run.infrastructure_pid and sys.platform == "linux":
                client.update_flow_run(run.id, infrastructure_pid=identity(os.getpid()))
        stopped = [run for run in runs if run.state and (run.state.is_cancelling() or run.state.is_cancelled())]
        if stopped:
            for run in runs:
                if run.state is None or not run.state.is_final():
                    client.set_flow_run_state(run.id, Cancelled(message="cancelled; its process has ended"), force=True)
            return stopped[-1].name
    return ""
