import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pusa.errors import MediaError, Rejected, StageError
from pusa.video.child import Child, this_threads_child

MADE = "tests.helpers.decoder_stand_ins"


@pytest.fixture
def child():
    with Child() as child:
        yield child


def call(child, name, seconds=20.0, **arguments):
    return child.call(f"{MADE}:{name}", arguments, "a.mp4", seconds)


def gone(pid: int) -> bool:
    """Whether a process is no more, not even a zombie; it may take a moment."""
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.05)
    return False


def test_it_answers_and_is_used_again(child):
    answers = [call(child, "twice", path=path) for path in ("a", "b\udcff")]
    assert [answer.facts["path"] for answer in answers] == ["a", "b\udcff"]
    np.testing.assert_array_equal(answers[0].array, np.arange(12).reshape(3, 4) * 2)
    assert answers[0].array.dtype == np.int16
    assert answers[0].facts["pid"] == answers[1].facts["pid"] != os.getpid()
    assert call(child, "empty").array.shape == (0, 8, 8, 3)


@pytest.mark.parametrize(
    ("name", "reason", "said"),
    [
        ("hang", "timeout", "a.mp4 took longer than 0.7 s"),
        ("hang_with_a_child", "timeout", "a.mp4 took longer than 0.7 s"),
        ("crash", "crashed", r"died \(signal 6\) on a.mp4"),
        ("leave", "crashed", r"died \(exit code 3\) on a.mp4"),
        ("err", "crashed", r"ZeroDivisionError: our own fault at .*made\.py"),
    ],
)
def test_after_a_hang_or_a_crash_there_is_another(child, name, reason, said):
    first = call(child, "nothing").facts["pid"]
    with pytest.raises(Rejected, match=said) as caught:
        call(child, name, seconds=0.7)
    assert caught.value.reason == reason and gone(first)
    assert call(child, "nothing").facts["pid"] != first


def test_named_errors_come_back_and_it_lives_on(child):
    first = call(child, "nothing").facts["pid"]
    with pytest.raises(Rejected, match="it is torn") as caught:
        call(child, "refuse")
    assert caught.value.reason == "damaged"
    with pytest.raises(MediaError, match="no good"):
        call(child, "complain")
    assert call(child, "nothing").facts["pid"] == first


def test_an_interrupt_leaves_no_half_read_answer(child, monkeypatch):
    first = call(child, "nothing").facts["pid"]
    monkeypatch.setattr(child, "_receive", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        call(child, "twice", path="a")
    monkeypatch.undo()
    assert gone(first) and call(child, "nothing").array is None


def test_each_thread_has_one_which_ends_with_it():
    pids = []

    def work():
        pids.append([call(this_threads_child(), "nothing").facts["pid"] for _ in range(2)])

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (a, b), (c, d) = pids
    assert a == b != c == d and gone(a) and gone(c)


@pytest.mark.parametrize("at_work", [True, False])
def test_it_dies_with_its_parent(at_work):
    code = (
        "import time; from pusa.video.child import Child; child = Child()\n"
        f"print(child.call('{MADE}:nothing', {{}}, '', 20).facts['pid'], flush=True)\n"
        f"child.call('{MADE}:hang', {{}}, '', 60) if {at_work} else time.sleep(60)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env) as parent:
        pid = int(parent.stdout.readline())
        time.sleep(0.2)
        parent.kill()
    assert gone(pid)


def test_one_that_dies_at_its_start_is_said(child, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(StageError, match=r"decoder's process did not start \(exit code 1\)"):
        call(child, "nothing")
    monkeypatch.undo()
    assert call(child, "nothing").array is None


def test_closed_it_leaves_nothing_behind():
    with Child() as child:
        pid = call(child, "nothing").facts["pid"]
    assert gone(pid)
