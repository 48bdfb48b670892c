"""Servers of Prefect that Pusa starts: the temporary one of a run, and the dashboard's."""

import atexit
import fcntl
import logging
import os
import re
import sqlite3
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Lock, Thread
from time import monotonic
from typing import IO, Any

import httpx
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import (
    PREFECT_API_DATABASE_CONNECTION_URL,
    PREFECT_HOME,
    PREFECT_SERVER_API_BASE_PATH,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
)
from prefect.settings.context import get_current_settings
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from flows.console import show
from flows.own_origin import HOSTS_VARIABLE
from flows.settings import WITHOUT
from pusa.errors import PusaError
from pusa.system.locks import holder_of, note_holder, open_lock, try_lock
from pusa.system.processes import bound_to_parent, ending
from pusa.system.text import first_line, printable

log = logging.getLogger("pusa.server")
LOOK_SECONDS = 0.1  # between looks at a server that starts
HEALTH_SECONDS = 2.0  # for its answer; then its process is looked at again
GRACE_SECONDS = 3  # for open connections, when the server ends
KEPT_LINES, LONGEST_LINE = 400, 4000  # of a starting server's output
PORT_TRIES = 5
BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
LAST_WORDS = re.compile(r"(?:ERROR:\s+)?([\w.]+(?:Error|Exception|Exit): .+)")  # the end of a traceback
LONGEST_WORDS = 300  # characters
TAKEN = "address already in use"
# For what is not set elsewhere. Programs get a token before they change anything; other sites' pages get nothing.
PROTECTED = {
    "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
    "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": "",
    HOSTS_VARIABLE: "",
}


class OwnServer(SubprocessASGIServer):
    """A server of Prefect in a session of its own, on the loopback address, for pages of its own origin only.

    Prefect starts its temporary server in our process group: Ctrl-C then kills it first, and the run waits without end
    to report to it. And it outlives a kill -9. Here it is sent SIGTERM when the thread that started it ends. Prefect
    also waits for its time limit when the server has died, and several that start at once fail in each other's
    migrations.
    """

    title: str
    without: str  # what to do instead, at the end of a message
    output: "_ServerOutput"

    def start(self, timeout: int | None = None) -> None:
        """Start the server, after those of other processes with the same database; do nothing if it runs.

        Raises:
            PusaError: it ended, or did not answer within `timeout` seconds, by default those of Prefect's setting.
        """
        if self.running:
            return
        limit = timeout or PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value()
        database, file = _database(self.without)
        atexit.register(self.stop)
        with _starting_alone(file, self.without) as lock:
            problem = _damage(file) or self._start_at_a_port(lock, limit)
        if problem:
            newer = "another version of Prefect made the database; " if "Can't locate revision" in problem else ""
            raise PusaError(f"{self.title} could not start: {problem}; {newer}its database is {database}{self.without}")
        self.running = True
        self.output.pass_on()

    def _start_at_a_port(self, lock: IO[str] | None, limit: float) -> str:
        """Start the server; return "" once it answers, or why it does not."""
        raise NotImplementedError

    def _start_once(self, lock: IO[str] | None, limit: float) -> str:
        """Start the server's process at `self.port`; return "" once it answers, or why it does not."""
        self.server_process = process = self._run_uvicorn_command(lock)
        assert process.stdout is not None
        self.output = _ServerOutput(process.stdout)
        health = f"{self.address}{PREFECT_SERVER_API_BASE_PATH.value() or '/api'}/health"
        deadline = monotonic() + limit
        with httpx.Client(trust_env=False, timeout=HEALTH_SECONDS) as client:
            while monotonic() < deadline:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK_SECONDS)
                    self.server_process = None
                    return f"{self.output.last_words()} ({ending(process)})"
                with suppress(httpx.HTTPError):
                    if client.get(health).status_code == httpx.codes.OK and process.poll() is None:
                        return ""
        self.stop()
        return f"it did not answer within {limit:.0f} s; {self.output.last_words()}"

    def _environment(self) -> Mapping[str, str]:
        """Return what sets this kind of server up; settings of the user's come before them."""
        return {}

    def _options(self) -> Sequence[str]:
        """Return options of uvicorn."""
        return ["--log-level", "error"]

    def _run_uvicorn_command(self, lock: IO[str] | None = None) -> subprocess.Popen[Any]:
        settings = {
            **PROTECTED,
            **self._environment(),
            "PREFECT__SERVER_FINAL": "1",
            **get_current_settings().to_environment_variables(exclude_unset=True),
        }
        # -P: a module in the folder where we were started must not take the place of a library.
        command = [sys.executable, "-P", "-m", "uvicorn", "--app-dir", str(Path(__file__).parents[1])]
        command += ["--lifespan", "on", "--timeout-graceful-shutdown", str(GRACE_SECONDS)]
        command += ["--factory", "flows.own_origin:create_app", "--host", "127.0.0.1", "--port", str(self.port)]
        return subprocess.Popen(  # noqa: S603
            bound_to_parent([*command, *self._options()]),
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            pass_fds=[lock.fileno()] if lock else [],  # if we are killed, the lock stays until the server has ended too
        )

    def stop(self) -> None:
        """End the server."""
        super().stop()
        if hasattr(self, "output"):
            self.output.last_words()  # all of it is read


