"""Run work in slots on the machines of a Ray cluster: an actor for each slot, which holds a GPU for life.

The actor does not do the work: it has a `ProcessSlot`, whose process does. So a job that kills its process costs no
actor, and locks, threads, errors and log records are the same as on one machine. Ray chooses the machine and carries
messages. It tries nothing again: an actor that is lost ends its call with `WorkerDied`, and the slot asks for another.
"""

import io
import logging
import os
import pickle
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from pusa.errors import StageError
from pusa.system.devices import UUID, Device
from pusa.system.files import PARTIAL, write_text
from pusa.system.ray_cluster import connected
from pusa.system.slot_worker import (
    Emit,
    RecordSender,
    chained,
    log_record,
    logger_levels,
    pickled_causes,
    set_logger_levels,
)
from pusa.system.slots import STARTS, ProcessSlot, Result, Slot, SlotClosed, SlotLost, WorkerDied, share_cores
from pusa.system.text import first_line, printable

log = logging.getLogger(__name__)
PATIENCE = 60.0  # seconds for an actor to be placed, and for the lock of its GPU; then it is asked for again
ANSWER_SECONDS = 15.0  # for an actor that is there, and has nothing else to do
FOLDER_SECONDS = 15.0  # until another machine sees a new file: network file systems remember what was not there
PASSED_ON = ("PUSA_ALLOWED_FOLDERS", "PUSA_CACHE")  # others may be secrets, and Ray encrypts nothing
EQUAL = ("pusa", "ray", "torch")  # packages whose versions must be equal on all machines


class _Gone(Exception):
    """An actor does not answer any more."""


# What runs in the actor.


class SlotActor:
    """A process slot on a machine of the cluster, and its answers as plain data."""

    def __init__(self, name: str, environment: Mapping[str, str], gpu: bool) -> None:
        device = None
        if gpu:
            import ray

            visible = ray.get_runtime_context().get_accelerator_ids()["GPU"][0]
            device = Device(visible, visible if UUID.fullmatch(visible) else None)
        self._slot = ProcessSlot(name, environment, device, PATIENCE)

    def ping(self) -> bool:
        """Return True."""
        return True

    def look(self, folder: str, token: str, current: str) -> dict[str, Any]:
        """Return the host, its versions, and whether it sees a file of the run's folder."""
        with suppress(OSError):  # for relative paths in a manifest
            os.chdir(current)
        end = time.monotonic() + FOLDER_SECONDS
        while not (seen := os.path.exists(os.path.join(folder, token))) and time.monotonic() < end:
            time.sleep(0.2)
        return {"host": socket.gethostname(), "versions": _versions(), "sees folder": seen}

    def answer(self, levels: Mapping[str, int], content: bytes | None) -> Iterator[tuple[str, Any]]:
        """Make a call in the process, or only start it, and yield its messages.

        These are "event" and a pickled value, and "log" and the attributes of a record; at the end "result" and a
        pickled value, "error" and pickled errors, "died" and how, or "lost" and why the process cannot be had.
        """
        set_logger_levels(levels)
        messages: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        handler = RecordSender(lambda record: messages.put(("log", record)))

        def work() -> None:
            logging.root.addHandler(handler)
            end: tuple[str, Any]
            try:
                end = ("result", self._run(content, lambda value: messages.put(("event", value))))
            except WorkerDied as died:
                end = ("died", died.how)
            except (SlotLost, SlotClosed) as lost:
                end = ("lost", str(lost))
            except BaseException as error:  # noqa: BLE001  it is raised at the other end
                end = ("error", pickled_causes(error))
            finally:
                logging.root.removeHandler(handler)
            messages.put(end)

        threading.Thread(target=work, daemon=True).start()
        kind = ""
        while kind in ("", "event", "log"):
            kind, value = messages.get()
            yield kind, value

    def _run(self, content: bytes | None, on_event: Emit) -> bytes | None:
        if content is None:
            self._slot.start()
            return None
        return self._slot.run(call_pickled, content, on_event=on_event)

    def close(self) -> None:
        """End the process, and free its GPU."""
        self._slot.close()


def call_pickled(content: bytes, emit: Emit) -> bytes:
    """Make a pickled call, in the process of a slot; its events and its result are pickled, too.

    The actor between hands them on as they are: to unpickle them it would have to import what they need.
    """
    call, arguments = pickle.loads(content)  # noqa: S301  from the command, through Ray, which asks for its token
    return pickle.dumps(call(*arguments, lambda value: emit(pickle.dumps(value))))


def _versions() -> dict[str, str]:
    """Return the versions that must be equal on all machines."""
    found = {"Python": ".".join(map(str, sys.version_info[:2]))}
    for package in EQUAL:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


class _Details(io.TextIOBase):
    """Logs the first line of what is printed."""

    def write(self, text: str) -> int:
        """Log a text, which may have hundreds of lines of Ray's state."""
        if words := text.strip():
            log.debug("%s", printable(words.splitlines()[0]))
        return len(text)


