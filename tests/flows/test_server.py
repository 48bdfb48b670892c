"""The server of a run: the one that is named answers, or the temporary one starts, alone, and ends with the run.

It answers its own pages and programs, and no page of another site.
"""

import fcntl
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx
import pytest
from prefect.client.orchestration import get_client
from prefect.settings import (
    PREFECT_API_DATABASE_CONNECTION_URL,
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_SERVER_API_AUTH_STRING,
    temporary_settings,
)
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from flows import database, server
from flows.commands.server import require_credentials, usable_port
from flows.own_origin import RUNS_VARIABLE
from flows.own_server import StandingServer, TemporaryServer
from flows.server import require_server
from pusa.errors import PusaError
from tests.helpers.processes import is_alive, python, wait_for
from tests.helpers.stand_in_server import HEALTHY, answering, mute, unused_address

SCRIPT = """
import time
from flows.settings import set_defaults
set_defaults()
from flows.server import require_server
require_server()
from prefect.server.api.server import SubprocessASGIServer
server = SubprocessASGIServer()  # as Prefect's client asks for it
assert server.running
print("started", server.server_process.pid, server.address, flush=True)
time.sleep(999)
"""
HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(999)
"""
DIES = """
import sys
print('''ERROR:    Traceback (most recent call last):
  File "a.py", line 1, in a
sqlalchemy.exc.DatabaseError: (sqlite3.DatabaseError) file is not a database
(Background on this error at: https://sqlalche.me/e/20/4xp6)
ERROR:    Application startup failed. Exiting.''', file=sys.stderr)
sys.exit(3)
"""
ANOTHER_VERSION = """
import sys
print("alembic.util.exc.CommandError: Can't locate revision identified by 'f00'", file=sys.stderr)
sys.exit(3)
"""
PORT_IS_TAKEN = "import sys; sys.exit('[Errno 98] error while attempting to bind: address already in use')"


def environment(**variables) -> dict[str, str]:
    """Return this process's environment without the server that a test harness may have set."""
    return {**{name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}, **variables}


# A real temporary server, which is asked what pages of other sites would ask it; at last its starter is killed.


@pytest.fixture(scope="module")
def temporary(tmp_path_factory):
    """Yield a process that has started a temporary server, that server's process id, and its address."""
    home = str(tmp_path_factory.mktemp("home"))
    starter = subprocess.Popen(python(SCRIPT), env=environment(PREFECT_HOME=home), stdout=subprocess.PIPE, text=True)
    line = next((line for line in starter.stdout if line.startswith("started ")), "")
    assert line, "the script ended before the server was up"
    _, process, address = line.split()
    yield starter, int(process), address
    starter.kill()
    starter.wait()


FOREIGN = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    "method, path, headers, status",
    [
        ("GET", "/api/admin/version", {}, 200),
        ("GET", "/api/admin/version", {"Host": "evil.test"}, 421),  # DNS rebinding
        ("GET", "/api/admin/version", {"Origin": FOREIGN}, 403),
        ("GET", "/api/csrf-token?client=a", {"Origin": FOREIGN}, 403),
        ("OPTIONS", "/api/flows/", {"Origin": FOREIGN, "Access-Control-Request-Method": "POST"}, 403),
        ("POST", "/api/flows/", {"Origin": FOREIGN, "Content-Type": "text/plain"}, 403),  # a form
        ("POST", "/api/flows/", {}, 403),  # without a token
        ("POST", "/api/flows/", {"Prefect-Csrf-Token": "a", "Prefect-Csrf-Client": "a"}, 403),
    ],
)
def test_only_own_pages_and_programs_are_answered(temporary, method, path, headers, status):
    with httpx.Client(trust_env=False) as client:
        answer = client.request(method, temporary[2] + path, headers=headers, content=b'{"name": "evil"}')
    assert answer.status_code == status
    if "Origin" in headers:
        assert "access-control-allow-origin" not in answer.headers


def test_prefects_client_changes_what_a_request_without_a_token_may_not(temporary):
    with temporary_settings({PREFECT_API_URL: f"{temporary[2]}/api"}), get_client(sync_client=True) as client:
        assert require_server().startswith("PREFECT_API_URL=")
        client.create_flow_from_name("own")
        assert [flow.name for flow in client.read_flows()] == ["own"]


@pytest.mark.parametrize("path", ["/api/events/out", "/api/events/in", "/api/logs/out"])
def test_no_websocket_of_another_page_is_accepted(temporary, path):
    url, kind = temporary[2].replace("http:", "ws:") + path, {"subprotocols": ["prefect"], "proxy": None}
    for foreign in (FOREIGN, "null", "http://evil.test"):
        with pytest.raises(InvalidStatus, match="403"):
            connect(url, origin=foreign, **kind)
    with pytest.raises(InvalidStatus, match="403"):
        connect(url.replace("127.0.0.1", "evil.test"), sock=socket.create_connection(address_of(url)), **kind)
    for own in (None, temporary[2]):
        connect(url, origin=own, **kind).close()


