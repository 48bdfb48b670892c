"""The trainer on the built-in tiny model, one process."""

import json

import pytest
import torch

from pusa.backbones.mochi.backbone import Mochi
from pusa.data.latents import Latents
from pusa.data.loader import MicroBatch, read_rows
from pusa.data.order import Order
from pusa.data.reader import Table
from pusa.diffusion.latent_spaces import LATENT_SPACES
from pusa.errors import ManifestError, TableError, TrainingError, WeightsError
from pusa.finetune.batch import batch_maker
from pusa.finetune.stage import finetune
from pusa.finetune.validation import validate_checkpoints
from pusa.generate.stage import generate
from pusa.manifest.models import ModelSpec
from pusa.manifest.training import Validation
from pusa.weights.model import Model
from pusa.weights.resolve import require_model
from tests.generate.test_stage import jobs
from tests.helpers.indexes import edit_index
from tests.helpers.training_runs import TINY, furthest, losses, recipe, weights


def draw(latents, manifest, step, places=None):
    rows = Order(latents.buckets, manifest.batch_size, manifest.seed).rows(step)
    places = places or range(manifest.batch_size)
    indices = [rows[place] for place in places]
    return batch_maker(manifest, latents, Mochi().drop_text)(
        MicroBatch(step, places, indices), read_rows(latents, indices)
    )


def test_the_loss_falls(made, tmp_path):
    rule = {"steps": 16, "batch_size": 4, "checkpoint_every": 16}
    result = finetune(recipe(made, **rule, learning_rate=1e-4), tmp_path / "a")
    rows = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 17))
    assert all(row["tokens_per_second"] > row["samples_per_second"] > 0 for row in rows)
    frozen = finetune(recipe(made, **rule, learning_rate=1e-12), tmp_path / "b")
    assert sum(losses(tmp_path / "a")[-8:]) < 0.97 * sum(losses(tmp_path / "b")[-8:])
    assert frozen.last_loss == losses(tmp_path / "b")[-1]


def test_a_sample_depends_on_its_place_only(made):
    latents = Latents(Table.open(made / "latents"))
    manifest = recipe(made, batch_size=5, caption_dropout=0.5)
    whole = draw(latents, manifest, 3)
    for places in (range(2), range(2, 5)):
        part = draw(latents, manifest, 3, places)
        for name in ("x0", "noise", "sigma_BF", "target"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[places.start : places.stop])
        assert torch.equal(part.text.mask, whole.text.mask[places.start : places.stop])
    assert len({tuple(row) for row in whole.sigma_BF.tolist()}) == 5
    assert not torch.equal(whole.noise, draw(latents, manifest, 4).noise)


def test_captions_are_dropped_whole_and_at_the_given_rate(made):
    latents = Latents(Table.open(made / "latents"))
    batches = [draw(latents, recipe(made, batch_size=12, caption_dropout=0.3), step) for step in range(40)]
    kept = torch.cat([batch.text.mask.any(1) for batch in batches])
    assert (~kept).float().mean() == pytest.approx(0.3, abs=0.07)
    silent = torch.cat([batch.text.features for batch in batches])[~kept]
    assert (silent == 0).all()


def test_checkpoints_hold_the_moving_average(made, tmp_path):
    rule = {"steps": 3, "checkpoint_every": 1, "learning_rate": 1e-3}
    finetune(recipe(made, **rule), tmp_path / "raw")
    finetune(recipe(made, **rule, ema_decay=0.15), tmp_path / "ema")
    raw = [weights(tmp_path / "raw", step) for step in (1, 2, 3)]
    expected, base = {}, Model(TINY).transformer.state_dict()
    for name, value in weights(tmp_path / "raw", 1).items():
        average = base[name].float()
        for step, row in enumerate(raw, 1):
            average = average.lerp(row[name], 1 - min(0.15, step / (step + 9)))
        expected[name] = average
        assert average.shape == value.shape
    assert furthest(weights(tmp_path / "ema", 3), expected) < 1e-6 < furthest(expected, raw[2])
    assert losses(tmp_path / "ema") == losses(tmp_path / "raw")


@pytest.mark.parametrize("lr_schedule, expected", [
    ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]), ("cosine", [1 / 3, 2 / 3, 1, 0.8535534, 0.5, 0.1464466]),
])  # fmt: skip
def test_the_learning_rate_rises_and_falls(made, tmp_path, lr_schedule, expected):
    result = finetune(
        recipe(made, steps=6, batch_size=1, warmup_steps=2, lr_schedule=lr_schedule, learning_rate=1e-4), tmp_path
    )
    rates = [json.loads(line)["learning_rate"] for line in result.metrics.read_text().splitlines()]
    assert rates == pytest.approx([1e-4 * part for part in expected])


