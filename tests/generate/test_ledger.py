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
from PIL import Image

from pusa.backbones.base import find_backbone
from pusa.errors import StageError
from pusa.generate import chunks, worker
from pusa.generate import run as runs
from pusa.generate.decode import write_job_video
from pusa.generate.ledger import InputHashes, JobState, Keys, Ledger
from pusa.generate.listed import listed_jobs
from pusa.generate.outputs import LATENTS
from pusa.generate.stage import generate
from pusa.generate.status import StatusReader
from pusa.manifest.place import Processes
from pusa.system.files import digest
from pusa.tasks.text_to_video import TextToVideo
from pusa.video.formats import FORMATS
from tests.helpers.stub_model import StubModel, manifest_of

JOBS = (
    {"id": "ball", "prompt": "a ball", "num_frames": 13, "formats": ("webm", "gif", "png", "lossless")},
    {"id": "more", "task": "extension", "given": [0, 1], "num_frames": 19, "video": Path("RUN/videos/ball.mp4")},
    {"id": "box", "prompt": "a box", "num_frames": 13},
    {"id": "cup", "prompt": "a cup", "seed": 3, "steps": 3},
)


def contents(run: Path, ends=(".mp4", ".safetensors", ".webm", ".gif", ".png", ".mkv")) -> dict[str, bytes]:
    """Return the content of all videos, in all formats, and latents of a run, also of hidden folders."""
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
            ends = [".mp4", ".json", ".latents.safetensors", *(FORMATS[name].end for name in job.get("formats", ()))]
            stats = {end: os.stat(record.with_suffix(end)) for end in ends}
            found |= {f"{job['id']}{end}": (stat.st_ino, stat.st_mtime_ns) for end, stat in stats.items()}
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """Return the videos and latents of a run that was not interrupted."""
    run = tmp_path_factory.mktemp("whole")
    assert generate(manifest_of(*JOBS), run, StubModel).made == ["ball", "box", "more", "cup"]
    names = {"ball.mp4", "ball.webm", "ball.gif", "ball.lossless.mkv", "ball.frames/00012.png", "more.mp4"}
    made = contents(run)
    assert names <= made.keys()
    return made


# After one write is nearly before the next, and the trial below has both at every write.
@pytest.mark.parametrize("before", [True, pytest.param(False, marks=pytest.mark.slow)])
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
    for name in ("ball.mp4", "ball.latents.safetensors", "ball.json", "ball.gif", "ball.frames/00003.png"):
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


def made_by(run: Path, *jobs, **changes) -> tuple[list[str], dict[str, bytes], dict]:
    """Generate, and return which jobs were made, the contents of the run, and the record of job a."""
    made = generate(manifest_of(*jobs).model_copy(update=changes), run, StubModel).made
    state = StatusReader(run / "videos").read().jobs["a"]
    assert state == JobState.DONE and generate(manifest_of(*jobs), run, StubModel).made == []
    return made, contents(run), json.loads((run / "videos/a.json").read_text())


def test_a_format_that_is_asked_for_later_is_made_from_the_latents_and_changes_nothing_else(tmp_path, monkeypatch):
    _, before, first = made_by(tmp_path, {"id": "a"})
    monkeypatch.setattr(worker, "sample_together", None)  # nothing is sampled again
    asked = {"id": "a", "formats": ("gif",)}
    list_jobs_of(tmp_path, asked)
    assert StatusReader(tmp_path / "videos").read().jobs["a"] != JobState.DONE
    made, now, record = made_by(tmp_path, asked)
    assert made == ["a"] and now == before | {"a.gif": now["a.gif"]}
    assert record["hashes"] == first["hashes"] | {"gif": record["hashes"]["gif"]} and record["key"] == first["key"]
    made, more, record = made_by(tmp_path, {"id": "a", "formats": ("lossless",)})
    assert made == ["a"] and more == now | {"a.lossless.mkv": more["a.lossless.mkv"]}, "those of before are kept"
    assert made_by(tmp_path, {"id": "a"})[0] == made_by(tmp_path, {"id": "a", "formats": ("lossless", "gif")})[0] == []
    (tmp_path / "videos/a.gif").unlink()
    assert made_by(tmp_path, {"id": "a"})[0] == []
    assert made_by(tmp_path, {"id": "a", "formats": ("gif",)})[:2] == (["a"], more)


