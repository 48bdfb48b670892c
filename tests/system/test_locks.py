"""Locks between processes: a lock is free when its holder dies, and all processes follow the first one's plan."""

import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

from pusa.errors import StageError
from pusa.system import locks
from pusa.system.files import LOCK
from pusa.system.locks import WorkQueue, join_work, remove_work_locks, sole_writer
from tests.helpers.processes import wait_for

PLAN = {"made_from": "a", "shard_rows": 7}
BOUND = 60  # seconds to wait for something that takes milliseconds
HOLD = """
import sys, time
from pathlib import Path
from pusa.system.locks import join_work
PLAN = {"made_from": "a", "shard_rows": 3}
with join_work(Path(sys.argv[1]), lambda: None, PLAN) as group, group.lock("segment") as locked:
    print(locked, flush=True)
    time.sleep(600)
"""


def start_holder(folder):
    """Start a process that joins the work in `folder` and holds the lock "segment" until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    return process


def kill(process):
    process.kill()
    process.wait()


def is_blocked_on_a_lock() -> bool:
    """Return whether a thread of this process waits for a flock, as far as the kernel lists locks."""
    locks = Path("/proc/locks")
    return not locks.exists() or any(
        "->" in line and f" {os.getpid()} " in line for line in locks.read_text().splitlines()
    )


def move(folder):
    folder.rename(folder.with_name("moved"))


def replace(folder):
    move(folder)
    shutil.copytree(folder.with_name("moved"), folder)


def complete_all(group, items, complete):
    queue = WorkQueue(group, items)
    while (item := queue.take()) is not None:
        queue.complete(item, partial(complete, item))


def test_a_child_that_a_killed_writer_was_just_starting_is_waited_for(tmp_path, monkeypatch):
    """Until its program begins, it has the descriptors of its parent, and with them the lock."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    note = {"holder": {"process": dead.pid, "host": socket.gethostname(), "since": "now"}}
    (tmp_path / LOCK).write_text(json.dumps(note))
    with open(tmp_path / LOCK, "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[lock.fileno()])
    with monkeypatch.context() as patch, pytest.raises(StageError, match="being written by another"):
        patch.setattr(locks, "SECONDS_OF_A_START", 0.0)
        sole_writer(tmp_path).__enter__()
    child.stdin.close()
    with sole_writer(tmp_path):
        assert child.wait() == 0


@pytest.mark.parametrize("lose", [move, shutil.rmtree, replace])
@pytest.mark.parametrize("hold", [sole_writer, lambda folder: join_work(folder, lambda: None, PLAN)])
def test_a_folder_that_is_moved_or_removed_while_it_is_written_is_noticed(tmp_path, hold, lose):
    folder = tmp_path / "table"
    with pytest.raises(StageError, match="table was moved, removed or replaced"), hold(folder):
        lose(folder)
    folder = tmp_path / "second" / "table"
    with pytest.raises(KeyError), hold(folder):  # an error of the work itself comes first
        lose(folder)
        raise KeyError


def test_a_writer_can_ask_whether_its_folder_is_in_place(tmp_path):
    folder = tmp_path / "videos"
    with sole_writer(folder) as require_in_place:
        require_in_place()
        move(folder)
        with pytest.raises(StageError, match="move it back"):
            require_in_place()
        folder.with_name("moved").rename(folder)


def test_an_item_has_one_holder_until_that_process_dies(tmp_path):
    other = start_holder(tmp_path)
    with join_work(tmp_path, lambda: None, PLAN) as group:
        with group.lock("segment") as locked, group.lock("another") as free:
            assert (locked, free) == (False, True)
        kill(other)
        with group.lock("segment") as locked:
            assert locked


def test_only_a_process_that_is_alone_cleans_up(tmp_path):
    (tmp_path / ".partial-0-a.parquet").touch()
    cleaned = []
    other = start_holder(tmp_path)
    assert not list(tmp_path.glob(".partial-*"))  # the other process was alone
    (tmp_path / ".partial-1-b.parquet").touch()
    with join_work(tmp_path, lambda: cleaned.append(1), PLAN) as group:
        assert not group.is_alone()
    kill(other)
    assert not cleaned and list(tmp_path.glob(".partial-*"))
    with join_work(tmp_path, lambda: cleaned.append(1), PLAN) as group:
        assert group.is_alone()
        remove_work_locks(tmp_path)
    assert cleaned and not list(tmp_path.glob(".partial-*")) and not list(tmp_path.glob(".claims/*"))


def test_a_lock_can_be_waited_for(tmp_path):
    other = start_holder(tmp_path)
    killer = threading.Thread(target=lambda: (wait_for(is_blocked_on_a_lock), other.kill()))
    killer.start()
    try:
        with join_work(tmp_path, lambda: None, PLAN) as group, group.lock("segment", wait=True) as locked:
            assert locked and other.wait(BOUND) == -9
    finally:
        kill(other)
        killer.join()


def test_every_item_is_completed_whoever_held_it(tmp_path):
    other = start_holder(tmp_path)
    completed = []

    class Segment(str):
        name = property(str)

    def complete(segment):
        completed.append(segment)
        if segment == "last":
            kill(other)

    with join_work(tmp_path, lambda: None, PLAN) as group:
        complete_all(group, [Segment("segment"), Segment("last")], complete)
    assert completed == ["last", "segment"]


def test_a_stopped_process_that_is_waited_for_is_named_again_and_again(tmp_path, caplog, monkeypatch):
    """As precompute does, whose peer holds a segment for ever."""
    for name in ("SECONDS_BETWEEN_LOOKS", "SECONDS_OF_SILENCE", "SECONDS_BETWEEN_REPORTS"):
        monkeypatch.setattr(locks, name, 0.001)
    caplog.set_level(logging.INFO, "pusa")
    other = start_holder(tmp_path)
    other.send_signal(signal.SIGSTOP)
    named = f"waiting for another process ({other.pid} on {socket.gethostname()}, since 20"

    def kill_when_named_twice():
        wait_for(lambda: caplog.text.count(named) >= 2)
        kill(other)

    class Segment(str):
        name = property(str)

    killer = threading.Thread(target=kill_when_named_twice)
    killer.start()
    with join_work(tmp_path, lambda: None, PLAN) as group:
        complete_all(group, [Segment("segment")], lambda segment: None)
        killer.join()
        assert f"which holds {tmp_path}/.claims/segment.lock" in caplog.text

        caplog.clear()
        other = start_holder(tmp_path)
        named = f"waiting for another process ({other.pid} on "
        killer = threading.Thread(target=kill_when_named_twice)
        killer.start()
        with group.lock("segment", wait=True) as locked:
            assert locked
        killer.join()


def test_a_linked_folder_of_locks_is_not_written_and_not_emptied(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/poetry.lock").touch()
    folder = tmp_path / "latents"
    with join_work(folder, lambda: None, PLAN) as group:
        (folder / ".claims").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(StageError, match=r"\.claims is a link"), group.lock("segment"):
            pytest.fail("it went on")
    remove_work_locks(folder)
    assert os.listdir(tmp_path / "elsewhere") == ["poetry.lock"] and not (folder / ".claims").is_symlink()


def test_a_later_process_follows_the_first_ones_plan_or_is_refused(tmp_path):
    other = start_holder(tmp_path)
    with join_work(tmp_path, lambda: None, PLAN) as group:
        assert group.plan["shard_rows"] == 3
    with (
        pytest.raises(StageError, match="works from other sources"),
        join_work(tmp_path, lambda: None, {"made_from": "b"}),
    ):
        pass
    kill(other)
    with join_work(tmp_path, lambda: None, {"made_from": "b"}) as group:
        assert group.plan == {"made_from": "b"}


@pytest.mark.parametrize("left", [b"", b'{"made_from": "b"}', b"[1]", b"{", b"\xff", b"[" * 100_000, b'{"holder": 1}'])
def test_the_plan_of_a_dead_process_is_not_followed(tmp_path, left):
    (tmp_path / ".lock").write_bytes(left)
    (tmp_path / ".partial-0-a").touch()
    cleaned = []
    with join_work(tmp_path, lambda: cleaned.append(1), PLAN) as group:
        assert cleaned and group.plan == PLAN and not list(tmp_path.glob(".partial-*"))


def test_a_process_with_another_plan_that_is_about_to_leave_is_waited_for(tmp_path):
    with (tmp_path / ".lock").open("a+") as lock:
        lock.write('{"made_from": "b"}')
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)  # as `is_alone` holds it during the final clean-up
        leaver = threading.Thread(target=lambda: (wait_for(is_blocked_on_a_lock), fcntl.flock(lock, fcntl.LOCK_UN)))
        leaver.start()
        with join_work(tmp_path, lambda: None, PLAN) as group:
            assert group.plan == PLAN
        leaver.join()


# Folders that cannot lock.


def refuse_locks(monkeypatch, number):
    """Have every flock fail with this error, as on some network and user file systems."""

    def refuse(file, kind):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize("name", ["ENOLCK", "ENOSYS", "EOPNOTSUPP", "EIO", "EINVAL"])
def test_a_folder_that_cannot_lock_is_named(monkeypatch, tmp_path, name):
    refuse_locks(monkeypatch, getattr(errno, name))
    for attempt in (sole_writer(tmp_path), join_work(tmp_path, lambda: None, PLAN)):
        with pytest.raises(StageError, match=f"{tmp_path} cannot be locked .*--run-dir"), attempt:
            pytest.fail("it went on without a lock")


def test_a_lock_of_an_item_names_its_folder_too(monkeypatch, tmp_path):
    with join_work(tmp_path, lambda: None, PLAN) as group:
        refuse_locks(monkeypatch, errno.ENOLCK)
        with pytest.raises(StageError, match=f"{tmp_path}.* cannot be locked"), group.lock("segment"):
            pytest.fail("it went on without a lock")