# The slots, in the command.


@dataclass(frozen=True)
class _Cluster:
    """A Ray cluster that this process is connected to. `unit`: what a slot holds there, "GPU" or "CPU"."""

    ray: Any
    unit: str
    environment: Mapping[str, str]
    folder: Path
    token: str  # the name of a file in the folder

    def new_actor(self, name: str) -> Any:
        """Return a new actor, which Ray places as soon as a GPU or core is free. It ends with this process."""
        gpu = self.unit == "GPU"
        options = {"num_gpus": int(gpu), "num_cpus": int(not gpu), "max_restarts": 0, "max_task_retries": 0}
        kind = self.ray.remote(max_concurrency=2, **options)(SlotActor)  # one call, and `close` beside it
        return kind.remote(name, dict(self.environment), gpu)

    def describe_free(self) -> str:
        """Return how many GPUs or cores are free, for a message."""
        total = _count(self.ray, self.unit)
        return f"{self.ray.available_resources().get(self.unit, 0):g} of {total:g} {self.unit}s are free"


class RaySlot(Slot):
    """An actor of a Ray cluster, which is replaced when it is lost."""

    def __init__(self, cluster: _Cluster, number: int) -> None:
        self.name = self._plain_name = f"ray {number}"
        self._cluster = cluster
        self._running, self._changing = threading.RLock(), threading.Lock()
        self._actor: Any = None
        self._is_there = False  # the actor has answered
        self._closed = threading.Event()

    def start(self) -> None:
        """Wait for an actor, and for the lock of its GPU; see `Slot.start`."""
        with self._running:
            while True:
                if self._answers():
                    return
                try:
                    return self._replace_actor()
                except SlotLost as lost:
                    log.warning("%s; asking again", lost)

    def run(self, call: Callable[..., Result], *arguments: Any, on_event: Emit) -> Result:
        """Run a call in the actor's process; see `Slot.run`."""
        content = pickle.dumps((call, arguments))
        with self._running:
            if not self._answers():  # it was lost since the last call, or in it
                raise SlotLost(f"slot {self.name} has no Ray actor")
            return pickle.loads(self._converse(content, on_event))  # noqa: S301  as in `call_pickled`

    def close(self) -> None:
        """End the actor's process and wait until it is gone, then end the actor."""
        self._closed.set()
        self._end_actor()

    def _replace_actor(self) -> None:
        """Have another actor, with the lock of its GPU.

        Raises:
            SlotLost: there is none within `PATIENCE`.
            StageError: it cannot work there; or it died again and again before it could.
        """
        how = ""
        for _ in range(STARTS):
            self._end_actor()
            try:
                return self._start_actor()
            except _Gone as gone:
                how = str(gone)
            except BaseException:
                self._end_actor()
                raise
        raise self._closed_or(StageError(f"slot {self._plain_name}: its Ray actor did not start ({how})"))

    def _answers(self) -> bool:
        """Return whether the actor is there."""
        if self._closed.is_set():
            raise SlotClosed(f"slot {self.name} is closed")
        try:
            return self._is_there and bool(self._ask("ping", ANSWER_SECONDS))
        except (_Gone, SlotLost):
            return False

    def _start_actor(self) -> None:
        with self._changing:
            if self._closed.is_set():
                raise SlotClosed(f"slot {self.name} is closed")
            self._actor = self._cluster.new_actor(self._plain_name)
        where = str(self._cluster.folder), self._cluster.token, os.getcwd()
        about = self._ask("look", PATIENCE, *where)
        host, ours = printable(str(about["host"]), 100), _versions()
        pairs = ((name, there, ours.get(name)) for name, there in about["versions"].items())
        if different := [f"{name} {there}, not {here}" for name, there, here in pairs if there != here]:
            raise StageError(f"the Ray worker on {host} has {', '.join(different)}: install the same on all machines")
        if not about["sees folder"]:
            raise StageError(
                f"the Ray worker on {host} does not see the files of {self._cluster.folder}: put the run's folder "
                "where all machines have it, by the same path"
            )
        self.name = f"{self._plain_name} ({host})"
        self._converse(None, lambda event: None)
        self._is_there = True

    def _ask(self, method: str, seconds: float, *arguments: str) -> Any:
        """Return what a method of the actor returns. Raises SlotLost if it does not within `seconds`."""
        cluster = self._cluster
        with self._lost_as_gone():
            reference = getattr(self._current(), method).remote(*arguments)
            ready, _ = cluster.ray.wait([reference], timeout=seconds)
            if ready:
                return cluster.ray.get(reference)
        free = cluster.describe_free()
        raise SlotLost(f"slot {self._plain_name} has waited {seconds:.0f} s for a {cluster.unit} of Ray ({free})")

    def _converse(self, content: bytes | None, on_event: Emit) -> Any:
        """Return the pickled result of a call that the actor makes. An actor that cannot go on is ended."""
        get, kind = self._cluster.ray.get, ""
        value: Any = None
        try:
            with self._lost_as_gone():
                messages = self._current().answer.options(num_returns="streaming").remote(logger_levels(), content)
            while kind not in ("result", "error", "died"):
                with self._lost_as_gone():
                    kind, value = get(next(messages))
                if kind == "event":
                    on_event(pickle.loads(value))  # noqa: S301  as in `call_pickled`
                elif kind == "log":
                    log_record(value)
                elif kind == "lost":
                    raise self._closed_or(SlotLost(value))
        except _Gone as gone:
            self._end_actor()
            if content is None:
                raise
            raise self._closed_or(WorkerDied(str(gone))) from gone
        except BaseException:  # it may be busy still: an error of `on_event`, an interrupt
            self._end_actor()
            raise
        if kind == "error":
            raise chained(value)
        if kind == "died":
            raise WorkerDied(value)
        return value

    def _current(self) -> Any:
        """Return the actor, which `close` may have ended meanwhile."""
        actor = self._actor
        if actor is None:
            raise SlotClosed(f"slot {self.name} is closed")
        return actor

    @contextmanager
    def _lost_as_gone(self) -> Iterator[None]:
        """Raise Ray's errors of a lost actor or machine as `_Gone`, or as SlotClosed if this process has ended it."""
        from ray.exceptions import RayError, RayTaskError

        try:
            yield
        except (RayError, StopIteration) as error:
            if isinstance(error, RayTaskError):  # ours: `answer` sends errors of the work as messages
                raise
            raise self._closed_or(_Gone(_describe(error))) from error

    def _closed_or(self, error: Exception) -> Exception:
        """Return an error, or SlotClosed if the slot was closed, which explains it."""
        return SlotClosed(f"slot {self.name} was closed while it worked") if self._closed.is_set() else error

    def _end_actor(self) -> None:
        """End the actor if there is one; wait until its process is gone, if it can be reached."""
        with self._changing:
            actor, was_there = self._actor, self._is_there
            self._actor, self._is_there = None, False
        if actor is None:
            return
        from ray.exceptions import GetTimeoutError, RayError

        if was_there:
            with suppress(RayError, GetTimeoutError):
                self._cluster.ray.get(actor.close.remote(), timeout=ANSWER_SECONDS)
        with suppress(RayError, ValueError):  # Ray may have ended it
            self._cluster.ray.kill(actor)


