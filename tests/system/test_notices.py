"""Notices of runs reach web servers and the worker's command, and what goes wrong with them stays a warning."""

import json
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pusa.errors import ManifestError, PusaError
from pusa.manifest.loading import load_manifest
from pusa.system import notices
from pusa.system.allowed import VARIABLE
from pusa.system.notices import COMMAND, HOSTS, notify
from tests.helpers.stand_in_server import mute, unused_address

NOTICE = {"text": "generate tiny/generate.yaml: completed", "state": "completed"}
QUICK = (0.01, 0.01)


class Received(list):
    """The paths and bodies that a server got."""

    address: str


@contextmanager
def receiving(*statuses: int, location: str = "") -> Iterator[Received]:
    """Serve POST with these answers in turn, the last one again and again."""
    received, answers = Received(), list(statuses)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.path, self.headers["Content-Type"], json.loads(body)))
            self.send_response(answers.pop(0) if len(answers) > 1 else answers[0])
            self.send_header("Location", location)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        received.address = f"http://127.0.0.1:{server.server_address[1]}"
        yield received
        server.shutdown()


def test_a_notice_reaches_every_address_as_json():
    with receiving(200) as one, receiving(204) as other:
        environment = {"PUSA_WEBHOOK_CHAT": f"{other.address}/services/SECRET?a=1#part"}
        assert notify([f"{one.address}/hook", "env:PUSA_WEBHOOK_CHAT"], NOTICE, environment) == []
    assert one == [("/hook", "application/json", NOTICE)]
    assert other == [("/services/SECRET?a=1", "application/json", NOTICE)]


def test_a_server_in_trouble_is_asked_again():
    with receiving(500, 503, 200) as received:
        assert notify([received.address], NOTICE, {}, delays=QUICK) == []
    assert len(received) == 3
    with receiving(500) as received:
        assert notify([received.address], NOTICE, {}, delays=QUICK) == ["127.0.0.1: the answer is HTTP 500"]
    assert len(received) == 3


@pytest.mark.parametrize("status", [301, 302, 307, 308, 400, 404, 410])
def test_a_redirect_or_refusal_is_final(status):
    with receiving(200) as elsewhere, receiving(status, location=f"{elsewhere.address}/") as received:
        assert notify([received.address], NOTICE, {}) == [f"127.0.0.1: the answer is HTTP {status}"]
    assert (len(received), len(elsewhere)) == (1, 0)


def test_no_message_has_more_of_an_address_than_its_host():
    addresses = [f"{unused_address()}/SECRET", "https://no-such-host.invalid/SECRET", "env:PUSA_WEBHOOK_A"]
    problems = notify(addresses, NOTICE, {"PUSA_WEBHOOK_A": "http://me:SECRET@localhost/"}, delays=())
    assert problems[0].startswith("127.0.0.1: ") and "refused" in problems[0]
    assert problems[1].startswith("no-such-host.invalid: ")
    assert problems[2] == "env:PUSA_WEBHOOK_A: the address of localhost has a user name or password"
    assert notify(["env:PUSA_WEBHOOK_B"], NOTICE, {}) == ["env:PUSA_WEBHOOK_B: the worker has no such variable"]
    assert "SECRET" not in str(problems)


def test_a_server_that_never_ends_its_answer_is_left():
    with mute() as silent:
        assert notify([f"{silent}/SECRET"], NOTICE, {}, seconds=0.2) == ["127.0.0.1: no end within 0.2 s"]


def test_the_proxy_of_the_environment_is_used_but_not_for_this_machine(monkeypatch):
    with receiving(200) as proxy, receiving(200) as received:
        monkeypatch.setenv("http_proxy", proxy.address)
        monkeypatch.delenv("no_proxy", raising=False)
        assert notify([received.address, "http://hooks.invalid/x"], NOTICE, {}, delays=()) == []
        guarded = notify(["http://hooks.invalid/x"], NOTICE, {HOSTS: ""}, delays=())
        assert notify(["http://hooks.invalid/x"], NOTICE, {HOSTS: "hooks.invalid"}, delays=()) == []
    assert [path for path, _, _ in received] == ["/"]
    assert [path for path, _, _ in proxy] == ["http://hooks.invalid/x"] * 2
    assert guarded and guarded[0].startswith("hooks.invalid: ")


@pytest.mark.parametrize("environment", [{HOSTS: ""}, {VARIABLE: "/data"}, {HOSTS: "other.example"}], ids=str)
def test_under_a_worker_a_host_must_be_public(environment):
    with receiving(200) as received:
        (problem,) = notify([received.address], NOTICE, environment)
        assert (
            problem
            == f"127.0.0.1: the host is not public; to allow it, start the worker with --webhook-host, or set {HOSTS}"
        )
        assert received == []
        assert notify([received.address], NOTICE, {**environment, HOSTS: "a.example 127.0.0.1"}) == []
    assert len(received) == 1


def test_a_name_that_leads_to_this_machine_is_not_public():
    for host in ("localhost", "0", "2130706433", "[::1]", "[::ffff:127.0.0.1]", "169.254.169.254", "10.1.2.3"):
        (problem,) = notify([f"http://{host}/"], NOTICE, {HOSTS: ""}, delays=())
        assert "is not public" in problem, host


