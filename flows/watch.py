"""Watch the server that a run reports to: a run whose server has died ends in a sentence, after the step that works.

Prefect's client repeats each request to a dead server for a minute, and a flow makes several before it fails.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from threading import Event, Lock, Thread
from time import monotonic

import httpx
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows.console import flush_streams, print_error
from flows.settings import WITHOUT
from pusa.system.text import first_line

log = logging.getLogger("pusa.server")
LOOK_SECONDS = 2.0  # between questions to the server
ANSWER_SECONDS = 10.0  # for its answer
GONE_SECONDS = 10.0  # that nothing listens at its address; a server that is started again takes less
MUTE_SECONDS = 60.0  # that it does not answer; it may have much to do
FAILED = 1  # the exit code

_lock = Lock()
_working = 0


@contextmanager
def at_work() -> Iterator[None]:
    """Mark a step whose work must not be ended because its server has died.

    An error whose message no server takes, with a file name that is not UTF-8, becomes a RuntimeError that one takes.
    """
    global _working
    with _lock:
        _working += 1
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


@contextmanager
def watched(server: str, end: Callable[[str], None] = _end_run) -> Iterator[None]:
    """Call `end` with a sentence if the server is lost while no step works.

    Args:
        server: the server's name, for the sentence.
        end: ends the run.
    """
    done = Event()
    thread = Thread(target=copy_context().run, args=(_watch, server, end, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _watch(server: str, end: Callable[[str], None], done: Event) -> None:
    """Ask the server whether it is well, until `done` is set or the run is ended."""
    answered, warned = monotonic(), False
    patience = {PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: ANSWER_SECONDS}
    with temporary_settings(patience), get_client(sync_client=True) as client:
        while not done.wait(LOOK_SECONDS):
            error = client.api_healthcheck()
            if error is None or (isinstance(error, httpx.HTTPStatusError) and not error.response.is_server_error):
                if warned:
                    log.info("%s answers again", server)
                    logging.raiseExceptions = True
                answered, warned = monotonic(), False
                continue
            silent = monotonic() - answered
            limit = GONE_SECONDS if isinstance(error, httpx.ConnectError) else MUTE_SECONDS
            problem = f"{server} has not answered for {silent:.0f} s ({first_line(error)})"
            if silent >= limit and not _working:
                end(f"{problem}; all finished work is kept: run the same command again to resume, {WITHOUT}")
                return
            if silent >= GONE_SECONDS and not warned:
                then = "after this step, whose work continues" if _working else f"after {limit:.0f} s"
                log.warning("%s; unless it answers again, the run ends %s", problem, then)
                logging.raiseExceptions, warned = False, True  # or Prefect prints an error for each group of log lines
