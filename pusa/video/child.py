"""A child process for code that may hang or crash; our side. `pusa.video.child_main` is the other."""

import json
import math
import os
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Self

import numpy as np

from pusa.errors import MediaError, Reason, Rejected, StageError
from pusa.system.processes import Deadline, ending, kill

START_SECONDS = 60.0  # for Python alone: more is a machine in trouble


@dataclass(frozen=True)
class Answer:
    """What a function in the child returned."""

    facts: dict[str, Any]
    array: np.ndarray | None


class Child:
    """Runs functions in a process of its own, one at a time. It is started at the first call, and again after a kill.

    It dies with the thread that started it. Nothing but JSON and plain bytes comes back from it.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the process, if there is one; the next call starts another."""
        if self._end is not None:
            self._end()
        self._process = self._end = None

    def call(self, function: str, arguments: Mapping[str, Any], path: str, seconds: float) -> Answer:
        """Call "module:function" with JSON arguments.

        Args:
            function: it returns a JSON object, and an array or None.
            arguments: by name.
            path: the file that it is about, for messages.
            seconds: time it may take; then it is killed.

        Raises:
            MediaError: the function did.
            Rejected: the function did, its time is up (TIMEOUT), or its process died (CRASHED).
            StageError: no process can be started.
        """
        process = self._started()
        answered = False
        try:
            with Deadline(process, seconds) as deadline:
                self._pipe.send_bytes(json.dumps({"function": function, "arguments": arguments}).encode())
                head, array = self._receive()
            answered = "died" not in head
        except (EOFError, OSError) as error:
            if deadline.passed:
                raise Rejected(Reason.TIMEOUT, _late(path, seconds)) from error
            raise Rejected(Reason.CRASHED, f"the decoder died ({ending(process)}) on {path}") from error
        finally:
            if not answered:
                self.close()
        return _opened(head, array, path)

    def _receive(self) -> tuple[dict[str, Any], np.ndarray | None]:
        head = json.loads(self._pipe.recv_bytes())
        if head.get("shape") is None:
            return head, None
        array = np.empty(head["shape"], head["dtype"])
        if math.prod(array.shape):
            self._pipe.recv_bytes_into(array.data.cast("B"))
        return head, array

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(  # noqa: S603  no word of it is a file's
                [sys.executable, "-P", "-m", "pusa.video.child_main", str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # decoders are noisy
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self._pipe = Connection(ours.detach())
        self._process, self._end = process, weakref.finalize(self, _finish, process, self._pipe)
        self._wait_for(process)
        return process

    def _wait_for(self, process: subprocess.Popen[bytes]) -> None:
        """Until it is ready. What keeps it from that is no fault of a source."""
        try:
            ready = self._pipe.poll(START_SECONDS) and self._pipe.recv_bytes()
        except (EOFError, OSError) as error:
            told = f"{sys.executable}: a decoder's process did not start ({ending(process)})"
            self.close()
            raise StageError(told) from error
        if not ready:
            self.close()
            raise StageError(f"{sys.executable}: a decoder's process did not start within {START_SECONDS:g} s")


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.child = Child()


_PER_THREAD = _PerThread()


def this_threads_child() -> Child:
    """The child that belongs to the current thread, and ends with it."""
    return _PER_THREAD.child


def _finish(process: subprocess.Popen[bytes], pipe: Connection) -> None:
    kill(process)
    pipe.close()


def _opened(head: Mapping[str, Any], array: np.ndarray | None, path: str) -> Answer:
    if "rejected" in head:
        raise Rejected(*head["rejected"])
    if "media_error" in head:
        raise MediaError(head["media_error"])
    if "died" in head:
        raise Rejected(Reason.CRASHED, f"the decoder died ({head['died']}) on {path}")
    return Answer(head["facts"], array)


def _late(path: str, seconds: float) -> str:
    return f"{path} took longer than {seconds:g} s to decode; the decoder was killed"
