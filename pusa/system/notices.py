"""Send a notice about a run: as JSON to web addresses, and to a command of the worker's configuration.

A manifest may name addresses, since they only receive; a command would let whoever submits it run anything. Whoever may
submit could also have the worker call servers that only it can reach: under a worker that allows some folders or hosts
alone, an address must be public, or its host one of PUSA_WEBHOOK_HOSTS. Only the host of an address is ever logged: the
rest may be a secret.
"""

import ipaddress
import json
import os
import re
import socket
import ssl
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from time import monotonic, sleep
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, urlsplit
from urllib.request import (
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    build_opener,
    getproxies,
    proxy_bypass,
)

from pusa.errors import PusaError
from pusa.system import allowed
from pusa.system.processes import Deadline, ending
from pusa.system.text import first_line, preview, printable
from pusa.system.threads import DaemonThreadPool

HOSTS = "PUSA_WEBHOOK_HOSTS"  # names of hosts that may be notified wherever they are, separated by spaces
COMMAND = "PUSA_NOTIFY_COMMAND"  # a JSON list of words: the command that gets each notice on its standard input
IN_ENVIRONMENT = re.compile(r"env:(PUSA_WEBHOOK_(?!HOSTS$)[A-Z0-9_]+)")  # an address in a variable of the worker
MAX_ADDRESSES, MAX_ADDRESS = 8, 2000  # of one list; characters
ANSWER_SECONDS, COMMAND_SECONDS, NOTICE_SECONDS = 10.0, 60.0, 75.0  # the last: until all of them are given up
DELAYS = (1.0, 4.0)  # seconds before the second and the third try
WORTH_RETRYING = (408, 425, 429)  # beside the errors of a server, 500 and more
Peer = tuple[Any, ...]  # an address of a socket
NAT64, INTERNET = ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("2000::/3")  # of IPv6


def read_addresses(value: Any) -> tuple[str, ...]:
    """Return the addresses of a manifest's key: one, or a list of a few.

    Raises:
        ValueError: one is neither an http(s) URL without a password nor env:PUSA_WEBHOOK_NAME. No message has a URL.
    """
    addresses = [value] if isinstance(value, str) else value
    expected = "an http(s) URL, env:PUSA_WEBHOOK_NAME for the URL in that variable of the worker, or a list of them"
    if not isinstance(addresses, list | tuple) or not all(isinstance(address, str) for address in addresses):
        raise ValueError(f"got a {type(value).__name__}; expected {expected}")
    if len(addresses) > MAX_ADDRESSES:
        raise ValueError(f"got {len(addresses)} addresses; expected {MAX_ADDRESSES} or fewer")
    for address in addresses:
        if address.startswith("env:"):
            if not IN_ENVIRONMENT.fullmatch(address):
                raise ValueError(f"{address!r:.80} is not env: and a variable's name; it begins with PUSA_WEBHOOK_")
        elif problem := _problem_of(address):
            raise ValueError(f"{problem}; expected {expected}")
    return tuple(addresses)


def _problem_of(url: str) -> str:
    """Return what is wrong with a URL, without a part of it that may be a secret; "" if nothing is."""
    if len(url) > MAX_ADDRESS or not re.fullmatch(r"[!-~]+", url) or "\\" in url:
        return f"an address has spaces, backslashes, letters that are not ASCII, or more than {MAX_ADDRESS} characters"
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is not a number, or the brackets of IPv6 do not match
        usable = False
    if not usable:
        return "an address does not begin with http:// or https:// and a host"
    return f"the address of {parts.hostname} has a user name or password" if "@" in parts.netloc else ""


def notify(
    addresses: Sequence[str],
    notice: Mapping[str, Any],
    environment: Mapping[str, str] = os.environ,
    seconds: float = NOTICE_SECONDS,
    delays: Sequence[float] = DELAYS,
) -> list[str]:
    """Send a notice to each address and to the worker's command, at the same time; return why some did not get it.

    Args:
        addresses: as `read_addresses` returns them.
        notice: JSON values.
        environment: the worker's configuration.
        seconds: the time after which those that did not end are left.
        delays: seconds before each further try.
    """
    body = json.dumps(notice).encode()
    calls: dict[str, Callable[[], None]] = {
        address: partial(_post, address, body, environment, delays) for address in addresses
    }
    if environment.get(COMMAND):
        calls[COMMAND] = partial(_run_command, environment[COMMAND], body, min(0.9 * seconds, COMMAND_SECONDS))
    pool, end = DaemonThreadPool(len(calls)), monotonic() + seconds
    sent = {address: pool.submit(call) for address, call in calls.items()}
    problems = []
    for address, result in sent.items():
        name = address if address == COMMAND or address.startswith("env:") else str(urlsplit(address).hostname)
        try:
            result.result(max(0.0, end - monotonic()))
        except TimeoutError:
            problems.append(f"{name}: no end within {seconds:g} s")
        except PusaError as error:
            problems.append(f"{name}: {error}")
        except Exception as error:  # noqa: BLE001  whatever a notice meets, the run's result counts; it may have the URL
            problems.append(f"{name}: {type(error).__name__}")
    pool.close()
    return problems


