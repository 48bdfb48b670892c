"""Run work in slots: in this process, or in one resident process for each GPU.

A process slot starts its process at its first run. The process lives until the slot closes, so what a call keeps in
module globals, such as a model, is there for the next call. A GPU's process sees only that GPU, whose lock the slot
holds from its start to its end, also while a process that died is replaced.

The process itself is in slot_worker.py. Slots on the machines of a Ray cluster are in ray_slots.py.
"""

import math
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import copy_context
from pathlib import Path
from typing import IO, Any, Generic, Protocol, TypeVar

from pusa.errors import ManifestError, StageError
from pusa.system.devices import VISIBLE, Device, lock_device, uuid_of, visible_gpus
from pusa.system.processes import kill
from pusa.system.slot_worker import Emit, Lost, Worker, call_message
from pusa.system.threads import DaemonThreadPool

STARTS = 3  # of a process that dies before it is ready, as where memory is short
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

Result = TypeVar("Result")
Work = TypeVar("Work")


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


class SlotLost(StageError):
    """A slot has no process, and may have to wait for one. Its work is not to blame, and is for another slot."""


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
    def start(self) -> None:
        """Wait until the slot can work, for ever if need be; the log says what for.

        A slot that waits so must hold no work that others wait for.

        Raises:
            SlotClosed: the slot was closed.
            StageError: its process cannot be started.
        """

    @abstractmethod
    def run(self, call: Callable[..., Result], *arguments: Any, on_event: Emit) -> Result:
        """Return `call(*arguments, emit)`, which runs in the slot.

        Args:
            call: a function at the top of a module.
            arguments: values that can be pickled.
            on_event: called in this thread, in order, with each value that the call gives to `emit`. Any thread of the
                call may use `emit`, until the call returns.

        Raises:
            WorkerDied: the slot's process died. The next run starts another, or raises SlotLost.
            SlotLost: the slot has no process; `start` waits for one.
            SlotClosed: the slot was closed.
            StageError: the process cannot be started, or the call raised an error that cannot be pickled.
            Exception: any other error that the call raised, with those that it was raised from.
        """

    @abstractmethod
    def close(self) -> None:
        """End the slot; a process is killed, whatever it does. Any thread may close a slot."""