def address_of(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname, parts.port


def test_the_server_has_its_own_session_and_ends_with_a_process_that_is_killed(temporary):
    starter, server, _ = temporary
    assert is_alive(server) and os.getsid(server) == server != os.getsid(starter.pid)
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    wait_for(lambda: not is_alive(server))


# The server that is named.


def refusal(url: str) -> str:
    """Return the sentence with which a server at this address is refused."""
    with temporary_settings({PREFECT_API_URL: url}), pytest.raises(PusaError) as refused:
        require_server()
    text = str(refused.value)
    assert "\n" not in text and f"PREFECT_API_URL={url}" in text and "--no-prefect" in text
    return text


@pytest.mark.parametrize(
    "status, body, words",
    [
        (200, b"<html>", "not as Prefect's API, whose address ends with /api"),
        (200, b'{"version": 1}', "not as Prefect's API"),
        (404, b"", "HTTP 404, but not as Prefect's API"),
        (401, b"{}", "set PREFECT_API_AUTH_STRING"),
        (403, b"{}", "set PREFECT_API_AUTH_STRING"),
        (500, b"", "HTTP 500"),
        (421, b"", "pusa server --allow-host 127.0.0.1"),
        (200, b'"2.19.1"', "is Prefect 2.19.1"),
    ],
)
def test_a_server_that_answers_wrongly_is_refused(status, body, words):
    with answering(status, body) as address:
        assert words in refusal(f"{address}/api")


def test_a_server_that_is_down_or_speaks_no_tls_is_refused():
    assert "Connection refused" in refusal(f"{unused_address()}/api")
    with answering(200, b"") as address:
        assert "SSL" in refusal(address.replace("http:", "https:") + "/api")


@pytest.mark.parametrize(
    "url", ["127.0.0.1:4200/api", "localhost:4200/api", "http://", "http://a:b/api", "ftp://a/api"]
)
def test_what_is_no_address_is_refused(url):
    assert "expected http://HOST:PORT/api" in refusal(url)


def test_a_server_that_never_answers_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(server, "ANSWER_SECONDS", 0.5)
    with mute() as address:
        assert "did not answer" in refusal(f"{address}/api")


def test_a_server_of_this_prefect_is_accepted():
    with answering(200, b'"3.8.0"') as address, temporary_settings({PREFECT_API_URL: f"{address}/api"}):
        require_server()


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "socks://127.0.0.1:9"])
def test_a_proxy_that_cannot_be_used_matters_only_beyond_this_machine(monkeypatch, proxy):
    monkeypatch.setenv("all_proxy", proxy)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "localhost,127.0.0.1")
    if proxy.startswith("socks5"):
        monkeypatch.setitem(sys.modules, "socksio", None)  # as if it were not installed
    far = {PREFECT_API_URL: "http://prefect.invalid/api"}
    with temporary_settings(far), pytest.raises(PusaError, match="all_proxy"):
        require_server()
    with answering(200, b'"3.8.0"') as address, temporary_settings({PREFECT_API_URL: f"{address}/api"}):
        require_server()


# The temporary server. Stand-ins take the place of its program, at a port that Prefect's own instance does not have.