def _post(address: str, body: bytes, environment: Mapping[str, str], delays: Sequence[float]) -> None:
    """Send the body with a few tries.

    Raises:
        PusaError: it was not received.
    """
    url = address
    if address.startswith("env:"):
        url = environment.get(address.removeprefix("env:"), "")
        if problem := _problem_of(url) if url else "the worker has no such variable":
            raise PusaError(problem)
    parts = urlsplit(url)
    why = ""
    for delay in (0.0, *delays):
        sleep(delay)
        try:
            _post_once(parts, body, environment)
            return
        except HTTPError as error:  # any answer but 2xx; a redirect is not followed
            error.close()
            why = f"the answer is HTTP {error.code}"
            if error.code < 500 and error.code not in WORTH_RETRYING:
                break
        except (OSError, HTTPException) as error:
            cause = error.reason if isinstance(error, URLError) and isinstance(error.reason, OSError) else error
            why = printable(first_line(cause) if isinstance(cause, OSError) else type(cause).__name__)
    raise PusaError(why)


def _post_once(parts: SplitResult, body: bytes, environment: Mapping[str, str]) -> None:
    host = parts.hostname or ""
    proxies = {} if _is_loopback(host) or proxy_bypass(parts.netloc) else getproxies()
    is_guarded = HOSTS in environment or bool(environment.get(allowed.VARIABLE))
    must_be_public = is_guarded and host not in environment.get(HOSTS, "").lower().split()
    peer = _look_up(parts, must_be_public) if must_be_public or parts.scheme not in proxies else None
    headers = {"Content-Type": "application/json", "User-Agent": "pusa"}
    request = Request(parts._replace(fragment="").geturl(), body, headers, method="POST")  # noqa: S310  http(s) only
    with _opener(proxies, None if parts.scheme in proxies else peer).open(request, timeout=ANSWER_SECONDS):
        pass  # the answer's body is not read


def _look_up(parts: SplitResult, must_be_public: bool) -> Peer:
    """Return the address of the socket to connect to: a name may lead elsewhere when it is looked up again.

    Raises:
        PusaError: it must be public, and one of those that the name has is not.
        OSError: the name is unknown.
    """
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    found = [peer for *_, peer in socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)]
    if must_be_public and not all(_is_public(str(peer[0])) for peer in found):
        raise PusaError(f"the host is not public; to allow it, start the worker with --webhook-host, or set {HOSTS}")
    return found[0]


def _is_public(text: str) -> bool:
    """Return whether an IP address is one of the internet, also where it stands for one of IPv4."""
    ip = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner:
            return _is_public(str(inner))
        if ip not in INTERNET:  # Python counts what nobody was given as global, and old prefixes of private networks
            return False
    return ip.is_global and not ip.is_multicast


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class _Http(HTTPConnection):
    """A connection to a peer whose address is known, whatever the host's name leads to by now."""

    peer: Peer | None = None

    def connect(self) -> None:
        """Connect."""
        if self.peer is None:
            super().connect()
        else:
            self.sock = socket.create_connection(self.peer[:2], self.timeout)


class _Https(HTTPSConnection, _Http):  # HTTPSConnection connects as the next class does, then checks the certificate
    pass


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        """Follow no redirect: it may lead to a host that was not checked."""


def _opener(proxies: Mapping[str, str], peer: Peer | None) -> OpenerDirector:
    def connect(kind: type[_Http], host: str, **options: Any) -> _Http:
        connection = kind(host, **options)
        connection.peer = peer
        return connection

    class Http(HTTPHandler):
        def http_open(self, request: Request) -> HTTPResponse:
            return self.do_open(partial(connect, _Http), request)  # type: ignore[arg-type]

    class Https(HTTPSHandler):
        def https_open(self, request: Request) -> HTTPResponse:
            context = ssl.create_default_context()
            return self.do_open(partial(connect, _Https), request, context=context)  # type: ignore[arg-type]

    return build_opener(ProxyHandler(dict(proxies)), _NoRedirect, Http, Https)


def _run_command(text: str, body: bytes, seconds: float) -> None:
    """Run the worker's command, without a shell, with the notice on its standard input.

    Raises:
        PusaError: it is not a list of words, cannot be started, fails or takes too long.
    """
    try:
        words = json.loads(text)
    except ValueError:
        words = None
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise PusaError(f"got {preview(text)}; expected a JSON list of words")
    try:
        process = subprocess.Popen(  # noqa: S603
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        raise PusaError(f"{printable(words[0])} cannot be started: {first_line(error)}") from error
    with Deadline(process, seconds) as deadline:
        process.communicate(body)
    if deadline.passed:
        raise PusaError(f"{printable(words[0])} was ended after {seconds:g} s")
    if process.returncode:
        raise PusaError(f"{printable(words[0])} failed: {ending(process)}")