def test_only_named_weights_change(made, tmp_path):
    partial = {"method": "partial", "names": ["transformer_blocks.1.*", "*.norm1.linear.weight"]}
    finetune(recipe(made, train=partial, learning_rate=1e-3), tmp_path)
    before, after = Model(TINY).transformer.state_dict(), weights(tmp_path, 4)
    changed = {name for name in after if not torch.equal(before[name].float(), after[name])}
    named = {name for name in after if ".1." in name[:22] or name.endswith("norm1.linear.weight")}
    assert named - changed == set() and changed - named == set()
    with pytest.raises(TrainingError, match=r"'transformer_block\.\*' .*transformer_blocks"):
        finetune(recipe(made, train={"method": "partial", "names": ["transformer_block.*"]}), tmp_path / "b")


@pytest.mark.parametrize("method", [{"method": "full"}, {"method": "lora", "rank": 4}])
def test_bf16_arithmetic_on_fp32_weights(made, tmp_path, method):
    rule = {"train": method, "learning_rate": 1e-7, "steps": 2}
    finetune(recipe(made, **rule), tmp_path / "fp32")
    finetune(recipe(made, **rule, precision="bfloat16"), tmp_path / "bf16")
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.03)
    assert losses(tmp_path / "bf16") != losses(tmp_path / "fp32")
    from safetensors.torch import load_file

    (state,) = (tmp_path / "bf16/checkpoints/last/state").glob("*.safetensors")
    masters = {name: t for name, t in load_file(state).items() if name.startswith("weight.")}
    assert {t.dtype for t in masters.values()} == {torch.float32}
    assert {t.dtype for t in weights(tmp_path / "bf16", 2).values()} == {torch.bfloat16}


@pytest.fixture(scope="module")
def plain(made, tmp_path_factory):
    """Return the folder of a run with the settings of `recipe`, to compare others with."""
    folder = tmp_path_factory.mktemp("plain")
    finetune(recipe(made), folder)
    return folder


@pytest.mark.parametrize("every", [1, 3])
def test_activation_checkpointing_changes_nothing(made, plain, tmp_path, every):
    finetune(recipe(made, activation_checkpointing=every), tmp_path)
    assert losses(tmp_path) == losses(plain)
    assert furthest(weights(tmp_path, 4), weights(plain, 4)) == 0


def test_loader_workers_change_nothing(made, plain, tmp_path):
    finetune(recipe(made, loader_workers=2), tmp_path)
    assert losses(tmp_path) == losses(plain)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(made, tmp_path):
    for compile in (False, True):
        finetune(recipe(made, compile=compile, activation_checkpointing=1), tmp_path / str(compile))
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), abs=1e-4)


def test_generate_notices_a_newer_checkpoint(own_run):
    spec = {**TINY.model_dump(), "checkpoint": own_run / "checkpoints/last"}
    manifest = jobs({"id": "a"}).model_copy(update={"model": ModelSpec(**spec)})
    for steps, made in ((2, ["a"]), (2, []), (4, ["a"])):
        finetune(recipe(own_run, steps=steps), own_run)
        assert generate(manifest, own_run).made == made


def test_a_lora_run_can_be_generated_from(own_run, tmp_path):
    """And validated and trained further, on a base with a checkpoint of its own too."""
    base = ModelSpec(weights="builtin:tiny", checkpoint="builtin:tiny-pusa", latent_space="dit")
    validation = Validation(steps=1, guidance=1, device="cpu")
    lora = {
        "train": {"method": "lora", "rank": 4},
        "learning_rate": 1e-2,
        "steps": 2,
        "base": base,
        "validation": validation,
    }
    finetune(manifest := recipe(own_run, **lora), own_run)
    spec = base.model_copy(update={"lora": str(own_run / "checkpoints/last")})
    assert generate(jobs({"id": "a"}).model_copy(update={"model": spec}), own_run).made == ["a"]
    with_lora = Model(spec).transformer.state_dict()
    assert furthest(with_lora, Model(base).transformer.state_dict()) > 1e-4
    with pytest.raises(WeightsError, match=r"trained on .* of fingerprint"):
        require_model(spec.model_copy(update={"checkpoint": None}))
    assert [sheet.name for sheet in validate_checkpoints(manifest, own_run)] == ["00000000.jpg", "00000002.jpg"]

    full = recipe(own_run, steps=1, learning_rate=1e-12, base=spec, validation=validation)
    finetune(full, tmp_path)
    assert furthest({name: w.float() for name, w in with_lora.items()}, weights(tmp_path, 1)) < 1e-6
    validate_checkpoints(full, tmp_path)  # the trained weights include the base's LoRA, which must not be added twice
    sheets = [json.loads((tmp_path / f"validation/0000000{step}.json").read_text())["videos"] for step in (0, 1)]
    assert sheets[0] == sheets[1]


