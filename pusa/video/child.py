"""Run code that may hang or crash in a child process. Both sides of the pipe are here: `Child`, and `serve` below.

A call is one JSON message: {"function": "module:name", "arguments": {...}}. An answer is a JSON message with "facts",
"rejected", "media_error" or "died"; with "facts" an array may follow, as raw bytes in pieces, whose "shape" and "dtype"
are in the message. Nothing but JSON and raw bytes comes back, so a corrupted child cannot run code in this process.
"""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import numpy as np

from pusa.errors import MediaError, Reason, Rejected, StageError
from pusa.system.processes import Deadline, end_with_parent, ending, kill

PIECE_BYTES = 2**24  # of an array in one message
START_SECONDS = 60.0  # for starting Python: if it takes longer, the machine is in trouble


@dataclass(frozen=True)
class Answer:
    """What a function in the child returned."""

    facts: dict[str, Any]
    array: np.ndarray | None


class Child:
    """A process that runs functions, one at a time.

    The process starts at the first call, and again after it was killed. It dies with the thread that started it.
    """

    def __init__(self, python: str = sys.executable) -> None:
        self.python = python
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the process if there is one. The next call starts another."""
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._finalizer = None

    def call(self, function: str, arguments: Mapping[str, Any], path: str, seconds: float) -> Answer:
        """Call a function in the child and return its answer.

        Args:
            function: "module:name". It returns a JSON object, and an array or None.
            arguments: keyword arguments, JSON values.
            path: the file that the call is about, for messages.
            seconds: time limit, after which the process is killed.

        Raises:
            MediaError: the function raised it.
            Rejected: the function raised it, the time limit passed (TIMEOUT), or the process died (CRASHED).
            StageError: no process can be started.
        """
        process = self._running_process()
        answered = False
        try:
            with Deadline(process, seconds) as deadline:
                self._pipe.send_bytes(json.dumps({"function": function, "arguments": arguments}).encode())
                message, array = self._receive()
            answered = "died" not in message
        except (EOFError, OSError) as error:
            if deadline.passed:
                detail = f"{path} took longer than {seconds:g} s to decode; the decoder was killed"
                raise Rejected(Reason.TIMEOUT, detail) from error
            raise Rejected(Reason.CRASHED, f"the decoder died ({ending(process)}) on {path}") from error
        finally:
            if not answered:
                self.close()
        if "rejected" in message:
            raise Rejected(*message["rejected"])
        if "media_error" in message:
            raise MediaError(message["media_error"])
        if "died" in message:
            raise Rejected(Reason.CRASHED, f"the decoder died ({message['died']}) on {path}")
        return Answer(message["facts"], array)

    def _receive(self) -> tuple[dict[str, Any], np.ndarray | None]:
        message = json.loads(self._pipe.recv_bytes())
        if message.get("shape") is None:
            return message, None
        array = np.empty(message["shape"], message["dtype"])
        for piece in _pieces(array):
            self._pipe.recv_bytes_into(piece)
        return message, array

    def _running_process(self) -> subprocess.Popen[bytes]:
        """Return the process, started if necessary and ready for a call. A failed start is not the source's fault."""
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(  # noqa: S603  no part of the command comes from a file
                [self.python, "-P", "-m", "pusa.video.child", str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # decoders print a lot
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self._pipe = Connection(ours.detach())
        self._process, self._finalizer = process, weakref.finalize(self, _kill_and_close, process, self._pipe)
        try:
            ready = self._pipe.poll(START_SECONDS) and self._pipe.recv_bytes()
        except (EOFError, OSError) as error:
            message = f"{self.python}: a decoder process did not start ({ending(process)})"
            self.close()
            raise StageError(message) from error
        if not ready:
            self.close()
            raise StageError(f"{self.python}: a decoder process did not start within {START_SECONDS:g} s")
        return process


def _kill_and_close(process: subprocess.Popen[bytes], pipe: Connection) -> None:
    kill(process)
    pipe.close()


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.child = Child()


_PER_THREAD = _PerThread()


def this_threads_child() -> Child:
    """Return the child that belongs to the current thread, and ends with it."""
    return _PER_THREAD.child


# The functions below run in the child process.


def serve(handle: int, parent: int) -> None:
    """Answer the calls that arrive through a socket, until its other end closes.

    Args:
        handle: file descriptor of the socket.
        parent: process id of the caller.
    """
    # A process that hangs in a decoder does not notice that the pipe closes. So the kernel kills it with its parent.
    end_with_parent(signal.SIGKILL, parent)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe = Connection(handle)

    def report_death(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        text = traceback.format_exception_only(kind, error)[-1].strip()
        place = "".join(f" at {frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(trace)[-1:])
        _send(pipe, {"died": text + place})

    sys.excepthook = report_death
    pipe.send_bytes(b"ready")
    while True:
        try:
            call = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        module, _, name = call["function"].partition(":")
        try:
            facts, array = getattr(import_module(module), name)(**call["arguments"])
        except Rejected as error:
            _send(pipe, {"rejected": [error.reason, error.detail]})
        except MediaError as error:
            _send(pipe, {"media_error": str(error)})
        else:
            _send(pipe, {"facts": facts}, array)


def _send(pipe: Connection, message: dict[str, Any], array: np.ndarray | None = None) -> None:
    if array is not None:
        array = np.ascontiguousarray(array)
        message = {**message, "shape": array.shape, "dtype": array.dtype.str}
    pipe.send_bytes(json.dumps(message).encode())
    for piece in () if array is None else _pieces(array):
        pipe.send_bytes(piece)


def _pieces(array: np.ndarray) -> Iterator[memoryview]:
    """Yield an array's bytes as the pipe takes them: in pieces, since the receiving end holds each a second time."""
    whole = array.reshape(-1).view(np.uint8).data
    for start in range(0, array.nbytes, PIECE_BYTES):
        yield whole[start : start + PIECE_BYTES]


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
