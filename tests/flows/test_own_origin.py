"""The guard before Prefect's server: whose requests reach it, and what its pages may do."""

import asyncio

import pytest

from flows.own_origin import OwnOrigin

HERE = {"host": "127.0.0.1:4200"}


async def behind(scope, receive, send):
    """Answer as Prefect does: any request of anybody."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})
    else:
        await send({"type": "websocket.accept"})


def first_message(guard: OwnOrigin, kind: str, headers: list[tuple[str, str]]) -> dict:
    """Return the first message that a request with these headers is answered with."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers]}
    asyncio.run(guard(scope, None, send))
    return sent[0]


def outcome(guard: OwnOrigin, headers: dict[str, str] | list[tuple[str, str]]) -> int:
    """Return the status of a request; a websocket with the same headers is accepted where that is 200."""
    pairs = list(headers.items()) if isinstance(headers, dict) else headers
    status = first_message(guard, "http", pairs)["status"]
    expected = "websocket.accept" if status == 200 else "websocket.close"
    assert first_message(guard, "websocket", pairs)["type"] == expected
    return status


@pytest.mark.parametrize("host", ["localhost", "LocalHost:1", "127.0.0.1", "127.0.0.1:4200", "[::1]", "[::1]:4200"])
def test_names_of_the_loopback_address_are_answered(host):
    assert outcome(OwnOrigin(behind), {"host": host}) == 200
    assert outcome(OwnOrigin(behind), {"host": host, "origin": f"http://{host}"}) == 200


@pytest.mark.parametrize(
    "host",
    ["evil.test", "evil.test:4200", "", "localhost.", "127.0.0.1.evil.test", "localhost@evil.test", "127.0.0.1:1:2",
     "127.0.0.1, evil.test", "::1", "127.0.0.2", "\x1b[2J"],
)  # fmt: skip
def test_other_names_are_refused(host):
    assert outcome(OwnOrigin(behind), {"host": host}) == 421
    assert outcome(OwnOrigin(behind, origins=["*"]), {"host": host}) == 421


def test_a_request_without_one_name_is_refused():
    assert outcome(OwnOrigin(behind), {}) == 421
    assert outcome(OwnOrigin(behind), [("host", "localhost"), ("host", "localhost")]) == 421


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.test"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": "http://127.0.0.1"},  # another port
        {"origin": "http://localhost:4200"},  # the same server by another name
        {"origin": "http://127.0.0.1:4200.evil.test"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},  # a picture or a script
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"},  # of another port
        {"sec-fetch-site": "cross-site"},
    ],
)
def test_pages_of_other_sites_are_refused(headers):
    assert outcome(OwnOrigin(behind), HERE | headers) == 403
    assert outcome(OwnOrigin(behind, origins=["https://friend.test"]), HERE | headers) == 403
    assert outcome(OwnOrigin(behind, origins=["*"]), HERE | headers) == 200


def test_one_foreign_origin_among_several_is_refused():
    both = [("host", "localhost"), ("origin", "http://localhost"), ("origin", "http://evil.test")]
    assert outcome(OwnOrigin(behind), both) == 403


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "http://127.0.0.1:4200", "sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "same-origin", "sec-fetch-mode": "no-cors"},
        {"sec-fetch-site": "none", "sec-fetch-mode": "navigate"},  # typed in
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},  # a link
    ],
)
def test_own_pages_and_programs_are_answered(headers):
    assert outcome(OwnOrigin(behind), HERE | headers) == 200


def test_what_the_user_allows_is_answered():
    guard = OwnOrigin(behind, ["Dash.example"], ["https://friend.test/", ""])
    assert outcome(guard, {"host": "dash.example", "origin": "https://dash.example"}) == 200
    assert outcome(guard, {"host": "dash.example", "origin": "https://other.example"}) == 403
    assert outcome(guard, HERE | {"origin": "https://friend.test", "sec-fetch-site": "cross-site"}) == 200


def test_pages_are_not_framed_and_reach_no_other_site():
    start = first_message(OwnOrigin(behind), "http", list(HERE.items()))
    policy = dict(start["headers"])[b"content-security-policy"].decode()
    assert policy == "frame-ancestors 'self'; img-src 'self' data: blob:; connect-src 'self'"


@pytest.mark.parametrize("address, host", [("10.0.0.7", "10.0.0.7"), ("fd00::7", "[fd00::7]")])
def test_the_address_that_a_request_came_to_is_the_servers_own(address, host):
    def status(name: str, **scope: object) -> int:
        guard, sent = OwnOrigin(behind), []

        async def send(message):
            sent.append(message)

        headers = [(b"host", name.encode()), (b"origin", f"http://{name}".encode())]
        asyncio.run(guard({"type": "http", "headers": headers, **scope}, None, send))
        return sent[0]["status"]

    assert status(f"{host}:4200", server=(address, 4200)) == 200
    assert status("10.0.0.8:4200", server=(address, 4200)) == 421
    assert status(f"{host}:4200") == status("", server=("", 4200)) == status("", server=None) == 421
