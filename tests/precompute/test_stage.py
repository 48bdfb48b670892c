"""Precompute with the built-in tiny model: existing rows are kept, and only what has changed is made."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from pusa.data.latents import Latents
from pusa.data.reader import Table
from pusa.data.schema import CLIPS
from pusa.data.writer import write_index, write_shard
from pusa.errors import ConditionError, StageError, TableError
from pusa.ingest.stage import ingest
from pusa.manifest.models import ClipSettings, IngestManifest, ModelSpec, PrecomputeManifest
from pusa.precompute.stage import precompute
from tests.helpers.processes import wait_for

TINY = ModelSpec(weights="builtin:tiny")
SIZE = {"width": 64, "height": 64, "num_frames": 31}


def settings(**changes) -> PrecomputeManifest:
    return PrecomputeManifest(model=TINY, **{"shard_rows": 5, **changes})


def ingest_folder(videos: Path, run_dir: Path, **changes):
    return ingest(IngestManifest(source=videos, clips=ClipSettings(**{**SIZE, **changes})), run_dir)


@pytest.fixture(scope="module")
def run_dir(drawn, tmp_path_factory) -> Path:
    """A run with twelve clips and their latents."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(drawn / "videos", folder / "videos")
    ingest_folder(folder / "videos", folder)
    precompute(settings(), folder)
    return folder


@pytest.fixture
def own(run_dir, tmp_path) -> Path:
    """A copy of the run that a test may change; its clips table still names the videos of the original."""
    return Path(shutil.copytree(run_dir, tmp_path / "own"))


def shards(run_dir: Path, part: str = "latents") -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (run_dir / "latents").glob(f"{part}-*.parquet")}


def content(run_dir: Path) -> str:
    return Table.open(run_dir / "latents").fingerprint


def test_rows_and_shards_describe_themselves(run_dir):
    table = Table.open(run_dir / "latents")
    path = run_dir / "latents" / table.parts["latents"][0]["name"]
    row = pq.read_table(path).slice(0, 1).to_pylist()[0]
    assert (row["width"], row["height"], row["bucket"], row["frames"]) == (64, 64, "64x64x31", list(range(31)))
    assert (row["dtype"], row["latent_shape"], len(row["latent_mean"])) == ("bfloat16", [12, 6, 8, 8], 2 * 12 * 6 * 64)
    facts = json.loads(pq.read_schema(path).metadata[b"pusa"])
    assert facts["stored_space"] == "vae" and set(facts["made_with"]) == {"vae", "text_encoder", "tokenizer"}
    assert facts["ingest"]["rule"]["width"] == 64 and "torch" in facts["packages"]
    texts = table.read("texts").to_pylist()
    assert all(row["tokens"] == row["text_shape"][0] for row in texts if row["caption"])
    assert [row["tokens"] for row in texts if not row["caption"]] == [0]  # the null prompt, once


def test_a_second_run_makes_nothing_with_any_batch_size_shard_size_or_compression(own):
    before = shards(own), (own / "latents/index.json").stat().st_mtime_ns
    for changes in ({}, {"batch_size": 1}, {"shard_rows": 2}, {"compression": "none"}, {"verify": "all"}):
        result = precompute(settings(**changes), own)
        assert (result.clips, result.rows, result.rejects, result.encoded, result.texts) == (12, 12, 0, 0, 0)
    assert before == (shards(own), (own / "latents/index.json").stat().st_mtime_ns)


def test_compression_does_not_change_the_rows(own, run_dir):
    shutil.rmtree(own / "latents")
    precompute(settings(compression="none"), own)
    (mean, _), (other, _) = (Latents(Table.open(path / "latents")).posterior(range(12)) for path in (own, run_dir))
    assert torch.equal(mean, other) and content(own) == content(run_dir)


def test_a_new_caption_makes_text_features_but_no_latents(own):
    (own / "videos/0003.txt").write_text("a caption of another kind")
    ingest_folder(own / "videos", own)
    before = shards(own)
    result = precompute(settings(clips=own / "clips"), own)
    assert (result.rows, result.encoded) == (12, 0) and shards(own) == before
    rows = Table.open(own / "latents").read("rows").to_pylist()
    assert sum(row["caption"] == "a caption of another kind" for row in rows) == 1


def test_a_new_crop_makes_all_latents_but_no_text_features(own):
    ingest_folder(own / "videos", own, fit="stretch", width=80)
    result = precompute(settings(clips=own / "clips", unused_days=0), own)
    assert (result.rows, result.encoded, result.texts) == (12, 12, 0)
    assert len(shards(own)) == 3  # those of the old crop are removed


