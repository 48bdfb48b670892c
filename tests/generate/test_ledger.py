"""The ledger: kills at any write, flipped bits, changed jobs, jobs that kill their worker, several commands at once."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
from itertools import count
from pathlib import Path
from typing import IO

import pytest
import torch

from pusa.errors import StageError
from pusa.generate import run as runs
from pusa.generate import worker
from pusa.generate.decode import write_job_video
from pusa.generate.ledger import Ledger, listed_jobs
from pusa.generate.stage import generate
from pusa.manifest.place import Processes
from tests.helpers.stub_model import StubModel, manifest_of

JOBS = (
    {"id": "ball", "prompt": "a ball", "num_frames": 13},
    {"id": "more", "task": "extension", "given": [0, 1], "num_frames": 19, "video": Path("RUN/videos/ball.mp4")},
    {"id": "box", "prompt": "a box", "num_frames": 13},
    {"id": "cup", "prompt": "a cup", "seed": 3, "steps": 3},
)


def contents(run: Path, ends=(".mp4", ".safetensors")) -> dict[str, bytes]:
    """Return the content of all videos and latents of a run, also of hidden folders."""
    videos = run / "videos"
    return {str(path.relative_to(videos)): path.read_bytes() for path in videos.rglob("*") if path.suffix in ends}


def in_child(call, *arguments) -> int | None:
    """Run a call in a fork of this process and return its exit code; a negative one is a signal."""
    child = multiprocessing.get_context("fork").Process(target=call, args=arguments)
    child.start()
    child.join()
    return child.exitcode


def killed_at(write: int, before: bool, run: Path) -> None:
    """Generate, and kill this process before or after its n-th file gets its name."""
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    rename, numbers = Path.replace, count(1)  # videos get their names in other threads

    def replace(path, target):
        number = next(numbers)
        if before and number == write:
            os.kill(os.getpid(), signal.SIGKILL)
        renamed = rename(path, target)
        if number == write:
            os.kill(os.getpid(), signal.SIGKILL)
        return renamed

    Path.replace = replace
    generate(manifest_of(*JOBS).model_copy(update={"save_every": 1e-9}), run, StubModel)


def finished(run: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of each finished job's files."""
    found = {}
    for job in JOBS:
        record = run / f"videos/{job['id']}.json"
        if record.exists() and json.loads(record.read_text())["status"] == "done":
            stats = {end: os.stat(record.with_suffix(end)) for end in (".mp4", ".json", ".latents.safetensors")}
            found |= {f"{job['id']}{end}": (stat.st_ino, stat.st_mtime_ns) for end, stat in stats.items()}
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """Return the videos and latents of a run that was not interrupted."""
    run = tmp_path_factory.mktemp("whole")
    assert generate(manifest_of(*JOBS), run, StubModel).made == ["ball", "box", "more", "cup"]
    return contents(run)


@pytest.mark.parametrize("before", [True, False])
def test_a_run_that_is_killed_at_one_write_after_another_ends_with_the_same_files(tmp_path, whole, before):
    kills, kept = 0, {}
    while (code := in_child(killed_at, kills + 1, before, tmp_path)) == -signal.SIGKILL:
        kills += 1
        now = finished(tmp_path)
        assert kept.items() <= now.items(), "a finished file was written again"
        kept = now
    assert code == 0 and kills >= 4
    assert contents(tmp_path) == whole


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False])
def test_a_run_that_is_killed_at_any_write_ends_with_the_same_files(tmp_path, whole, before):
    for write in range(1, 1000):
        run = tmp_path / str(write)
        code = in_child(killed_at, write, before, run)
        kept = finished(run)
        generate(manifest_of(*JOBS), run, StubModel)
        assert contents(run) == whole and kept.items() <= finished(run).items()
        if code == 0:
            break
    assert code == 0 and write > 20


