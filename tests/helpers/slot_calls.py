"""Calls for slots. They import nothing heavy, so that a process that makes them starts quickly."""

import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from pusa.errors import Rejected

log = logging.getLogger("pusa.slot_calls")
_calls = 0  # of this process


class AcceleratorError(RuntimeError):
    """What torch raises once a GPU is lost."""


class Unpicklable(Exception):
    """Its copy cannot be made."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


def count(emit) -> tuple[int, int]:
    """Return this process's number, and how many calls it has had."""
    global _calls
    _calls += 1
    return os.getpid(), _calls


def variable(name, emit):
    return os.environ.get(name)


def modules(emit) -> list[str]:
    return sorted(sys.modules)


def emit_all(values, emit) -> None:
    for value in values:
        log.info("before %s", value)
        emit(value)
        print("printed", value, flush=True)  # noqa: T201


def emit_from_threads(threads, each, emit) -> None:
    """Emit from several threads at once."""

    def work(thread: int) -> None:
        for number in range(each):
            emit((thread, number, "x" * 5000))

    started = [threading.Thread(target=work, args=(thread,)) for thread in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()


_late = threading.Event()


def emit_late(emit) -> None:
    """Leave a thread that emits in a later call."""

    def work() -> None:
        _late.wait()
        emit("late")

    threading.Thread(target=work, name="late", daemon=True).start()


def let_it_emit(emit) -> None:
    thread = next(thread for thread in threading.enumerate() if thread.name == "late")
    _late.set()
    thread.join()
    emit("in time")


def log_at(levels, emit) -> None:
    for level in levels:
        log.log(level, "level %d", level)
    try:
        raise KeyError("inner")
    except KeyError:
        log.warning("with a traceback", exc_info=True)


def fail(kind, emit) -> None:
    """Raise an error, from an OSError, while handling a KeyError."""
    try:
        {}["missing"]
    except KeyError:
        try:
            raise OSError(28, "No space left on device", "/a/file")
        except OSError as cause:
            if kind == "rejected":
                raise Rejected("crashed", "a detail") from cause
            if kind == "unpicklable":
                raise Unpicklable("two", "arguments") from cause
            if kind == "device":
                raise RuntimeError("chunk failed") from AcceleratorError("CUDA error: unspecified launch failure")
            raise ValueError(kind) from cause


def not_picklable(where, emit):
    if where == "event":
        emit(lambda: None)
    return lambda: None


def die(how, emit) -> None:
    emit("alive")
    if how == "exit":
        sys.exit(7)
    if how == "torn":  # the beginning of a message
        os.write(emit.func.__self__.pipe.fileno(), b"\0\0\0\x64half")
    os.kill(os.getpid(), signal.SIGKILL)


def die_unless(path, emit) -> str:
    """Die until the file is there."""
    if Path(path).exists():
        return "done"
    os.kill(os.getpid(), signal.SIGKILL)
    return ""


def start_children(folder, emit) -> None:
    """Start a child that ends with its input and a decoder's process; write their numbers; wait for ever."""
    from pusa.video.child import Child

    child = Child()
    child.call("tests.helpers.slot_calls:facts", {}, "no file", 60)
    reader = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    assert child._process is not None
    numbers = f"{os.getpid()} {reader.pid} {child._process.pid}"
    partial = Path(folder, f"partial-{os.getpid()}")
    partial.write_text(numbers)
    partial.rename(Path(folder, f"numbers-{os.getpid()}"))
    threading.Event().wait()


def facts() -> tuple[dict, None]:
    return {}, None


def wait_for_ever(emit) -> None:
    emit(os.getpid())
    threading.Event().wait()
