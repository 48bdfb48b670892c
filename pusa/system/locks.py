"""Several processes, on any machines that share a folder, at one work: who is there, and whose a piece of it is.

The locks are the operating system's, and so are free the instant their holder dies. On a network file system they
reach as far as its flock does: NFS 4, CephFS, and Lustre mounted with `flock` lock across machines.
"""

import fcntl
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from pusa.errors import StageError
from pusa.system.files import remove_partials

CLAIMS = ".claims"
SECONDS_BETWEEN_LOOKS = 1.0  # at what other processes have made


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold a folder, made if need be, for this process alone; what a killed one left half written is removed.

    The lock is the operating system's: it is free the instant its holder dies, however it dies.

    Raises:
        StageError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StageError(
                f"{folder} is being written by another process; wait for it, or use another --run-dir"
            ) from error
        remove_partials(folder)
        _held.add(lock)
        try:
            yield
        finally:
            _held.discard(lock)


def _let_go() -> None:
    """In a forked child, which would hold its parent's locks on when that is killed."""
    for lock in _held:
        lock.close()


_held: set[IO[str]] = set()
os.register_at_fork(after_in_child=_let_go)


class HasName(Protocol):
    """A piece of work; its name is the same in every process."""

    @property
    def name(self) -> str:
        """For files."""


Named = TypeVar("Named", bound=HasName)


@dataclass(frozen=True)
class WorkGroup:
    """The processes that write one folder, seen from one of them, and the plan of who was there first."""

    folder: Path
    lock: IO[str]
    plan: Mapping[str, Any]

    @contextmanager
    def claim(self, name: str, wait: bool = False) -> Iterator[bool]:
        """Whether the piece of work is this process's now; with `wait`, once it is."""
        path = self.folder / CLAIMS / f"{name}.lock"
        path.parent.mkdir(exist_ok=True)
        with path.open("w") as file:
            yield _locked(file, fcntl.LOCK_EX, wait)

    def share_out(self, pieces: Sequence[Named], complete: Callable[[Named], None]) -> None:
        """Have every piece completed, by this process or by others; `complete` finds out what is left to do of it.

        What another process is at is looked at again until it is done, or its maker is dead.
        """
        todo = list(pieces)
        while todo:
            left = [piece for piece in todo if not self._take(piece, complete)]
            if len(left) == len(todo):
                time.sleep(SECONDS_BETWEEN_LOOKS)
            todo = left

    def _take(self, piece: Named, complete: Callable[[Named], None]) -> bool:
        with self.claim(piece.name) as mine:
            if mine:
                complete(piece)
        return mine

    def is_alone(self) -> bool:
        """Whether no other process is at it, nor can be until this one leaves: asked once, as its last act."""
        return _locked(self.lock, fcntl.LOCK_EX, wait=False)


@contextmanager
def join_work(
    folder: Path, tidy: Callable[[], None], plan: Mapping[str, Any], name: str = "made_from"
) -> Iterator[WorkGroup]:
    """Be one of those who write a folder, made if need be; who finds it empty of others first clears up.

    Args:
        folder: what they write.
        tidy: called where no other process is at it, once what killed ones left half written is removed.
        plan: what this process is up to, plain values; others who come meanwhile are handed this one's.
        name: the key of the plan whose value all must agree on.

    Raises:
        StageError: others are making something else there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+", encoding="utf-8") as lock:
        while True:
            if _locked(lock, fcntl.LOCK_EX, wait=False):
                _begin(lock, folder, tidy, plan)
            _locked(lock, fcntl.LOCK_SH, wait=True)
            theirs = _plan_in(lock)
            if theirs.get(name) == plan[name]:
                break
            # Another's plan: is it there still? Without one, who was there did not live to say.
            if theirs and not _locked(lock, fcntl.LOCK_EX, wait=False):
                raise StageError(
                    f"{folder} is being written by a process that makes another table there, of other sources or by "
                    "other settings; wait for it, or use another folder"
                )
            if not theirs:
                fcntl.flock(lock, fcntl.LOCK_UN)
                time.sleep(random.uniform(0, SECONDS_BETWEEN_LOOKS / 4))  # noqa: S311
        yield WorkGroup(folder, lock, theirs)


def _begin(lock: IO[str], folder: Path, tidy: Callable[[], None], plan: Mapping[str, Any]) -> None:
    """Clear up, then say what is being made: an empty plan is that of one who did not come so far."""
    lock.truncate(0)
    remove_partials(folder)
    tidy()
    lock.write(json.dumps(dict(plan)))
    lock.flush()


def _plan_in(lock: IO[str]) -> dict[str, Any]:
    lock.seek(0)
    try:
        found = json.loads(lock.read())
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def remove_work_locks(folder: Path) -> None:
    """Remove the locks' files. Only for who is alone: a lock on a file without a name guards nothing."""
    for path in (folder / CLAIMS).glob("*.lock"):
        path.unlink()


def _locked(file: IO[str], kind: int, wait: bool) -> bool:
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
