"""Run work in slots: in this process, or in one resident process for each GPU.

A process slot starts its process at its first run. The process lives until the slot closes, so what a call keeps in
module globals, such as a model, is there for the next call. A GPU's process sees only that GPU, and holds its lock.

This is the parent's side; `slot_worker` is the process's. Another transport is another subclass of `Slot`, and a line
in `open_slots`.
"""

import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import copy_context
from itertools import pairwise
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

from pusa.errors import ManifestError, StageError
from pusa.system.devices import VISIBLE, Device, hold_device, visible_gpus
from pusa.system.processes import ending, kill
from pusa.system.threads import DaemonThreadPool

STARTS = 3  # of a process that dies before it is ready, as where memory is short
END_SECONDS = 10.0  # between the end of a process's pipe and its own
SERVE = "import sys; from pusa.system.slot_worker import serve; serve(int(sys.argv[1]), int(sys.argv[2]))"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

Result = TypeVar("Result")
Work = TypeVar("Work")
Emit = Callable[[Any], None]


class WorkerDied(StageError):
    """The process of a slot died in a call. `how`: "signal 9", "exit code 1", or the error of a lost GPU."""

    def __init__(self, how: str) -> None:
        super().__init__(f"the worker process died ({how})")
        self.how = how

    def __reduce__(self) -> tuple[type["WorkerDied"], tuple[str]]:
        """Return how to make an equal one in another process."""
        return type(self), (self.how,)


class SlotClosed(StageError):
    """A slot was closed while it worked, because the run ends: its work is not to blame."""


class Step(Protocol):
    """Run a named part of the work: directly, or as a task that an engine shows."""

    def __call__(self, name: str, call: Callable[[], Result], /) -> Result:
        """Return what `call` returns, or raise its error."""


def call_directly(name: str, call: Callable[[], Result], /) -> Result:
    """Return what `call` returns; the name is for engines."""
    return call()


class Slot(ABC):
    """A place where one call runs at a time."""

    name: str

    @abstractmethod
    def run(self, call: Callable[..., Result], *arguments: Any, on_event: Emit) -> Result:
        """Return `call(*arguments, emit)`, which runs in the slot.

        Args:
            call: a function at the top of a module.
            arguments: values that can be pickled.
            on_event: called in this thread, in order, with each value that the call gives to `emit`. Any thread of the
                call may use `emit`, until the call returns.

        Raises:
            WorkerDied: the slot's process died. The next run starts another.
            SlotClosed: the slot was closed.
            StageError: the process cannot be started, or the call raised an error that cannot be pickled.
            Exception: any other error that the call raised, with those that it was raised from.
        """

    @abstractmethod
    def close(self) -> None:
        """End the slot; a process is killed, whatever it does. Any thread may close a slot."""


class HereSlot(Slot):
    """This process, in the thread that calls `run`."""

    name = "here"

    def run(self, call: Callable[..., Result], *arguments: Any, on_event: Emit) -> Result:
        """Call it."""
        return call(*arguments, on_event)

    def close(self) -> None:
        """Do nothing: no call outlasts its `run`."""


