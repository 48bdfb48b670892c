"""A process that makes calls, one at a time. Both sides of its pipe are here: `Worker`, and `serve` below.

A call is a pickled pair: the levels of loggers, and the pickled function with its arguments. A message to the parent is
a pickled pair: "event" and a value; "log" and the attributes of a record; "dead device" and what was raised; and at the
end of each call "result" and its value, or "error" and the error with its causes, each pickled.
"""

import codecs
import faulthandler
import logging
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection
from threading import Lock, Thread
from typing import IO, Any

from pusa.errors import StageError
from pusa.system.failures import causes, is_dead_device
from pusa.system.processes import end_with_parent, ending, kill
from pusa.system.text import first_line

SERVE = "import sys; from pusa.system.slot_worker import serve; serve(int(sys.argv[1]), int(sys.argv[2]))"
END_SECONDS = 10.0  # between the end of a process's messages and its own
RELAY_SECONDS = 1.0  # for the rest of what an ended process has printed; what it started may keep its stderr open
Emit = Callable[[Any], None]


class Lost(Exception):
    """The process is gone, or cannot be understood any more."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.how = how


class Worker:
    """A process, and the pipe to it.

    A new interpreter, unlike a fork of this one or multiprocessing's spawn, runs nothing of the main module, and reads
    its environment before any library. It has a session of its own, so Ctrl-C is for the parent alone; what it prints
    goes to the parent's `sys.stderr`, since stdout is for results.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self.process = subprocess.Popen(  # noqa: S603  no part of the command comes from a file
                [sys.executable, "-P", "-c", SERVE, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
            )
            self.pipe = Connection(ours.detach())
        self._relay = Thread(target=_relay, args=(self.process.stdout,), name="worker output", daemon=True)
        self._relay.start()

    def answer(self, message: bytes, on_event: Emit) -> tuple[Any, BaseException | None]:
        """Send a call and return its result, or else its error.

        Raises:
            Lost: the process has died.
        """
        try:
            self.pipe.send_bytes(message)
        except OSError as error:
            raise Lost(self._how_it_ended()) from error
        while True:
            try:
                # A process may run no code here that it could not run there: both are this program.
                kind, value = pickle.loads(self.pipe.recv_bytes())  # noqa: S301
            except (EOFError, OSError, pickle.UnpicklingError) as error:
                raise Lost(self._how_it_ended()) from error
            if kind == "event":
                on_event(value)
            elif kind == "log":
                log_record(value)
            elif kind == "dead device":
                raise Lost(value)
            elif kind == "error":
                return None, chained(value)
            else:
                return value, None

    def end(self) -> None:
        """Kill the process, and wait for its last words."""
        kill(self.process)
        self._relay.join(RELAY_SECONDS)
        self.pipe.close()

    def _how_it_ended(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)
        return "its messages ended" if self.process.poll() is None else ending(self.process)


def _relay(output: IO[bytes]) -> None:
    """Write what a process prints to stderr, until it ends: not past it, since a table may be drawn there."""
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    with output:
        while data := os.read(output.fileno(), 1 << 16):
            with suppress(AttributeError, OSError, ValueError):  # stderr is None or closed; the process must not wait
                sys.stderr.write(decoder.decode(data))
                sys.stderr.flush()


def call_message(call: Callable[..., Any], *arguments: Any) -> bytes:
    """Return a call, with the levels of this process's loggers."""
    return pickle.dumps((logger_levels(), pickle.dumps((call, arguments))))


def logger_levels() -> dict[str, int]:
    """Return the levels of this process's loggers by name, where they have one of their own."""
    loggers = {"": logging.root, **logging.root.manager.loggerDict}
    return {
        name: logger.level for name, logger in loggers.items() if isinstance(logger, logging.Logger) and logger.level
    }


