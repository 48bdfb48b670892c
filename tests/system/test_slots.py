"""Slots: a call's result, events, log lines and errors come back; a process that dies is replaced, and none is left."""

import contextvars
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from pusa.errors import ManifestError, Rejected, StageError
from pusa.system import devices as gpus
from pusa.system.devices import Device, visible_gpus
from pusa.system.failures import causes
from pusa.system.slots import (
    HereSlot,
    ProcessSlot,
    SlotClosed,
    SlotLost,
    WorkerDied,
    call_directly,
    open_slots,
    run_in_slots,
)
from tests.helpers import slot_calls as calls
from tests.helpers.processes import is_alive, wait_for

BOUND = 120  # seconds to wait for something that takes less than one
PRETENDED = [Device("0", "GPU-a"), Device("1", "GPU-b"), Device("2", "GPU-c")]


def ignore(event) -> None:
    pass


@pytest.fixture(scope="module")
def shared():
    """A process that the tests share which leave it alive."""
    with closing(ProcessSlot("shared")) as slot:
        yield slot


@pytest.fixture
def locks(tmp_path, monkeypatch) -> Path:
    """A folder for the locks of pretended GPUs."""
    monkeypatch.setattr(gpus.tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"pusa-{os.getuid()}"


def in_thread(call, *arguments):
    """Start a call in a thread; return the thread and the list that holds its result or error in the end."""
    outcome = []

    def run():
        try:
            outcome.append(call(*arguments))
        except BaseException as error:  # noqa: BLE001
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


# Calls.


def test_what_a_call_keeps_is_there_for_the_next_and_this_process_is_another(shared):
    (pid, first), (again, second) = (shared.run(calls.count, on_event=ignore) for _ in range(2))
    assert pid == again == shared.pid != os.getpid() and second == first + 1
    here = HereSlot()
    (pid, first), (again, second) = (here.run(calls.count, on_event=ignore) for _ in range(2))
    assert pid == again == os.getpid() and second == first + 1


def test_a_process_imports_nothing_that_its_calls_do_not_need(shared):
    loaded = shared.run(calls.modules, on_event=ignore)
    assert not {"torch", "prefect", "flows", "pytest", "pusa.video"} & {*loaded}


@pytest.mark.parametrize("slot", ["here", "process"])
def test_events_and_log_lines_come_in_their_order_in_the_callers_thread(slot, caplog, capfd):
    caplog.set_level(logging.INFO, "pusa")
    seen = []

    class Handler(logging.Handler):
        def emit(self, record):
            seen.append((threading.get_ident(), record.getMessage()))

    logger, handler = logging.getLogger("pusa.slot_calls"), Handler()
    logger.addHandler(handler)
    try:
        with closing(HereSlot() if slot == "here" else ProcessSlot("one")) as chosen:
            chosen.run(
                calls.emit_all, [1, "two", {"three": 3}], on_event=lambda e: seen.append((threading.get_ident(), e))
            )
    finally:
        logger.removeHandler(handler)
    assert [value for _, value in seen] == ["before 1", 1, "before two", "two", "before {'three': 3}", {"three": 3}]
    assert {thread for thread, _ in seen} == {threading.get_ident()}
    out, err = capfd.readouterr()
    assert ("printed two" in out) == (slot == "here") and ("printed two" in err) == (slot == "process")


def test_the_levels_of_loggers_are_those_of_this_process(shared, caplog):
    for level in (logging.DEBUG, logging.WARNING, logging.INFO):
        caplog.clear()
        caplog.set_level(level, "pusa.slot_calls")
        shared.run(calls.log_at, [10, 20, 30, 40], on_event=ignore)
        assert [r.getMessage() for r in caplog.records][:-1] == [f"level {n}" for n in (10, 20, 30, 40) if n >= level]
        assert "KeyError: 'inner'" in caplog.records[-1].getMessage() and caplog.records[-1].process == shared.pid


def test_many_threads_of_a_call_may_emit(shared):
    events = []
    shared.run(calls.emit_from_threads, 4, 50, on_event=events.append)
    assert sorted(event[:2] for event in events) == [(thread, n) for thread in range(4) for n in range(50)]
    for thread in range(4):
        assert [n for t, n, _ in events if t == thread] == list(range(50))


def test_an_event_of_an_earlier_call_is_dropped(shared):
    events = []
    shared.run(calls.emit_late, on_event=events.append)
    shared.run(calls.let_it_emit, on_event=events.append)
    assert events == ["in time"]


# Errors.


@pytest.mark.parametrize("kind", ["value", "rejected", "unpicklable"])
def test_an_error_comes_back_with_its_causes_and_the_process_lives(shared, kind):
    pid = shared.run(calls.count, on_event=ignore)[0]
    with pytest.raises(Exception) as caught:
        shared.run(calls.fail, kind, on_event=ignore)
    error = caught.value
    expected = {"value": ValueError, "rejected": Rejected, "unpicklable": StageError}[kind]
    assert type(error) is expected
    if kind == "rejected":
        assert (error.reason, error.detail) == ("crashed", "a detail")
    if kind == "unpicklable":
        assert str(error) == "Unpicklable: two arguments"
    cause, missing, trace = list(causes(error))[1:]
    assert isinstance(cause, OSError) and (cause.errno, cause.filename) == (28, "/a/file")  # a full disk is the run's
    assert isinstance(missing, KeyError) and "slot_calls.py" in str(trace) and "in fail" in str(trace)
    assert shared.run(calls.count, on_event=ignore)[0] == pid


@pytest.mark.parametrize("where", ["result", "event"])
def test_what_cannot_be_pickled_is_an_error_of_the_call(shared, where):
    pid = shared.run(calls.count, on_event=ignore)[0]
    with pytest.raises((AttributeError, pickle.PicklingError), match="pickle"):
        shared.run(calls.not_picklable, where, on_event=ignore)
    with pytest.raises((AttributeError, pickle.PicklingError), match="pickle"):
        shared.run(calls.variable, lambda: None, on_event=ignore)
    assert shared.run(calls.count, on_event=ignore)[0] == pid


@pytest.mark.parametrize(("how", "ended"), [("exit", "exit code 7"), ("kill", "signal 9"), ("torn", "signal 9")])
def test_a_process_that_dies_is_named_and_replaced(how, ended):
    with closing(ProcessSlot("one")) as slot:
        pid, _ = slot.run(calls.count, on_event=ignore)
        events = []
        with pytest.raises(WorkerDied, match=rf"the worker process died \({ended}\)") as caught:
            slot.run(calls.die, how, on_event=events.append)
        assert caught.value.how == ended and events == ["alive"] and slot.pid is None and not is_alive(pid)
        again, count = slot.run(calls.count, on_event=ignore)
        assert again != pid and count == 1
        os.kill(again, signal.SIGKILL)
        wait_for(lambda: slot.pid is None)
        assert slot.run(calls.count, on_event=ignore)[1] == 1  # a death between calls is nobody's fault


def test_a_lost_gpu_ends_the_process():
    with closing(ProcessSlot("one")) as slot:
        pid, _ = slot.run(calls.count, on_event=ignore)
        with pytest.raises(WorkerDied, match="chunk failed"):
            slot.run(calls.fail, "device", on_event=ignore)
        assert slot.run(calls.count, on_event=ignore)[0] != pid


def test_an_error_of_the_receiver_ends_the_call_in_the_process():
    with closing(ProcessSlot("one")) as slot:
        for error in (OSError(28, "No space left"), KeyboardInterrupt()):  # not to be taken for the pipe's
            pids = []

            def fail(pid, pids=pids, error=error):
                pids.append(pid)
                raise error

            with pytest.raises(type(error)):
                slot.run(calls.wait_for_ever, on_event=fail)
            assert slot.pid is None and not is_alive(pids[0])
        assert slot.run(calls.count, on_event=ignore)[1] == 1


def test_a_process_that_cannot_start_is_the_runs_fault():
    with closing(ProcessSlot("one", {"PYTHONIOENCODING": "nonsense"})) as slot:
        with pytest.raises(StageError, match=r"slot one: the worker process did not start \(exit code 1\)") as caught:
            slot.run(calls.count, on_event=ignore)
        assert not isinstance(caught.value, WorkerDied | SlotClosed)


def test_a_closed_slot_ends_its_call_and_makes_no_other():
    slot, started = ProcessSlot("one"), threading.Event()
    thread, outcome = in_thread(lambda: slot.run(calls.wait_for_ever, on_event=lambda pid: started.set()))
    assert started.wait(BOUND)
    slot.close()
    thread.join(BOUND)
    assert isinstance(outcome[0], SlotClosed) and slot.pid is None
    with pytest.raises(SlotClosed):
        slot.run(calls.count, on_event=ignore)
    slot.close()


# The life of the processes.

PARENT = """
import sys, threading
from pathlib import Path
from pusa.system.slots import ProcessSlot, open_slots, run_in_slots
from tests.helpers.slot_calls import start_children
print("main", flush=True)  # a spawned process that ran this file again would print it again
works = iter(range(2))
with open_slots({"processes": 2}, Path()) as slots:
    work = lambda slot, _: slot.run(start_children, sys.argv[1], on_event=print)
    run_in_slots(slots, lambda: next(works, None), work)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_its_parent(tmp_path, root, number):
    script = tmp_path / "script.py"
    script.write_text(PARENT)  # not guarded by `if __name__ == "__main__"`
    environment = {**os.environ, "PYTHONPATH": str(root)}
    parent = subprocess.Popen(
        [sys.executable, script, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        files = wait_for(lambda: len(found := sorted(tmp_path.glob("numbers-*"))) == 2 and found)
        numbers = [int(number) for file in files for number in file.read_text().split()]
        assert len(set(numbers)) == 6 and all(map(is_alive, numbers))
        parent.send_signal(number)
        out, err = parent.communicate(timeout=BOUND)
    finally:
        parent.kill()
    wait_for(lambda: not any(map(is_alive, numbers)))
    assert out == "main\n" and ("KeyboardInterrupt" in err) == (number == signal.SIGINT)
    assert parent.returncode == -number  # Python ends itself with SIGINT after a KeyboardInterrupt


# GPUs.


def test_the_places_of_a_manifest(monkeypatch):
    def names(place, devices=()):
        with open_slots(place, Path(), devices) as slots:
            return [slot.name for slot in slots]

    assert names("local") == ["cpu"]
    assert names("local", PRETENDED) == ["gpu 0", "gpu 1", "gpu 2"]
    assert names({"gpus": [2, 0]}, PRETENDED) == ["gpu 2", "gpu 0"]
    assert names({"processes": 2}, PRETENDED) == ["process 0", "process 1"]
    with pytest.raises(ManifestError, match=r"place: gpus: got 3; this machine has 3 visible GPUs, numbers 0 to 2"):
        names({"gpus": [0, 3]}, PRETENDED)
    with pytest.raises(ManifestError, match=r"place: gpus: got 0; this machine has no visible GPU"):
        names({"gpus": [0]})


def test_processes_share_the_cores_and_see_no_gpu(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("MKL_NUM_THREADS", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with open_slots({"processes": 2}, Path()) as slots:
        values = [
            slots[1].run(calls.variable, name, on_event=ignore)
            for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
        ]
    assert values == [str(max(1, len(os.sched_getaffinity(0)) // 2)), "3", ""]


def test_each_process_sees_its_gpu_alone(locks):
    with open_slots({"gpus": [2, 0]}, Path(), PRETENDED) as slots:
        seen = [slot.run(calls.variable, "CUDA_VISIBLE_DEVICES", on_event=ignore) for slot in slots]
        assert seen == ["2", "0"] and {path.name for path in locks.iterdir()} == {"GPU-a.lock", "GPU-c.lock"}
        assert locks.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("variable", "count", "seen"),
    [
        (None, 2, ["0", "1"]),
        ("3, 5", 2, ["3", "5"]),
        ("GPU-x,GPU-y", 2, ["GPU-x", "GPU-y"]),
        ("1,-1,2", 1, ["1"]),
        ("", 0, []),
        (None, 0, []),
    ],
)
def test_the_gpus_are_those_that_this_process_may_use(monkeypatch, variable, count, seen):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert [device.visible for device in visible_gpus()] == seen


def test_a_gpu_has_one_user_and_who_waits_knows_for_whom(locks, caplog):
    caplog.set_level(logging.INFO, "pusa")
    first, second, third = (ProcessSlot(name, device=Device("0", "GPU-a")) for name in ("first", "second", "third"))
    with closing(second), closing(third):
        with closing(first):
            first.start()
            thread, outcome = in_thread(lambda: second.run(calls.count, on_event=ignore))
            wait_for(lambda: f"waiting for another process ({os.getpid()} on" in caplog.text)
            os.kill(first.pid, signal.SIGKILL)
            wait_for(lambda: first.pid is None)
            assert first.run(calls.count, on_event=ignore)[1] == 1  # nobody took the GPU meanwhile
            caplog.clear()
            waiting, given_up = in_thread(third.start)
            wait_for(lambda: "which uses GPU GPU-a" in caplog.text)
            third.close()
            waiting.join(BOUND)
            assert isinstance(given_up[0], SlotClosed) and not outcome
        thread.join(BOUND)
        assert outcome == [(second.pid, 1)]


def test_a_folder_of_locks_that_others_can_enter_is_refused(locks):
    locks.mkdir(mode=0o755)
    with closing(ProcessSlot("one", device=PRETENDED[0])) as slot:
        with pytest.raises(StageError, match="is not a folder that only this user can enter"):
            slot.start()
        locks.rmdir()
        locks.symlink_to(locks.parent)
        with pytest.raises(StageError, match="is not a folder that only this user can enter"):
            slot.run(calls.count, on_event=ignore)
        assert slot.pid is None


# Work in several slots.

VARIABLE = contextvars.ContextVar("variable", default="unset")


class Threads(HereSlot):
    """Several of these have a thread each, as processes have."""

    def __init__(self) -> None:
        self.closed = threading.Event()

    def close(self):
        self.closed.set()


def test_all_work_is_done_once_in_all_slots_at_the_same_time_with_the_callers_context():
    slots, feed, together, done = [Threads() for _ in range(3)], iter(range(9)), threading.Barrier(3), []
    VARIABLE.set("of the run")

    def work(slot, item):
        together.wait(BOUND)
        done.append((item, slot, VARIABLE.get()))
        VARIABLE.set("of the slot")

    run_in_slots(slots, lambda: next(feed, None), work)
    assert sorted(item for item, _, _ in done) == list(range(9)) and {slot for _, slot, _ in done} == {*slots}
    assert sorted(value for *_, value in done) == ["of the run"] * 3 + ["of the slot"] * 6
    assert VARIABLE.get() == "of the run" and not any(slot.closed.is_set() for slot in slots)
    run_in_slots([], lambda: 1, work)


def test_one_slot_here_uses_this_thread():
    feed, threads = iter(range(2)), []
    run_in_slots([HereSlot()], lambda: next(feed, None), lambda slot, item: threads.append(threading.get_ident()))
    assert threads == [threading.get_ident()] * 2


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_the_first_error_closes_all_slots_and_is_raised_once_no_work_runs(kind):
    slots, feed, working, left = [Threads() for _ in range(3)], iter(range(9)), threading.Barrier(3), []

    def work(slot, item):
        working.wait(BOUND)
        if slot is slots[1]:
            raise kind("this")
        slot.closed.wait(BOUND)
        left.append(item)
        raise SlotClosed("closed")

    with pytest.raises(kind, match="this"):
        run_in_slots(slots, lambda: next(feed, None), work)
    assert len(left) == 2 and len(list(feed)) == 6


def test_an_error_does_not_wait_for_a_slot_that_waits_for_work():
    slots, waiting, never = [Threads(), Threads()], threading.Event(), threading.Event()
    turn = iter(["bad"])

    def take():
        if (item := next(turn, None)) is None:
            waiting.set()
            never.wait()
        return item

    def work(slot, item):
        assert waiting.wait(BOUND)
        raise ValueError(item)

    with pytest.raises(ValueError, match="bad"):
        run_in_slots(slots, take, work)
    never.set()


def test_the_end_does_not_wait_for_a_slot_that_is_not_ready_and_such_a_slot_holds_no_work():
    class Waiting(Threads):
        def start(self):
            self.closed.wait()

    slots, feed, done = [Waiting(), Threads(), Waiting()], iter(range(5)), []
    run_in_slots(slots, lambda: next(feed, None), lambda slot, item: done.append((item, slot)))
    assert done == [(item, slots[1]) for item in range(5)]
    feed = iter(range(5))
    for slot in slots:
        slot.close()
    assert list(feed) == list(range(5))


def test_work_of_a_slot_that_is_lost_is_for_another_and_the_end_waits_for_it():
    """The first slot is lost with its work while the other has found nothing left; it comes back when told to."""

    class Lost(Threads):
        def __init__(self):
            super().__init__()
            self.starts, self.back = 0, threading.Event()

        def start(self):
            self.starts += 1
            assert self.starts == 1 or self.back.wait(BOUND)

    lost, feed, done = Lost(), [1], []
    other, found_nothing, taken = Threads(), threading.Event(), threading.Event()

    def take():
        if threading.current_thread().name == f"slot {other.name}" and not found_nothing.is_set():
            assert taken.wait(BOUND)
            found_nothing.set()
            return None
        return feed.pop() if feed else None

    def work(slot, item):
        if slot is lost and not done:
            taken.set()
            assert found_nothing.wait(BOUND)
            feed.append(item)
            raise SlotLost("lost")
        done.append((slot, item))

    lost.name, other.name = "lost", "other"
    run_in_slots([lost, other], take, work)
    assert done == [(other, 1)] and lost.starts == 2
    lost.back.set()


def test_an_interrupt_ends_the_processes_at_once():
    """Of the main thread, while it waits for the threads of the slots."""
    pids, feed = [], iter(range(2))

    def interrupt(pid):
        pids.append(pid)
        if len(pids) == 2:
            os.kill(os.getpid(), signal.SIGINT)  # as the terminal does

    with open_slots({"processes": 2}, Path()) as slots:
        with pytest.raises(KeyboardInterrupt):
            run_in_slots(
                slots, lambda: next(feed, None), lambda slot, _: slot.run(calls.wait_for_ever, on_event=interrupt)
            )
        assert len(pids) == 2 and not any(map(is_alive, pids)) and [slot.pid for slot in slots] == [None, None]


def test_a_step_is_a_call():
    assert call_directly("a name", lambda: 7) == 7
