"""Start Prefect's server with the galleries of runs, and examine a machine, its server and its runs."""

import ipaddress
import logging
import os
import re
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated

from cyclopts import Parameter, Token

from flows.commands.options import as_written
from flows.console import show
from pusa.errors import PusaError

LEFT = 3  # the exit code if problems are left
HOST_NAME = re.compile(r"\[[0-9a-f:.]+\]|[a-z0-9._-]+", re.IGNORECASE)


def require_host_names(kind: type, names: Sequence[str]) -> None:
    """Raise ValueError if one of these is not what a browser or a proxy calls a host."""
    for name in names:
        if not HOST_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not the name of a host; expected a name without a scheme or port")


def require_folders(kind: type, names: Sequence[str]) -> None:
    """Raise ValueError if one of these is not a folder, or is the root of the file system."""
    for name in names:
        if not os.path.exists(name):
            raise ValueError(f"{name!r} does not exist; make the folder, or name another one")
        if not os.path.isdir(name) or os.path.realpath(name) == os.sep:
            raise ValueError(f"{name!r} cannot be shown; expected a folder of a run, or one with folders of runs")


def to_paths(kind: type, tokens: Sequence[Token]) -> tuple[Path, ...]:
    """Return paths; an empty text is refused, since it would be the current folder."""
    for token in tokens:
        as_written(Path, [token])
    return tuple(Path(token.value) for token in tokens)


def to_address(kind: type, tokens: Sequence[Token]) -> str:
    """Return an IP address; localhost is 127.0.0.1."""
    text = tokens[0].value
    try:
        return str(ipaddress.ip_address("127.0.0.1" if text.lower() == "localhost" else text))
    except ValueError as error:
        raise ValueError(f"{text!r:.80} is not an IP address; expected one of this machine, or 0.0.0.0") from error


def server(
    *,
    host: Annotated[str, Parameter(metavar="ADDRESS", converter=to_address)] = "127.0.0.1",
    port: Annotated[int, Parameter(metavar="PORT")] = 4200,
    allow_host: Annotated[tuple[str, ...], Parameter(metavar="NAME", validator=require_host_names)] = (),
    runs: Annotated[tuple[str, ...], Parameter(metavar="FOLDER", validator=require_folders)] = (),
) -> int:
    """Start Prefect's server: its dashboard in a browser, schedules, and the galleries of runs.

    It answers its own pages and programs, and no page of another site. It has the settings that runs have.

    Args:
        host: The IP address to listen at; another than the loopback address needs PREFECT_SERVER_API_AUTH_STRING.
        port: The port.
        allow_host: Another name of this server, behind a proxy that passes it on; repeat the option for each name.
        runs: Show this folder read-only below /runs/: one of a run, or one with folders of runs; repeat for each.
    """
    from flows.settings import load_prefect

    signal.signal(signal.SIGTERM, end_well)
    load_prefect()
    require_credentials(host)
    port = usable_port(host, port)
    logging.getLogger("pusa").setLevel(logging.INFO)
    from flows.own_server import StandingServer

    serving = StandingServer(port, allow_host, host, [Path(folder) for folder in runs])
    serving.start()
    show(f"the server is at {serving.address}; to send runs to it, set PREFECT_API_URL={serving.api_url}")
    if runs:
        show(f"the galleries of {', '.join(runs)} are at {serving.address}/runs/")
    if not ipaddress.ip_address(host).is_loopback:
        show(
            "programs and browsers send the auth string to it as clear text: beyond this machine, let them reach it "
            "through a proxy with TLS, whose name --allow-host gives"
        )
    serving.wait()
    return 0


def end_well(signal_number: int, frame: FrameType | None) -> None:
    """End this process as it was asked to: its exit code is 0, and the server ends before."""
    signal.signal(signal_number, signal.SIG_IGN)
    raise SystemExit(0)


def require_credentials(host: str) -> None:
    """Raise PusaError if the server would answer other machines without credentials."""
    from prefect.settings.context import get_current_settings

    secret = get_current_settings().server.api.auth_string
    if not ipaddress.ip_address(host).is_loopback and not (secret and secret.get_secret_value()):
        raise PusaError(
            f"--host {host} lets other machines change runs; set PREFECT_SERVER_API_AUTH_STRING=USER:PASSWORD for the "
            "server and PREFECT_API_AUTH_STRING with the same value for its programs, or listen at 127.0.0.1"
        )


def usable_port(host: str, port: int) -> int:
    """Return the port, or one that is free if it is 0.

    Raises:
        PusaError: it cannot be listened at.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family) as free:
            return free.getsockname()[1]
    except (OSError, OverflowError) as error:
        raise PusaError(f"port {port} of {host} cannot be used: {error}; choose another with --port") from error


def doctor(
    runs: Annotated[tuple[Path, ...], Parameter(converter=to_paths, n_tokens=-1, accepts_keys=False)] = (),
    /,
    *,
    repair: bool = False,
    json: bool = False,
) -> int:
    """Report what is well with this machine, its server and its runs, and what is not.

    The exit code is 3 if a problem is left.

    Args:
        runs: Folders of runs to look at as well.
        repair: Free slots that nobody holds, mark dead runs as crashed, end servers whose starter is gone, and remove
            unfinished files of killed writers. No finished work is touched.
        json: Print one JSON object for each line of the report.
    """
    from json import dumps

    from flows.doctor import examine_all
    from flows.doctor.findings import Level

    problems = 0
    for line in examine_all(runs, repair):
        problems += line.finding.level == Level.PROBLEM
        show(*([dumps(line.as_json())] if json else line.lines()))
    if not json:
        show(f"{problems} problem{'s' * (problems != 1)}" if problems else "no problems")
    return LEFT if problems else 0
