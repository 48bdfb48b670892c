"""A killed run resumes exactly, and a run that cannot be resumed is refused with the reason."""

import json
import logging
import os
import re
import resource
import shutil

import pytest

import pusa.finetune.stage as module
from pusa.errors import ManifestError, StageError, TrainingError, WeightsError
from pusa.finetune.check import check_finetune
from pusa.finetune.stage import finetune
from pusa.system.files import sha256_file
from pusa.system.locks import sole_writer
from tests.helpers.indexes import edit_index
from tests.helpers.processes import wait_for
from tests.helpers.training_runs import furthest, losses, recipe, weights


class Killed(BaseException):
    pass


def killed_at(monkeypatch, manifest, run_dir, steps):
    """Run until `steps` steps are made and their checkpoint is written; then drop everything, as a kill does."""
    step, calls = module.train_step, []

    def die(*given):
        if len(calls) == steps:
            written = run_dir / f"checkpoints/{steps // 2 * 2:08d}"
            wait_for(written.exists)  # another thread writes it
            raise Killed
        calls.append(1)
        return step(*given)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "train_step", die)
        finetune(manifest, run_dir)


@pytest.mark.parametrize("changes", [
    {}, {"ema_decay": 0.9, "lr_schedule": "cosine"}, {"train": {"method": "lora", "rank": 4}, "micro_batch_size": 1},
    {"train": {"method": "partial", "names": ["*.norm1.*"]}, "ema_decay": 0.5},
])  # fmt: skip
def test_a_killed_run_resumes_exactly(made, tmp_path, changes, monkeypatch):
    manifest = recipe(made, learning_rate=1e-3, **changes)
    finetune(manifest, tmp_path / "whole")
    killed_at(monkeypatch, manifest, tmp_path / "killed", 3)
    again = finetune(manifest, tmp_path / "killed")
    assert again.trained_steps == 2
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")
    assert furthest(weights(tmp_path / "whole", 4), weights(tmp_path / "killed", 4)) == 0
    assert not list((tmp_path / "killed/checkpoints").glob(".partial*"))


def test_a_finished_run_trains_only_when_more_steps_are_asked_for(own_run):
    first = finetune(recipe(own_run), own_run)
    again = finetune(recipe(own_run), own_run)
    assert (again.trained_steps, again.last_loss, again.checkpoint) == (0, first.last_loss, first.checkpoint)
    assert (own_run / "checkpoints/last").resolve() == first.checkpoint
    assert finetune(recipe(own_run, steps=6), own_run).trained_steps == 2
    assert finetune(recipe(own_run, steps=4), own_run).checkpoint == first.checkpoint
    with pytest.raises(TrainingError, match="past step 3 and kept no checkpoint of it; it has 2, 4, 6"):
        finetune(recipe(own_run, steps=3), own_run)


def test_the_last_few_are_kept(made, tmp_path):
    finetune(recipe(made, steps=3, checkpoint_every=1, keep_checkpoints=2), tmp_path)
    there = sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name[0] != ".")
    assert there == ["00000002", "00000003", "last"]


