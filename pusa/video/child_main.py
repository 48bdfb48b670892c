"""The child process of `pusa.video.child`: reads a call, runs it, writes the answer, until nobody asks any more."""

import json
import resource
import signal
import sys
import traceback
from collections.abc import Mapping
from importlib import import_module
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import numpy as np

from pusa.errors import MediaError, Rejected
from pusa.system.processes import end_with_parent


def main(handle: int, parent: int) -> None:
    """Serve the calls that come through a socket."""
    end_with_parent(signal.SIGKILL, parent)  # hanging in a decoder we would not see the other end of the pipe close
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe = Connection(handle)
    sys.excepthook = lambda kind, error, trace: _send(pipe, {"died": _told(kind, error, trace)})
    pipe.send_bytes(b"ready")
    while True:
        try:
            call = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        _send(pipe, *_answer(**call))


def _answer(function: str, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray | None]:
    module, _, name = function.partition(":")
    try:
        facts, array = getattr(import_module(module), name)(**arguments)
    except Rejected as rejected:
        return {"rejected": [rejected.reason, rejected.detail]}, None
    except MediaError as error:
        return {"media_error": str(error)}, None
    return {"facts": facts}, array


def _send(pipe: Connection, head: dict[str, Any], array: np.ndarray | None = None) -> None:
    if array is not None:
        array = np.ascontiguousarray(array)
        head = {**head, "shape": array.shape, "dtype": array.dtype.str}
    pipe.send_bytes(json.dumps(head).encode())
    if array is not None and array.size:
        pipe.send_bytes(array.data.cast("B"))


def _told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> str:
    where = traceback.extract_tb(trace)[-1:]
    what = traceback.format_exception_only(kind, error)[-1].strip()
    return "".join([what, *(f" at {frame.filename}:{frame.lineno}" for frame in where)])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
