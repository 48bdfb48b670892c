"""Prefect's server, and run folders beside it, behind a guard that answers only its own pages and programs.

A page of any other site, open in the user's browser, can send requests to the loopback address. Prefect answers any
name and any page by default, so such a page could read runs and change them.
"""

import json
import os
import re
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flows.run_folders import RunFolders
from pusa.system.text import printable

HOSTS_VARIABLE = "PUSA_SERVER_HOSTS"  # more names of this server, separated by spaces
RUNS_VARIABLE = "PUSA_SERVER_RUNS"  # a JSON list of the absolute paths of the folders that it shows
OWN_HOSTS = ("localhost", "127.0.0.1", "[::1]")
PORT = re.compile(r":\d{1,5}$")
MISDIRECTED, FORBIDDEN = 421, 403  # HTTP's codes for a name that is not the server's, and for a page of another site
POLICY_VIOLATION = 1008  # a websocket's code
# Another site's page must not show this one in a frame. Markdown that strangers wrote must not fetch pictures, and the
# dashboard's own page, which reports its use to a company, must not report anything.
POLICY = "frame-ancestors 'self'; img-src 'self' data: blob:; connect-src 'self'"


def create_app() -> "OwnOrigin":
    """Return Prefect's server behind the guard; uvicorn calls this in the server's process."""
    from prefect.server.api.server import create_app as create_prefect_app
    from prefect.settings.context import get_current_settings

    settings = get_current_settings().server
    origins, hosts = settings.api.cors_allowed_origins.split(","), os.environ.get(HOSTS_VARIABLE, "").split()
    elsewhere = urlsplit(settings.ui.api_url or "")  # where the dashboard's page finds the API
    connections = f" {elsewhere.scheme}://{elsewhere.netloc}" if elsewhere.netloc else ""
    app: ASGIApp = create_prefect_app()
    if folders := json.loads(os.environ.get(RUNS_VARIABLE, "[]")):
        secret = settings.api.auth_string
        app = RunFolders(app, folders, secret.get_secret_value() if secret else None)
    return OwnOrigin(app, hosts, origins, POLICY + connections)


class OwnOrigin:
    """Refuse requests and websockets for another name than the server's, and those of another site's pages."""

    def __init__(
        self, app: ASGIApp, hosts: Collection[str] = (), origins: Collection[str] = (), policy: str = POLICY
    ) -> None:
        """Guard an app.

        Args:
            app: what answers the requests that are not refused.
            hosts: names that the server has besides those of the loopback address, and the address that was reached.
            origins: other sites whose pages may use the server, such as `https://HOST:PORT`; `*` stands for all.
            policy: the content security policy of the server's own pages.
        """
        self._headers = {"content-security-policy": policy, "x-content-type-options": "nosniff"}
        self._app = app
        self._hosts = {*OWN_HOSTS, *(name.lower() for name in hosts)}
        self._origins = {origin.strip().lower().rstrip("/") for origin in origins} - {""}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request or websocket."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
            await send(message)

        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
        elif (refusal := self._refusal(Headers(scope=scope), _address_of(scope))) is None:
            await self._app(scope, receive, send_with_headers)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})  # before it is accepted: HTTP's 403
        else:
            await refusal(scope, receive, send)

    def _refusal(self, headers: Headers, address: str) -> PlainTextResponse | None:
        """Return the answer to a request that came to an address and is refused, or None."""
        host = ", ".join(headers.getlist("host")).lower()  # two Host headers match no name
        name = PORT.sub("", host)
        if not name or name not in {*self._hosts, address}:
            text = f"this server is not {printable(host)!r}; use its address, or `pusa server --allow-host NAME`\n"
            return PlainTextResponse(text, MISDIRECTED)
        if "*" in self._origins:
            return None
        origins = [origin.lower() for origin in headers.getlist("origin")]
        own = {f"http://{host}", f"https://{host}"} | self._origins
        foreign = [origin for origin in origins if origin not in own]
        # Pictures, scripts and frames come without an origin. A link to a page of this server is followed.
        from_elsewhere = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if not origins and from_elsewhere and headers.get("sec-fetch-mode") != "navigate":
            foreign = ["another site"]
        if foreign:
            allow = "to allow it, set PREFECT_SERVER_CORS_ALLOWED_ORIGINS"
            return PlainTextResponse(f"a page of {printable(foreign[0])} may not use this server; {allow}\n", FORBIDDEN)
        return None


def _address_of(scope: Scope) -> str:
    """Return this machine's address to which a request came, as a URL has it.

    No name of another site can stand for it: a page under this address came from this server.
    """
    address = str((scope.get("server") or [""])[0])
    return f"[{address}]" if ":" in address else address
