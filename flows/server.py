"""The server that a run reports to: the one of PREFECT_API_URL, or Prefect's temporary one in a session of its own."""

import logging
import os
import re
from contextvars import copy_context
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx
import prefect
from prefect.client.base import ServerType
from prefect.client.orchestration import get_client
from prefect.context import get_settings_context
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_SERVER_EPHEMERAL_ENABLED,
    temporary_settings,
)

from flows.own_origin import MISDIRECTED
from flows.own_server import TemporaryServer
from flows.settings import WITHOUT
from pusa.errors import PusaError
from pusa.system.text import first_line, printable
from pusa.system.threads import DaemonThreadPool

log = logging.getLogger("pusa.server")
ANSWER_SECONDS = 8.0  # for a server's answer, from the look-up of its name to the last byte


def require_server() -> str:
    """Return the server's name once it answers: the one of PREFECT_API_URL, or the temporary one, which is started.

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
    return server


def _origin(url: str) -> str:
    """Return the address and where it is set."""
    shown = f"PREFECT_API_URL={_without_password(url)}"
    if url in (os.environ.get("PREFECT_API_URL"), os.environ.get("prefect_api_url")):  # noqa: SIM112
        return shown
    return f"{shown} (of Prefect's profile {get_settings_context().profile.name!r})"


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
        if code == MISDIRECTED:
            return f"refuses the name {host}{through}; start it with `pusa server --allow-host {host}`, {correct}"
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
