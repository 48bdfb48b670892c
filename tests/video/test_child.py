import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from pusa.errors import MediaError, Rejected, StageError
from pusa.video.child import Child, this_threads_child
from tests.helpers.processes import wait_for

STAND_INS = "tests.helpers.decoder_stand_ins"


@pytest.fixture
def child():
    with Child() as child:
        yield child


def call(child, name, seconds=120.0, **arguments):
    return child.call(f"{STAND_INS}:{name}", arguments, "a.mp4", seconds)


def wait_until_gone(pid: int) -> None:
    """Wait until a process does not exist, not even as a zombie."""
    wait_for(lambda: not Path(f"/proc/{pid}").exists())


def test_one_process_answers_several_calls(child):
    answers = [call(child, "twice", path=path) for path in ("a", "b\udcff")]
    assert [answer.facts["path"] for answer in answers] == ["a", "b\udcff"]
    np.testing.assert_array_equal(answers[0].array, np.arange(12).reshape(3, 4) * 2)
    assert answers[0].array.dtype == np.int16
    assert answers[0].facts["pid"] == answers[1].facts["pid"] != os.getpid()
    assert call(child, "empty_array").array.shape == (0, 8, 8, 3)


@pytest.mark.parametrize(
    ("name", "seconds", "reason", "message"),
    [
        ("hang", 0.7, "timeout", "a.mp4 took longer than 0.7 s"),
        ("hang_with_a_child", 0.7, "timeout", "a.mp4 took longer than 0.7 s"),
        ("abort", 120, "crashed", r"died \(signal 6\) on a.mp4"),
        ("exit_with_3", 120, "crashed", r"died \(exit code 3\) on a.mp4"),
        ("divide_by_zero", 120, "crashed", r"ZeroDivisionError: our own fault at .*decoder_stand_ins\.py"),
    ],
)
def test_after_a_hang_or_a_crash_a_new_process_is_started(child, name, seconds, reason, message):
    first = call(child, "process_id").facts["pid"]
    with pytest.raises(Rejected, match=message) as caught:
        call(child, name, seconds)
    assert caught.value.reason == reason
    wait_until_gone(first)
    assert call(child, "process_id").facts["pid"] != first


def test_media_errors_are_passed_on_and_the_process_lives_on(child):
    first = call(child, "process_id").facts["pid"]
    with pytest.raises(Rejected, match="it is torn") as caught:
        call(child, "reject")
    assert caught.value.reason == "damaged"
    with pytest.raises(MediaError, match="no good"):
        call(child, "raise_media_error")
    assert call(child, "process_id").facts["pid"] == first


def test_an_interrupt_leaves_no_half_read_answer(child, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    first = call(child, "process_id").facts["pid"]
    with monkeypatch.context() as patch:
        patch.setattr(child, "_receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            call(child, "twice", path="a")
    wait_until_gone(first)
    assert call(child, "process_id").array is None


def test_each_thread_has_a_child_that_ends_with_the_thread():
    pids = []

    def work():
        pids.append([call(this_threads_child(), "process_id").facts["pid"] for _ in range(2)])

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (a, b), (c, d) = pids
    assert a == b != c == d
    wait_until_gone(a)
    wait_until_gone(c)


@pytest.mark.parametrize("is_busy", [True, False])
def test_the_child_dies_with_its_parent(tmp_path, is_busy):
    started = tmp_path / "started"
    code = (
        "import sys; from pusa.video.child import Child; child = Child()\n"
        f"print(child.call('{STAND_INS}:process_id', {{}}, '', 120).facts['pid'], flush=True)\n"
        f"if {is_busy}: child.call('{STAND_INS}:hang', {{'started': {str(started)!r}}}, '', 3600)\n"
        "sys.stdin.read()"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as parent:
        pid = int(parent.stdout.readline())
        if is_busy:
            wait_for(started.exists)
        parent.kill()
    wait_until_gone(pid)


def test_a_child_that_cannot_start_is_an_error_of_the_stage():
    with Child(python="/bin/false") as child:
        with pytest.raises(StageError, match=r"/bin/false: a decoder process did not start \(exit code 1\)"):
            call(child, "process_id")
        child.python = sys.executable
        assert call(child, "process_id").array is None


def test_a_closed_child_leaves_no_process_behind():
    with Child() as child:
        pid = call(child, "process_id").facts["pid"]
    wait_until_gone(pid)
