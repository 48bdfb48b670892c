"""One clip or caption that fails is recorded, and all others are made; what is everybody's fault ends the run."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import pusa.precompute.frames as frames
import pusa.precompute.stage as stage
from pusa.data.reader import Table
from pusa.errors import PartlyFailed, Reason, Rejected, StageError, TableError, WeightsError
from pusa.ingest.stage import ingest
from pusa.manifest.models import ClipSettings, IngestManifest, ModelSpec, PrecomputeManifest
from pusa.precompute.frames import decode_clip
from pusa.precompute.rows import make_each
from pusa.precompute.stage import precompute
from pusa.weights.model import Model

CLIPS = 4


class PanicException(BaseException):
    """What a library in Rust raises."""


@pytest.fixture(scope="module")
def ingested(drawn, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ingested")
    (folder / "videos").mkdir()
    for path in sorted((drawn / "videos").glob(f"000[0-{CLIPS - 1}].*")):
        shutil.copy(path, folder / "videos")
    clips = ClipSettings(width=64, height=64, num_frames=7)
    ingest(IngestManifest(source=folder / "videos", clips=clips), folder)
    return folder


@pytest.fixture
def run_dir(ingested, tmp_path) -> Path:
    return Path(shutil.copytree(ingested, tmp_path / "run"))


def run(run_dir: Path, **changes) -> stage.Precomputed:
    return precompute(PrecomputeManifest(model=ModelSpec(weights="builtin:tiny"), **changes), run_dir)


def rejects(run_dir: Path) -> list[tuple[str, str]]:
    rows = Table.open(run_dir / "latents").read("rejects").to_pylist()
    return [(row["source"], row["reason"]) for row in rows]


ERRORS = [
    RuntimeError("DefaultCPUAllocator: can't allocate memory\nand a trace"),
    OSError(21, "Is a directory"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    MemoryError(),
    PanicException("called `Option::unwrap()` on a `None` value"),
    Rejected(Reason.NOT_FINITE, "2 of 4 values"),
    TableError("x.parquet cannot be read"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("bad", [{"c"}, {"a", "e"}, set("abcdefg")])
def test_keys_that_fail_are_found_and_all_others_are_made(tmp_path, error, bad):
    def make(keys):
        if bad & {*keys}:
            raise error
        return {key: key.upper() for key in keys}

    made = make_each("abcdefg", make, tmp_path)
    assert list(made) == list("abcdefg")
    reason = Reason.NOT_FINITE if isinstance(error, Rejected) else Reason.FAILED
    for key, item in made.items():
        assert (item.reason == reason) if key in bad else item == key.upper()
        unexpected = key in bad and not isinstance(error, TableError | Rejected)
        assert (tmp_path / f"failures/{key}.txt").is_file() == unexpected


@pytest.mark.parametrize(
    ("where", "error"),
    [("decode", ERRORS[1]), ("encode", RuntimeError("an operator\nfails")), ("caption", ERRORS[4])],
    ids=lambda v: str(v)[:7],
)
def test_a_clip_that_fails_is_recorded_and_tried_again(run_dir, monkeypatch, where, error):
    posterior, encode_text, decode = Model.posterior, Model.encode_text, frames.read_clip
    marked = []

    def failing_decode(path, *arguments):
        if path.name == "0001.mp4":
            raise error
        return decode(path, *arguments)

    def failing_encode(self, frames_BTHWC, tile=0):
        marked.append(len(frames_BTHWC))
        if any(np.array_equal(clip, bad) for clip in frames_BTHWC):
            raise error
        return posterior(self, frames_BTHWC, tile)

    def failing_text(self, prompts, padded=True):
        if any(prompt == caption for prompt in prompts):
            raise error
        return encode_text(self, prompts, padded)

    clip = Table.open(run_dir / "clips").read("clips").to_pylist()[1]
    bad, caption = decode_clip(clip, 60), clip["caption"]
    if where == "decode":
        monkeypatch.setattr(frames, "read_clip", failing_decode)
    elif where == "encode":
        monkeypatch.setattr(Model, "posterior", failing_encode)
    else:
        monkeypatch.setattr(Model, "encode_text", failing_text)
    result = run(run_dir, batch_size=CLIPS)
    assert (result.rows, result.rejects, result.failed) == (CLIPS - 1, 1, 1)
    assert rejects(run_dir) == [("0001.mp4@0", "failed")]
    if where == "encode":
        assert marked == [4, 2, 1, 1, 2], "the batch, its halves, and those of the half that fails"
    (trace,) = (run_dir / "latents/failures").iterdir()
    text = trace.read_text()
    assert "Traceback" in text and type(error).__name__ in text
    detail = Table.open(run_dir / "latents").read("rejects")["detail"][0].as_py()
    assert f"failures/{trace.name}" in detail and "\n" not in detail
    with pytest.raises(PartlyFailed, match="1 clips failed"):
        result.require_all()
    monkeypatch.undo()
    again = run(run_dir)
    assert (again.rows, again.rejects, again.failed) == (CLIPS, 0, 0)
    assert not (run_dir / "latents/failures").exists() and again.encoded == (where != "caption")
    again.require_all()


def test_features_that_are_not_finite_reject_the_clips_of_their_caption(run_dir, monkeypatch):
    encode_text = Model.encode_text
    caption = Table.open(run_dir / "clips").read("clips")["caption"][1].as_py()

    def broken(self, prompts, padded=True):
        text = encode_text(self, prompts, padded)
        for features, prompt in zip(text.features, prompts, strict=True):
            if prompt == caption:
                features[0, 0] = float("nan")
        return text

    monkeypatch.setattr(Model, "encode_text", broken)
    result = run(run_dir)
    assert (result.rows, result.failed) == (CLIPS - 1, 0) and rejects(run_dir) == [("0001.mp4@0", "not_finite")]
    monkeypatch.setattr(Model, "encode_text", lambda self, prompts, padded=True: 1 / 0)
    shutil.rmtree(run_dir / "latents")
    with pytest.raises(StageError, match="the empty prompt, which every table needs, has no features: ZeroDivision"):
        run(run_dir)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), WeightsError("vae/config.json is missing")])
def test_what_is_everybodys_fault_ends_the_run_at_once(run_dir, monkeypatch, error):
    calls = []

    def fail(self, frames_BTHWC, tile=0):
        calls.append(1)
        raise error

    monkeypatch.setattr(Model, "posterior", fail)
    with pytest.raises(type(error)):
        run(run_dir, batch_size=1)
    assert len(calls) == 1


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_source_that_is_replaced_by_one_of_equal_size_and_time_is_rejected(run_dir, monkeypatch, when):
    """As `cp -p` or rsync would replace it."""
    clip = Table.open(run_dir / "clips").read("clips").to_pylist()[0]
    path = Path(shutil.copy(clip["source"], run_dir / "own.mp4"))
    clip["source"] = str(path)
    assert len(decode_clip(clip, 60)) == 7  # and its hash is remembered
    read = frames.read_clip

    def replace() -> None:
        stat, data = path.stat(), path.read_bytes()
        other = path.with_name("other.mp4")
        other.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        other.replace(path)

    def replaced_while_reading(*arguments):
        decoded = read(*arguments)
        replace()
        return decoded

    if when == "before":
        replace()
    else:
        monkeypatch.setattr(frames, "read_clip", replaced_while_reading)
    with pytest.raises(Rejected, match=r"own\.mp4 is not the file that was ingested"):
        decode_clip(clip, 60)


def test_the_clips_table_that_is_read_is_the_one_that_its_index_lists(run_dir):
    (path,) = (run_dir / "clips").glob("clips-*.parquet")
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[-20] ^= 1  # in the footer, which no page's checksum covers
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ValueError, match=r"clips-.*cannot be read: its SHA-256 is not that in the index"):
        run(run_dir)


def test_memory_that_one_clip_needs_is_not_the_runs_fault(run_dir, monkeypatch):
    def no_memory(self, vae, x_BCTHW, tile):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(Model(ModelSpec(weights="builtin:tiny")).backbone), "encode_video", no_memory)
    with pytest.raises(StageError, match=r"none of 4 clips became latents.*does not fit in memory"):
        run(run_dir)