def list_jobs_of(run: Path, *jobs) -> None:
    """List the jobs of a manifest as a run does that is killed before it makes one."""
    with pytest.raises(KeyboardInterrupt):
        generate(manifest_of(*jobs), run, StubModel, step=interrupt)


def interrupt(name, call):
    raise KeyboardInterrupt


def test_formats_follow_their_video_to_the_old_ones_and_are_replaced_whole(tmp_path):
    job = {"id": "a", "formats": ("png", "gif"), "num_frames": 13}
    _, first, record = made_by(tmp_path, job)
    made_by(tmp_path, {**job, "num_frames": 7, "formats": ("png",)})
    old = {f".old/a.{digest(record['key'])[:8]}{name.removeprefix('a')}": first[name] for name in first}
    now = contents(tmp_path)
    assert old.items() <= now.items() and "a.gif" not in now and len([n for n in now if n[:8] == "a.frames"]) == 7
    made_by(tmp_path, job)  # and away again: of the same settings as one that is in .old already
    made_by(tmp_path, {**job, "num_frames": 7, "formats": ()})
    assert old.items() <= contents(tmp_path).items()
    made_by(tmp_path, {**job, "formats": ("png", "gif")})
    (note := tmp_path / "videos/a.frames/note.txt").touch()
    (tmp_path / "videos/a.frames/00001.png").unlink()
    assert "'note.txt' beside frames" in generate(manifest_of(job), tmp_path, StubModel).failed["a"]
    note.unlink()
    made_by(tmp_path, job)
    made_by(tmp_path, {**job, "num_frames": 7, "formats": ()}, keep_old=False)
    assert not [name for name in contents(tmp_path) if name.startswith(("a.gif", "a.frames"))]


def test_the_picture_of_a_job_is_of_its_middle_frame_and_its_loss_costs_nothing(tmp_path):
    videos = tmp_path / "videos"
    loop = {"id": "b", "task": "loop", "num_frames": 13}
    made_by(tmp_path, {"id": "a", "num_frames": 13, "width": 960, "height": 64}, loop)
    with Image.open(videos / "previews/a.jpg") as picture:
        assert picture.format == "JPEG" and picture.size == (480, 32)
    (videos / "previews/b.jpg").unlink()
    assert generate(manifest_of(loop), tmp_path, StubModel).kept == ["b"]
    shutil.rmtree(videos / "previews")
    (videos / "previews").symlink_to(tmp_path)
    assert made_by(tmp_path, {"id": "a", "seed": 1})[0] == ["a"] and not (tmp_path / "a.jpg").exists()
    assert not list((videos / ".work").glob("*.jpg"))


def test_facts_of_latents_are_those_of_the_file_that_is_decoded(tmp_path):
    """A job that was changed, sampled, and changed back before it was decoded has two files."""
    (tmp_path / ".work").mkdir()
    job, old, new = TextToVideo(id="a"), Keys("1", "old"), Keys("2", "new")
    ledger = Ledger(tmp_path, find_backbone("mochi").geometry, {}, InputHashes())
    for keys in (old, new):
        if ledger.work(name := f"a{LATENTS}").exists():
            ledger.work(name).rename(tmp_path / name)
        ledger.save_sampled(job, keys, torch.zeros(12, 1, 2, 2), {"sampled": keys.latents})
    assert [ledger.facts_of_latents(job, keys)["sampled"] for keys in (old, new)] == ["old", "new"]
    assert ledger.facts_of_latents(job, Keys("3", "other")) == {}


def test_the_ffmpeg_of_a_killed_worker_does_not_write_into_the_next_one_s_video(tmp_path, monkeypatch):
    left: list[IO[bytes]] = []

    def write(job, model, z_CFhw, path, *more):
        close = write_job_video(job, model, z_CFhw, path, *more)
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


def test_a_job_that_kills_its_worker_is_given_up_until_it_is_tried_again(tmp_path, monkeypatch):
    for module in (chunks, runs):
        monkeypatch.setattr(module, "MAX_CRASHES", 2)  # a worker takes long to start
    jobs = in_processes(1, {"id": "a"}, {"id": "b", "prompt": "poison"}, {"id": "c", "seed": 1})
    result = generate(jobs, tmp_path, Kills)
    assert (
        sorted(result.made) == ["a", "c"] and "died 2 times" in result.failed["b"] and "signal 9" in result.failed["b"]
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
