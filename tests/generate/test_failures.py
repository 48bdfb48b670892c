"""Jobs that fail: each is recorded with its reason, the others are made, and no good video or record is lost."""

import errno
import io
import json
import os
import shutil
import weakref
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from PIL import Image

from pusa.errors import PartlyFailed, StageError, WeightsError
from pusa.generate.check import check_jobs
from pusa.generate.stage import generate
from tests.helpers.stub_model import StubModel, manifest_of


class PanicException(BaseException):
    """As libraries in Rust raise it."""


ERRORS = {
    "allocator": RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    "folder": OSError(errno.EISDIR, "Is a directory", "a.mp4"),
    "name": UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"),
    "memory": MemoryError(),
    "gpu": torch.OutOfMemoryError("CUDA out of memory"),
    "library": KeyError("x"),
    "panic": PanicException("index out of bounds"),
}


class Fails(StubModel):
    """Raises the error that a prompt names."""

    def encode_text(self, prompts, padded=True):
        if error := self.errors.get(prompts[0]):
            raise error
        return super().encode_text(prompts, padded)

    errors: ClassVar = ERRORS


class MakesNothing(StubModel):
    def encode_text(self, prompts, padded=True):
        raise AssertionError("a job was sampled")


class LosesItsFolder(StubModel):
    """Moves the run's folder away while it samples the second job."""

    def encode_text(self, prompts, padded=True):
        if prompts == ["second"]:
            self.run.rename(self.run.with_name("moved"))
        return super().encode_text(prompts, padded)

    run: ClassVar[Path]


def record(folder, id):
    return json.loads((folder / f"videos/{id}.json").read_text())


def test_any_error_of_a_job_is_recorded_with_its_traceback_and_the_others_are_made(tmp_path):
    result = generate(manifest_of(*({"id": name, "prompt": name} for name in (*ERRORS, "good"))), tmp_path, Fails)
    assert result.made == ["good"] and result.failed.keys() == ERRORS.keys()
    for name, error in ERRORS.items():
        facts = record(tmp_path, name)
        assert facts["status"] == "failed" and facts["error"] == result.failed[name]
        assert facts["error"].startswith(type(error).__name__) and "encode_text" in facts["traceback"]
    with pytest.raises(PartlyFailed, match="7 jobs failed"):
        result.require_all()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), WeightsError("no vae"), KeyboardInterrupt()]
)
def test_an_error_of_the_whole_run_ends_it(tmp_path, error):
    class Ends(Fails):
        errors: ClassVar = {"a": error}

    with pytest.raises(type(error)):
        generate(manifest_of({"id": "a", "prompt": "a"}, {"id": "b"}), tmp_path, Ends)
    assert not list((tmp_path / "videos").glob("*.json"))


def test_a_folder_in_the_place_of_an_output_is_refused_before_the_job_is_made(tmp_path):
    for name in ("a.mp4", "b.json", "c.latents.safetensors", "gallery.html"):
        (tmp_path / "videos" / name).mkdir(parents=True)
    (tmp_path / "videos/.lock").touch()
    os.mkfifo(tmp_path / "videos/e.json")
    manifest = manifest_of(*({"id": id} for id in "abcde"))
    problems = check_jobs(manifest, folder=tmp_path / "videos")
    result = generate(manifest, tmp_path, StubModel)
    assert result.made == ["d"] and result.failed.keys() == {"a", "b", "c", "e"}
    for id, text in result.failed.items():
        kind = "not a regular file" if id == "e" else "a folder"
        assert f"is {kind}, and the job writes a file of this name; remove or rename it" in text
    assert problems == result.failed
    assert record(tmp_path, "a")["status"] == "failed" and (tmp_path / "videos/b.json").is_dir()
    with pytest.raises(PartlyFailed, match=r"4 jobs failed.*the gallery could not be written: IsADirectoryError"):
        result.require_all()


def test_inputs_in_a_folder_whose_name_is_not_utf_8_are_read_and_recorded(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "a.png")
    first = generate(manifest_of({"id": "a"}), tmp_path, StubModel)
    shutil.copy(first.videos / "a.mp4", folder)
    shutil.copy(first.videos / "a.latents.safetensors", folder)
    result = generate(
        manifest_of(
            {"id": "picture", "task": "image_to_video", "image": folder / "a.png"},
            {"id": "clip", "task": "extension", "video": folder / "a.mp4", "given": [0]},
            {"id": "latents", "task": "extension", "video": folder / "a.latents.safetensors", "given": [0]},
            {"id": "none", "task": "image_to_video", "image": folder / "none.png"},
        ),
        tmp_path,
        StubModel,
    )
    assert result.made == ["picture", "clip", "latents"] and result.failed.keys() == {"none"}
    assert record(tmp_path, "picture")["job"]["image"] == str(folder / "a.png")
    assert result.gallery.is_file() and result.sheet.is_file()


