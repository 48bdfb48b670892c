"""The server that a run reports to: the one of PREFECT_API_URL, or Prefect's temporary one in a session of its own."""

import atexit
import fcntl
import logging
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from pathlib import Path
from threading import Lock, Thread
from time import monotonic
from typing import IO, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx
import prefect
from prefect.client.base import ServerType
from prefect.client.orchestration import get_client
from prefect.context import get_settings_context
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import (
    PREFECT_API_DATABASE_CONNECTION_URL,
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_HOME,
    PREFECT_SERVER_EPHEMERAL_ENABLED,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    temporary_settings,
)
from prefect.settings.context import get_current_settings
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from flows.settings import WITHOUT
from pusa.errors import PusaError
from pusa.system.locks import try_lock
from pusa.system.processes import bound_to_parent, ending
from pusa.system.text import first_line, printable
from pusa.system.threads import DaemonThreadPool

log = logging.getLogger("pusa.server")
ANSWER_SECONDS = 8.0  # for a server's answer, from the look-up of its name to the last byte
LOOK_SECONDS = 0.1  # between looks at a server that starts
ANSWER_SECONDS = 2.0  # for its answer; then its process is looked at again
KEPT_LINES = 400  # of a starting server's output
PORT_TRIES = 5
LAST_WORDS = re.compile(r"(?:ERROR:\s+)?([\w.]+(?:Error|Exception|Exit): .+)")  # the end of a traceback
TAKEN = "address already in use"


def require_server() -> None:
    """Return once Prefect's server answers: the one of PREFECT_API_URL, or the temporary one, which is started.

    Call this from the main thread: the temporary server is sent SIGTERM when the thread that started it ends.

    Raises:
        PusaError: the server does not answer as Prefect does, cannot be started, or none is configured.
    """
    if url := PREFECT_API_URL.value():
        server = _origin(url)
        _require_address(url, server)
    elif PREFECT_SERVER_EPHEMERAL_ENABLED.value():
        url, server = "http://127.0.0.1", "Prefect's temporary server"
    else:
        raise PusaError(
            f"Prefect's profile {get_settings_context().profile.name!r} names no server and forbids a temporary one; "
            f"set PREFECT_API_URL, or PREFECT_SERVER_EPHEMERAL_ENABLED=true, {WITHOUT}"
        )
    _require_usable_proxies(urlsplit(url).hostname or "")
    if not PREFECT_API_URL.value():
        TemporaryServer().start()
    if problem := _problem_of_answer(url):
        raise PusaError(f"{server} {problem}, {WITHOUT}")


def _origin(url: str) -> str:
    """Return the address and where it is set."""
    shown = f"PREFECT_API_URL={_without_password(url)}"
    if url in (os.environ.get("PREFECT_API_URL"), os.environ.get("prefect_api_url")):  # noqa: SIM112
        return shown
    profile = get_settings_context().profile
    if profile.to_environment_variables().get("PREFECT_API_URL") == url:
        return f"{shown} (of Prefect's profile {profile.name!r})"
    return f"{shown} (of .env, prefect.toml or pyproject.toml in {Path.cwd()})"


def _without_password(url: str) -> str:
    return printable(re.sub(r"//[^/@]*@", "//***@", url))


