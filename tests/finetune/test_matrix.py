"""Held-out clips are measured by pattern and level, never train, and decide which checkpoint is kept."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pusa.finetune.stage as module
from pusa.backbones.base import find_backbone
from pusa.data.latents import Latents
from pusa.data.reader import Table
from pusa.diffusion.seeds import derived
from pusa.errors import TrainingError
from pusa.finetune.matrix import Cell, Matrix, cell_levels, count_measurements, patterns_for
from pusa.finetune.measurements import read_measurements
from pusa.finetune.parallel import process_group
from pusa.finetune.split import split_clips
from pusa.finetune.stage import finetune
from pusa.finetune.state import Training
from pusa.manifest.training import PATTERNS, Parallel
from tests.helpers.training_runs import TINY, furthest, recipe, weights

HELD_OUT = {"held_out": 0.3, "clips": 1}
MEASURED = {**HELD_OUT, "every": 2, "levels": [0.2, 0.7], "matrix_clips": 2}


def rows(run: Path) -> list[dict]:
    timeless = {"seconds", "waited", "samples_per_second", "tokens_per_second", "memory_bytes"}
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in timeless} for row in lines]


def settings(**changes) -> dict:
    return {"steps": 5, "learning_rate": 1e-3, "ema_decay": 0.9, "validation": MEASURED, **changes}


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory) -> Path:
    """Return the folder of an uninterrupted run of 5 steps with a moving average."""
    folder = tmp_path_factory.mktemp("whole")
    finetune(recipe(made, **settings()), folder)
    return folder


def test_steps_are_measured_at_the_start_as_often_as_asked_and_at_the_end(whole):
    measured = {row["step"]: row for row in rows(whole) if "validation" in row}
    assert [*measured] == [0, 2, 4, 5] and count_measurements(5, 2) == 4
    for row in measured.values():
        assert [*row["validation"]] == list(PATTERNS) and row["validation_levels"] == [0.2, 0.7]
        assert all(len(losses) == 2 and min(losses) > 0 for losses in row["validation"].values())
    assert "loss" not in measured[0] and len({json.dumps(row["validation"]) for row in measured.values()}) == 4


def test_measuring_changes_no_bit_of_the_training(made, whole, tmp_path):
    finetune(recipe(made, **settings(validation=HELD_OUT)), tmp_path)
    assert [row["loss"] for row in rows(tmp_path)] == [row["loss"] for row in rows(whole) if row["step"]]
    assert furthest(weights(tmp_path, 5), weights(whole, 5)) == 0


def test_a_run_that_is_killed_between_two_checkpoints_has_the_same_rows(made, whole, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed_before(count: int) -> None:
        step, calls = module.train_step, []

        def die(*args):
            if len(calls) == count:
                raise Killed
            calls.append(1)
            return step(*args)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(module, "train_step", die)
            finetune(recipe(made, **settings()), tmp_path)

    for count in (0, 1, 3):  # with what step 0 gives alone, without a checkpoint, and after one
        killed_before(count)
    assert finetune(recipe(made, **settings()), tmp_path).trained_steps in (3, 5)
    assert rows(tmp_path) == rows(whole)
    assert furthest(weights(tmp_path, 5), weights(whole, 5)) == 0


def test_what_is_measured_with_other_settings_before_the_first_step_takes_the_place_of_step_0(
    made, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch, pytest.raises(IndexError):
        patch.setattr(module, "train_step", lambda *args: ()[0])
        finetune(recipe(made, **settings()), tmp_path)
    (first,) = (one for one in read_measurements(tmp_path / "metrics.jsonl") if one.step == 0)
    finetune(recipe(made, **settings(steps=1, validation={**MEASURED, "levels": [0.4]})), tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == [0, 1]
    measured = read_measurements(tmp_path / "metrics.jsonl")
    assert all(one.levels == [0.4] and one.key != first.key for one in measured) and len(measured) == 2


def test_what_is_measured_is_what_the_checkpoint_offers(made, whole, tmp_path):
    """The moving average, in evaluation mode: a run that starts from it measures the same before its first step."""
    base = {**TINY.model_dump(exclude_none=True), "checkpoint": str(whole / "checkpoints/last")}
    finetune(recipe(made, **settings(steps=1, base=base)), tmp_path)
    (last,), (first, _) = read_measurements(whole / "metrics.jsonl")[-1:], read_measurements(tmp_path / "metrics.jsonl")
    assert first.key == last.key
    for pattern in PATTERNS:
        assert first.losses[pattern] == pytest.approx(last.losses[pattern], abs=1e-7)


def test_weights_and_averages_are_exchanged_back_to_the_bit_after_an_error():
    weight, average = torch.nn.Parameter(torch.rand(9)), torch.rand(9)
    before = weight.detach().clone(), average.clone()
    training = Training(None, None, {"a": weight}, {"a": average}, None)
    with pytest.raises(KeyError), training.averaged():
        assert torch.equal(weight, before[1]) and torch.equal(average, before[0])
        raise KeyError
    assert torch.equal(weight, before[0]) and torch.equal(average, before[1])


def test_held_out_clips_never_train(made, tmp_path, monkeypatch):
    read, make = set(), module.batch_maker

    def spy(*args):
        make_batch = make(*args)

        def noting(micro_batch, given_rows):
            read.update(given_rows.indices)
            return make_batch(micro_batch, given_rows)

        return noting

    monkeypatch.setattr(module, "batch_maker", spy)
    result = finetune(recipe(made, steps=8, checkpoint_every=8, validation=HELD_OUT), tmp_path)
    latents = Latents(Table.open(made / "latents", "rows"))
    split = split_clips(recipe(made, validation=HELD_OUT).validation, latents, Latents)
    (held_out,), (training,) = split.held_out.values(), split.training.values()
    assert read == set(training) and read.isdisjoint(held_out) and len(read) + len(held_out) == len(latents)
    record = json.loads((result.checkpoint / "checkpoint.json").read_text())
    assert record["data"]["clips"] == len(training) and record["recipe"]["held_out"] == 0.3


class Still:
    """A backbone that predicts no motion, and notes the levels that it is given."""

    def __init__(self) -> None:
        self.geometry, self.levels = find_backbone("mochi").geometry, []

    def predict(self, transformer, z, sigma_BF, text, embedded_guidance):
        self.levels.append(sigma_BF[0])
        return torch.zeros_like(z)


def test_a_cell_is_the_error_on_made_frames_with_noise_of_clip_and_pattern(made):
    manifest = recipe(made, seed=7, validation=MEASURED)
    latents = Latents(Table.open(made / "latents", "rows"))
    split, backbone = split_clips(manifest.validation, latents, Latents), Still()
    with process_group(Parallel()) as world:
        matrix = Matrix(manifest, world, backbone, split, [])
    row = matrix.cells[0].row
    x0, (clip,) = latents.space.enter(latents.posterior([row])[0])[0], latents.clip_ids([row])
    for pattern, first in (("text_to_video", 0), ("image_to_video", 1), ("extension", 2)):
        loss = matrix._loss(Training(manifest, None, {}, {}, None), Cell(row, pattern, 0.7))
        noise = torch.randn(x0.shape, generator=derived("matrix", 7, clip, pattern))
        assert loss == pytest.approx(float((x0 - noise)[:, first:].square().mean()), rel=1e-5)
        assert backbone.levels[-1].tolist() == pytest.approx([0.0] * first + [0.7] * (6 - first))


@given(st.floats(0, 0.4), st.floats(0.6, 1), st.floats(0, 1), st.integers(1, 40), st.randoms(use_true_random=False))
def test_independent_levels_have_the_level_as_their_mean_and_stay_within_the_range(low, high, share, frames, random):
    level = low + share * (high - low)
    order_F = torch.tensor(random.sample(range(frames), frames))
    sigma_F, made_F = cell_levels("independent", level, frames, (low, high), order_F)
    assert made_F.all() and float(sigma_F.double().mean()) == pytest.approx(level, abs=1e-6)
    assert low - 1e-6 <= float(sigma_F.min()) and float(sigma_F.max()) <= high + 1e-6
    assert frames == 1 or min(level - low, high - level) < 1e-3 or len({*sigma_F.tolist()}) == frames


@pytest.mark.parametrize("frames, measured", [
    (1, ["text_to_video"]), (2, ["text_to_video", "image_to_video", "independent"]),
    (3, ["text_to_video", "image_to_video", "keyframes", "independent"]), (4, list(PATTERNS)), (28, list(PATTERNS)),
])  # fmt: skip
def test_patterns_without_made_frames_or_equal_to_another_are_left_out(frames, measured):
    reasons = patterns_for(frames, PATTERNS)
    assert [pattern for pattern, reason in reasons.items() if not reason] == measured and [*reasons] == list(PATTERNS)


def test_a_pattern_that_equals_one_that_is_not_asked_for_is_measured():
    assert patterns_for(3, ["extension"]) == {"extension": ""}


GETS_WORSE = {**MEASURED, "keep_best": "mean", "every": 1, "levels": [0.5]}


def test_the_best_checkpoint_is_kept_and_patience_ends_the_training(made, tmp_path):
    """A learning rate that destroys the model: step 0 is never reached again."""
    changes = {"steps": 8, "learning_rate": 0.5, "checkpoint_every": 2, "keep_checkpoints": 1}

    def run(patience, **overrides):
        validation = {**GETS_WORSE, "patience": patience}
        return finetune(recipe(made, **{**changes, "validation": validation}), tmp_path, overrides)

    ended = run(3)
    assert (ended.steps, ended.trained_steps, ended.checkpoint.name) == (3, 3, "00000003")
    (reason,) = ended.ended_early
    assert reason.startswith("at step 3: ") and "validation.patience is 3" in reason
    before = rows(tmp_path)
    again = run(3)
    assert (again.steps, again.trained_steps, again.ended_early) == (3, 0, ended.ended_early)
    assert rows(tmp_path) == before and [row["step"] for row in before] == [0, 1, 2, 3]
    best = min((2, 3), key=lambda step: sum(row[0] for row in before[step]["validation"].values()))
    assert os.readlink(tmp_path / "checkpoints/best") == f"{best:08d}"

    raised = run(5)
    assert (raised.steps, raised.trained_steps) == (5, 2) and raised.ended_early
    values = {one.step: one.value("mean") for one in read_measurements(tmp_path / "metrics.jsonl")}
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("[0-9]" * 8))
    name = os.readlink(tmp_path / "checkpoints/best")
    assert set(kept) == {name, "00000005"} and values[int(name)] <= min(values[step] for step in (4, 5))

    for trained_steps in (2, 0):  # with another recipe patience begins anew
        other = run(2, learning_rate="0.4")
        assert (other.steps, other.trained_steps) == (7, trained_steps) and other.ended_early

    name = os.readlink(tmp_path / "checkpoints/best")
    unmeasured = recipe(
        made, **{**changes, "learning_rate": 0.4, "validation": HELD_OUT}
    )  # it does not ask for a best one
    finetune(unmeasured, tmp_path)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("[0-9]" * 8))
    assert kept == [name, "00000008"] and (tmp_path / "checkpoints/best/checkpoint.json").is_file()


def test_a_resume_with_another_split_is_refused(made, whole, tmp_path):
    for share, words in ((0.2, "0.3, the manifest has 0.2"), (0.0, "0.3, the manifest has 0")):
        changed = recipe(made, **settings(steps=6, validation={"held_out": share}))
        with pytest.raises(TrainingError, match=rf"was trained with validation\.held_out {words}; .*another --run-dir"):
            finetune(changed, whole)
    finetune(recipe(made, steps=2), tmp_path)
    with pytest.raises(TrainingError, match=r"validation\.held_out 0, the manifest has 0\.3"):
        finetune(recipe(made, validation=HELD_OUT), tmp_path)


def test_patterns_that_no_clip_can_be_measured_with_are_refused(made):
    manifest = recipe(made, validation=MEASURED)
    latents = Latents(Table.open(made / "latents", "rows"))
    split = split_clips(manifest.validation, latents, Latents)
    backbone = Still()
    backbone.geometry = type("Short", (), {"latent_frames": lambda self, frames: 2})()
    only = {**MEASURED, "patterns": ["text_to_video", "keyframes"], "keep_best": "keyframes"}
    with process_group(Parallel()) as world:
        assert {cell.pattern for cell in Matrix(manifest, world, backbone, split, []).cells} == {
            "text_to_video", "image_to_video", "independent",
        }  # fmt: skip
        with pytest.raises(TrainingError, match="keep_best is keyframes, which held-out clips of 2 latent frames"):
            Matrix(recipe(made, validation=only), world, backbone, split, [])