def test_latents_of_clips_that_are_away_are_kept_until_they_return(own, monkeypatch):
    import pusa.precompute.shards as module

    ingest_folder(own / "videos", own)
    before = shards(own)
    (own / "away").mkdir()
    for path in (own / "videos").glob("000[0-4].*"):  # all clips of one shard
        path.rename(own / "away" / path.name)
    ingest_folder(own / "videos", own)
    assert precompute(settings(clips=own / "clips"), own).rows == 7 and shards(own) == before
    monkeypatch.setattr(module, "sha256_file", None)  # any attempt to hash a shard would fail
    for path in (own / "away").iterdir():
        path.rename(own / "videos" / path.name)
    ingest_folder(own / "videos", own)
    result = precompute(settings(clips=own / "clips"), own)
    assert (result.rows, result.encoded) == (12, 0) and shards(own) == before
    assert json.loads((own / "latents/unused.json").read_text()) == {}


def test_one_clip_more_and_one_less_make_one_row(own, drawn):
    (own / "videos/0000.mp4").unlink()
    for suffix in (".mp4", ".txt"):
        shutil.copy(drawn / f"videos/0001{suffix}", own / f"videos/extra{suffix}")
    with (own / "videos/extra.mp4").open("ab") as file:
        file.write(b"\0\0\0\x08free")  # an empty box: other bytes, the same video
    ingest_folder(own / "videos", own)
    result = precompute(settings(clips=own / "clips"), own)
    assert (result.rows, result.encoded) == (12, 1)
    ids = Table.open(own / "latents").read("rows")["clip_id"].to_pylist()
    assert "extra.mp4@0" in ids and "0000.mp4@0" not in ids


@pytest.mark.parametrize("indexed", [True, False])
def test_a_shard_with_flipped_bytes_is_quarantined_and_made_again(own, indexed):
    before = content(own)
    name = sorted(shards(own))[0]
    path = own / "latents" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    if not indexed:  # as after a kill
        (own / "latents/index.json").unlink()
    result = precompute(settings(), own)
    assert result.encoded in (2, 5) and content(own) == before
    assert [path.name for path in (own / "latents/quarantine").iterdir()] == [name]
    Latents(Table.open(own / "latents")).posterior(range(12))


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nothing"])
def test_what_is_not_a_file_but_has_the_name_of_a_shard_is_set_aside(own, kind):
    before, (name, *others) = content(own), sorted(shards(own))
    path = own / "latents" / name
    unlisted = own / "latents" / f"latents-{'0' * 12}-{'0' * 32}.parquet"
    path.unlink()
    for place in (path, unlisted):
        if kind == "folder":
            place.mkdir()
            (place / "file").touch()
        elif kind == "pipe":
            os.mkfifo(place)
        else:
            place.symlink_to("/nowhere")
    (own / f"latents/rejects-{'0' * 16}.parquet").mkdir()
    assert precompute(settings(), own).encoded > 0 and content(own) == before
    assert {path.name for path in (own / "latents/quarantine").iterdir()} == {name, unlisted.name}
    assert others and not (own / f"latents/rejects-{'0' * 16}.parquet").exists()


def test_nothing_is_moved_through_a_link(own, tmp_path):
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (own / "latents/quarantine").symlink_to(elsewhere)
    flip(own / "latents" / sorted(shards(own))[0], 60, keep_time=False)
    with pytest.raises(StageError, match="quarantine is a link; expected a folder for damaged shards"):
        precompute(settings(), own)
    assert not os.listdir(elsewhere)


@pytest.mark.parametrize("part", ["rows", "rejects", "texts", "latents"])
@pytest.mark.parametrize("keep_time", [True, False])
def test_damage_to_any_part_is_repaired(own, part, keep_time):
    before = content(own)
    path = own / "latents" / Table.open(own / "latents").parts[part][0]["name"]
    flip(path, 60, keep_time=keep_time)  # near its beginning, where the keys are
    precompute(settings(verify="all" if keep_time else "changed"), own)
    assert content(own) == before and precompute(settings(), own).encoded == 0
    table = Table.open(own / "latents")
    assert all(table.read(part).num_rows == table.rows(part) for part in table.parts)


def test_a_shard_found_damaged_when_it_is_read_is_made_again(own):
    flip(own / "latents" / sorted(shards(own))[0], 60, keep_time=True)
    (own / "videos/0003.txt").write_text("so that there is something to do")
    ingest_folder(own / "videos", own)
    assert precompute(settings(clips=own / "clips"), own).rows == 12
    Latents(Table.open(own / "latents")).posterior(range(12))


