"""Share work between processes through file locks.

The processes may run on any machines that share a folder. The locks are the operating system's, so a lock is free as
soon as its holder dies. On a network file system they reach as far as its flock does: NFS 4, CephFS, and Lustre mounted
with `flock` lock across machines. Where a folder cannot lock at all, a `StageError` names it.
"""

import errno
import fcntl
import json
import logging
import os
import random
import socket
import stat
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from threading import Event, Lock, Thread
from typing import IO, Any, Generic, Protocol, TypeVar

from pusa.errors import StageError
from pusa.system.files import LOCK, make_own_folder, parse_json, remove, remove_partials, require_own
from pusa.system.text import local_time, printable

log = logging.getLogger(__name__)
LOCKS_FOLDER = ".claims"
SECONDS_BETWEEN_LOOKS = 1.0  # before locks that other processes hold are tried again
SECONDS_OF_SILENCE = 3.0  # before a wait for a lock is logged
SECONDS_OF_A_START = 10.0  # of a program, at most, on a busy machine
SECONDS_BETWEEN_REPORTS = 60.0  # of a wait
MAX_PLAN = 1 << 16  # bytes of a plan
_HOLDER = "holder"  # the key, in a lock, of the process that holds it


@contextmanager
def sole_writer(folder: Path) -> Iterator[Callable[[], None]]:
    """Hold the lock of a folder, created if needed, and remove the unfinished files of killed writers.

    Yields a function that raises StageError once the folder is not at its place any more. It is called at the end, too.

    Raises:
        StageError: another process holds the lock, the folder cannot lock, it holds files of somebody else, or it was
            moved, removed or replaced meanwhile.
    """
    require_own(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open_lock(folder / LOCK) as lock:
        if not _lock_alone(lock):
            raise StageError(f"{folder} is being written by {holder_of(lock)}; wait for it, or use another --run-dir")
        note_holder(lock)
        remove_partials(folder)
        _held.add(lock)
        try:
            yield partial(_require_in_place, folder, lock)
        finally:
            _held.discard(lock)
        _require_in_place(folder, lock)


def _lock_alone(lock: IO[Any]) -> bool:
    """Take a lock and return True; return False if another process holds it.

    A child that a killed process was just starting has that one's lock until its program begins: that is waited for.
    """
    until = time.monotonic() + SECONDS_OF_A_START
    while not try_lock(lock, fcntl.LOCK_EX, wait=False):
        if not _holder_is_dead(lock) or time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def _require_in_place(folder: Path, lock: IO[str]) -> None:
    """Raise StageError if a folder's lock is not the one that is held: what is written now is apart from the rest."""
    with suppress(FileNotFoundError, NotADirectoryError):
        if os.path.samestat(os.stat(folder / LOCK), os.fstat(lock.fileno())):
            return
    raise StageError(
        f"{folder} was moved, removed or replaced while it was written, so a part of the files is not there; move it "
        "back, or run again to make what is missing"
    )


def _close_inherited_locks() -> None:
    """Close the locks in a forked child, which would otherwise keep them after its parent is killed."""
    for lock in _held:
        lock.close()


_held: set[IO[str]] = set()
os.register_at_fork(after_in_child=_close_inherited_locks)


class WorkItem(Protocol):
    """A part of the work. Its name is a file name, and the same in every process."""

    @property
    def name(self) -> str:
        """The name of its lock."""


Item = TypeVar("Item", bound=WorkItem)


@dataclass(frozen=True)
class WorkGroup:
    """The processes that write one folder together, seen from one of them; `plan` is that of the first of them."""

    folder: Path
    folder_lock: IO[str]
    plan: Mapping[str, Any]

    @contextmanager
    def lock(self, name: str, wait: bool = False) -> Iterator[bool]:
        """Yield whether this process holds the lock `name`; with `wait`, wait until it does."""
        with self.open_lock(name) as file:
            locked = try_lock(file, fcntl.LOCK_EX, wait)
            if locked:
                note_holder(file)
            yield locked

    def open_lock(self, name: str) -> IO[str]:
        """Open the lock `name`, created if needed."""
        folder = self.folder / LOCKS_FOLDER
        make_own_folder(folder, "locks")
        return open_lock(folder / f"{name}.lock")

    def is_held(self, name: str) -> bool:
        """Return whether another process, or another part of this one, holds the lock `name`."""
        with self.lock(name) as locked:
            return not locked

    def require_in_place(self) -> None:
        """Raise StageError if the folder was moved, removed or replaced: what is written now is apart from the rest."""
        _require_in_place(self.folder, self.folder_lock)

    def is_alone(self) -> bool:
        """Return whether no other process is in the group; if so, none can join until this one leaves.

        Call it once, as the last thing before this process leaves.
        """
        return try_lock(self.folder_lock, fcntl.LOCK_EX, wait=False)


class WaitReports:
    """Log now and then who holds a lock that the threads of this process wait for."""

    def __init__(self, group: WorkGroup) -> None:
        self._group, self._lock, self._next_at = group, Lock(), 0.0

    def add(self, name: str, more: int = 0) -> None:
        """Note that a thread waits for the lock `name`, and for `more` others, which somebody else holds."""
        with self._lock:
            if time.monotonic() < self._next_at:
                return
            self._next_at = time.monotonic() + SECONDS_BETWEEN_REPORTS
        with self._group.open_lock(name) as file:
            _report_wait(file, more)


class WorkQueue(Generic[Item]):
    """The items of a group's work, shared by the threads of this process.

    Items that another process holds come again until that process is done or dead; the log says which it is.
    """

    def __init__(self, group: WorkGroup, items: Iterable[Item]) -> None:
        self._group, self._lock = group, Lock()
        self._waiting = deque((0.0, item) for item in items)  # each with the time from which its lock is tried
        self._reports = WaitReports(group)

    def take(self) -> Item | None:
        """Return the next item, to be passed to `complete`; None if there is none that no thread of this process has.

        Waits if others hold all that are left.
        """
        with self._lock:
            if not self._waiting:
                return None
            time_to_try, item = self._waiting.popleft()
            others = len(self._waiting)
        if (seconds := time_to_try - time.monotonic()) > 0:
            self._reports.add(item.name, others)
            time.sleep(seconds)
        return item

    def complete(self, item: Item, complete: Callable[[], None]) -> None:
        """Call `complete` under the item's lock, or put the item back if another process holds it.

        It is put back, too, if `complete` raises an error. `complete` must find out what other processes left undone.
        """
        completed = False
        try:
            with self._group.lock(item.name) as locked:
                if locked:
                    complete()
                    completed = True
        finally:
            if not completed:
                with self._lock:
                    self._waiting.append((time.monotonic() + SECONDS_BETWEEN_LOOKS, item))


@contextmanager
def join_work(
    folder: Path, clean_up: Callable[[], None], plan: Mapping[str, Any], agreed_key: str = "made_from"
) -> Iterator[WorkGroup]:
    """Join the processes that write a folder, which is created if needed.

    Args:
        folder: where they write.
        clean_up: called if no other process is in the group, after the unfinished files of killed ones are removed.
        plan: what this process would do, as JSON values. Processes that join later are given the first one's plan.
        agreed_key: the key of the plan whose value must be equal in all processes.

    Raises:
        StageError: other processes make something else there, the folder cannot lock, it holds files of somebody else,
            or it was moved, removed or replaced meanwhile.
    """
    require_own(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open_lock(folder / LOCK) as lock:
        while True:
            if try_lock(lock, fcntl.LOCK_EX, wait=False):
                # Empty the plan first: if this process dies before it writes its own, nobody follows an old one.
                note_holder(lock)
                remove_partials(folder)
                clean_up()
                lock.truncate(0)
                lock.write(json.dumps(dict(plan)))
                lock.flush()
            try_lock(lock, fcntl.LOCK_SH, wait=True)
            group_plan = _read_plan(lock, agreed_key)
            if group_plan.get(agreed_key) == plan[agreed_key]:
                break
            # The plan may be of a process that is gone. If there is no plan, its writer died before it wrote one.
            if group_plan and not try_lock(lock, fcntl.LOCK_EX, wait=False):
                raise StageError(
                    f"{folder} is being written by a process that works from other sources, with other weights or "
                    "settings; wait for it, or use another folder"
                )
            if not group_plan:
                fcntl.flock(lock, fcntl.LOCK_UN)
                time.sleep(random.uniform(0, SECONDS_BETWEEN_LOOKS / 4))  # noqa: S311
        yield WorkGroup(folder, lock, group_plan)
        _require_in_place(folder, lock)


@contextmanager
def join_as_worker(folder: Path) -> Iterator[WorkGroup]:
    """Join the group that this worker's parent has joined already, for as long as the context lasts.

    Raises:
        StageError: the folder was moved or removed.
    """
    with open_lock(folder / LOCK) as lock:
        try_lock(lock, fcntl.LOCK_SH, wait=True)
        yield WorkGroup(folder, lock, {})


def _read_plan(lock: IO[str], agreed_key: str) -> dict[str, Any]:
    """Return the plan in a lock; an empty one if there is none."""
    plan = parse_json(os.pread(lock.fileno(), MAX_PLAN, 0))
    return plan if isinstance(plan, dict) and agreed_key in plan else {}


def remove_work_locks(folder: Path) -> None:
    """Remove the lock files of work items. Call it only while alone: others could not see a lock on a removed file."""
    locks = folder / LOCKS_FOLDER
    if locks.is_symlink():
        remove(locks)
    for path in locks.glob("*.lock"):
        remove(path)


def open_lock(path: Path) -> IO[str]:
    """Open a file to lock, created if needed. Its content is kept, and a link is not followed.

    Raises:
        StageError: something else than a file of its own is there.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        if stat.S_ISREG(os.fstat(handle).st_mode):
            return open(path, "a+", encoding="utf-8", opener=lambda name, flags: handle)
        os.close(handle)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
    raise StageError(f"{path} is a link or a folder, or not a file; expected a file to lock: remove it")


def try_lock(file: IO[Any], kind: int, wait: bool, other: str = "another --run-dir") -> bool:
    """Lock an open file and return True; return False if `wait` is false and another process holds the lock.

    Args:
        file: the open file; closing it frees the lock.
        kind: LOCK_EX for the only holder, LOCK_SH for one of several.
        wait: wait until the lock is free; the log says who holds it.
        other: how to choose another folder, for the message.

    Raises:
        StageError: the file system cannot lock.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            return False
        with _reported_wait(file):
            fcntl.flock(file, kind)
    except OSError as error:  # ENOLCK, ENOSYS, EOPNOTSUPP, and whatever else a network or user file system answers
        raise StageError(
            f"{Path(file.name).parent} cannot be locked ({error.strerror}), which keeps two processes from writing "
            f"there at once; use {other} on a file system that can lock; on NFS, start its lock service, or mount it "
            "with local_lock=flock, which locks within one machine"
        ) from error
    return True


def note_holder(lock: IO[Any]) -> None:
    """Write into a lock, in place of its content, that this process holds it now: `holder_of` names it to others."""
    host, since = socket.gethostname(), datetime.now().astimezone().isoformat(" ", "seconds")
    note = {_HOLDER: {"process": os.getpid(), "host": host, "since": since}}
    with suppress(OSError):  # a full disk: the note only serves messages
        os.ftruncate(lock.fileno(), 0)
        os.pwrite(lock.fileno(), json.dumps(note).encode(), 0)


def _read_holder(lock: IO[Any]) -> dict[str, Any]:
    """Return what `note_holder` wrote last; empty if that cannot be read."""
    content = parse_json(os.pread(lock.fileno(), MAX_PLAN, 0))
    holder = content.get(_HOLDER) if isinstance(content, dict) else None
    return holder if isinstance(holder, dict) else {}


def _holder_is_dead(lock: IO[Any]) -> bool:
    """Return whether the process that noted itself last was one of this machine, and is no more."""
    holder = _read_holder(lock)
    process = holder.get("process")
    if holder.get("host") != socket.gethostname() or not isinstance(process, int) or process <= 0:
        return False
    try:
        os.kill(process, 0)
    except (OSError, OverflowError) as error:
        return isinstance(error, ProcessLookupError)
    return False


def holder_of(lock: IO[Any]) -> str:
    """Return who else holds a lock, and since when, as far as that is known."""
    holder = _read_holder(lock)
    if not all(isinstance(holder.get(key), str) for key in ("host", "since")):
        return "another process"
    since = local_time(holder["since"])
    return printable(f"another process ({holder.get('process')} on {holder['host']}, since {since})", 200)


def holder_now(path: Path) -> str | None:
    """Return who holds the lock of a file, as `holder_of`; None if nobody does. The file is not created."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return holder_of(lock)
    except OSError:  # there is none, or it cannot be locked
        pass
    return None


def _report_wait(lock: IO[Any], more: int = 0) -> None:
    others = f" (and for {more} more locks)" if more else ""
    log.info("waiting for %s, which holds %s%s", holder_of(lock), printable(lock.name), others)


@contextmanager
def _reported_wait(lock: IO[Any]) -> Iterator[None]:
    """Log from time to time, while this context lasts, who holds a lock."""
    ended = Event()

    def report() -> None:
        silence = SECONDS_OF_SILENCE
        while not ended.wait(silence):
            _report_wait(lock)
            silence = SECONDS_BETWEEN_REPORTS

    reporter = Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        ended.set()
        reporter.join()  # it reads the lock, which the caller may close
