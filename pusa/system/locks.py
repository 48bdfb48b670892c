"""Share work between processes through file locks.

The processes may run on any machines that share a folder. The locks are the operating system's, so a lock is free as
soon as its holder dies. On a network file system they reach as far as its flock does: NFS 4, CephFS, and Lustre mounted
with `flock` lock across machines. Where a folder cannot lock at all, a `StageError` names it.
"""

import errno
import fcntl
import json
import os
import random
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from pusa.errors import StageError
from pusa.system.files import remove_partials

LOCKS_FOLDER = ".claims"
SECONDS_BETWEEN_LOOKS = 1.0  # before locks that other processes hold are tried again


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, created if needed, and remove the unfinished files of killed writers.

    Raises:
        StageError: another process holds the lock, or the folder cannot lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open_lock(folder / ".lock") as lock:
        if not try_lock(lock, fcntl.LOCK_EX, wait=False):
            raise StageError(f"{folder} is being written by another process; wait for it, or use another --run-dir")
        remove_partials(folder)
        _held.add(lock)
        try:
            yield
        finally:
            _held.discard(lock)


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
        path = self.folder / LOCKS_FOLDER / f"{name}.lock"
        path.parent.mkdir(exist_ok=True)
        with open_lock(path) as file:
            yield try_lock(file, fcntl.LOCK_EX, wait)

    def complete_all(self, items: Sequence[Item], complete: Callable[[Item], None]) -> None:
        """Return once every item is complete.

        `complete` is called for each item under its lock, and must find out what other processes left undone. Items
        that another process holds are tried again until that process is done or dead.
        """
        remaining = list(items)
        while remaining:
            held_by_others = []
            for item in remaining:
                with self.lock(item.name) as locked:
                    if locked:
                        complete(item)
                    else:
                        held_by_others.append(item)
            if len(held_by_others) == len(remaining):
                time.sleep(SECONDS_BETWEEN_LOOKS)
            remaining = held_by_others

    def is_alone(self) -> bool:
        """Return whether no other process is in the group; if so, none can join until this one leaves.

        Call it once, as the last thing before this process leaves.
        """
        return try_lock(self.folder_lock, fcntl.LOCK_EX, wait=False)


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
        StageError: other processes make something else there, or the folder cannot lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open_lock(folder / ".lock") as lock:
        while True:
            if try_lock(lock, fcntl.LOCK_EX, wait=False):
                # Empty the plan first: if this process dies before it writes its own, nobody follows an old one.
                lock.truncate(0)
                remove_partials(folder)
                clean_up()
                lock.write(json.dumps(dict(plan)))
                lock.flush()
            try_lock(lock, fcntl.LOCK_SH, wait=True)
            group_plan = _read_plan(lock)
            if group_plan.get(agreed_key) == plan[agreed_key]:
                break
            # The plan may be of a process that is gone. If there is no plan, its writer died before it wrote one.
            if group_plan and not try_lock(lock, fcntl.LOCK_EX, wait=False):
                raise StageError(
                    f"{folder} is being written by a process that makes another table there, from other sources or "
                    "with other settings; wait for it, or use another folder"
                )
            if not group_plan:
                fcntl.flock(lock, fcntl.LOCK_UN)
                time.sleep(random.uniform(0, SECONDS_BETWEEN_LOOKS / 4))  # noqa: S311
        yield WorkGroup(folder, lock, group_plan)


def _read_plan(lock: IO[str]) -> dict[str, Any]:
    lock.seek(0)
    try:
        plan = json.loads(lock.read())
    except json.JSONDecodeError:
        return {}
    return plan if isinstance(plan, dict) else {}


def remove_work_locks(folder: Path) -> None:
    """Remove the lock files of work items. Call it only while alone: others could not see a lock on a removed file."""
    for path in (folder / LOCKS_FOLDER).glob("*.lock"):
        path.unlink()


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
        wait: wait until the lock is free.
        other: how to choose another folder, for the message.

    Raises:
        StageError: the file system cannot lock.
    """
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # ENOLCK, ENOSYS, EOPNOTSUPP, and whatever else a network or user file system answers
        raise StageError(
            f"{Path(file.name).parent} cannot be locked ({error.strerror}), which keeps two processes from writing "
            f"there at once; use {other} on a file system that can lock; on NFS, start its lock service, or mount it "
            "with local_lock=flock, which locks within one machine"
        ) from error
    return True