def test_a_failure_keeps_the_video_and_the_record_of_an_earlier_run(tmp_path):
    manifest = manifest_of({"id": "a"})
    assert generate(manifest, tmp_path, StubModel).made == ["a"]
    good, video = record(tmp_path, "a"), (tmp_path / "videos/a.mp4").read_bytes()
    changed = manifest_of({"id": "a", "prompt": "memory"})
    for _ in range(2):
        assert generate(changed, tmp_path, Fails).failed == {"a": "MemoryError: MemoryError"}
        facts = record(tmp_path, "a")
        failure = facts.pop("failure")
        page = (tmp_path / "videos/gallery.html").read_text()
        assert "of an earlier run; the last one failed: MemoryError" in page and "a.mp4" in page
        assert (
            facts == {**good, "sha256": facts["sha256"]}
            and failure["error"] == "MemoryError: MemoryError"
            and failure["traceback"]
        )
        assert failure["job"]["prompt"] == "memory"
    assert (tmp_path / "videos/a.mp4").read_bytes() == video
    assert generate(manifest, tmp_path, MakesNothing).kept == ["a"]
    assert record(tmp_path, "a") == good


def test_a_video_whose_input_is_gone_is_kept_and_reported(tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    manifest = manifest_of({"id": "a", "task": "image_to_video", "image": tmp_path / "a.png"})
    assert generate(manifest, tmp_path, StubModel).made == ["a"]
    good = record(tmp_path, "a")
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    assert "No such file" in generate(manifest, tmp_path, MakesNothing).failed["a"]
    assert record(tmp_path, "a").pop("failure")["error"] and (tmp_path / "videos/a.mp4").is_file()
    (tmp_path / "b.png").rename(tmp_path / "a.png")
    assert generate(manifest, tmp_path, MakesNothing).kept == ["a"] and record(tmp_path, "a") == good


SHAPES = ["[]", "null", "[" * 100_000, '{"status": "done", "key": []}', "\ud800", ""]


def test_records_of_other_shapes_are_written_again(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / ".lock").touch()
    for i, text in enumerate(SHAPES):
        (folder / f"a{i}.json").write_text(text, encoding="utf-8", errors="surrogatepass")
        shutil.copy(folder / f"a{i}.json", folder / f"b{i}.json")
    good, bad = ([f"{name}{i}" for i in range(len(SHAPES))] for name in "ab")
    jobs = [{"id": id, "num_frames": 1, "width": 33 if id in bad else 32} for id in (*good, *bad)]
    result = generate(manifest_of(*jobs), tmp_path, StubModel)
    assert result.made == good and list(result.failed) == bad
    assert [record(tmp_path, id)["status"] for id in (*good, *bad)] == ["done"] * 6 + ["failed"] * 6


def test_what_a_failed_job_held_in_memory_is_free_before_the_next_one(tmp_path):
    held, free = [], []

    class Holds(StubModel):
        def encode_text(self, prompts, padded=True):
            free.append(all(tensor() is None for tensor in held))
            features = torch.zeros(9)
            held.append(weakref.ref(features))
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert len(generate(manifest_of({"id": "a", "prompt": "a"}, {"id": "b"}), tmp_path, Holds).failed) == 2
    assert free == [True, True]


def test_a_run_whose_folder_is_moved_ends_before_it_writes_into_another(tmp_path):
    LosesItsFolder.run = run = tmp_path / "run"
    names = ("first", "second", "third")  # of different lengths, so that they share no chunk with the first
    manifest = manifest_of(*({"id": id, "prompt": id, "num_frames": 6 * i + 7} for i, id in enumerate(names)))
    with pytest.raises(StageError, match=r"videos was moved"):
        generate(manifest, run, LosesItsFolder)
    assert not run.exists() and record(tmp_path / "moved", "first")["status"] == "done"
    (tmp_path / "moved").rename(run)
    assert generate(manifest, run, StubModel).kept == ["first"]


@pytest.mark.parametrize("end", [".mp4", ".json"])
def test_a_result_that_cannot_be_read_is_neither_replaced_nor_said_to_be_recorded(tmp_path, monkeypatch, end):
    manifest = manifest_of({"id": "a"}, {"id": "b"})
    generate(manifest, tmp_path, StubModel)
    file, opened = tmp_path / f"videos/a{end}", io.open

    def refuse(path, *args, **kwargs):
        if str(path) == str(file):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return opened(path, *args, **kwargs)

    before = file.read_bytes()
    with monkeypatch.context() as patched:  # root may read everything, whatever the mode
        patched.setattr("io.open", refuse)
        patched.setattr("builtins.open", refuse)
        result = generate(manifest, tmp_path, StubModel)
    assert result.kept == ["b"] and result.failed == {"a": f"{file} cannot be read: Permission denied"}
    (problem,) = result.not_shown
    assert problem == f"the failure of job a could not be recorded: {result.failed['a']}"
    assert file.read_bytes() == before and "b.mp4" in (tmp_path / "videos/gallery.html").read_text()
    with pytest.raises(PartlyFailed, match="could not be recorded"):
        result.require_all()
