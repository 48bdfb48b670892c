"""The folder of checkpoints, as copies, damage and strangers leave it: every checkpoint that is complete is found."""

import errno
import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from pusa.finetune.checkpoint import Checkpoints
from pusa.finetune.parallel import process_group
from pusa.manifest.training import Parallel
from pusa.system.files import set_link, sha256_file, write_json, write_text

RECORD = {"recipe": {"seed": 0}, "overrides": [], "skipped": 0}


@pytest.fixture(scope="module")
def world():
    with process_group(Parallel()) as world:
        yield world


@pytest.fixture
def folder(tmp_path):
    """Return the folder of two complete checkpoints, of steps 2 and 4."""
    for step in (2, 4):
        path = tmp_path / f"{step:08d}"
        file = path / "state/a.safetensors"
        write_text(file, f"state of step {step}")
        files = {"state/a.safetensors": [file.stat().st_size, sha256_file(file)]}
        write_json(path / "checkpoint.json", {**RECORD, "step": step, "files": files})
    set_link(tmp_path / "last", "00000004")
    return tmp_path


def last_step(folder, world):
    found = Checkpoints(folder, world, 2).last()
    return found and found.step


def copy_of_last(folder):
    """Replace the link by a copy of its folder, as `cp -rL` does."""
    path = (folder / "last").resolve()
    (folder / "last").unlink()
    shutil.copytree(path, folder / "last")
    return path


def test_a_last_that_was_copied_as_a_folder_is_set_aside(folder, world, caplog):
    copy_of_last(folder)
    assert last_step(folder, world) == 4
    assert "last is a copy instead of a link; renamed it to last.copied" in caplog.text
    assert os.readlink(folder / "last") == "00000004" and (folder / "last.copied/checkpoint.json").is_file()
    copy_of_last(folder)
    assert last_step(folder, world) == 4  # also a second time


def test_a_disk_without_links_has_no_last(folder, world, caplog, monkeypatch):
    def refuse(self, target):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(self))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    (folder / "last").unlink()
    assert last_step(folder, world) == 4 and not os.path.lexists(folder / "last")
    assert "last cannot be a link on this disk; name the checkpoint itself, 00000004" in caplog.text


def test_a_last_that_alone_was_copied_gets_the_name_of_its_step(folder, world):
    shutil.rmtree(copy_of_last(folder))
    shutil.rmtree(folder / "00000002")
    assert last_step(folder, world) == 4
    assert sorted(os.listdir(folder)) == ["00000004", "last"] and os.readlink(folder / "last") == "00000004"


@pytest.mark.parametrize("name", ["folder", "file", "dangling"])
def test_anything_else_by_the_name_of_last_is_set_aside_or_replaced(folder, world, name):
    (folder / "last").unlink()
    if name == "folder":
        (folder / "last").mkdir()
    elif name == "file":
        (folder / "last").write_text("00000004")
    else:
        (folder / "last").symlink_to("gone")
    assert last_step(folder, world) == 4 and os.readlink(folder / "last") == "00000004"


def test_the_links_are_made_again_after_a_kill_and_best_is_that_of_the_measurements(folder, world):
    (folder / "last").unlink()
    (folder / "best").symlink_to("00000004")
    with Checkpoints(folder, world, 1, lambda steps: min(steps)) as checkpoints:
        assert checkpoints.last().step == 4
    assert (os.readlink(folder / "last"), os.readlink(folder / "best")) == ("00000004", "00000002")
    with Checkpoints(folder, world, 1, lambda steps: None) as checkpoints:  # nothing was measured with these settings
        checkpoints.last()
    assert os.readlink(folder / "best") == "00000002"


def test_without_a_best_a_folder_of_this_name_is_somebodys_own(folder, world):
    shutil.copytree(folder / "00000002", folder / "best")
    assert last_step(folder, world) == 4
    assert not (folder / "best").is_symlink() and (folder / "best/checkpoint.json").is_file()


def test_a_best_that_was_copied_as_a_folder_is_a_link_again(folder, world):
    shutil.copytree(folder / "00000002", folder / "best")
    with Checkpoints(folder, world, 1, lambda steps: 2) as checkpoints:
        assert checkpoints.last().step == 4
    assert os.readlink(folder / "best") == "00000002" and (folder / "best.copied/checkpoint.json").is_file()
    shutil.rmtree(folder / "best.copied")
    (folder / "best").unlink()
    (folder / "00000002").rename(folder / "best")  # a copy of the best one alone
    with Checkpoints(folder, world, 1, lambda steps: min(steps)) as checkpoints:
        checkpoints.last()
    assert os.readlink(folder / "best") == "00000002" and (folder / "00000002").is_dir()


RECORDS = {
    "another shape": b"[1, 2]",
    "too deep": b"[" * 100_000,
    "not UTF-8": b"\xff\xfe",
    "torn": b'{"step": 4, "re',
    "a step that is text": {"step": "4"},
    "another step": {"step": 9},
    "skipped of another type": {"skipped": "3"},
    "a recipe that is a list": {"recipe": []},
    "overrides of another type": {"overrides": {"a": 1}},
    "no files": {"files": {}},
    "files of another shape": {"files": {"state/a.safetensors": 5}},
    "files outside": {"files": {"../00000002/state/a.safetensors": [15, "0"]}},
}


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_a_record_of_another_shape_is_set_aside_by_name(folder, world, record, caplog):
    path = folder / "00000004/checkpoint.json"
    changed = record if isinstance(record, bytes) else json.dumps({**json.loads(path.read_text()), **record}).encode()
    path.write_bytes(changed)
    with caplog.at_level(logging.WARNING):
        assert last_step(folder, world) == 2
    assert "00000004 is damaged and is skipped: " in caplog.text and os.readlink(folder / "last") == "00000002"
    assert (folder / "00000004.torn/checkpoint.json").read_bytes() == changed


@pytest.mark.parametrize("plant", [
    lambda path, outside: path.write_text("no folder"), lambda path, outside: path.symlink_to(outside),
    lambda path, outside: path.symlink_to("nowhere"), lambda path, outside: path.mkdir(),
])  # fmt: skip
def test_what_is_planted_by_the_name_of_a_checkpoint_is_set_aside_and_nothing_behind_it_is_changed(
    folder, world, tmp_path_factory, plant
):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "mine").write_text("mine")
    plant(folder / "00000006", outside)
    assert last_step(folder, world) == 4
    assert os.path.lexists(folder / "00000006.torn") and os.listdir(outside) == ["mine"]
