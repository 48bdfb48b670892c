"""Atomic writes: a reader sees a whole file or none, also when the writer is killed; and whose a folder is."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from pusa.errors import StageError
from pusa.system.files import (
    atomic,
    digest,
    publish,
    read_json,
    read_object,
    remove_partials,
    require_own,
    scratch,
    set_link,
    sha256_file,
    write_json,
)
from pusa.system.locks import join_work, sole_writer


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


@pytest.mark.parametrize("content", [b"[1, 2", b"\xff\xfe{}", b"[" * 100_000, b'{"a": ' * 100_000, b"", b"1" * 5000])
def test_a_file_that_is_no_json_reads_as_none_and_one_of_another_shape_as_no_object(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    assert read_json(tmp_path / "a.json") is None and read_object(tmp_path / "a.json") == {}
    (tmp_path / "a.json").write_text("[1]")
    assert read_json(tmp_path / "a.json") == [1] and read_object(tmp_path / "a.json") == {}


def test_a_json_file_that_is_too_large_or_no_file_reads_as_none(tmp_path, monkeypatch):
    monkeypatch.setattr("pusa.system.files.MAX_JSON", 10)
    (tmp_path / "large.json").write_text('"' + "x" * 9 + '"')
    (tmp_path / "endless.json").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    for name in ("large", "endless", "pipe", "folder"):
        assert read_json(tmp_path / f"{name}.json") is None


def test_only_files_are_hashed(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match="it is not a file"):
            sha256_file(path)


def test_the_unfinished_files_of_one_name_are_removed_alone(tmp_path):
    for name in (".partial-0123-a.json", ".partial-0123-b.json", "a.json"):
        (tmp_path / name).touch()
    remove_partials(tmp_path, "a.json")
    assert sorted(os.listdir(tmp_path)) == [".partial-0123-b.json", "a.json"]


def in_a_work_group(folder):
    return join_work(folder, lambda: None, {"made_from": "a"})


@pytest.mark.parametrize("write", [sole_writer, in_a_work_group])
@pytest.mark.parametrize(
    "names",
    [["thesis.tex"], [".bashrc"], ["clips"], [".partial-0123-a.json", "b.mp4"], ["index.json"], ["a-20240101.parquet"]],
)
def test_a_folder_with_files_of_somebody_else_is_refused_and_not_touched(tmp_path, write, names):
    for name in names:
        (tmp_path / name).touch()
    with (
        pytest.raises(StageError, match=f"not empty, and Pusa did not write it: it has '{names[-1]}'"),
        write(tmp_path),
    ):
        pytest.fail("it went on")
    assert sorted(os.listdir(tmp_path)) == sorted(names)


@pytest.mark.parametrize(
    "name",
    [".lock", "index.json", "00000004/checkpoint.json", "gallery.html", f"{'0a' * 8}-00000001-{'0' * 32}.parquet"],
)
def test_a_folder_of_ours_is_not_refused_even_if_it_was_copied_without_hidden_files(tmp_path, name):
    (tmp_path / "note.txt").touch()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"version": 3, "parts": {}, "facts": {}}')
    require_own(tmp_path)


def test_a_free_folder_may_be_a_link_or_hold_what_every_disk_has(tmp_path):
    (tmp_path / "disk/lost+found").mkdir(parents=True)
    (tmp_path / "disk/.DS_Store").touch()
    (tmp_path / "videos").symlink_to(tmp_path / "disk")
    for folder in (tmp_path / "videos", tmp_path / "new/one"):
        with sole_writer(folder):
            require_own(folder)
    assert (tmp_path / "disk/.lock").is_file()


def test_the_root_of_the_file_system_is_refused_under_every_name(tmp_path):
    (tmp_path / "link").symlink_to("/")
    for name in ("/", "//", "/usr/..", tmp_path / "link"):
        with pytest.raises(StageError, match="is the root of the file system"):
            require_own(Path(name))


def test_a_planted_link_is_replaced_and_nothing_is_written_through_it(tmp_path):
    (tmp_path / "keys").write_text("mine")
    (tmp_path / "x.json").symlink_to("keys")
    write_json(tmp_path / "x.json", {})
    set_link(tmp_path / "last", "keys")
    set_link(tmp_path / "last", "x.json")
    assert (tmp_path / "keys").read_text() == "mine" and not (tmp_path / "x.json").is_symlink()
    (tmp_path / ".lock").symlink_to("keys")
    with pytest.raises(StageError, match=r"\.lock is a link or a folder"), sole_writer(tmp_path):
        pytest.fail("it went on")
    assert (tmp_path / "keys").read_text() == "mine"


def test_a_device_or_a_pipe_is_not_replaced(tmp_path):
    """As the superuser could replace /dev/null, for everybody."""
    os.mkfifo(pipe := tmp_path / "pipe")
    with pytest.raises(OSError, match=r"it is a device or a pipe, not a file; name another one: .*pipe"):
        write_json(pipe, {})
    with scratch(tmp_path / "other") as partial:
        partial.touch()
        with pytest.raises(OSError, match="a device or a pipe"):
            publish(partial, pipe)
    assert pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]


def test_the_digest_does_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
