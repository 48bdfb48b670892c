"""Tell an error of one item (a job, a clip, a source) from an error of the whole run, and record the former."""

import errno
import os
import secrets
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pusa.errors import PartlyFailed, PusaError, Reason, Rejected, StageError, WeightsError
from pusa.system.files import PARTIAL, write_text
from pusa.system.text import first_line

FAILURES = "failures"  # a folder of tables: the tracebacks of the unexpected errors of the last run
LONGEST_TRACEBACK = 20_000  # characters
PROBE_BYTES = 1 << 16
# A full disk or quota, a read-only file system, no more files for this process or machine: the next item fails as well.
RUN_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE}
RUN_ERRORS = (WeightsError, StageError)  # the model cannot be loaded; the stage cannot work
DEAD_DEVICE = "AcceleratorError"  # torch's error of a GPU whose context is lost: every later call fails
NO_MEMORY = "OutOfMemoryError"  # torch's, of a GPU
# In the RuntimeErrors of torch on a CPU, and of the libraries of CUDA.
NO_MEMORY_WORDS = ("can't allocate memory", "not enough memory", "ALLOC_FAILED")
# A disk, a network, a device, a process that died: torch reports most of it as RuntimeError.
HEALING = (OSError, MemoryError, EOFError, RuntimeError)
PANIC = "PanicException"  # of a library in Rust; it is not a subclass of Exception

Value = TypeVar("Value")


@dataclass(frozen=True)
class Failure:
    """Why one item failed. `traceback` is "" for an error that Pusa raises on purpose: its message says everything.

    Its class has the name `kind`, which is "" where it is not known.
    """

    message: str
    traceback: str = ""
    kind: str = field(default="", compare=False)

    def rejected(self, folder: Path, name: str) -> Rejected:
        """Return the reject of an item of a table. Its traceback is written to `failures/NAME.txt` in the folder."""
        detail = self.message
        if self.traceback:
            path = folder / FAILURES / f"{name}.txt"
            write_text(path, self.traceback.encode("utf-8", "backslashreplace").decode())
            detail = f"{detail} (its traceback is in {FAILURES}/{path.name})"
        return Rejected(Reason.FAILED, detail)


def attempt(make: Callable[[], Value], folder: Path | None) -> Value | Failure:
    """Return the result of `make`, which makes one item, or its failure if the other items can still be made.

    Any error of any library counts as one item's, a panic of Rust too. Errors of the whole run are raised: a model that
    cannot be loaded, a full disk, a lost GPU, or a run folder that cannot be written any more, whatever was raised.

    Args:
        make: makes the item.
        folder: the folder that the stage writes; None if nothing is written.
    """
    try:
        return make()
    except BaseException as error:
        if _is_of_the_run(error):
            raise
        if folder is not None:
            _require_writable(folder)
        if isinstance(error, PusaError):
            return Failure(str(error), kind=type(error).__name__)
        trace = "".join(traceback.format_exception(error))
        return Failure(f"{type(error).__name__}: {first_line(error)}", trace[-LONGEST_TRACEBACK:])


def make_or_reject(make: Callable[[], Value], folder: Path, name: str) -> Value | Rejected:
    """Return the result of `make`, which makes one item of a table, or why it has none. Errors: as `attempt`.

    Args:
        make: makes the item. It may raise `Rejected`.
        folder: the table's folder.
        name: the item's name in file names, for the traceback of an unexpected error.
    """

    def catch_reject() -> Value | Rejected:
        try:
            return make()
        except Rejected as reject:
            return reject.with_traceback(None)  # which would keep all arrays in memory

    made = attempt(catch_reject, folder)
    return made.rejected(folder, name) if isinstance(made, Failure) else made


def require_none_failed(failed: int, kind: str, table: Path) -> None:
    """Raise PartlyFailed if `failed` items of a table are rejects because of unexpected errors; `kind` names them."""
    if failed:
        raise PartlyFailed(
            f"{failed} {kind} failed with unexpected errors; `pusa inspect {table}` lists them, their tracebacks are "
            f"in {table / FAILURES}. All others are made; run the command again to try these"
        )


class PartialFailures:
    """Continue with the stages after one of which a part failed, and report all of them at the end."""

    def __init__(self) -> None:
        self._messages: list[str] = []

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Keep the PartlyFailed of a stage for `require_none`."""
        try:
            yield
        except PartlyFailed as error:
            self._messages.append(str(error))

    def require_none(self) -> None:
        """Raise PartlyFailed with all messages if there are any."""
        if self._messages:
            raise PartlyFailed("\n  ".join(self._messages))


def may_heal(error: object) -> bool:
    """Return whether what raised this error may succeed when it runs again: not for one of the input or of our code."""
    return isinstance(error, HEALING) and not isinstance(error, PusaError | NotImplementedError)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that there is not enough memory: Python's, or torch's on any device."""
    if isinstance(error, MemoryError) or type(error).__name__ == NO_MEMORY:
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY_WORDS)


def _is_of_the_run(error: BaseException) -> bool:
    if not isinstance(error, Exception) and type(error).__name__ != PANIC:  # an interrupt, a cancellation
        return True
    if isinstance(error, RUN_ERRORS) or is_dead_device(error):
        return True
    return any(isinstance(cause, OSError) and cause.errno in RUN_ERRNOS for cause in causes(error))


def is_dead_device(error: BaseException) -> bool:
    """Return whether the error is that of a lost GPU: this process cannot use it any more."""
    return any(kind.__name__ == DEAD_DEVICE for kind in type(error).__mro__)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and those that it was raised from or while handling."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _require_writable(folder: Path) -> None:
    """Raise OSError if a file cannot be written into the folder: libraries report this in words of their own."""
    probe = folder / f"{PARTIAL}{secrets.token_hex(6)}-probe"
    try:
        probe.write_bytes(os.urandom(PROBE_BYTES))
    except OSError as error:  # a full disk is reported without a name
        raise OSError(error.errno, error.strerror, str(folder)) from error
    finally:
        probe.unlink(missing_ok=True)