@contextmanager
def stand_in(tmp_path, *programs: str):
    """Yield a temporary server that runs these programs, one for each start, with the database in `tmp_path`."""

    class StandIn(TemporaryServer):
        def __init__(self, port: int) -> None:
            super().__init__(port)
            self.programs = list(programs)

        def _run_uvicorn_command(self, lock=None):
            command = [*python(self.programs.pop(0)), str(self.port)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            return subprocess.Popen(command, pass_fds=[lock.fileno()], **pipes)

    database = f"sqlite+aiosqlite:///{tmp_path / 'prefect.db'}"
    with temporary_settings({PREFECT_API_DATABASE_CONNECTION_URL: database}):
        started = StandIn(1)
        try:
            yield started
        finally:
            started.stop()


def test_a_server_that_dies_is_seen_at_once_with_its_last_words(tmp_path):
    with stand_in(tmp_path, DIES) as dying, pytest.raises(PusaError) as failed:
        dying.start(timeout=600)
    text = str(failed.value)
    assert "sqlalchemy.exc.DatabaseError: (sqlite3.DatabaseError) file is not a database (exit code 3)" in text
    assert str(tmp_path / "prefect.db") in text and "--no-prefect" in text and "\n" not in text


def not_sqlite(database):
    database.write_text("this is no database")


def torn(database):
    with sqlite3.connect(database) as whole:
        whole.executescript("CREATE TABLE a (b); INSERT INTO a VALUES (zeroblob(100000))")
    os.truncate(database, 5000)


def older_than_prefects(database):
    """A whole database whose tables Prefect's migrations refuse."""
    with sqlite3.connect(database) as other:
        other.executescript("CREATE TABLE alembic_version (version_num); INSERT INTO alembic_version VALUES ('f00')")


@pytest.mark.parametrize(
    "spoil, words",
    [
        (not_sqlite, "file is not a database; "),
        (torn, "database disk image is malformed; "),
        (lambda database: database.mkdir(), "unable to open database file; "),
    ],
)
def test_a_database_that_cannot_be_used_is_seen_before_a_server_starts(tmp_path, spoil, words):
    spoil(tmp_path / "prefect.db")
    with stand_in(tmp_path) as none, pytest.raises(PusaError) as failed:
        none.start()
    assert f"{words}its database is {tmp_path / 'prefect.db'}" in str(failed.value)


def test_a_database_of_another_version_is_named_as_such(tmp_path):
    with stand_in(tmp_path, ANOTHER_VERSION) as dying, pytest.raises(PusaError) as failed:
        dying.start(timeout=600)
    assert "(exit code 3); another version of Prefect made the database; " in str(failed.value)


@pytest.mark.slow  # the test before has the same words without Prefect's server, which takes long to start
def test_prefects_own_server_says_what_is_wrong_with_its_database(tmp_path):
    older_than_prefects(tmp_path / "prefect.db")
    done = subprocess.run(
        python("from flows.server import require_server; require_server()"),
        env=environment(PREFECT_HOME=str(tmp_path)), capture_output=True, text=True,
    )  # fmt: skip
    assert "(exit code 3); another version of Prefect made the database; " in done.stderr


@pytest.mark.parametrize("name", ["a?b", "a%62", "a%3Fb"])
def test_a_home_whose_database_would_lie_elsewhere_is_refused(tmp_path, name):
    home = tmp_path / name
    settings = {PREFECT_HOME: home, PREFECT_API_DATABASE_CONNECTION_URL: f"sqlite+aiosqlite:///{home}/prefect.db"}
    with stand_in(tmp_path) as none, temporary_settings(settings), pytest.raises(PusaError) as failed:
        none.start()
    assert str(failed.value).startswith(f"PREFECT_HOME={home} has '?' or '%'") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a:b", "a#b c", "a'b"])
def test_a_home_of_another_name_has_its_database_locked(tmp_path, name):
    home = tmp_path / name
    settings = {PREFECT_HOME: home, PREFECT_API_DATABASE_CONNECTION_URL: f"sqlite+aiosqlite:///{home}/prefect.db"}
    with stand_in(tmp_path, DIES) as dying, temporary_settings(settings), pytest.raises(PusaError) as failed:
        dying.start(timeout=600)
    assert f"{home}/prefect.db (PREFECT_HOME={home})" in str(failed.value)
    assert (home / "prefect.db.lock").is_file()


def test_the_lock_of_a_database_follows_no_link(tmp_path):
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "prefect.db.lock").symlink_to(tmp_path / "mine")
    with stand_in(tmp_path) as none, pytest.raises(PusaError, match="is a link"):
        none.start()
    assert (tmp_path / "mine").read_text() == "kept"


def test_what_a_server_prints_cannot_steer_the_terminal(tmp_path):
    with stand_in(tmp_path, r"import sys; sys.exit('\033[2Jbroken')") as dying, pytest.raises(PusaError) as failed:
        dying.start(timeout=600)
    assert r"\x1b[2Jbroken" in str(failed.value)


def test_a_port_that_another_program_took_is_not_tried_again(tmp_path):
    with stand_in(tmp_path, PORT_IS_TAKEN, HEALTHY) as second:
        second.start(timeout=600)
        assert second.running and is_alive(second.server_process.pid)
        with (tmp_path / "prefect.db.lock").open() as lock:
            assert database.try_lock(lock, fcntl.LOCK_EX, wait=False)  # also while the server runs


def test_a_home_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with stand_in(tmp_path / "file") as homeless, pytest.raises(PusaError, match=f"{tmp_path / 'file'}.*PREFECT_HOME"):
        homeless.start()


