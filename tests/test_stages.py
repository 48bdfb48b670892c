"""Precompute, finetune and generate on the built-in tiny model, each fed by the files of the one before."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from pusa.data.latents import Latents, sample
from pusa.data.loader import read_rows
from pusa.data.reader import Table
from pusa.errors import TableError, TrainingError, WeightsError
from pusa.finetune import draw_batch, finetune, order_of
from pusa.fitting import fit
from pusa.generate import generate
from pusa.ingest import ingest
from pusa.latent_spaces import LATENT_SPACES
from pusa.manifest import (
    ClipRule,
    FinetuneManifest,
    IngestManifest,
    ModelSpec,
    PrecomputeManifest,
)
from pusa.model import Model
from pusa.precompute import precompute
from pusa.video import read_frames
from pusa.weights.resolve import require
from tests.test_generate import jobs

TINY = ModelSpec(weights="builtin:tiny")
SIZE = {"width": 64, "height": 64, "num_frames": 31}


@pytest.fixture(scope="module")
def run_dir(drawn, tmp_path_factory) -> Path:
    """A run with its clips and latents made."""
    folder = tmp_path_factory.mktemp("run")
    ingest(IngestManifest(source=drawn / "videos", clips=ClipRule(**SIZE)), folder)
    precompute(PrecomputeManifest(clips=folder / "clips", model=TINY, shard_rows=5), folder)
    return folder


@pytest.fixture
def own_run(run_dir, tmp_path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(run_dir, tmp_path / "own"))


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(TINY)


def recipe(run_dir: Path, **changes) -> FinetuneManifest:
    settings = {"steps": 4, "batch_size": 5, "learning_rate": 1e-3, "checkpoint_every": 2, "density": "uniform"}
    return FinetuneManifest(latents=run_dir / "latents", base=TINY, **{**settings, **changes})


def batch_at(latents: Latents, manifest: FinetuneManifest, step: int):
    return draw_batch(read_rows(latents, order_of(latents, manifest).rows(step)), latents, manifest, step)


# Precompute


def test_latents_are_what_the_encoders_say(run_dir, model):
    table = Table.open(run_dir / "latents")
    clips = Table.open(run_dir / "clips").read("clips").to_pylist()
    assert table.rows("latents") == len(clips) == 12 and len(table.parts["latents"]) == 3
    latents = Latents(table)
    frames = fit(read_frames(Path(clips[7]["source"]), clips[7]["frames"]), 64, 64)
    mean, _ = latents.posterior([7])
    torch.testing.assert_close(model.space.enter(mean[0]), model.encode(frames), atol=2e-2, rtol=0)
    text = model.encode_text([clips[7]["caption"]])
    features, mask = latents.text([7])
    assert torch.equal(mask, text.mask)
    torch.testing.assert_close(features[mask], text.features[text.mask], atol=2e-2, rtol=0)


def test_a_prompt_that_is_cut_is_said(model, caplog):
    model.encode_text(["a red circle", "a red circle and " * 8])
    assert [record.message[:46] for record in caplog.records] == ["a prompt is cut to the first 16 of its 33 toke"]


def test_latents_are_normalised_and_drawn_afresh(run_dir):
    latents = Latents(Table.open(run_dir / "latents"))
    rows = latents.posterior(range(12))
    first, second = (sample(*rows, latents.space, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert 0.7 < first.std() < 1.3 and first.mean().abs() < 0.3
    assert not torch.equal(first, second)


def test_precompute_again_encodes_nothing_and_a_lost_shard_alone(own_run):
    manifest = PrecomputeManifest(clips=own_run / "clips", model=TINY, shard_rows=5)
    assert precompute(manifest, own_run).encoded == 0
    before = Table.open(own_run / "latents").fingerprint
    (own_run / "latents" / Table.open(own_run / "latents").parts["latents"][1]["name"]).unlink()
    assert precompute(manifest, own_run).encoded == 5
    assert Table.open(own_run / "latents").fingerprint == before


def test_a_clip_that_changed_after_ingest_is_rejected_and_the_rest_goes_on(drawn, tmp_path):
    shutil.copytree(drawn / "videos", tmp_path / "videos")
    ingest(IngestManifest(source=tmp_path / "videos", clips=ClipRule(**SIZE)), tmp_path)
    shutil.copy(tmp_path / "videos/0001.mp4", tmp_path / "videos/0002.mp4")
    (tmp_path / "videos/0003.mp4").unlink()
    result = precompute(PrecomputeManifest(clips=tmp_path / "clips", model=TINY), tmp_path)
    assert (result.clips, result.rows, result.rejects) == (12, 10, 2)
    rejects = Table.open(result.table).read("rejects")["source"].to_pylist()
    assert rejects == ["0002.mp4@0", "0003.mp4@0"]
    shutil.copy(drawn / "videos/0003.mp4", tmp_path / "videos/0003.mp4")
    again = precompute(PrecomputeManifest(clips=tmp_path / "clips", model=TINY), tmp_path)
    assert (again.rows, again.rejects, again.encoded) == (11, 1, 1)


def test_a_torn_shard_is_made_again(own_run):
    manifest = PrecomputeManifest(model=TINY, shard_rows=5)
    before = Table.open(own_run / "latents").fingerprint
    path = own_run / "latents" / Table.open(own_run / "latents").parts["latents"][1]["name"]
    path.write_bytes(path.read_bytes()[:-100])
    assert precompute(manifest, own_run).encoded == 5
    assert Table.open(own_run / "latents").fingerprint == before


def test_flipped_bytes_are_found(own_run):
    path = own_run / "latents" / Table.open(own_run / "latents").parts["latents"][0]["name"]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(TableError, match="cannot be read"):
        finetune(recipe(own_run), own_run)


def test_a_rename_and_a_double_are_clips_of_their_own(drawn, tmp_path):
    shutil.copytree(drawn / "videos", tmp_path / "videos")
    for suffix in (".mp4", ".txt"):
        shutil.copy(tmp_path / f"videos/0001{suffix}", tmp_path / f"videos/double{suffix}")
    for name in ("0000", "renamed"):
        if name == "renamed":
            for suffix in (".mp4", ".txt"):
                (tmp_path / f"videos/0000{suffix}").rename(tmp_path / f"videos/renamed{suffix}")
        both = IngestManifest(source=tmp_path / "videos", clips=ClipRule(**SIZE), duplicates="keep")
        clips = ingest(both, tmp_path)
        result = precompute(PrecomputeManifest(model=TINY, shard_rows=1), tmp_path)
        assert (clips.clips, result.rows, result.rejects) == (13, 13, 0)
        latents = Latents(Table.open(result.table))
        assert f"{name}.mp4@0" in latents.clip_ids(range(13)) and len(set(latents.clip_ids(range(13)))) == 13


def test_latents_of_other_encoders_are_refused(own_run):
    index = json.loads((own_run / "latents/index.json").read_text())
    index["facts"]["made_with"]["vae"] = "another"
    (own_run / "latents/index.json").write_text(json.dumps(index))
    with pytest.raises(TableError, match="made with vae another; the base has vae"):
        finetune(recipe(own_run), own_run)


def test_an_unfinished_table_is_refused_by_the_next_stage(own_run):
    (own_run / "latents/index.json").unlink()
    with pytest.raises(TableError, match="has not finished"):
        finetune(recipe(own_run), own_run)


# Finetune


def test_it_learns(own_run):
    result = finetune(recipe(own_run, steps=40, batch_size=8), own_run)
    rows = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 41))
    base = FinetuneManifest.model_validate(
        {**recipe(own_run).model_dump(), "learning_rate": 1e-12, "steps": 40, "batch_size": 8}
    )
    frozen = [json.loads(line)["loss"] for line in finetune(base, own_run / "b").metrics.read_text().splitlines()]
    assert sum(row["loss"] for row in rows[-15:]) < 0.97 * sum(frozen[-15:])


def weights(checkpoint: Path) -> bytes:
    return (checkpoint / "transformer/diffusion_pytorch_model.safetensors").read_bytes()


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_killed_run_goes_on_exactly(own_run, ema, monkeypatch):
    whole = finetune(recipe(own_run, steps=6, ema_decay=ema), own_run / "whole")

    class Killed(BaseException):
        pass

    import pusa.finetune as module

    step = module.train_step
    calls = []

    def die(*given):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return step(*given)

    monkeypatch.setattr(module, "train_step", die)
    with pytest.raises(Killed):
        finetune(recipe(own_run, steps=6, ema_decay=ema), own_run / "killed")
    monkeypatch.setattr(module, "train_step", step)
    again = finetune(recipe(own_run, steps=6, ema_decay=ema), own_run / "killed")
    assert again.trained_steps == 4
    losses = [[json.loads(line)["loss"] for line in r.metrics.read_text().splitlines()] for r in (whole, again)]
    assert losses[0] == losses[1]
    assert weights(whole.checkpoint) == weights(again.checkpoint)


def test_finished_it_trains_no_more_and_another_recipe_is_refused(own_run):
    first = finetune(recipe(own_run), own_run)
    again = finetune(recipe(own_run), own_run)
    assert (again.trained_steps, again.last_loss, again.checkpoint) == (0, first.last_loss, first.checkpoint)
    assert (own_run / "checkpoints/last").resolve() == first.checkpoint
    with pytest.raises(TrainingError, match=r"learning_rate: 0.001 there, 0.01 here"):
        finetune(recipe(own_run, learning_rate=1e-2), own_run)
    assert finetune(recipe(own_run, steps=6), own_run).trained_steps == 2
    assert finetune(recipe(own_run, steps=4), own_run).checkpoint == first.checkpoint
    with pytest.raises(TrainingError, match="past step 3 and kept none there; it has 2, 4, 6"):
        finetune(recipe(own_run, steps=3), own_run)


def test_last_follows_even_where_a_kill_kept_it_from_it(own_run, monkeypatch):
    monkeypatch.setattr("pusa.training.checkpoint.point", lambda link, name: None)
    finetune(recipe(own_run), own_run)
    assert not (own_run / "checkpoints/last").exists()
    monkeypatch.undo()
    result = finetune(recipe(own_run), own_run)
    assert result.trained_steps == 0 and (own_run / "checkpoints/last").resolve() == result.checkpoint


def test_metrics_have_each_step_once_whatever_became_of_the_file(own_run):
    finetune(recipe(own_run, steps=2), own_run)
    (own_run / "metrics.jsonl").unlink()
    result = finetune(recipe(own_run, steps=6), own_run)
    result.metrics.write_text(result.metrics.read_text() + '{"step": 7, "lo')
    result = finetune(recipe(own_run, steps=8), own_run)
    assert [json.loads(line)["step"] for line in result.metrics.read_text().splitlines()] == [3, 4, 5, 6, 7, 8]


def test_a_checkpoint_that_moves_on_is_another_model(own_run):
    spec = {**TINY.model_dump(), "checkpoint": own_run / "checkpoints/last"}
    manifest = jobs({"id": "a"}).model_copy(update={"model": ModelSpec(**spec)})
    for steps, made in ((2, ["a"]), (2, []), (4, ["a"])):
        finetune(recipe(own_run, steps=steps), own_run)
        assert generate(manifest, own_run).made == made
    path = own_run / "checkpoints/last/checkpoint.json"
    path.write_text(path.read_text().replace('"dit"', '"vae"'))
    spec["latent_space"] = "dit"
    with pytest.raises(WeightsError, match="latent_space 'vae'; wanted is 'dit'"):
        generate(manifest.model_copy(update={"model": ModelSpec(**spec)}), own_run)


def test_the_published_latent_space_is_trained_recorded_and_used(own_run):
    spec = ModelSpec(weights="builtin:tiny", latent_space="vae")
    result = finetune(recipe(own_run, steps=2).model_copy(update={"base": spec}), own_run)
    assert json.loads((result.checkpoint / "checkpoint.json").read_text())["recipe"]["latent_space"] == "vae"
    batches = [
        batch_at(Latents(Table.open(own_run / "latents"), space), recipe(own_run), 0) for space in ("dit", "vae")
    ]
    space = LATENT_SPACES["dit"](*Model(spec).backbone.latent_statistics(Model(spec).vae))
    torch.testing.assert_close(batches[0].x0, space.enter(batches[1].x0))
    torch.testing.assert_close(batches[1].target, space.enter(batches[1].x0 - batches[1].noise))

    tuned = {"weights": "builtin:tiny", "checkpoint": str(result.checkpoint)}
    assert Model(ModelSpec(**tuned)).space_name == "vae"
    with pytest.raises(WeightsError, match="latent_space 'vae'; wanted is 'dit'"):
        require(ModelSpec(**tuned, latent_space="dit"))
    with pytest.raises(TrainingError, match="latent_space: 'vae' there, 'dit' here"):
        finetune(recipe(own_run, steps=3), own_run)


def test_a_loss_that_is_not_finite_stops_and_names_the_clips(own_run, monkeypatch):
    posterior = Latents.posterior
    monkeypatch.setattr(
        Latents, "posterior", lambda self, rows: [x / (0 if 3 in rows else 1) for x in posterior(self, rows)]
    )
    with pytest.raises(TrainingError, match=r"clips .*'0003.mp4@0'"):
        finetune(recipe(own_run, steps=10), own_run)


def test_an_epoch_shows_every_row_once(run_dir):
    latents = Latents(Table.open(run_dir / "latents"))
    rows = [row for step in range(3) for row in batch_at(latents, recipe(run_dir, batch_size=4), step).rows]
    assert sorted(rows) == list(range(12)) != rows