class HereSlot(Slot):
    """This process, in the thread that calls `run`."""

    name = "cpu"

    def __init__(self, name: str = name) -> None:
        self.name = name

    def start(self) -> None:
        """Do nothing: this process can work."""

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
        device: the GPU that the process uses; None: none.
        patience: seconds to wait for the lock of the GPU, after which SlotLost is raised.
    """

    def __init__(
        self,
        name: str,
        environment: Mapping[str, str] = {},
        device: Device | None = None,
        patience: float = math.inf,
    ) -> None:
        self.name, self._patience = name, patience
        self._environment = {**environment, VISIBLE: device.visible if device else ""}
        self._device = device
        # The kernel kills a process when the thread that started it ends: this one lives as long as the slot.
        self._starter = DaemonThreadPool(1)
        self._running, self._changing = threading.RLock(), threading.Lock()
        self._worker: Worker | None = None
        self._device_lock: IO[str] | None = None
        self._closed = threading.Event()

    @property
    def pid(self) -> int | None:
        """Return the number of the process; None if none was started, or it is gone."""
        worker = self._worker
        return worker.process.pid if worker and worker.process.poll() is None else None

    def start(self) -> None:
        """Start the process, and wait for the lock of its GPU; see `Slot.start`."""
        with self._running:
            self._ready_worker()

    def run(self, call: Callable[..., Result], *arguments: Any, on_event: Emit) -> Result:
        """Run a call in the process; see `Slot.run`."""
        message = call_message(call, *arguments)
        with self._running:
            answered = False
            try:
                worker = self._ready_worker()
                value, error = worker.answer(message, on_event)
                answered = True
            except Lost as lost:
                raise self._closed_or(WorkerDied(lost.how)) from lost
            finally:
                if not answered:  # it may be busy still: an error of `on_event`, an interrupt
                    self._end_worker()
        if error:
            raise error
        return value

    def close(self) -> None:
        """Kill the process and wait until it is gone, then free its GPU."""
        with self._changing:
            self._closed.set()
            worker = self._worker
        if worker:
            kill(worker.process)
        with self._running:  # wait until a call that ran has noticed
            self._end_worker()
            if self._device_lock:
                self._device_lock.close()
        self._starter.close()

    def _ready_worker(self) -> Worker:
        """Return the process, started if there is none."""
        if self._closed.is_set():
            raise SlotClosed(f"slot {self.name} is closed")
        if self.pid and self._worker and (self._device_lock or not self._device):
            return self._worker
        worker, uuid = self._start_worker()
        if self._device and self._device_lock is None:
            self._device_lock = lock_device(uuid, self._closed, self._patience)
            if self._device_lock is None and not self._closed.is_set():
                self._end_worker()  # it may have memory of the GPU
                raise SlotLost(f"slot {self.name}: another process has used GPU {uuid} for {self._patience:.0f} s")
            if self._device_lock is None:
                raise SlotClosed(f"slot {self.name} was closed while it waited for its GPU")
        return worker

    def _start_worker(self) -> tuple[Worker, str]:
        """Return a new process, and the UUID of its GPU. A death at its start is not the fault of any work."""
        how = ""
        for _ in range(STARTS):
            self._end_worker()
            worker = self._starter.submit(self._start).result()
            try:
                uuid, error = worker.answer(call_message(uuid_of, self._device), lambda event: None)
            except Lost as lost:
                how = lost.how
                continue
            if error:
                raise error
            return worker, uuid
        raise self._closed_or(StageError(f"slot {self.name}: the worker process did not start ({how})"))

    def _start(self) -> Worker:
        with self._changing:
            if self._closed.is_set():
                raise SlotClosed(f"slot {self.name} is closed")
            self._worker = Worker(self._environment)
            return self._worker

    def _end_worker(self) -> None:
        with self._changing:
            worker, self._worker = self._worker, None
        if worker:
            worker.end()

    def _closed_or(self, error: StageError) -> StageError:
        return SlotClosed(f"slot {self.name} was closed while it worked") if self._closed.is_set() else error


@contextmanager
def open_slots(place: Any, folder: Path, devices: Sequence[Device] | None = None) -> Iterator[list[Slot]]:
    """Yield the slots of a place, and close them afterwards.

    Args:
        place: a manifest's `place` as JSON values. "local": a process for each visible GPU, or this process if there is
            none; {"gpus": [0, 2]}: a process for each of these; {"processes": 2}: processes on the CPU, which share its
            cores; {"ray": "auto", "slots": 16}: actors of a Ray cluster.
        folder: what the slots write; each machine of a cluster must have it.
        devices: the visible GPUs; None: ask torch.

    Raises:
        ManifestError: there is no such GPU, or no such Ray cluster.
    """
    opened: AbstractContextManager[list[Slot]]
    if isinstance(place, dict) and "ray" in place:
        from pusa.system.ray_slots import ray_slots

        opened = ray_slots(place["ray"], place["slots"], folder)
    else:
        opened = nullcontext(_slots_of(place, devices))
    with opened as slots:
        try:
            yield slots
        finally:
            _close_all(slots)


def _slots_of(place: Any, devices: Sequence[Device] | None) -> list[Slot]:
    if isinstance(place, dict) and "processes" in place:
        count = place["processes"]
        return [ProcessSlot(f"process {number}", share_cores(count)) for number in range(count)]
    devices = visible_gpus() if devices is None else devices
    numbers = place["gpus"] if isinstance(place, dict) else range(len(devices))
    if missing := [number for number in numbers if number >= len(devices)]:
        there = f"{len(devices)} visible GPUs, numbers 0 to {len(devices) - 1}" if devices else "no visible GPU"
        raise ManifestError(f"place: gpus: got {missing[0]}; this machine has {there}")
    environment = share_cores(len(numbers) or 1)
    return [ProcessSlot(f"gpu {number}", environment, devices[number]) for number in numbers] or [HereSlot()]


def share_cores(processes: int, cores: int | None = None) -> dict[str, str]:
    """Return the environment of one of several processes that share cores, this machine's by default.

    What the user set stays.
    """
    threads = max(1, (cores or len(os.sched_getaffinity(0))) // processes)
    return {name: os.environ.get(name, str(threads)) for name in THREADS}


def run_in_slots(slots: Sequence[Slot], take: Callable[[], Work | None], work: Callable[[Slot, Work], None]) -> None:
    """Work in all slots until there is nothing left to take.

    Each slot has a thread, with a copy of the caller's context variables, that starts the slot, then calls `take` and
    `work` in turn. A single slot in this process uses the caller's thread. The first error, or an interrupt of the
    caller, closes all slots: work that runs in a process then ends with `SlotClosed`. It is raised here once no `work`
    runs any more. At the end, slots that still wait for their GPU are not waited for. A slot whose `work` raises
    `SlotLost` is started again.

    Args:
        slots: where the work is done.
        take: returns the next work, or None where nothing is left. It may wait for what other slots do.
        work: does it, in the slot. It runs in several threads at once. If it raises `SlotLost`, `take` must return
            that work again.
    """
    if [type(slot) for slot in slots] == [HereSlot]:
        while (item := take()) is not None:
            work(slots[0], item)
        return
    crew = _Crew(take, work)
    at_work = [threading.Lock() for _ in slots]
    for slot, working in zip(slots, at_work, strict=True):
        run = copy_context().run
        threading.Thread(target=run, args=(crew.work_in, slot, working), name=f"slot {slot.name}", daemon=True).start()
    try:
        if slots:
            crew.wait()
    except BaseException:
        crew.stopped.set()
        _close_all(slots)
        for working in at_work:
            with working:  # a thread that waits in `take` is left behind
                pass
        raise


class _Crew(Generic[Work]):
    """The threads of `run_in_slots`."""

    def __init__(self, take: Callable[[], Work | None], work: Callable[[Slot, Work], None]) -> None:
        self.stopped = threading.Event()
        self._take, self._work = take, work
        self._changed = threading.Condition()
        self._busy, self._lost = 0, 0  # threads that take and work; slots that were lost, whose work is left
        self._over = False
        self._error: BaseException | None = None

    def work_in(self, slot: Slot, working: threading.Lock) -> None:
        """Take work and do it until nothing is left; hold `working` while work is done."""
        try:
            while not self._over:
                slot.start()
                with self._changed:
                    if self._over:
                        return
                    self._busy += 1
                    lost_before = self._lost
                try:
                    while not self.stopped.is_set() and (item := self._take()) is not None:
                        with working:
                            if not self.stopped.is_set():
                                self._work(slot, item)
                except SlotLost:
                    self._leave(lost_before, lost=1)
                else:
                    self._leave(lost_before)
        except BaseException as error:  # noqa: BLE001  it is raised in the caller's thread
            with self._changed:
                self._error = error if self._error is None else self._error
                self._changed.notify_all()

    def _leave(self, lost_before: int, lost: int = 0) -> None:
        """Note that a thread has found nothing to take, or has lost its slot. Wait while others may leave work."""
        with self._changed:
            self._busy -= 1
            self._lost += lost
            self._changed.notify_all()
            if not lost:
                self._changed.wait_for(
                    lambda: not self._busy or self._lost > lost_before or self._over or self._error is not None
                )
                self._over = self._over or self._lost == lost_before
                self._changed.notify_all()

    def wait(self) -> None:
        """Return when all work is done, or raise the first error."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._error is not None)
        if self._error is not None:
            raise self._error


def _close_all(slots: Sequence[Slot]) -> None:
    """Close slots together: each waits until its process is gone."""
    pool = DaemonThreadPool(len(slots))
    for closed in [pool.submit(slot.close) for slot in slots]:
        closed.result()
    pool.close()