def test_which_addresses_are_public():
    public = ["8.8.8.8", "2606:4700:4700::1111", "64:ff9b::808:808"]
    private = ["127.0.0.1", "10.0.0.1", "192.168.1.1", "172.16.0.1", "100.64.0.1", "169.254.169.254", "0.0.0.0"]
    private += ["::1", "fe80::1%eth0", "fd00:ec2::254", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::"]
    private += ["224.0.0.1", "ff02::1", "::", "::7f00:1", "fec0::1", "64:ff9b:1::a00:1"]
    assert [ip for ip in public + private if notices._is_public(ip)] == public


@pytest.mark.parametrize("not_by_proxy", ["", "hook.example:80"], ids=["no proxy", "a proxy for others"])
def test_a_host_is_looked_up_once(monkeypatch, not_by_proxy):
    """Otherwise a name could lead to a public address while it is checked, and to this machine afterwards."""
    monkeypatch.setenv("http_proxy", unused_address() if not_by_proxy else "")
    monkeypatch.setenv("no_proxy", not_by_proxy)
    with receiving(200) as received:
        port = int(received.address.rpartition(":")[2])
        asked: list[str] = []
        look_up = socket.getaddrinfo

        def answer(host: str, asked_port: int, *rest: int, **more: int) -> list:
            asked.append(host)
            return look_up("127.0.0.1", port if host == "hook.example" else asked_port, *rest, **more)

        monkeypatch.setattr(notices, "_is_public", lambda ip: True)
        monkeypatch.setattr(socket, "getaddrinfo", answer)
        assert notify(["http://hook.example:80/"], NOTICE, {HOSTS: ""}, delays=()) == []
    assert len(received) == 1 and asked.count("hook.example") == 1


def command(code: str, *words: str) -> dict[str, str]:
    return {COMMAND: json.dumps([sys.executable, "-c", code, *words])}


def test_the_workers_command_gets_the_notice(tmp_path):
    code = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.stdin.read() + sys.argv[2])"
    assert notify([], NOTICE, command(code, str(tmp_path / "out"), "; $HOME `x`")) == []
    assert (tmp_path / "out").read_text() == json.dumps(NOTICE) + "; $HOME `x`"


def test_a_command_that_fails_is_named():
    long = {**NOTICE, "text": "x" * 1_000_000}  # more than a pipe holds: the command does not read it
    (problem,) = notify([], long, command("import sys; sys.exit(3)"))
    assert problem == f"{COMMAND}: {sys.executable} failed: exit code 3"
    endless = command("import time; time.sleep(600)")[COMMAND]
    with pytest.raises(PusaError, match=r"was ended after 0.2 s"):
        notices._run_command(endless, json.dumps(long).encode(), 0.2)
    assert notify([], NOTICE, {COMMAND: '["/no/such/program"]'})[0].startswith(f"{COMMAND}: /no/such/program cannot be")
    for text in ("echo", "[]", "[1]", '{"a": 1}', '"echo"'):
        assert "expected a JSON list of words" in notify([], NOTICE, {COMMAND: text})[0]


INGEST = "kind: ingest\nsource: in\n"
WRONG = {
    "on_end: 5": "got a int; expected an http(s) URL",
    "on_end: {url: SECRET}": "got a dict",
    "on_failure: [https://a.example, 1]": "got a list",
    "on_end: ftp://SECRET": "does not begin with http:// or https://",
    "on_end: file:///SECRET": "does not begin",
    "on_end: http:///SECRET": "does not begin",
    "on_end: 'https://a.example:port/SECRET'": "does not begin",
    "on_end: 'https://[::1/SECRET'": "does not begin",
    "on_end: 'https://me:SECRET@a.example/'": "the address of a.example has a user name or password",
    "on_end: 'https://SECRET@a.example/'": "the address of a.example has a user name or password",
    "on_end: 'https://a.example/SECRET words'": "an address has spaces",
    "on_end: 'http://a.example\\@127.0.0.1/SECRET'": "an address has spaces, backslashes",
    f"on_end: 'https://a.example/{'SECRET' * 400}'": "more than 2000 characters",
    "on_end: env:HOME": "is not env: and a variable's name; it begins with PUSA_WEBHOOK_",
    f"on_end: env:{HOSTS}": "is not env: and a variable's name",
    f"on_end: {['https://a.example/SECRET'] * 9}": "got 9 addresses; expected 8 or fewer",
}


@pytest.mark.parametrize("text, expected", WRONG.items(), ids=range(len(WRONG)))
def test_a_wrong_address_is_refused_and_not_shown(tmp_path, text, expected):
    (tmp_path / "m.yaml").write_text(f"{INGEST}{text}\n")
    with pytest.raises(ManifestError) as error:
        load_manifest(tmp_path / "m.yaml", tmp_path / "run")
    (line,) = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert line.startswith(text.partition(":")[0]) and expected in line and "SECRET" not in line


def test_every_kind_of_manifest_takes_addresses(tmp_path: Path):
    keys = "on_end: env:PUSA_WEBHOOK_CHAT\non_failure: [https://a.example/x, 'http://[::1]:8000']\n"
    model = '{weights: "builtin:tiny"}'
    for text in (INGEST, f"kind: precompute\nmodel: {model}\n", f"kind: finetune\nbase: {model}\n",
                 f"kind: generate\nmodel: {model}\njobs: [{{id: a, task: text_to_video}}]\n"):  # fmt: skip
        (tmp_path / "m.yaml").write_text(text + keys)
        manifest = load_manifest(tmp_path / "m.yaml", tmp_path / "run")
        assert manifest.on_end == ("env:PUSA_WEBHOOK_CHAT",)
        assert manifest.on_failure == ("https://a.example/x", "http://[::1]:8000")