class TemporaryServer(OwnServer):
    """The server that Prefect starts by itself where PREFECT_API_URL is not set.

    Prefect keeps one instance of `SubprocessASGIServer` for each port, and for no port the one that its client uses:
    whoever makes it first, also as a subclass, decides how it starts.
    """

    title = "Prefect's temporary server"
    without = f", {WITHOUT}"

    def _start_at_a_port(self, lock: IO[str] | None, limit: float) -> str:
        for _ in range(PORT_TRIES):
            try:
                self.port = self.find_available_port()
            except RuntimeError as error:  # all of those that Prefect tried are taken
                return first_line(error)
            log.info("starting Prefect's temporary server on %s", self.address)
            if TAKEN not in (problem := self._start_once(lock, limit)):
                break
        return problem

    def _environment(self) -> Mapping[str, str]:
        return {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1"}


class Dashboard(OwnServer):
    """The server that shows runs in a browser, with all of Prefect's services, until it is ended."""

    title = "the dashboard"
    without = ""

    def __init__(self, port: int, hosts: Sequence[str] = ()) -> None:
        """Prepare a server.

        Args:
            port: the port of 127.0.0.1.
            hosts: more names under which the server may be asked, as a proxy passes them on.
        """
        super().__init__(port)
        self._hosts = hosts

    def wait(self) -> None:
        """Wait until the server ends, and raise PusaError: only a signal to this process is meant to end it."""
        assert self.server_process is not None
        end = ending(self.server_process)
        self.server_process = None
        raise PusaError(f"{self.title} has ended ({end}); what it printed is above")

    def _start_at_a_port(self, lock: IO[str] | None, limit: float) -> str:
        problem = self._start_once(lock, limit)
        if TAKEN in problem:
            raise PusaError(f"port {self.port} of 127.0.0.1 was taken meanwhile; choose another with --port")
        return problem

    def _environment(self) -> Mapping[str, str]:
        return {HOSTS_VARIABLE: " ".join(self._hosts)}

    def _options(self) -> Sequence[str]:
        api, logging_level = get_current_settings().server.api, get_current_settings().server.logging_level
        return [
            *("--log-level", logging_level.lower()),
            *("--timeout-keep-alive", str(api.keepalive_timeout)),
            *("--ws-ping-interval", str(api.websocket_ping_interval)),
            *("--ws-ping-timeout", str(api.websocket_ping_timeout)),
        ]


class _ServerOutput:
    """What a server prints: kept while it starts, then passed on to stderr."""

    def __init__(self, stream: IO[str]) -> None:
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._write: Callable[[str], Any] = self._lines.append
        self._lock = Lock()
        self._reader = Thread(target=self._read, args=(stream,), daemon=True)
        self._reader.start()

    def pass_on(self) -> None:
        with self._lock:
            self._write = partial(show, error=True)
            for line in self._lines:
                self._write(line)

    def last_words(self) -> str:
        """Return the last error that the server, which has ended, printed before it was up."""
        self._reader.join()
        lines = [line.strip()[:LONGEST_WORDS] for line in self._lines if line.strip()]
        errors = [match[1] for line in lines if (match := LAST_WORDS.match(line))]
        taken = [line for line in lines if TAKEN in line]
        return (taken or errors or lines or ["it printed nothing"])[-1]

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                with self._lock:
                    self._write(printable(line.rstrip(), LONGEST_LINE))


def _database(without: str) -> tuple[str, Path | None]:
    """Return the server's database and how to choose another, and its file if it is one of SQLite.

    Raises:
        PusaError: its address is invalid, or leads out of PREFECT_HOME.
    """
    setting, home = "PREFECT_API_DATABASE_CONNECTION_URL", PREFECT_HOME.value()
    address = PREFECT_API_DATABASE_CONNECTION_URL.value() or ""
    try:
        url = make_url(address)
    except ArgumentError as error:
        raise PusaError(f"{setting} is not the address of a database; correct or unset it{without}") from error
    if url.get_backend_name() != "sqlite" or not url.database or url.database.startswith((":memory:", "file:")):
        return f"{url.render_as_string(hide_password=True)}; start it, correct or unset {setting}", None
    file = Path(url.database).absolute()
    if file.is_relative_to(home):
        setting = f"PREFECT_HOME={home}"
    elif f"{home}/" in address:  # Prefect puts the name into the address as it is
        raise PusaError(
            f"PREFECT_HOME={home} has '?' or '%', with which the address of the database leads elsewhere, to {file}; "
            f"name another folder{without}"
        )
    return f"{file} ({setting}); move it away, make room there, or name another place", file


def _damage(database: Path | None) -> str:
    """Return what is wrong with a database of SQLite, as far as a look at it shows; the server finds out much later."""
    if database is None or not database.exists():
        return ""
    try:
        with closing(sqlite3.connect(database, timeout=HEALTH_SECONDS)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.DatabaseError as error:
        return "" if getattr(error, "sqlite_errorcode", None) in BUSY else first_line(error)
    return ""


@contextmanager
def _starting_alone(database: Path | None, without: str) -> Iterator[IO[str] | None]:
    """Hold the lock of a database, and wait for it if another process starts a server with the same one.

    Raises:
        PusaError: the folder of the database cannot be written or locked.
    """
    if database is None:
        yield None
        return
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        lock = open_lock(database.with_name(f"{database.name}.lock"))
    except OSError as error:
        raise PusaError(
            f"Prefect cannot keep its records in {database.parent} ({error.strerror}); set PREFECT_HOME to a folder "
            f"that can be written{without}"
        ) from error
    with lock:
        kind, other = fcntl.LOCK_EX, f"--no-prefect, or another PREFECT_HOME than {PREFECT_HOME.value()},"
        if not try_lock(lock, kind, wait=False, other=other):
            log.info("waiting for %s, which starts a server with %s", holder_of(lock), database)
            try_lock(lock, kind, wait=True, other=other)
        note_holder(lock)
        try:
            yield lock
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # the server has it open as well
