"""Servers of Prefect that Pusa starts: the temporary one of a run, and the one of `pusa server`, which stays."""

import atexit
import json
import logging
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Lock, Thread
from time import monotonic
from typing import IO, Any

import httpx
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import (
    PREFECT_SERVER_API_BASE_PATH,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
)
from prefect.settings.context import get_current_settings

from flows.console import show
from flows.database import database, find_damage, starting_alone
from flows.own_origin import HOSTS_VARIABLE, RUNS_VARIABLE
from flows.settings import WITHOUT
from pusa.errors import PusaError
from pusa.system.processes import bound_to_parent, ending
from pusa.system.text import first_line, printable

log = logging.getLogger("pusa.server")
LOOK_SECONDS = 0.1  # between looks at a server that starts
HEALTH_SECONDS = 2.0  # for its answer; then its process is looked at again
GRACE_SECONDS = 3  # for open connections, when the server ends
KEPT_LINES, LONGEST_LINE = 400, 4000  # of a starting server's output
PORT_TRIES = 5
LAST_WORDS = re.compile(r"(?:ERROR:\s+)?([\w.]+(?:Error|Exception|Exit): .+)")  # the end of a traceback
LONGEST_WORDS = 300  # characters
TAKEN = "address already in use"
# For what is not set elsewhere. Programs get a token before they change anything; other sites' pages get nothing.
PROTECTED = {
    "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
    "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": "",
    # A slot that a killed run held is free again a minute later, also if the server was killed as well: it finds the
    # lease in PREFECT_HOME. Prefect keeps leases in memory by default, and counts those of an earlier server for ever.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    HOSTS_VARIABLE: "",
    RUNS_VARIABLE: "[]",
}


class OwnServer(SubprocessASGIServer):
    """A server of Prefect in a session of its own, for pages of its own origin only.

    Prefect starts its temporary server in our process group: Ctrl-C then kills it first, and the run waits without end
    to report to it. And it outlives a kill -9. Here it is sent SIGTERM when the thread that started it ends. Prefect
    also waits for its time limit when the server has died, and several that start at once fail in each other's
    migrations.
    """

    title: str
    host = "127.0.0.1"
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
        description, file = database(self.without)
        atexit.register(self.stop)
        with starting_alone(file, self.without) as lock:
            problem = find_damage(file) or self._start_at_a_port(lock, limit)
        if problem:
            newer = "another version of Prefect made the database; " if "Can't locate revision" in problem else ""
            raise PusaError(
                f"{self.title} could not start: {problem}; {newer}its database is {description}{self.without}"
            )
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
        command += ["--factory", "flows.own_origin:create_app", "--host", self.host, "--port", str(self.port)]
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
        if process := self.server_process:
            log.info("stopping %s", self.title)
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS + 2)
            process.kill()
            process.wait()
            self.server_process = None
        super().stop()  # forgets it
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


class StandingServer(OwnServer):
    """The server that shows runs in a browser and starts what is scheduled, until it is ended."""

    title = "the server"
    without = ""

    def __init__(
        self, port: int, hosts: Sequence[str] = (), host: str = "127.0.0.1", runs: Sequence[Path] = ()
    ) -> None:
        """Prepare a server.

        Args:
            port: the port.
            hosts: more names under which the server may be asked, as a proxy passes them on.
            host: the address to listen at.
            runs: folders to show at `/runs`: of runs, or with folders of runs.
        """
        super().__init__(port)
        self.host, self._hosts = host, hosts
        self._runs = [os.path.abspath(run) for run in runs]  # without "..", which browsers take out of an address

    @property
    def address(self) -> str:
        """Return the address at which a program of this machine reaches the server."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def wait(self) -> None:
        """Wait until the server ends, and raise PusaError: only a signal to this process is meant to end it."""
        assert self.server_process is not None
        end = ending(self.server_process)
        self.server_process = None
        raise PusaError(f"{self.title} has ended ({end}); what it printed is above")

    def _start_at_a_port(self, lock: IO[str] | None, limit: float) -> str:
        problem = self._start_once(lock, limit)
        if TAKEN in problem:
            raise PusaError(f"port {self.port} of {self.host} was taken meanwhile; choose another with --port")
        return problem

    def _environment(self) -> Mapping[str, str]:
        return {HOSTS_VARIABLE: " ".join(self._hosts), RUNS_VARIABLE: json.dumps(self._runs)}

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