def _require_address(url: str, server: str) -> None:
    """Raise PusaError if this is not the address of a server."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # the port is not a number, or the brackets of IPv6 do not match
        valid = False
    if not valid:
        raise PusaError(f"{server} is not an address; expected http://HOST:PORT/api: correct or unset it, {WITHOUT}")


def _require_usable_proxies(host: str) -> None:
    """Raise PusaError if the environment names a proxy that the HTTP client refuses, whatever it would be used for.

    Where the server is on this machine no proxy is needed: all of them are switched off, with a warning.
    """
    try:
        httpx.Client().close()
    except (ImportError, ValueError, httpx.InvalidURL) as error:  # ImportError: a SOCKS proxy needs another package
        names = ", ".join(f"{name}_proxy" for name in getproxies())
        problem = f"the proxy settings {names} cannot be used: {first_line(error)}"
        if not proxy_bypass(host):
            raise PusaError(f"{problem}; correct or unset them, {WITHOUT}") from error
        log.warning("%s; this run uses no proxies", problem)
        os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"


def _problem_of_answer(url: str) -> str:
    """Ask the server that Prefect's client uses for its version; return what is wrong and how to mend it, or ""."""
    host = urlsplit(url).hostname or ""
    proxies = {} if proxy_bypass(host) else getproxies()
    proxy = proxies.get(urlsplit(url).scheme, proxies.get("all"))
    through = f" through the proxy {_without_password(proxy)}" if proxy else ""
    start, correct = "start the server, correct or unset PREFECT_API_URL", "correct or unset PREFECT_API_URL"
    other = f"but not as Prefect's API, whose address ends with /api; {correct}"
    try:
        version = DaemonThreadPool(1).submit(copy_context().run, _ask_version).result(ANSWER_SECONDS)
    except TimeoutError:  # also of a name that is looked up for minutes, and of an answer that drips
        return f"did not answer within {ANSWER_SECONDS:.0f} s{through}; {start}"
    except httpx.HTTPStatusError as error:
        code = error.response.status_code
        if code in (401, 403):
            asked = "asks for credentials" if code == 401 else "refuses the credentials"
            return f"{asked} (HTTP {code}{through}); set PREFECT_API_AUTH_STRING to its PREFECT_SERVER_API_AUTH_STRING"
        if code >= httpx.codes.INTERNAL_SERVER_ERROR:
            return f"answers{through} with the error HTTP {code}; mend it, {correct}"
        return f"answers{through} with HTTP {code}, {other}"
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:  # OSError: a file of certificates
        return f"cannot be reached{through}: {first_line(error)}; {start}"
    except ValueError:
        version = None
    if not isinstance(version, str) or not re.match(r"\d+\.", version):
        return f"answers{through}, {other}"
    if version.split(".")[0] != prefect.__version__.split(".")[0]:
        return f"is Prefect {version}, and this is Prefect {prefect.__version__}; {correct}"
    return ""


def _ask_version() -> Any:
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), get_client(sync_client=True) as client:
        if client.server_type != ServerType.CLOUD:
            return client.api_version()
        if error := client.api_healthcheck():
            raise error
        return prefect.__version__