def _describe(error: BaseException) -> str:
    """Return the reason in Ray's error of a lost actor, which has many lines."""
    if missing := re.search(r"(?:ModuleNotFound|Import)Error: ([^\n]*)", str(error)):
        return printable(f"Pusa is not installed on its machine: {missing[1]}", 300)
    because = re.search(r"because (its [^.\n]*)", str(error))
    return printable(because[1] if because else f"{type(error).__name__}: {first_line(error)}", 300)


@contextmanager
def ray_slots(address: str, count: int, folder: Path) -> Iterator[list[Slot]]:
    """Yield the slots of a Ray cluster, and leave it afterwards. The caller closes the slots before.

    Meanwhile what this process prints is logged as details: Ray prints much, and stdout is for results.

    Args:
        address: "auto": the cluster that this machine is in, or of RAY_ADDRESS; "local": a Ray of this process's own,
            on the loopback address; or HOST:PORT.
        count: the number of slots. Those for which the cluster has no GPU, or core, wait for one.
        folder: what the slots write.

    Raises:
        ManifestError: Ray is not installed, or runs nowhere; or the address is not one that a worker allows.
        StageError: the cluster takes commands without a token, or this process's token is not its own.
    """
    folder = folder.absolute()
    with redirect_stdout(_Details()), connected(address, count) as ray:
        name = f"{PARTIAL}ray-{secrets.token_hex(8)}"
        write_text(folder / name, "a sign for the workers of Ray that they see this folder\n")
        try:
            unit = "GPU" if _count(ray, "GPU") else "CPU"
            there = int(_count(ray, unit))
            if not there:
                raise StageError("the Ray cluster has no GPU and no CPU: start Ray on a machine with --num-cpus")
            if there < count:
                log.warning(
                    "the Ray cluster has %d %ss: %d of %d slots wait for more", there, unit, count - there, count
                )
            # A GPU has its share of the cores of its machines, the slots of a cluster without GPUs share all cores.
            cores = int(sum(node["Resources"].get("CPU", 0) for node in _nodes(ray, unit)))
            threads = share_cores(there if unit == "GPU" else count, max(1, cores))
            own = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
            cluster = _Cluster(ray, unit, own | threads, folder, name)
            yield [RaySlot(cluster, number) for number in range(count)]
        finally:
            (folder / name).unlink(missing_ok=True)


def _nodes(ray: Any, unit: str) -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get(unit)]


def _count(ray: Any, unit: str) -> float:
    return float(sum(node["Resources"][unit] for node in _nodes(ray, unit)))
