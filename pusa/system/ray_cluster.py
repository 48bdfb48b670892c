"""Join a Ray cluster that asks for a token, or start a Ray of this process's own.

Ray pickles what its processes say to each other: whoever can talk to them can run code there. Its token keeps others
out, so a cluster that takes commands without one is refused. Nothing is encrypted: the machines of a cluster belong in
a network of their own.
"""

import logging
import os
import secrets
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from pusa.errors import ManifestError, StageError
from pusa.system.allowed import Allowed
from pusa.system.devices import visible_gpus
from pusa.system.text import first_line, printable

PROBE_SECONDS = 10.0
MEMORY = 80 << 20  # bytes of the object store of a Ray of our own, which carries small messages only
CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
LOOPBACK = "127.0.0.1"
START_IT = "start it with RAY_AUTH_MODE=token and the same RAY_AUTH_TOKEN, or ~/.ray/auth_token, on each machine"


@contextmanager
def connected(address: str, count: int) -> Iterator[Any]:
    """Connect this process to a Ray, or start one for it, and yield the module `ray`."""
    settings = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    if address == "local":
        settings["RAY_AUTH_TOKEN"] = os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)
        settings["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # every port on the loopback address
        # As other slots of one machine; Ray's default is 15.
        settings["RAY_worker_niceness"] = os.environ.get("RAY_worker_niceness", "0")  # noqa: SIM112
    with _environment(settings):  # Ray reads it when it is imported
        yield from _connected(address, count)


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while: another Ray that is joined later has another token."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _connected(address: str, count: int) -> Iterator[Any]:
    try:
        import ray
    except ImportError as error:
        raise ManifestError("place: ray: Ray is not installed: pip install 'pusa[ray]'") from error
    if ray.is_initialized():
        raise StageError("this process is connected to a Ray already; leave it with ray.shutdown()")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with ExitStack() as ended:
        if address == "local":
            folder = tempfile.TemporaryDirectory(prefix="pusa-ray-", ignore_cleanup_errors=True)
            options |= _options_of_own(count, ended.enter_context(folder))
        else:
            address = check_address(address)
        _init(ray, address, options)
        try:
            if address == "local" and (here := ray.util.get_node_ip_address()) != LOOPBACK:
                raise StageError(f"a Ray of this process's own would listen at {here}: it has used another Ray before")
            yield ray
        finally:
            ray.shutdown()


def _init(ray: Any, address: str, options: Mapping[str, Any]) -> None:
    """Call `ray.init`, and keep this process's handler of SIGTERM, which Ray replaces."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, **options)
    except (ray.exceptions.RayError, RuntimeError, ValueError, OSError) as error:
        raise StageError(f"Ray {address} cannot be used from this machine: {printable(first_line(error))}") from error
    finally:
        if in_main_thread and before is not None:
            signal.signal(signal.SIGTERM, before)


def _options_of_own(count: int, temporary: str) -> dict[str, Any]:
    """Return the arguments of `ray.init` for a Ray of this process's own, whose files are in a folder."""
    cores = len(os.sched_getaffinity(0))
    return {
        "num_cpus": max(count, cores),
        "num_gpus": len(visible_gpus()),
        "include_dashboard": False,
        "object_store_memory": MEMORY,
        "_temp_dir": temporary,
    }


def check_address(address: str) -> str:
    """Return the address of a cluster that answers, only to those who have its token, and to this process.

    Ray itself would join a cluster that asks for no token, and would wait for minutes where nobody answers.

    Raises:
        ManifestError: there is none; this process has no token; or this worker allows no such address.
        StageError: it does not answer, or takes commands without a token, or has another one.
    """
    if address != "auto" and Allowed.from_environment() and address != os.environ.get("RAY_ADDRESS"):
        raise ManifestError(
            f"place: ray: got {address}; this worker allows auto, local, and what its RAY_ADDRESS names"
        )
    from ray._private.services import canonicalize_bootstrap_address  # as `ray.init` calls it

    try:
        found = canonicalize_bootstrap_address(address)
    except ValueError as error:
        raise ManifestError(f"place: ray: {address}: {printable(first_line(error))}") from error
    except ConnectionError:
        found = None
    if not found:
        raise ManifestError(f"place: ray: {address}: no Ray runs on this machine; use ray: local, or {START_IT}")
    token = _own_token()
    if not token:
        raise ManifestError(f"place: ray: this process has no token for the Ray at {found}: {START_IT}")
    if (answer := _probe(found)) == "OK":
        raise StageError(f"the Ray at {found} takes commands from everybody who reaches it: {START_IT}")
    if answer == "UNAUTHENTICATED" and (answer := _probe(found, token)) == "UNAUTHENTICATED":
        raise StageError(f"the Ray at {found} has another token than this process: {START_IT}")
    if answer != "OK":
        raise StageError(f"no Ray answers at {found} ({answer})")
    return found


def _own_token() -> str:
    """Return the token that Ray would use in this process; "" if there is none."""
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    if not token:
        with suppress(OSError, UnicodeDecodeError):
            token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser().read_text()
    return token.strip() if token.strip().isascii() else ""


def _probe(address: str, token: str = "") -> str:
    """Return how a cluster answers whether it is alive: "OK", "UNAUTHENTICATED", or another status of gRPC."""
    import grpc

    header = [("authorization", f"Bearer {token}")] if token else None
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(CHECK_ALIVE)(b"", timeout=PROBE_SECONDS, metadata=header)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"