class TemporaryServer(SubprocessASGIServer):
    """The server that Prefect starts by itself where PREFECT_API_URL is not set, started in a session of its own.

    Prefect starts it in our process group: Ctrl-C then kills it first, and the run waits without end to report to it.
    And it outlives a kill -9. Here it is sent SIGTERM when the thread that started it ends. Prefect also waits for its
    time limit when the server has died, and several that start at once fail in each other's migrations.

    Prefect keeps one instance of `SubprocessASGIServer` for each port, and for no port the one that its client uses:
    whoever makes it first, also as a subclass, decides how it starts.
    """

    output: "_Output"

    def start(self, timeout: int | None = None) -> None:
        """Start the server, after those of other processes with the same database; do nothing if it runs.

        Raises:
            PusaError: it ended, or did not answer within `timeout` seconds, by default those of Prefect's setting.
        """
        if self.running:
            return
        limit = timeout or PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value()
        database, file = _database()
        atexit.register(self.stop)
        with _starting_alone(file) as lock:
            for _ in range(PORT_TRIES):
                problem = self._start_once(lock, limit)
                if TAKEN not in problem:
                    break
        if problem:
            newer = "another version of Prefect made the database; " if "Can't locate revision" in problem else ""
            raise PusaError(
                f"Prefect's temporary server could not start: {problem}; {newer}its database is {database}, {WITHOUT}"
            )
        self.running = True
        self.output.pass_on()

    def _start_once(self, lock: IO[str] | None, limit: float) -> str:
        """Start the server's process at a free port; return "" once it answers, or why it does not."""
        try:
            self.port = self.find_available_port()
        except RuntimeError as error:  # all of those that Prefect tried are taken
            return first_line(error)
        log.info("starting Prefect's temporary server on %s", self.address)
        self.server_process = process = self._run_uvicorn_command(lock)
        assert process.stdout is not None
        self.output = _Output(process.stdout)
        deadline = monotonic() + limit
        with httpx.Client(trust_env=False, timeout=ANSWER_SECONDS) as client:
            while monotonic() < deadline:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK_SECONDS)
                    self.server_process = None
                    return f"{self.output.last_words()} ({ending(process)})"
                with suppress(httpx.HTTPError):
                    if client.get(f"{self.api_url}/health").status_code == httpx.codes.OK and process.poll() is None:
                        return ""
        self.stop()
        return f"it did not answer within {limit:.0f} s; {self.output.last_words()}"

    def _run_uvicorn_command(self, lock: IO[str] | None = None) -> subprocess.Popen[Any]:
        settings = {
            "PREFECT_UI_ENABLED": "0",
            "PREFECT__SERVER_EPHEMERAL": "1",
            "PREFECT__SERVER_FINAL": "1",
            **get_current_settings().to_environment_variables(exclude_unset=True),
        }
        command = [sys.executable, "-m", "uvicorn", "--app-dir", str(prefect.__module_path__.parent)]
        command += ["--factory", "prefect.server.api.server:create_app"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--log-level", "error", "--lifespan", "on"]
        return subprocess.Popen(  # noqa: S603
            bound_to_parent(command),
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


class _Output:
    """What a server prints: kept while it starts, then passed on to stderr."""

    def __init__(self, stream: IO[str]) -> None:
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._write: Callable[[str], Any] = self._lines.append
        self._lock = Lock()
        self._reader = Thread(target=self._read, args=(stream,), daemon=True)
        self._reader.start()

    def pass_on(self) -> None:
        with self._lock:
            sys.stderr.writelines(self._lines)
            self._write = sys.stderr.write

    def last_words(self) -> str:
        """Return the last error that the server, which has ended, printed before it was up."""
        self._reader.join()
        lines = [printable(line.strip()) for line in self._lines if line.strip()]
        errors = [match[1] for line in lines if (match := LAST_WORDS.match(line))]
        taken = [line for line in lines if TAKEN in line]
        return (taken or errors or lines or ["it printed nothing"])[-1]

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                with self._lock:
                    self._write(line)


def _database() -> tuple[str, Path | None]:
    """Return the server's database and how to choose another, and its file if it is one of SQLite.

    Raises:
        PusaError: its address is invalid.
    """
    setting = "PREFECT_API_DATABASE_CONNECTION_URL"
    try:
        url = make_url(PREFECT_API_DATABASE_CONNECTION_URL.value())
    except ArgumentError as error:
        raise PusaError(f"{setting} is not the address of a database; correct or unset it, {WITHOUT}") from error
    if url.get_backend_name() != "sqlite" or not url.database or ":" in url.database:  # :memory: and file: URIs
        return f"{url.render_as_string(hide_password=True)}; start it, correct or unset {setting}", None
    file = Path(url.database).absolute()
    if file.is_relative_to(PREFECT_HOME.value()):
        setting = f"PREFECT_HOME={PREFECT_HOME.value()}"
    return f"{file} ({setting}); move it away, make room there, or name another place", file


@contextmanager
def _starting_alone(database: Path | None) -> Iterator[IO[str] | None]:
    """Hold the lock of a database, and wait for it if another process starts a server with the same one.

    Raises:
        PusaError: the folder of the database cannot be written or locked.
    """
    if database is None:
        yield None
        return
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        lock = database.with_name(f"{database.name}.lock").open("w")
    except OSError as error:
        raise PusaError(
            f"Prefect cannot keep its records in {database.parent} ({error.strerror}); set PREFECT_HOME to a folder "
            f"that can be written, {WITHOUT}"
        ) from error
    with lock:
        kind, other = fcntl.LOCK_EX, f"--no-prefect, or another PREFECT_HOME than {PREFECT_HOME.value()},"
        if not try_lock(lock, kind, wait=False, other=other):
            log.info("waiting for another process that starts a server with %s", database)
            try_lock(lock, kind, wait=True, other=other)
        try:
            yield lock
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # the server has it open as well
