"""What a worker runs, in which environment, and under which name."""

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from json import dumps
from pathlib import Path

from prefect.client.schemas.responses import DeploymentResponse
from prefect.settings import PREFECT_HOME

from flows.deployments import FLOWS
from pusa.errors import PusaError
from pusa.system import allowed, notices
from pusa.system.locks import holder_of, note_holder, open_lock, try_lock
from pusa.system.text import preview

ENTRY_POINTS = {f"flows.{name}.{name}": name for name in FLOWS}


def require_own_flow(deployment: DeploymentResponse) -> str:
    """Return the name of the flow of Pusa's that a deployment runs.

    Raises:
        PusaError: it runs something else, or fetches code first.
    """
    flow = ENTRY_POINTS.get(deployment.entrypoint or "")
    if flow is None:
        ours = ", ".join(ENTRY_POINTS)
        raise PusaError(
            f"the deployment {preview(deployment.name)} runs {preview(deployment.entrypoint)}; this worker runs "
            f"{ours} alone: make the deployment with `pusa deploy`"
        )
    if deployment.pull_steps or deployment.storage_document_id:
        part = "pull steps" if deployment.pull_steps else "a storage block"
        raise PusaError(
            f"the deployment {preview(deployment.name)} has {part}, which fetch code; this worker runs the package "
            "that is installed: make the deployment with `pusa deploy`"
        )
    return flow


def environment(
    ours: Mapping[str, str], folders: Sequence[Path], command: Sequence[str], hosts: Sequence[str]
) -> dict[str, str]:
    """Return the environment of the runs' processes: this process's, with what the worker allows.

    What an option does not say stays as it is in `ours`. What Prefect keeps there about a run around us is left out.
    """
    theirs = {name: value for name, value in ours.items() if not name.startswith("PREFECT__")}
    if folders:
        theirs[allowed.VARIABLE] = os.pathsep.join(map(str, folders))
    if command:
        theirs[notices.COMMAND] = dumps(list(command))
    if hosts:
        theirs[notices.HOSTS] = " ".join(hosts)
    return theirs


@contextmanager
def sole_worker(name: str) -> Iterator[None]:
    """Hold the lock of a worker's name on this machine: what runs under this name is this worker's.

    Raises:
        PusaError: another worker has it, or PREFECT_HOME cannot be written.
    """
    folder = PREFECT_HOME.value() / "workers"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open_lock(folder / f"{name}.lock")
    except OSError as error:
        raise PusaError(f"{folder} cannot be written ({error.strerror}); set PREFECT_HOME to another folder") from error
    with lock:
        if not try_lock(lock, fcntl.LOCK_EX, wait=False):
            raise PusaError(f"{holder_of(lock)} is a worker named {name!r} already; choose another name with --name")
        note_holder(lock)
        yield