def test_the_published_latent_space_is_trained_recorded_and_used(own_run):
    spec = ModelSpec(weights="builtin:tiny", latent_space="vae")
    result = finetune(recipe(own_run, steps=2).model_copy(update={"base": spec}), own_run)
    assert json.loads((result.checkpoint / "checkpoint.json").read_text())["recipe"]["latent_space"] == "vae"
    batches = [draw(Latents(Table.open(own_run / "latents"), space), recipe(own_run), 0) for space in ("dit", "vae")]
    space = LATENT_SPACES["dit"](*Model(spec).backbone.latent_statistics(Model(spec).vae))
    torch.testing.assert_close(batches[0].x0, space.enter(batches[1].x0))
    torch.testing.assert_close(batches[1].target, space.enter(batches[1].x0 - batches[1].noise))

    tuned = {"weights": "builtin:tiny", "checkpoint": str(result.checkpoint)}
    assert Model(ModelSpec(**tuned)).space_name == "vae"
    with pytest.raises(WeightsError, match="latent_space 'vae'; the manifest has 'dit'"):
        require_model(ModelSpec(**tuned, latent_space="dit"))
    with pytest.raises(TrainingError, match="latent_space: 'vae' there, 'dit' here"):
        finetune(recipe(own_run, steps=3), own_run)


def poisoned(monkeypatch, row):
    posterior = Latents.posterior
    monkeypatch.setattr(
        Latents, "posterior", lambda self, rows: [x / (0 if row in rows else 1) for x in posterior(self, rows)]
    )


def test_a_step_that_is_not_finite_is_logged_with_its_clip_ids_and_changes_nothing(made, tmp_path, monkeypatch, caplog):
    rule = {"steps": 3, "checkpoint_every": 1, "batch_size": 4, "learning_rate": 1e-3}
    poisoned(monkeypatch, 3)
    result = finetune(recipe(made, **rule), tmp_path)
    rows = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    (bad,) = [row for row in rows if row["loss"] is None]
    assert "0003.mp4@0" in bad["skipped"] and len(bad["skipped"]) == 4 and result.skipped_steps == 1
    assert f"step {bad['step']}: loss or gradient not finite" in caplog.text and "0003.mp4@0" in caplog.text
    before = weights(tmp_path, bad["step"] - 1) if bad["step"] > 1 else Model(TINY).transformer.state_dict()
    assert furthest({k: v.float() for k, v in before.items()}, weights(tmp_path, bad["step"])) == 0


def test_too_many_steps_that_are_not_finite_end_the_run(made, tmp_path, monkeypatch):
    poisoned(monkeypatch, 3)
    manifest = recipe(made, steps=7, batch_size=4, checkpoint_every=1, non_finite_limit=1)
    with pytest.raises(
        TrainingError, match=r"clips \[.*'0003.mp4@0'.*2 steps .* skipped so far, non_finite_limit is 1"
    ):
        finetune(manifest, tmp_path)
    # The first skipped step is in the last checkpoint, so the same command fails again at the second.
    kept = json.loads((tmp_path / "checkpoints/last/checkpoint.json").read_text())
    assert kept["skipped"] == 1
    with pytest.raises(TrainingError, match="2 steps of this run were skipped"):
        finetune(manifest, tmp_path)
    monkeypatch.undo()
    assert finetune(manifest, tmp_path).skipped_steps == 1


def test_a_table_without_rows_is_refused(own_run):
    edit_index(own_run / "latents", lambda index: index.update(parts={name: [] for name in index["parts"]}))
    with pytest.raises(TableError, match="has no rows; there is nothing to train with"):
        finetune(recipe(own_run), own_run)


def test_an_epoch_shows_every_row_once(made):
    order = Order(Latents(Table.open(made / "latents")).buckets, 4, 0)
    rows = [row for step in range(3) for row in order.rows(step)]
    assert sorted(rows) == list(range(12)) != rows


@pytest.mark.parametrize("overrides, why", [
    ({"activation_checkpointing": "1"}, "change it in the manifest itself"), ({"seed": "1"}, "a run cannot change it"),
    ({"learnin_rate": "1"}, "did you mean 'learning_rate'"), ({"learning_rate": "7"}, "learning_rate: .*less than"),
    ({"learning_rate": "[}"}, "--override"),
])  # fmt: skip
def test_invalid_overrides_are_refused(made, tmp_path, overrides, why):
    with pytest.raises(ManifestError, match=why):
        finetune(recipe(made), tmp_path, overrides)