class ProcessSlot(Slot):
    """A process that dies with this one. Its decoders die with it, and its encoders when their input ends.

    Args:
        name: the slot's name for people.
        environment: variables of the process, beside those of this one.
        device: the GPU that the process uses, and locks before its first call; None: none.
    """

    def __init__(self, name: str, environment: Mapping[str, str] = {}, device: Device | None = None) -> None:
        self.name = name
        self._environment = {**environment, VISIBLE: device.visible if device else ""}
        self._device = device
        # The kernel kills a process when the thread that started it ends: this one lives as long as the slot.
        self._starter = DaemonThreadPool(1)
        self._running, self._changing = threading.RLock(), threading.Lock()
        self._worker: _Worker | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Return the number of the process; None if none was started, or it is gone."""
        worker = self._worker
        return worker.process.pid if worker and worker.process.poll() is None else None

    def run(self, call: Callable[..., Result], *arguments: Any, on_event: Emit) -> Result:
        """Run a call in the process; see `Slot.run`."""
        message = _message(call, *arguments)
        with self._running:
            answered = False
            try:
                worker = self._ready_worker()
                kind, value = worker.answer(message, on_event)
                answered = True
            except _Lost as lost:
                raise self._closed_or(WorkerDied(lost.how)) from lost
            finally:
                if not answered:  # it may be busy still: an error of `on_event`, an interrupt
                    self._end_worker()
        if kind == "error":
            raise _chained(value)
        return value

    def close(self) -> None:
        """Kill the process and wait until it is gone."""
        with self._changing:
            self._closed = True
            worker = self._worker
        if worker:
            kill(worker.process)
        with self._running:  # wait until a call that ran has noticed
            self._end_worker()
        self._starter.close()

    def _ready_worker(self) -> "_Worker":
        """Return the process, started if there is none. A death at its start is not the fault of any work."""
        if self._closed:
            raise SlotClosed(f"slot {self.name} is closed")
        if self.pid and self._worker:
            return self._worker
        how = ""
        for _ in range(STARTS):
            self._end_worker()
            worker = self._starter.submit(self._start).result()
            try:
                kind, value = worker.answer(_message(hold_device, self._device), lambda event: None)
            except _Lost as lost:
                how = lost.how
                continue
            if kind == "error":
                raise _chained(value)
            return worker
        raise self._closed_or(StageError(f"slot {self.name}: the worker process did not start ({how})"))

    def _start(self) -> "_Worker":
        with self._changing:
            if self._closed:
                raise SlotClosed(f"slot {self.name} is closed")
            self._worker = _Worker(self._environment)
            return self._worker

    def _end_worker(self) -> None:
        with self._changing:
            worker, self._worker = self._worker, None
        if worker:
            kill(worker.process)
            worker.pipe.close()

    def _closed_or(self, error: StageError) -> StageError:
        return SlotClosed(f"slot {self.name} was closed while it worked") if self._closed else error


class _Lost(Exception):
    """The process is gone, or cannot be understood any more."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.how = how


class _Worker:
    """A process, and the pipe to it.

    A new interpreter, unlike a fork of this one or multiprocessing's spawn, runs nothing of the main module, and reads
    its environment before any library. It has a session of its own, so Ctrl-C is for the parent alone; what it prints
    goes to stderr, since stdout is for results.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self.process = subprocess.Popen(  # noqa: S603  no part of the command comes from a file
                [sys.executable, "-P", "-c", SERVE, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
            )
            self.pipe = Connection(ours.detach())

    def answer(self, message: bytes, on_event: Emit) -> tuple[str, Any]:
        """Send a message and return the answer: "result" and its value, or "error" and its pickled causes.

        Raises:
            _Lost: the process has died.
        """
        try:
            self.pipe.send_bytes(message)
        except OSError as error:
            raise _Lost(self._how_it_ended()) from error
        while True:
            try:
                # A process may run no code here that it could not run there: both are this program.
                kind, value = pickle.loads(self.pipe.recv_bytes())  # noqa: S301
            except (EOFError, OSError, pickle.UnpicklingError) as error:
                raise _Lost(self._how_it_ended()) from error
            if kind == "event":
                on_event(value)
            elif kind == "log":
                _log(value)
            elif kind == "dead device":
                raise _Lost(value)
            else:
                return kind, value

    def _how_it_ended(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)
        return "its messages ended" if self.process.poll() is None else ending(self.process)


def _message(call: Callable[..., Any], *arguments: Any) -> bytes:
    """Return a call, with the levels of this process's loggers."""
    loggers = {"": logging.root, **logging.root.manager.loggerDict}
    levels = {
        name: logger.level for name, logger in loggers.items() if isinstance(logger, logging.Logger) and logger.level
    }
    return pickle.dumps((levels, pickle.dumps((call, arguments))))