def flip(path: Path, place: int, keep_time: bool) -> None:
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)
    if keep_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_copied_table_is_hashed_once(own, monkeypatch):
    import pusa.precompute.shards as module

    hashed = []
    sha256 = module.sha256_file
    monkeypatch.setattr(module, "sha256_file", lambda path: hashed.append(path) or sha256(path))
    for path in (own / "latents").glob("*.parquet"):
        path.touch()
    for count in (6, 0):
        assert precompute(settings(), own).encoded == 0 and len(hashed) == count
        hashed.clear()


def test_the_leftovers_of_a_killed_run_are_removed_even_if_there_is_nothing_to_do(own):
    names = {path.name for path in (own / "latents").iterdir()}
    left = ["latents-0123456789ab-" + "0" * 32, "rows-0123456789abcdef-00000", "rejects-0123456789abcdef"]
    for name in left:
        shutil.copy(own / "latents" / sorted(shards(own))[0], own / "latents" / f"{name}.parquet")
    (own / "latents/.partial-0-latents.parquet").touch()
    assert precompute(settings(), own).encoded == 0
    assert {path.name for path in (own / "latents").iterdir()} - {"quarantine"} == names


def test_an_imported_table_is_not_replaced(own):
    path = own / "latents/index.json"
    path.write_text(path.read_text().replace('"stored_space"', '"imported": {"from": "x"}, "stored_space"'))
    with pytest.raises(TableError, match="holds an imported table"):
        precompute(settings(), own)


@pytest.mark.parametrize("text", ["[]", "{}", '{"version": 2}', '{"version": 2, "parts": {"rows": [{}]}, "facts": {}}'])
def test_a_damaged_index_is_written_again(own, text):
    before = content(own)
    (own / "latents/index.json").write_text(text)
    with pytest.raises(TableError, match="run its stage again"):
        Table.open(own / "latents")
    assert precompute(settings(), own).encoded == 0 and content(own) == before


def test_another_kind_of_table_is_refused(own):
    with pytest.raises(TableError, match="is a table of rows, latents, texts, rejects; expected a table with clips"):
        precompute(settings(clips=own / "latents"), own)


def test_rejects_of_another_process_are_kept(own, monkeypatch):
    import pusa.precompute.stage as stage

    ingest_folder(own / "videos", own)
    rejects_of = stage.RejectFiles.of
    first = Table.open(own / "latents").read("rows")["key"][0].as_py()
    entries = [{"key": first, "reason": "damaged", "detail": "recorded by a process that died"}]
    monkeypatch.setattr(
        stage.RejectFiles,
        "of",
        lambda self, segment: entries if first in segment.keys else rejects_of(self, segment),
    )
    shutil.rmtree(own / "latents")
    (own / "videos/0001.mp4").unlink()
    result = precompute(settings(), own)
    assert (result.rows, result.rejects) == (10, 2)
    reasons = Table.open(own / "latents").read("rejects")["reason"].to_pylist()
    assert sorted(reasons) == ["changed", "damaged"]


def test_bit_rot_without_a_new_time_is_found_by_verify_all(own):
    path = own / "latents" / sorted(shards(own))[0]
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert precompute(settings(), own).encoded == 0
    with pytest.raises(TableError, match="verify: all"):
        Latents(Table.open(own / "latents")).posterior(range(12))
    assert precompute(settings(verify="all"), own).encoded in (2, 5)
    Latents(Table.open(own / "latents")).posterior(range(12))


def test_a_changed_clip_is_rejected_until_its_source_is_back(own, drawn):
    table = own / "latents"
    ingest_folder(own / "videos", own)
    shutil.rmtree(table)
    shutil.copy(own / "videos/0001.mp4", own / "videos/0002.mp4")
    (own / "videos/0003.mp4").unlink()
    result = precompute(settings(), own)
    assert (result.clips, result.rows, result.rejects) == (12, 10, 2)
    rejects = Table.open(table).read("rejects").to_pylist()
    assert [(row["source"], row["reason"]) for row in rejects] == [("0002.mp4@0", "changed"), ("0003.mp4@0", "changed")]
    shutil.copy(drawn / "videos/0003.mp4", own / "videos/0003.mp4")
    again = precompute(settings(), own)
    assert (again.rows, again.rejects, again.encoded) == (11, 1, 1)


def fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("put", [Path.mkdir, fifo, lambda path: path.symlink_to(path)])
def test_a_source_that_is_not_a_file_any_more_is_rejected_and_the_others_are_encoded(own, put):
    ingest_folder(own / "videos", own)
    shutil.rmtree(own / "latents")
    (own / "videos/0002.mp4").unlink()
    put(own / "videos/0002.mp4")
    result = precompute(settings(), own)
    assert (result.rows, result.rejects) == (11, 1)
    assert Table.open(own / "latents").read("rejects")["reason"].to_pylist() == ["unreadable"]


def test_latents_with_nan_are_rejected_and_the_others_are_kept(own, monkeypatch):
    from pusa.weights.model import Model

    posterior = Model.posterior

    def broken(self, frames_BTHWC, tile=0):
        mean, logvar = posterior(self, frames_BTHWC, tile)
        mean[0, 0, 0, 0, 0] = float("nan")
        return mean, logvar

    shutil.rmtree(own / "latents")
    monkeypatch.setattr(Model, "posterior", broken)
    result = precompute(settings(batch_size=4), own)  # a batch of four and one of one, twice; then two
    assert (result.rows, result.rejects) == (7, 5)
    assert Counter(Table.open(own / "latents").read("rejects")["reason"].to_pylist()) == {"not_finite": 5}
    with pytest.raises(StageError, match="none of 12 clips became latents"):
        shutil.rmtree(own / "latents")
        precompute(settings(batch_size=1), own)
    monkeypatch.undo()
    assert precompute(settings(), own).rows == 12


def test_a_disk_that_fills_up_loses_one_segment(own, monkeypatch):
    shutil.rmtree(own / "latents")
    write, calls = pq.write_table, []

    def fills_up(table, where, **options):
        calls.append(where)
        if len(calls) == 3:
            Path(where).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(table, where, **options)

    monkeypatch.setattr(pq, "write_table", fills_up)
    with pytest.raises(OSError, match=r"latents-.*No space left|No space left.*latents-"):
        precompute(settings(), own)
    assert len(shards(own)) == 1 and not list((own / "latents").glob(".partial-*"))
    monkeypatch.undo()
    assert precompute(settings(), own).encoded == 7


def test_unsupported_shapes_are_refused_before_work_starts(own):
    ingest(IngestManifest(source=own / "videos", clips=ClipSettings(width=64, height=64, num_frames=13)), own)
    table = Table.open(own / "clips")
    rows = table.read("clips")
    rows = rows.set_column(rows.column_names.index("bucket"), rows.field("bucket"), [["64x64x12"] * 12])
    write_shard(own / "clips/clips-other.parquet", rows, CLIPS)
    write_index(own / "clips", {"clips": [own / "clips/clips-other.parquet"], "rejects": []}, table.facts)
    with pytest.raises(ConditionError, match="12"):
        precompute(settings(), own)


RUN = """
import sys
from pathlib import Path
from pusa.manifest.models import ModelSpec, PrecomputeManifest
from pusa.precompute.stage import precompute
tiny = ModelSpec(weights="builtin:tiny")
result = precompute(PrecomputeManifest(model=tiny, shard_rows=int(sys.argv[2]), batch_size=1), Path(sys.argv[1]))
print(result.encoded, result.rows)
"""


def start(run_dir: Path, rows: int) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", RUN, str(run_dir), str(rows)], stdout=subprocess.PIPE, text=True)


@pytest.mark.slow  # the next test also has two, and tests/precompute/test_worker.py
def test_two_processes_share_the_work_and_both_return_all_rows(own):
    shutil.rmtree(own / "latents")
    runs = [start(own, rows) for rows in (1, 2)]  # the first one decides the size of the shards
    results = [list(map(int, run.communicate(timeout=600)[0].split())) for run in runs]
    assert sum(encoded for encoded, _ in results) == 12 and [rows for _, rows in results] == [12, 12]
    assert len(shards(own)) in (6, 12) and not list((own / "latents").glob(".partial-*"))


def test_the_segment_of_a_killed_process_is_made_by_another(own):
    before = content(own)
    shutil.rmtree(own / "latents")
    victim = start(own, 1)
    wait_for(lambda: len(shards(own)) >= 2 or victim.poll() is not None, seconds=600)
    assert victim.poll() is None  # it has written some shards, and has not finished
    victim.kill()
    result = precompute(settings(shard_rows=1, batch_size=1), own)
    victim.communicate()
    assert result.rows == 12 and 1 <= result.encoded <= 10
    assert content(own) == before and precompute(settings(), own).encoded == 0
    assert not list((own / "latents").glob(".partial-*"))