def test_a_flipped_bit_in_any_file_of_a_job_is_found_and_only_that_job_is_made_again(tmp_path, whole):
    generate(manifest_of(*JOBS), tmp_path, StubModel)
    for name in ("ball.mp4", "ball.latents.safetensors", "ball.json"):
        path = tmp_path / "videos" / name
        content = bytearray(path.read_bytes())
        content[-40] ^= 1
        path.write_bytes(content)
        assert generate(manifest_of(*JOBS), tmp_path, StubModel).made == ["ball"], name
        assert contents(tmp_path) == whole


def test_a_changed_job_is_made_again_and_its_old_files_are_kept_unless_told_otherwise(tmp_path):
    first, second, third = ({"id": "a", "seed": seed} for seed in range(3))
    videos = tmp_path / "videos"
    generate(manifest_of(first, {"id": "b"}), tmp_path, StubModel)
    old = {path.name: path.read_bytes() for path in videos.glob("a.*")}
    assert generate(manifest_of(second, {"id": "b"}), tmp_path, StubModel).made == ["a"]
    kept = {path.name: path.read_bytes() for path in (videos / ".old").iterdir()}
    assert sorted(kept.values()) == sorted(old.values()) and len(kept) == 3
    record = json.loads((videos / "a.json").read_text())
    assert record["job"]["seed"] == 1 and "failure" not in record
    replaced = manifest_of(third).model_copy(update={"keep_old": False})
    assert generate(replaced, tmp_path, StubModel).made == ["a"]
    assert {path.name for path in (videos / ".old").iterdir()} == kept.keys()


def test_the_ffmpeg_of_a_killed_worker_does_not_write_into_the_next_one_s_video(tmp_path, monkeypatch):
    left: list[IO[bytes]] = []

    def write(job, model, z_CFhw, path):
        close = write_job_video(job, model, z_CFhw, path)
        left.append(path.open("ab"))
        return close

    def crash(*arguments):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(worker, "write_job_video", write)
    monkeypatch.setattr(Ledger, "publish", crash)
    with pytest.raises(OSError, match="no space"):
        generate(manifest_of({"id": "a"}), tmp_path, StubModel)
    monkeypatch.undo()
    with (tmp_path / "videos/.lock").open() as another:  # so that nothing is cleaned up
        fcntl.flock(another, fcntl.LOCK_SH)
        assert generate(manifest_of({"id": "a"}), tmp_path, StubModel).made == ["a"]
    left[0].write(b"late")
    left[0].close()
    assert generate(manifest_of({"id": "a"}), tmp_path, StubModel).kept == ["a"]


def test_jobs_that_are_added_are_made_and_removed_ones_are_left_alone(tmp_path):
    generate(manifest_of({"id": "a"}, {"id": "b"}), tmp_path, StubModel)
    before = contents(tmp_path)
    result = generate(manifest_of({"id": "b"}, {"id": "c"}), tmp_path, StubModel)
    assert (result.made, result.kept) == (["c"], ["b"])
    assert before.items() <= contents(tmp_path).items()
    assert [job.id for job in listed_jobs(tmp_path / "videos")[0]] == ["b", "c"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [(".work", "a link"), (".old", "a link"), *((n, "not a folder") for n in (".work", ".claims", ".old"))],
)
def test_something_else_in_the_place_of_a_folder_ends_the_run_in_a_sentence(tmp_path, name, kind):
    generate(manifest_of({"id": "a"}), tmp_path, StubModel)
    shutil.rmtree(place := tmp_path / "videos" / name, ignore_errors=True)
    place.symlink_to(tmp_path) if kind == "a link" else place.touch()
    with pytest.raises(StageError, match=f"{name} is {kind}; expected a folder for"):
        generate(manifest_of({"id": "a", "seed": 1}), tmp_path, StubModel)


def test_jobs_of_a_higher_priority_are_made_first(tmp_path):
    jobs = [{"id": name, "priority": priority} for name, priority in (("a", 0), ("b", -1), ("c", 5))]
    assert generate(manifest_of(*jobs), tmp_path, StubModel).made == ["c", "a", "b"]
    others = [{**job, "priority": 0} for job in jobs]
    assert generate(manifest_of(*others), tmp_path, StubModel).kept == ["a", "b", "c"]


