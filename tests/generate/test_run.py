"""What the command of a run decides: which jobs are left to it, and whether there is anything to do."""

import fcntl
import json
import logging
import os
from contextlib import nullcontext
from pathlib import Path
from typing import IO

import pytest

from pusa.errors import StageError
from pusa.generate import run as runs
from pusa.generate.messages import Busy
from pusa.generate.stage import generate
from pusa.system.locks import LOCKS_FOLDER, note_holder, open_lock, try_lock
from pusa.system.slots import HereSlot, WorkerDied
from tests.helpers.stub_model import StubModel, manifest_of


def test_a_job_that_a_later_manifest_changes_is_left_to_it(tmp_path):
    jobs = [{"id": id, "num_frames": frames} for id, frames in (("a", 7), ("b", 13), ("c", 19))]
    first = manifest_of(*jobs)
    later = manifest_of(*jobs[:2], {**jobs[2], "seed": 1, "priority": 1})

    def step(name, call):
        if not (tmp_path / "videos/c.mp4").exists():
            assert generate(later, tmp_path, StubModel).made == ["c", "a", "b"]
        return call()

    result = generate(first, tmp_path, StubModel, step=step)
    assert (result.made, result.kept, result.left, result.failed) == ([], ["a", "b"], ["c"], {})
    assert json.loads((tmp_path / "videos/c.json").read_text())["job"]["seed"] == 1
    assert generate(later, tmp_path, StubModel).kept == ["a", "b", "c"]
    assert generate(first, tmp_path, StubModel).made == ["c"]


def test_a_job_that_reads_another_and_has_another_path_elsewhere_is_not_taken_for_a_changed_one(tmp_path):
    (tmp_path / "run").mkdir()
    (elsewhere := tmp_path / "mount").symlink_to("run")
    more = {"id": "more", "task": "extension", "given": [0], "video": Path("RUN/videos/ball.mp4"), "num_frames": 13}
    jobs = manifest_of({"id": "ball", "num_frames": 13}, more)
    failed = manifest_of({"id": "ball", "num_frames": 12}, more)

    def step(name, call):
        if not elsewhere.joinpath("videos/ball.json").exists():  # it lists the jobs, and makes none
            assert generate(failed, elsewhere, StubModel).failed.keys() == {"ball", "more"}
        return call()

    assert generate(jobs, tmp_path / "run", StubModel, step=step).made == ["ball", "more"]


class Refuses(StubModel):
    """Fails at one prompt."""

    def encode_text(self, prompts, padded=True):
        if prompts == ["old"]:
            raise ValueError("refused")
        return super().encode_text(prompts, padded)


@pytest.mark.parametrize("model", [StubModel, Refuses])
def test_a_job_that_is_made_and_held_by_another_command_only_shares_a_batch(tmp_path, monkeypatch, model):
    monkeypatch.setenv("PUSA_CACHE", "")
    a, b = {"id": "a", "prompt": "old"}, {"id": "b", "seed": 1}
    assert generate(manifest_of(a), tmp_path, StubModel).made == ["a"]
    before = (tmp_path / "videos/a.json").read_bytes()
    chunks = []

    def step(name, call):
        chunks.append(name)
        assert len(chunks) == 1, "the same chunk is tried again and again"
        return call()

    (tmp_path / "videos" / LOCKS_FOLDER).mkdir(exist_ok=True)
    with (tmp_path / "videos/.lock").open() as group, open_lock(tmp_path / "videos" / LOCKS_FOLDER / "a.lock") as lock:
        assert try_lock(group, fcntl.LOCK_SH, wait=False) and try_lock(lock, fcntl.LOCK_EX, wait=False)
        result = generate(manifest_of(a, b), tmp_path, model, step=step)
    assert (result.made, result.kept, result.failed, chunks) == (
        ["b"],
        ["a"],
        {},
        ["text_to_video 32x32x7, jobs 1-2 on cpu"],
    )
    assert (tmp_path / "videos/a.json").read_bytes() == before


def test_a_run_with_nothing_left_to_do_opens_no_slots_also_where_jobs_read_others(tmp_path, monkeypatch):
    more = {"id": "more", "task": "extension", "given": [0], "video": Path("RUN/videos/ball.mp4")}
    jobs = manifest_of({"id": "ball", "num_frames": 13}, {**more, "num_frames": 13})
    assert generate(jobs, tmp_path, StubModel).made == ["ball", "more"]
    monkeypatch.delattr(runs, "open_slots")
    assert generate(jobs, tmp_path, StubModel).kept == ["ball", "more"]


def test_the_log_says_at_the_start_what_there_is_to_do_and_where(tmp_path, caplog):
    caplog.set_level("INFO", "pusa")
    jobs = [{"id": "a"}, {"id": "b"}]
    generate(manifest_of(*jobs), tmp_path, StubModel)
    assert caplog.messages[:2] == [f"2 jobs: 0 made already, 2 to make, in {tmp_path / 'videos'}", "slots: cpu"]
    assert caplog.messages[2].startswith("denoising steps: ") and "of 2 videos; " in caplog.messages[2]
    caplog.clear()
    generate(manifest_of(*jobs, {"id": "c", "num_frames": 12}), tmp_path, StubModel)
    assert caplog.messages[1:] == [f"3 jobs: 2 made already, 0 to make, 1 failed, in {tmp_path / 'videos'}"]


class Releases(logging.Handler):
    """Closes a lock once the log says who holds it."""

    held: IO[str] | None = None
    said = ""

    def emit(self, record):
        if self.held and "waiting for" in record.getMessage():
            self.said = record.getMessage()
            self.held.close()


def test_a_wait_for_another_command_names_it(tmp_path, monkeypatch):
    releases = Releases()
    monkeypatch.setattr(logging.getLogger("pusa.system.locks"), "handlers", [releases])
    logging.getLogger("pusa.system.locks").setLevel(logging.INFO)

    def step(name, call):
        if releases.held is None:
            releases.held = open_lock(tmp_path / "videos" / LOCKS_FOLDER / "b.lock")
            assert try_lock(releases.held, fcntl.LOCK_EX, wait=False)
            note_holder(releases.held)
        return call()

    jobs = manifest_of({"id": "a"}, {"id": "b", "num_frames": 13})
    assert generate(jobs, tmp_path, StubModel, step=step).made == ["a", "b"]
    assert str(os.getpid()) in releases.said and "b.lock" in releases.said


class DiesLoading(HereSlot):
    """A slot whose worker dies when it begins to load weights."""

    def run(self, call, *arguments, on_event):
        def emit(event):
            on_event(event)
            if event == Busy(()):
                raise WorkerDied("signal 9")

        return super().run(call, *arguments, on_event=emit)


def test_a_worker_that_dies_while_it_loads_weights_blames_no_job(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "open_slots", lambda place, folder: nullcontext([DiesLoading()]))
    with pytest.raises(StageError, match="died 6 times before they began a job"):
        generate(manifest_of({"id": "a", "prompt": "a"}), tmp_path)
    assert not (tmp_path / "videos/a.json").exists()