def truncate(checkpoint):
    (file,) = checkpoint.glob("state/*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])


def flip(checkpoint):
    (file,) = checkpoint.glob("transformer/*.safetensors")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def add(checkpoint):
    shutil.copy(next(checkpoint.glob("state/*")), checkpoint / "state/other.safetensors")


def forget(checkpoint):
    path = checkpoint / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": {"state/x": 5}}))


def lose(checkpoint):
    shutil.rmtree(checkpoint / "state")


def tear(checkpoint):
    path = checkpoint / "checkpoint.json"
    path.write_text(path.read_text()[:50])


def revise(checkpoint):
    path = checkpoint / "checkpoint.json"
    path.write_text(path.read_text().replace('"skipped": 0', '"skipped": 8'))


@pytest.fixture(scope="module")
def finished(made, tmp_path_factory):
    """Return the folder of a run of 4 steps, to copy."""
    folder = tmp_path_factory.mktemp("finished")
    finetune(recipe(made, learning_rate=1e-3), folder)
    return folder


@pytest.fixture(scope="module")
def begun(made, tmp_path_factory):
    """Return the folder of a run of 2 steps, to copy."""
    folder = tmp_path_factory.mktemp("begun")
    finetune(recipe(made, steps=2), folder)
    return folder


def copy(run_dir, folder):
    shutil.copytree(run_dir, folder, symlinks=True, dirs_exist_ok=True)


@pytest.mark.parametrize("damage", [truncate, flip, lose, tear, add, forget, revise])
def test_a_damaged_checkpoint_is_skipped_by_name(made, finished, tmp_path, damage, caplog):
    manifest = recipe(made, learning_rate=1e-3)
    copy(finished, tmp_path)
    before, series = weights(tmp_path, 4), losses(tmp_path)
    damage(tmp_path / "checkpoints/00000004")
    with caplog.at_level(logging.WARNING):
        assert finetune(manifest, tmp_path).trained_steps == 2
    assert "checkpoints/00000004 is damaged and is skipped: " in caplog.text
    assert losses(tmp_path) == series and furthest(weights(tmp_path, 4), before) == 0
    assert (tmp_path / "checkpoints/00000004.torn").is_dir()


def test_a_note_in_a_checkpoint_is_not_damage(made, tmp_path):
    finetune(recipe(made), tmp_path)
    (tmp_path / "checkpoints/00000004/note.txt").write_text("the good one")
    assert finetune(recipe(made), tmp_path).trained_steps == 0


@pytest.mark.parametrize("error", [WeightsError("no"), OSError(28, "No space left on device")])
def test_the_error_that_prevents_a_checkpoint_is_raised(made, tmp_path, error, monkeypatch):
    def fail(*given):
        raise error

    monkeypatch.setattr("pusa.finetune.stage.write_transformer", fail)
    with pytest.raises(OSError, match=re.escape(f"00000002 could not be written: {error}")):
        finetune(recipe(made), tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == [".lock"]  # a full disk has no room for an unfinished one


def test_a_state_of_another_run_is_refused(made, tmp_path):
    finetune(recipe(made, steps=2), tmp_path / "full")
    finetune(recipe(made, steps=2, train={"method": "lora", "rank": 4}), tmp_path / "lora")
    checkpoint = tmp_path / "full/checkpoints/00000002"
    (file,) = (tmp_path / "lora/checkpoints/00000002/state").iterdir()
    shutil.copy(file, checkpoint / "state")
    record = json.loads((checkpoint / "checkpoint.json").read_text())
    record["files"][f"state/{file.name}"] = [file.stat().st_size, sha256_file(file)]
    del record["sha256"]
    (checkpoint / "checkpoint.json").write_text(json.dumps(record))
    with pytest.raises(TrainingError, match=r"00000002 cannot be resumed: .*Missing key"):
        finetune(recipe(made), tmp_path / "full")


@pytest.mark.parametrize("error", [Killed, TrainingError("no"), KeyboardInterrupt])
def test_a_started_checkpoint_is_finished_whatever_ends_the_training(made, tmp_path, error, monkeypatch):
    step, calls = module.train_step, []

    def die(*given):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return step(*given)

    monkeypatch.setattr(module, "train_step", die)
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        finetune(recipe(made), tmp_path)
    assert (tmp_path / "checkpoints/last").resolve().name == "00000002"
    monkeypatch.undo()
    assert finetune(recipe(made), tmp_path).trained_steps == 2


def test_last_is_repaired_after_a_kill(own_run):
    result = finetune(recipe(own_run), own_run)
    last = own_run / "checkpoints/last"
    last.unlink()
    last.symlink_to("00000002")  # as a kill leaves it that came before `last` followed
    again = finetune(recipe(own_run), own_run)
    assert again.trained_steps == 0 and last.resolve() == again.checkpoint == result.checkpoint
    last.unlink()
    assert finetune(recipe(own_run), own_run).trained_steps == 0 and last.resolve() == result.checkpoint


def test_a_full_disk_is_an_error_and_nothing_is_lost(made, begun, tmp_path):
    copy(begun, tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # more than metrics, less than weights
    try:
        with pytest.raises(OSError, match=r"checkpoints/.*00000004.* could not be written"):
            finetune(recipe(made), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [".lock", "00000002", "last"]
    result = finetune(recipe(made), tmp_path)
    assert result.trained_steps == 2 and [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_second_trainer_is_refused(made, tmp_path):
    with sole_writer(tmp_path / "checkpoints"), pytest.raises(StageError, match="being written by another process"):
        finetune(recipe(made), tmp_path)


@pytest.mark.parametrize("changes, message", [
    ({"learning_rate": 1e-2}, "learning_rate: 1e-05 there, 0.01 here"), ({"seed": 3}, "seed: 0 there, 3 here"),
    ({"train": {"method": "lora"}}, "train: {'method': 'full'} there, {'method': 'lora'"),
    ({"levels": "ptss(0.2)", "batch_size": 8}, "batch_size: 2 there, 8 here; levels: 'independent' there, 'ptss"),
    ({"precision": "bfloat16"}, "precision: 'float32' there, 'bfloat16' here"),
])  # fmt: skip
def test_a_changed_recipe_is_refused_with_both_values(made, begun, tmp_path, changes, message):
    copy(begun, tmp_path)
    with pytest.raises(TrainingError) as error:
        finetune(recipe(made, **changes), tmp_path)
    assert message in str(error.value)


def test_settings_that_may_change_do_not_change_the_steps(made, begun, tmp_path):
    finetune(recipe(made), tmp_path / "whole")
    copy(begun, tmp_path / "other")
    other = {
        "micro_batch_size": 2,
        "activation_checkpointing": 1,
        "loader_workers": 1,
        "keep_checkpoints": 9,
        "checkpoint_every": 1,
    }
    finetune(recipe(made, **other), tmp_path / "other")
    assert losses(tmp_path / "whole") == losses(tmp_path / "other")


def test_an_override_is_applied_and_recorded_and_must_be_repeated(made, begun, tmp_path):
    copy(begun, tmp_path)
    changed = {"learning_rate": "0.001", "weighting": "gaussian"}
    result = finetune(recipe(made), tmp_path, changed)
    assert [row["learning_rate"] for row in rows(tmp_path)] == [1e-5, 1e-5, 1e-3, 1e-3]
    record = json.loads((result.checkpoint / "checkpoint.json").read_text())
    assert record["recipe"]["learning_rate"] == 0.001
    assert record["overrides"] == [
        {"step": 2, "key": "learning_rate", "from": 1e-5, "to": 0.001},
        {"step": 2, "key": "weighting", "from": "none", "to": "gaussian"},
    ]
    with pytest.raises(TrainingError, match=r"as before: --override learning_rate=0.001 --override weighting=gauss"):
        finetune(recipe(made, steps=6), tmp_path)
    again = finetune(recipe(made, steps=6), tmp_path, changed)
    assert json.loads((again.checkpoint / "checkpoint.json").read_text())["overrides"] == record["overrides"]
    back = finetune(recipe(made, steps=8), tmp_path, {"learning_rate": "1e-5", "weighting": "none"})
    assert len(json.loads((back.checkpoint / "checkpoint.json").read_text())["overrides"]) == 4


def test_a_changed_table_is_refused_unless_overridden(own_run, tmp_path):
    finetune(recipe(own_run, steps=2), tmp_path)
    edit_index(own_run / "latents", lambda index: index["facts"].update(content="grown"))
    change = f"--override latents={own_run}/latents"
    with pytest.raises(TrainingError, match=f"latents: .*resume with the change: {change}, or"):
        finetune(recipe(own_run), tmp_path)
    (line,) = check_finetune(recipe(own_run), tmp_path, print)
    assert "00000002 has another recipe (latents: " in line
    result = finetune(recipe(own_run), tmp_path, {"latents": f"{own_run}/latents"})
    (change,) = json.loads((result.checkpoint / "checkpoint.json").read_text())["overrides"]
    assert (change["step"], change["key"]) == (2, "latents") and change["from"] != change["to"]


def test_a_longer_cosine_is_refused_unless_overridden(made, tmp_path):
    finetune(recipe(made, lr_schedule="cosine"), tmp_path)
    with pytest.raises(TrainingError, match="steps: 4 there, 6 here"):
        finetune(recipe(made, lr_schedule="cosine", steps=6), tmp_path)
    result = finetune(recipe(made, lr_schedule="cosine", steps=6), tmp_path, {"steps": "6"})
    record = json.loads((result.checkpoint / "checkpoint.json").read_text())
    assert record["overrides"] == [{"step": 4, "key": "steps", "from": 4, "to": 6}]
    assert [row["learning_rate"] for row in rows(tmp_path)][4] == pytest.approx(1e-5 * 0.25)
    with pytest.raises(TrainingError, match="steps: 6 there, None here"):
        finetune(recipe(made, steps=8), tmp_path)
    assert finetune(recipe(made, steps=8), tmp_path, {"lr_schedule": "constant"}).trained_steps == 2


def warnings(caplog) -> list[str]:
    """Return what pusa has logged as a warning; torch logs too."""
    records = [record for record in caplog.records if record.name.startswith("pusa.")]
    return [record.message for record in records if record.levelno >= logging.WARNING]


def test_a_checkpoint_with_old_keys_resumes_without_complaint(own_run, caplog):
    result = finetune(recipe(own_run, steps=2, lr_schedule="cosine"), own_run, {"max_grad_norm": "0.5"})
    path = result.checkpoint / "checkpoint.json"
    record = json.loads(path.read_text())
    del record["sha256"]  # which that version did not write
    current = record["recipe"]
    assert (current["lr_schedule"], current["max_grad_norm"]) == ("cosine", 0.5)
    renamed = {"lr_schedule": "decay", "max_grad_norm": "clip_norm"}
    old = {renamed.get(key, key): value for key, value in current.items()}
    path.write_text(json.dumps({**record, "recipe": old}))

    longer = {"steps": "4", "max_grad_norm": "0.5"}
    manifest = recipe(own_run, steps=4, lr_schedule="cosine")
    with pytest.raises(TrainingError, match=r"recipe \(max_grad_norm: 0.5 there, 1.0 here; steps: 2 there, 4 here\)"):
        finetune(manifest, own_run)
    (line,) = check_finetune(manifest, own_run, print)
    assert "recipe (max_grad_norm: 0.5 there, 1.0 here; steps: 2 there, 4 here)" in line
    result = finetune(manifest, own_run, longer)
    assert result.trained_steps == 2 and not warnings(caplog)
    record = json.loads((result.checkpoint / "checkpoint.json").read_text())
    assert record["recipe"] == {**current, "steps": 4}
    assert [(change["step"], change["key"]) for change in record["overrides"]] == [(0, "max_grad_norm"), (2, "steps")]


def test_an_old_key_is_overridden_with_one_warning(own_run, caplog):
    finetune(recipe(own_run, steps=2), own_run)
    result = finetune(recipe(own_run), own_run, {"decay": "cosine"})
    assert warnings(caplog) == ["the key decay is now called lr_schedule; the next version will refuse decay"]
    record = json.loads((result.checkpoint / "checkpoint.json").read_text())
    assert record["overrides"] == [{"step": 2, "key": "lr_schedule", "from": "constant", "to": "cosine"}]
    with pytest.raises(ManifestError, match="--override: decay and lr_schedule are both given"):
        finetune(recipe(own_run), own_run, {"decay": "cosine", "lr_schedule": "cosine"})


def test_metrics_have_each_step_once_even_if_the_file_was_removed_or_torn(own_run):
    finetune(recipe(own_run, steps=2), own_run)
    (own_run / "metrics.jsonl").unlink()
    result = finetune(recipe(own_run, steps=6), own_run)
    result.metrics.write_text(result.metrics.read_text() + '{"step": 7, "lo')
    finetune(recipe(own_run, steps=8), own_run)
    assert [row["step"] for row in rows(own_run)] == [3, 4, 5, 6, 7, 8]