def test_retry_failed_makes_the_failed_jobs_and_no_others(tmp_path, picture):
    jobs = manifest_of({"id": "bad", "task": "image_to_video", "image": tmp_path / "later.png"}, {"id": "good"})
    assert generate(jobs, tmp_path, StubModel).failed.keys() == {"bad"}
    more = manifest_of({"id": "bad", "task": "image_to_video", "image": picture}, {"id": "good"}, {"id": "new"})
    result = generate(more, tmp_path, StubModel, retry_failed=True)
    assert (result.made, result.kept, result.left) == (["bad"], ["good"], ["new"])
    assert generate(more, tmp_path, StubModel).made == ["new"]


@pytest.fixture
def picture(drawn) -> Path:
    return drawn / "media/ball-first.png"


class Kills(StubModel):
    """Kills its process when it encodes one prompt."""

    def encode_text(self, prompts, padded=True):
        if prompts == ["poison"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_text(prompts, padded)


def in_processes(count: int, *jobs, **keys):
    return manifest_of(*jobs, **keys).model_copy(update={"place": Processes(processes=count)})


def test_a_job_that_kills_its_worker_is_given_up_until_it_is_tried_again(tmp_path):
    jobs = in_processes(1, {"id": "a"}, {"id": "b", "prompt": "poison"}, {"id": "c", "seed": 1})
    result = generate(jobs, tmp_path, Kills)
    assert (
        sorted(result.made) == ["a", "c"] and "died 3 times" in result.failed["b"] and "signal 9" in result.failed["b"]
    )
    assert json.loads((tmp_path / "videos/b.json").read_text())["reason"] == "crashed"
    again = generate(jobs, tmp_path, StubModel)
    assert (again.made, sorted(again.kept), again.failed) == ([], ["a", "c"], result.failed)
    changed = in_processes(1, {"id": "a"}, {"id": "b", "prompt": "honey"}, {"id": "c", "seed": 1})
    assert generate(changed.model_copy(update={"place": "local"}), tmp_path, StubModel).made == ["b"]


MANY = tuple({"id": f"j{i}", "prompt": f"prompt {i}"} for i in range(12))


class Notes(StubModel):
    """Notes each prompt that it encodes, in a file that several processes share; the first one waits to be killed."""

    file: Path
    dies = False

    def encode_text(self, prompts, padded=True):
        if prompts[0]:
            with self.file.open("a") as file:
                file.write(f"{prompts[0]}\n")
            if self.dies:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_text(prompts, padded)


def share(run: Path, dies_at: int | None, result: Path) -> None:
    """Generate together with other processes, a job at a time; perhaps die at the n-th job. Write which were made."""
    torch.set_num_threads(1)
    runs.CHUNK_SECONDS, jobs, encoded = 0.0, manifest_of(*MANY), []
    jobs = jobs.model_copy(update={"batch_tokens": 0})

    def new_model(spec):
        model = Notes(spec)
        model.file = run / "notes"
        encode = model.encode_text

        def counted(prompts, padded=True):
            encoded.append(prompts)
            model.dies = len(encoded) == dies_at
            return encode(prompts, padded)

        model.encode_text = counted
        return model

    result.write_text(json.dumps(generate(jobs, run, new_model).made))


def test_three_processes_share_the_jobs_and_take_over_those_of_one_that_is_killed(tmp_path):
    fork = multiprocessing.get_context("fork").Process
    results = [tmp_path / f"{i}.json" for i in range(3)]
    (run := tmp_path / "run").mkdir()
    children = [fork(target=share, args=(run, (2, None, None)[i], results[i])) for i in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [-signal.SIGKILL, 0, 0]
    made = [json.loads(path.read_text()) for path in results[1:]]
    notes = (run / "notes").read_text().splitlines()
    assert not set(made[0]) & set(made[1])
    assert len(notes) == len(MANY) + 1, "only the job in flight was begun again"
    assert generate(manifest_of(*MANY), run, StubModel).kept == [job["id"] for job in MANY]
