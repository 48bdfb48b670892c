"""Several processes at one folder: locks that die with their holders."""

import fcntl
import subprocess
import sys
import threading

import pytest

from pusa.errors import StageError
from pusa.system.locks import join_work, remove_work_locks

PLAN = {"made_from": "a", "shard_rows": 7}
HOLD = """
import sys, time
from pathlib import Path
from pusa.system.locks import join
PLAN = {"made_from": "a", "shard_rows": 3}
with join(Path(sys.argv[1]), lambda: None, PLAN) as crew, crew.claim("piece") as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


def holder(folder):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    return process


def test_a_piece_has_one_maker_until_it_dies(tmp_path):
    other = holder(tmp_path)
    with join_work(tmp_path, lambda: None, PLAN) as crew:
        with crew.claim("piece") as mine, crew.claim("another") as free:
            assert (mine, free) == (False, True)
        other.kill()
        other.wait()
        with crew.claim("piece") as mine:
            assert mine


def test_only_who_is_alone_tidies_up(tmp_path):
    (tmp_path / ".partial-0-a.parquet").touch()
    tidied = []
    other = holder(tmp_path)
    assert not list(tmp_path.glob(".partial-*"))  # the other was alone
    (tmp_path / ".partial-1-b.parquet").touch()
    with join_work(tmp_path, lambda: tidied.append(1), PLAN) as crew:
        assert not crew.is_alone()
    other.kill()
    other.wait()
    assert not tidied and list(tmp_path.glob(".partial-*"))
    with join_work(tmp_path, lambda: tidied.append(1), PLAN) as crew:
        assert crew.is_alone()
        remove_work_locks(tmp_path)
    assert tidied and not list(tmp_path.glob(".partial-*")) and not list(tmp_path.glob(".claims/*"))


def test_to_wait_for_a_claim(tmp_path):
    other = holder(tmp_path)
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {other.pid}"])
    with join_work(tmp_path, lambda: None, PLAN) as crew, crew.claim("piece", wait=True) as mine:
        assert mine and other.wait(5) == -9
    killer.wait()


def test_who_comes_later_follows_the_plan_of_the_first_or_is_refused(tmp_path):
    other = holder(tmp_path)
    with join_work(tmp_path, lambda: None, PLAN) as crew:
        assert crew.plan["shard_rows"] == 3
    with (
        pytest.raises(StageError, match="makes another table there"),
        join_work(tmp_path, lambda: None, {"made_from": "b"}),
    ):
        pass
    other.kill()
    other.wait()
    with join_work(tmp_path, lambda: None, {"made_from": "b"}) as crew:
        assert crew.plan == {"made_from": "b"}


@pytest.mark.parametrize("left", ["", '{"made_from": "b"}', "[1]", "{"])
def test_the_plan_of_one_that_died_binds_nobody(tmp_path, left):
    (tmp_path / ".lock").write_text(left)
    (tmp_path / ".partial-0-a").touch()
    tidied = []
    with join_work(tmp_path, lambda: tidied.append(1), PLAN) as crew:
        assert tidied and crew.plan == PLAN and not list(tmp_path.glob(".partial-*"))


def test_one_that_is_at_its_end_with_another_plan_is_waited_for(tmp_path):
    with (tmp_path / ".lock").open("a+") as lock:
        lock.write('{"made_from": "b"}')
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)  # as `is_alone` has it while it clears up
        ending = threading.Timer(0.3, lambda: fcntl.flock(lock, fcntl.LOCK_UN))
        ending.start()
        with join_work(tmp_path, lambda: None, PLAN) as crew:
            assert crew.plan == PLAN
        ending.join()
