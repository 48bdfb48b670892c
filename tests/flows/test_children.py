"""Children that are told to end, that will not, and whose parents are killed; scripts stand in for the trainer."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flows.children import last_lines, run
from pusa.errors import TrainingError

STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
inner = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(99)"
inner = subprocess.Popen([sys.executable, "-c", inner])
print(os.getpid(), inner.pid, flush=True)
time.sleep(99)
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def wait_for(what, seconds=30):
    """What `what` finds, as soon as it finds something."""
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "it never came"
        time.sleep(0.05)
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def words_of(path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def test_what_a_child_says_is_kept_and_told(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    log = tmp_path / "launch/log.txt"
    for number in (1, 2, 3):
        say = f"import sys; print('step {number}'); print('\\x1b[2Jdone', file=sys.stderr)"
        assert run(python(say), log, os.environ) == 0
    assert sorted(log.read_text().splitlines()) == ["\x1b[2Jdone", "step 3"]
    assert "step 2" in log.with_name("log.1.txt").read_text()
    assert "step 3" in last_lines(log) and "\\x1b[2Jdone" in last_lines(log)
    assert caplog.messages and not any("\x1b" in message for message in caplog.messages)


def test_a_torrent_of_words_becomes_a_line_now_and_then(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert run(python("for i in range(100_000): print(i, 'x' * 100)"), tmp_path / "log.txt", os.environ) == 0
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 100_000
    assert 1 <= len(caplog.messages) <= 20 and caplog.messages[-1].startswith("99999 ")


@pytest.mark.parametrize("code, ended", [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", -9)])
def test_how_a_child_ended(tmp_path, code, ended):
    assert run(python(code), tmp_path / "log.txt", os.environ) == ended


def test_who_does_not_end_when_told_is_killed_with_all_its_children(tmp_path):
    log, stop = tmp_path / "log.txt", threading.Event()
    teller = threading.Thread(target=lambda: (wait_for(lambda: len(words_of(log)) == 2), stop.set()))
    teller.start()
    with pytest.raises(TrainingError, match="goes on from its last checkpoint"):
        run(python(STUBBORN), log, os.environ, stop, grace=0.5)
    teller.join()
    wait_for(lambda: not any(map(is_alive, map(int, words_of(log)))))


def test_what_a_child_leaves_behind_ends_with_it(tmp_path):
    code = (
        "import subprocess, sys; inner = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']); "
        "print(inner.pid, flush=True)"
    )
    assert run(python(code), tmp_path / "log.txt", os.environ) == 0
    wait_for(lambda: not is_alive(int(words_of(tmp_path / "log.txt")[0])))


def test_a_child_ends_with_the_launcher_that_is_killed(tmp_path):
    log = tmp_path / "log.txt"
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(99)"
    begin = "import os, sys; from pathlib import Path; from flows.children import run"
    launcher = subprocess.Popen(python(f"{begin}; run({python(child)!r}, Path({str(log)!r}), os.environ)"))
    (pid,) = map(int, wait_for(lambda: words_of(log)))
    assert is_alive(pid)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    wait_for(lambda: not is_alive(pid))