def _log(attributes: dict[str, Any]) -> None:
    record = logging.makeLogRecord(attributes)
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)


def _chained(pickled: Sequence[bytes]) -> BaseException:
    """Return the first error, raised from the next one, and so on."""
    errors = [pickle.loads(error) for error in pickled]  # noqa: S301
    for error, cause in pairwise(errors):
        error.__cause__ = cause
    return errors[0]


@contextmanager
def open_slots(place: Any, devices: Sequence[Device] | None = None) -> Iterator[list[Slot]]:
    """Yield the slots of a place, and close them afterwards.

    Args:
        place: a manifest's `place` as JSON values. "local": a process for each visible GPU, or this process if there is
            none; {"gpus": [0, 2]}: a process for each of these; {"processes": 2}: processes on the CPU, which share its
            cores.
        devices: the visible GPUs; None: ask torch.

    Raises:
        ManifestError: there is no such GPU.
    """
    slots = _slots_of(place, devices)
    try:
        yield slots
    finally:
        _close_all(slots)


def _slots_of(place: Any, devices: Sequence[Device] | None) -> list[Slot]:
    if isinstance(place, dict) and "processes" in place:
        count = place["processes"]
        return [ProcessSlot(f"process {number}", _cores(count)) for number in range(count)]
    devices = visible_gpus() if devices is None else devices
    numbers = place["gpus"] if isinstance(place, dict) else range(len(devices))
    if missing := [number for number in numbers if number >= len(devices)]:
        there = f"{len(devices)} visible GPUs, numbers 0 to {len(devices) - 1}" if devices else "no visible GPU"
        raise ManifestError(f"place: gpus: got {missing[0]}; this machine has {there}")
    environment = _cores(len(numbers) or 1)
    return [ProcessSlot(f"gpu {number}", environment, devices[number]) for number in numbers] or [HereSlot()]


def _cores(processes: int) -> dict[str, str]:
    """Return the environment of one of several processes that share the cores; what the user set stays."""
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    return {name: os.environ.get(name, str(threads)) for name in THREADS}


def run_in_slots(slots: Sequence[Slot], take: Callable[[], Work | None], work: Callable[[Slot, Work], None]) -> None:
    """Work in all slots until there is nothing left to take.

    Each slot has a thread, with a copy of the caller's context variables, that calls `take` and then `work`. A single
    slot in this process uses the caller's thread. The first error, or an interrupt of the caller, closes all slots:
    work that runs in a process then ends with `SlotClosed`. It is raised here once no `work` runs any more.

    Args:
        slots: where the work is done.
        take: returns the next work, or None for a slot that is to stop. It may wait for what other slots do.
        work: does it, in the slot. It runs in several threads at once.
    """
    if [type(slot) for slot in slots] == [HereSlot]:
        while (item := take()) is not None:
            work(slots[0], item)
        return
    stopped, ended = threading.Event(), SimpleQueue[BaseException | None]()
    at_work = [threading.Lock() for _ in slots]

    def loop(slot: Slot, working: threading.Lock) -> None:
        try:
            while not stopped.is_set() and (item := take()) is not None:
                with working:
                    if not stopped.is_set():
                        work(slot, item)
        except BaseException as error:  # noqa: BLE001  it is raised in the caller's thread
            ended.put(error)
        else:
            ended.put(None)

    for slot, working in zip(slots, at_work, strict=True):
        run = copy_context().run
        threading.Thread(target=run, args=(loop, slot, working), name=f"slot {slot.name}", daemon=True).start()
    try:
        for _ in slots:
            if error := ended.get():
                raise error
    except BaseException:
        stopped.set()
        _close_all(slots)
        for working in at_work:
            with working:  # a thread that waits in `take` is left behind
                pass
        raise


def _close_all(slots: Sequence[Slot]) -> None:
    """Close slots together: each waits until its process is gone."""
    pool = DaemonThreadPool(len(slots))
    for closed in [pool.submit(slot.close) for slot in slots]:
        closed.result()
    pool.close()
