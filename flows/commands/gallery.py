"""Write the gallery of a run anew, and serve it: to this machine's browser, or to a phone in the same network."""

import ipaddress
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

from cyclopts import Parameter

from flows.commands.options import File
from flows.commands.server import end_well, to_address, usable_port
from flows.console import show

OUTSIDE = "192.0.2.1"  # an address of no machine: to find this machine's own one, without sending anything


def gallery(
    run: File,
    /,
    *,
    serve: bool = False,
    host: Annotated[str, Parameter(metavar="ADDRESS", converter=to_address)] = "127.0.0.1",
    port: Annotated[int, Parameter(metavar="PORT")] = 8000,
) -> int:
    """Write the gallery of a run anew from its files, also of a run that works or was killed, and print its path.

    In a folder in which only calls from Python made videos, it shows all of them.

    Args:
        run: The folder of the run, for example runs/tiny.
        serve: Then show it in a browser, until Ctrl-C.
        host: The IP address to listen at; 0.0.0.0 lets a phone in, and everybody else in the network.
        port: The port; 0 for one that is free.
    """
    if serve:
        show(f"writing the gallery of {run}")
    from pusa.generate.gallery import write_gallery
    from pusa.generate.listed import shown_ids

    page = write_gallery(run / "videos", shown_ids(run))
    show(page)
    if serve:
        _serve(page, host, usable_port(host, port))
    return 0


def _serve(page: Path, host: str, port: int) -> None:
    """Answer browsers until this process is interrupted: with the folder of the page, read-only, and nothing else."""
    import uvicorn
    from starlette.responses import RedirectResponse
    from starlette.types import Receive, Scope, Send

    from flows.own_origin import OwnOrigin
    from flows.run_folders import PREFIX, RunFolders

    page = page.absolute()
    address = f"{PREFIX}{quote(str(page), errors='surrogateescape')}"

    async def lead_to_page(scope: Scope, receive: Receive, send: Send) -> None:
        await RedirectResponse(address)(scope, receive, send)

    addresses, names = _addresses(host)
    show(f"the gallery is at {' and '.join(f'http://{name}:{port}/' for name in addresses)}; Ctrl-C ends this")
    if not ipaddress.ip_address(host).is_loopback:
        show("everybody in the network can see its videos, prompts and settings, without a password")
    app = OwnOrigin(RunFolders(lead_to_page, [str(page.parent)]), names)
    signal.signal(signal.SIGTERM, end_well)
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", lifespan="off", timeout_graceful_shutdown=2)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run()


def _addresses(host: str) -> tuple[list[str], list[str]]:
    """Return this machine's addresses as they are typed in a browser, and other names that it may be asked by."""
    ip = ipaddress.ip_address(host)
    if not ip.is_unspecified:
        return [f"[{host}]" if ip.version == 6 else host], []
    outward = []
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((OUTSIDE, 9))
        outward = [probe.getsockname()[0]]
    name = socket.gethostname()
    return [*outward, "127.0.0.1"], [name, f"{name}.local", socket.getfqdn()]