def test_one_server_starts_at_a_time_and_a_killed_starter_holds_nobody_up(tmp_path, caplog):
    holder = subprocess.Popen([*python(HOLD), str(tmp_path / "prefect.db.lock")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    killed = []

    def kill_the_holder() -> None:
        wait_for(lambda: "waiting for another process" in caplog.text)
        killed.append(True)
        holder.kill()

    with stand_in(tmp_path, HEALTHY) as second, caplog.at_level("INFO", "pusa.server"):
        killer = threading.Thread(target=kill_the_holder)
        killer.start()
        second.start(timeout=600)
        assert killed and second.running
        killer.join()
    holder.wait()


@pytest.mark.parametrize(
    "address, words",
    [
        ("postgresql://a:secret@127.0.0.1/b", "'postgresql'; expected postgresql+asyncpg://"),
        ("mysql://a:secret@127.0.0.1/b", "'mysql'; expected postgresql+asyncpg://"),
        ("postgresql+asyncpg://a:secret@127.0.0.1:x/b", "is not the address of a database"),
        ("PORT", "Connect call failed"),
    ],
)
def test_a_database_that_cannot_be_reached_is_one_sentence(tmp_path, address, words):
    if address == "PORT":
        address = unused_address().replace("http://", "postgresql+asyncpg://a:secret@") + "/b"
    settings = temporary_settings({PREFECT_API_DATABASE_CONNECTION_URL: address})
    with stand_in(tmp_path) as none, settings, pytest.raises(PusaError, match="_CONNECTION_URL") as failed:
        none.start()
    assert words in str(failed.value) and "\n" not in str(failed.value) and "secret" not in str(failed.value)


def test_a_database_that_never_answers_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "ANSWER_SECONDS", 0.3)
    with mute() as address, stand_in(tmp_path) as none:
        url = address.replace("http://", "postgresql+asyncpg://a:secret@") + "/b"
        with temporary_settings({PREFECT_API_DATABASE_CONNECTION_URL: url}), pytest.raises(PusaError, match="within"):
            none.start()


def test_a_disk_that_is_full_is_seen_before_a_server_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "LEAST_FREE", 1 << 62)
    with stand_in(tmp_path) as none, pytest.raises(PusaError, match=r"its disk has .* MB left.* make room there"):
        none.start()


@pytest.mark.slow
def test_three_runs_at_once_share_a_fresh_home(tmp_path):
    script = "from flows.server import require_server; require_server()"
    runs = [subprocess.Popen(python(script), env=environment(PREFECT_HOME=str(tmp_path))) for _ in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0]


# The server of `pusa server`.


@pytest.mark.parametrize("secret", [None, ""])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_other_machines_need_credentials(host, secret):
    with temporary_settings({PREFECT_SERVER_API_AUTH_STRING: secret}):
        with pytest.raises(PusaError, match=f"--host {host}.* set PREFECT_SERVER_API_AUTH_STRING=USER:PASSWORD"):
            require_credentials(host)
        for loopback in ("127.0.0.1", "127.9.9.9", "::1"):
            require_credentials(loopback)
    with temporary_settings({PREFECT_SERVER_API_AUTH_STRING: "a:b"}):
        require_credentials(host)


def test_a_port_or_an_address_that_is_not_free_is_one_sentence():
    with mute() as address, pytest.raises(PusaError, match=r"cannot be used: .*; choose another with --port"):
        usable_port(*address_of(address))
    for host, port in (("127.0.0.1", 99999), ("192.0.2.1", 0)):
        with pytest.raises(PusaError, match=f"port {port} of {host} cannot be used"):
            usable_port(host, port)


def test_the_address_of_a_folder_that_is_shown_has_no_dots(tmp_path):
    serving = StandingServer(address_of(unused_address())[1], runs=[tmp_path / "a/../runs"])
    assert json.loads(serving._environment()[RUNS_VARIABLE]) == [str(tmp_path / "runs")]


@pytest.mark.slow
def test_a_server_for_other_machines_asks_each_for_credentials_and_ends_as_it_is_asked_to(tmp_path):
    (tmp_path / "runs/a/videos").mkdir(parents=True)
    (tmp_path / "runs/a/videos/gallery.html").write_text("a gallery")
    port = address_of(unused_address())[1]
    command = [sys.executable, "-m", "flows", "server", "--host", "0.0.0.0", "--port", str(port)]
    command += ["--allow-host", "pusa.example", "--runs", str(tmp_path / "runs")]
    variables = environment(PREFECT_HOME=str(tmp_path / "home"), PREFECT_SERVER_API_AUTH_STRING="a:b")
    for signal_number, code in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):  # the second one at the same port, at once
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, env=variables, **pipes) as process:
            assert any("clear text" in line for line in process.stdout), "the server ended before it was up"
            base = f"http://127.0.0.1:{port}"
            with httpx.Client(trust_env=False, base_url=base) as client:
                for path in ("/api/admin/version", "/runs/", f"/runs{tmp_path}/runs/a/videos/gallery.html"):
                    assert client.get(path).status_code == client.get(path, auth=("a", "c")).status_code == 401
                    assert client.get(path, auth=("a", "b")).status_code == 200
                    assert client.get(path, headers={"Host": "evil.test"}).status_code == 421
                    assert client.get(path, auth=("a", "b"), headers={"Host": "pusa.example"}).status_code == 200
            process.send_signal(signal_number)
            process.stdout.read()
        assert process.returncode == code
