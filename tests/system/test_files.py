"""Atomic writes: a reader sees a whole file or none, also when the writer is killed."""

import os
import signal
import subprocess
import sys

import pytest
from safetensors import SafetensorError

from pusa.errors import StageError
from pusa.system.files import atomic, digest, read_json, set_link, write_json
from pusa.system.locks import sole_writer


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": True})
    with pytest.raises(RuntimeError), atomic(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert read_json(path) == {"old": True} and os.listdir(tmp_path) == ["a.json"]


def test_the_error_of_a_full_disk_names_the_file(tmp_path):
    for error in (SafetensorError("no space"), OSError(28, "no space")):
        with pytest.raises(OSError, match=r"a\.bin"), atomic(tmp_path / "a.bin"):
            raise error


def test_a_folder_appears_whole(tmp_path):
    with atomic(tmp_path / "step") as partial:
        (partial / "inner").mkdir(parents=True)
        (partial / "inner/weights").write_text("x")
        assert not (tmp_path / "step").exists()
    assert (tmp_path / "step/inner/weights").read_text() == "x"


def test_a_killed_writer_leaves_only_a_partial_file_that_the_next_one_removes(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from pusa.system.files import atomic\n"
        "with atomic(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half'); print('written', flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a.txt")], stdout=subprocess.PIPE)
    child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert len(os.listdir(tmp_path)) == 1 and not (tmp_path / "a.txt").exists()
    with sole_writer(tmp_path):
        assert os.listdir(tmp_path) == [".lock"]


def test_a_folder_has_one_writer_at_a_time_and_is_free_after_a_kill(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from pusa.system.locks import sole_writer\n"
        "with sole_writer(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    child.stdout.readline()
    with pytest.raises(StageError, match="another process"), sole_writer(tmp_path):
        pass
    child.kill()
    child.wait()
    with sole_writer(tmp_path):
        pass


def test_a_link_can_be_set_again(tmp_path):
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        set_link(tmp_path / "last", name)
        assert os.readlink(tmp_path / "last") == name


def test_an_incomplete_json_file_reads_as_none(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ')
    assert read_json(tmp_path / "a.json") is None and read_json(tmp_path / "none.json") is None


def test_the_digest_does_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