def set_logger_levels(levels: Mapping[str, int]) -> None:
    """Give loggers the levels that they have in another process."""
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def log_record(attributes: dict[str, Any]) -> None:
    """Log a record of another process, which `RecordSender` has sent."""
    record = logging.makeLogRecord(attributes)
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)


def chained(pickled: Sequence[bytes]) -> BaseException:
    """Return the first error, raised from the next one, and so on."""
    errors = [pickle.loads(error) for error in pickled]  # noqa: S301
    for error, cause in pairwise(errors):
        error.__cause__ = cause
    return errors[0]


# The rest runs in the process.


class WorkerTraceback(Exception):
    """Where an error was raised in the worker, as the last of its causes."""

    def __str__(self) -> str:
        """Return the traceback, below the line that names this class."""
        return f"\n{super().__str__()}"


class RecordSender(QueueHandler):
    """A handler of log records that passes them to `send` as plain attributes, for `log_record`."""

    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(None)  # type: ignore[arg-type]
        self._send = send

    def enqueue(self, record: logging.LogRecord) -> None:
        """Send a record, whose message is complete."""
        self._send({name: value for name, value in vars(record).items() if isinstance(value, str | int | float)})


class _Parent:
    """The pipe to the parent."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self._sending, self._calls = pipe, Lock(), 0

    def log(self, record: dict[str, Any]) -> None:
        """Send a log record."""
        self._send(pickle.dumps(("log", record)))

    def answer(self, message: bytes) -> None:
        """Make a call and send its answer."""
        emit = partial(self._emit_event, self._calls)
        try:
            levels, content = pickle.loads(message)  # noqa: S301  from our own parent
            set_logger_levels(levels)
            call, arguments = pickle.loads(content)  # noqa: S301
            answer = pickle.dumps(("result", call(*arguments, emit)))
        except SystemExit:
            raise
        except BaseException as error:  # noqa: BLE001  the parent raises it
            if any(is_dead_device(cause) for cause in causes(error)):  # no later call can use the GPU
                self._send(pickle.dumps(("dead device", f"{type(error).__name__}: {first_line(error)}")))
                os._exit(1)
            trace = WorkerTraceback("".join(traceback.format_exception(error)))
            answer = pickle.dumps(("error", [*pickled_causes(error), pickle.dumps(trace)]))
        with self._sending:
            self._calls += 1
            self.pipe.send_bytes(answer)

    def _emit_event(self, call: int, value: Any) -> None:
        """Send an event of a call. A thread that outlasts its call emits nothing into the next one."""
        message = pickle.dumps(("event", value))
        with self._sending:
            if call == self._calls:
                self.pipe.send_bytes(message)

    def _send(self, message: bytes) -> None:
        with self._sending:
            self.pipe.send_bytes(message)


def pickled_causes(error: BaseException) -> list[bytes]:
    """Return an error and its causes, for `chained`. What cannot be pickled becomes a StageError."""
    pickled = []
    for cause in causes(error):
        try:
            data = pickle.dumps(cause)
            if str(pickle.loads(data)) != str(cause):  # noqa: S301
                raise ValueError
        except Exception:  # noqa: BLE001  an exception may do anything when it is copied
            data = pickle.dumps(StageError(f"{type(cause).__name__}: {first_line(cause)}"))
        pickled.append(data)
    return pickled


def serve(handle: int, parent: int) -> None:
    """Answer calls until the parent closes the pipe.

    Args:
        handle: file descriptor of the pipe.
        parent: process id of the parent.
    """
    end_with_parent(signal.SIGKILL, parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's, which then ends this process
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the core of a process with a model would fill the disk
    faulthandler.enable()
    os.set_inheritable(handle, False)  # or a child would keep the pipe open after this process
    to_parent = _Parent(Connection(handle))
    logging.root.addHandler(RecordSender(to_parent.log))
    while True:
        try:
            message = to_parent.pipe.recv_bytes()
        except (EOFError, OSError):
            return
        to_parent.answer(message)
