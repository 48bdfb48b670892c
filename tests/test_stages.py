"""Stages meet at tables: precompute with the built-in tiny model, and fine-tunes that refuse damaged tables."""

import shutil
from pathlib import Path

import pytest
import torch

from pusa.data.latents import Latents, sample_posterior
from pusa.data.reader import Table
from pusa.errors import TableError
from pusa.finetune.stage import finetune
from pusa.ingest.stage import ingest
from pusa.manifest.models import ClipSettings, IngestManifest, ModelSpec, PrecomputeManifest
from pusa.precompute.stage import precompute
from pusa.video.fit import fit_frames
from pusa.video.media import read_frames
from pusa.weights.model import Model
from tests.helpers.indexes import edit_index
from tests.helpers.training_runs import recipe

TINY = ModelSpec(weights="builtin:tiny")
SIZE = {"width": 64, "height": 64, "num_frames": 31}


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(TINY)


# Precompute


def test_latents_are_those_of_the_encoders(made, model):
    table = Table.open(made / "latents")
    clips = Table.open(made / "clips").read("clips").to_pylist()
    assert table.rows("latents") == len(clips) == 12 and len(table.parts["latents"]) == 3
    latents = Latents(table)
    frames = fit_frames(read_frames(Path(clips[7]["source"]), clips[7]["frames"]), 64, 64)
    mean, _ = latents.posterior([7])
    torch.testing.assert_close(model.space.enter(mean[0]), model.encode(frames), atol=2e-2, rtol=0)
    text = model.encode_text([clips[7]["caption"]])
    stored = latents.text([7])
    assert torch.equal(stored.mask, text.mask)
    torch.testing.assert_close(stored.features[stored.mask], text.features[text.mask], atol=2e-2, rtol=0)


def test_a_prompt_that_is_cut_is_logged(model, caplog):
    model.encode_text(["a red circle", "a red circle and " * 8])
    assert [record.message[:46] for record in caplog.records] == ["a prompt is cut to the first 16 of its 33 toke"]


def test_latents_are_normalised_and_sampled_anew(made):
    latents = Latents(Table.open(made / "latents"))
    rows = latents.posterior(range(12))
    first, second = (sample_posterior(*rows, latents.space, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert 0.7 < first.std() < 1.3 and first.mean().abs() < 0.3
    assert not torch.equal(first, second)


def test_a_second_precompute_encodes_only_the_shard_that_was_lost(own_run):
    manifest = PrecomputeManifest(clips=own_run / "clips", model=TINY, shard_rows=5)
    assert precompute(manifest, own_run).encoded == 0
    before = Table.open(own_run / "latents").fingerprint
    (own_run / "latents" / Table.open(own_run / "latents").parts["latents"][1]["name"]).unlink()
    assert precompute(manifest, own_run).encoded == 5
    assert Table.open(own_run / "latents").fingerprint == before


def test_a_clip_that_changed_after_ingest_is_rejected_and_the_others_are_encoded(drawn, tmp_path):
    shutil.copytree(drawn / "videos", tmp_path / "videos")
    ingest(IngestManifest(source=tmp_path / "videos", clips=ClipSettings(**SIZE)), tmp_path)
    shutil.copy(tmp_path / "videos/0001.mp4", tmp_path / "videos/0002.mp4")
    (tmp_path / "videos/0003.mp4").unlink()
    result = precompute(PrecomputeManifest(clips=tmp_path / "clips", model=TINY), tmp_path)
    assert (result.clips, result.rows, result.rejects) == (12, 10, 2)
    rejects = Table.open(result.table).read("rejects")["source"].to_pylist()
    assert rejects == ["0002.mp4@0", "0003.mp4@0"]
    shutil.copy(drawn / "videos/0003.mp4", tmp_path / "videos/0003.mp4")
    again = precompute(PrecomputeManifest(clips=tmp_path / "clips", model=TINY), tmp_path)
    assert (again.rows, again.rejects, again.encoded) == (11, 1, 1)


def test_a_truncated_shard_is_made_again(own_run):
    manifest = PrecomputeManifest(model=TINY, shard_rows=5)
    before = Table.open(own_run / "latents").fingerprint
    path = own_run / "latents" / Table.open(own_run / "latents").parts["latents"][1]["name"]
    path.write_bytes(path.read_bytes()[:-100])
    assert precompute(manifest, own_run).encoded == 5
    assert Table.open(own_run / "latents").fingerprint == before


def test_a_shard_with_a_changed_byte_is_refused(own_run):
    path = own_run / "latents" / Table.open(own_run / "latents").parts["latents"][0]["name"]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(TableError, match="cannot be read"):
        finetune(recipe(own_run), own_run)


def test_a_renamed_file_and_a_copy_are_clips_of_their_own(drawn, tmp_path):
    shutil.copytree(drawn / "videos", tmp_path / "videos")
    for suffix in (".mp4", ".txt"):
        shutil.copy(tmp_path / f"videos/0001{suffix}", tmp_path / f"videos/double{suffix}")
    for name in ("0000", "renamed"):
        if name == "renamed":
            for suffix in (".mp4", ".txt"):
                (tmp_path / f"videos/0000{suffix}").rename(tmp_path / f"videos/renamed{suffix}")
        both = IngestManifest(source=tmp_path / "videos", clips=ClipSettings(**SIZE), duplicates="keep")
        clips = ingest(both, tmp_path)
        result = precompute(PrecomputeManifest(model=TINY, shard_rows=1), tmp_path)
        assert (clips.clips, result.rows, result.rejects) == (13, 13, 0)
        latents = Latents(Table.open(result.table))
        assert f"{name}.mp4@0" in latents.clip_ids(range(13)) and len(set(latents.clip_ids(range(13)))) == 13


def test_latents_of_other_encoders_are_refused(own_run):
    edit_index(own_run / "latents", lambda index: index["facts"]["made_with"].update(vae="another"))
    with pytest.raises(TableError, match="made with vae 'another'; the base has vae"):
        finetune(recipe(own_run), own_run)


def test_an_unfinished_table_is_refused_by_the_next_stage(own_run):
    (own_run / "latents/index.json").unlink()
    with pytest.raises(TableError, match="has not finished"):
        finetune(recipe(own_run), own_run)
