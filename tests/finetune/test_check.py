"""`pusa check` of a finetune manifest refuses what the trainer would refuse, and downloads nothing."""

import json
import shutil
from pathlib import Path

import pytest

from flows.commands import main
from pusa.data.writer import INDEX
from pusa.errors import PusaError
from pusa.finetune.check import check_finetune
from pusa.finetune.stage import finetune
from pusa.manifest.models import FinetuneManifest
from pusa.weights.resolve import builtin_folder
from tests.helpers.indexes import edit_index


def manifest(run: Path, **settings) -> FinetuneManifest:
    base = {"latents": run / "latents", "base": {"weights": "builtin:tiny"}, "batch_size": 4, "steps": 1}
    return FinetuneManifest.model_validate({**base, **settings})


def checked(manifest: FinetuneManifest, run: Path) -> tuple[list[str], list[str]]:
    notes: list[str] = []
    return list(check_finetune(manifest, run, notes.append)), notes


WRONG = {
    "a layer that is not there": (
        {"train": {"method": "lora", "targets": ["to_qu"]}},
        "train: 'to_qu' matches the end of no",
    ),
    "a name of no weight": ({"train": {"method": "partial", "names": ["a.*", "b"]}}, "train: 'a.*' matches no"),
    "an uneven context": ({"parallel": {"processes": 4, "context": 3}}, "parallel.context is 3; it must divide the 4"),
    "heads that cannot be shared": ({"parallel": {"processes": 5, "context": 5}}, "5 processes cannot split"),
    "more processes than frames": ({"parallel": {"processes": 8, "context": 8}}, "clips of 6 latent frames allow no"),
    "an uneven batch": ({"parallel": {"processes": 3}}, "batch_size is 4; it must be a multiple of 3"),
    "no such device": ({"validation": {"device": "cuda:63"}}, "validation.device is 'cuda:63'"),
    "no clip held out": ({"validation": {"held_out": 1e-9}}, "and none of the 12 clips of "),
    "no such table of held-out clips": ({"validation": {"latents": "/nowhere", "every": 1}}, "/nowhere has no"),
    "no such table": ({"latents": "/nowhere/latents"}, "/nowhere/latents has no"),
    "no such base": ({"base": {"weights": "builtin:tny"}}, "unknown built-in model 'builtin:tny'"),
}


@pytest.mark.parametrize("settings, message", WRONG.values(), ids=WRONG)
def test_manifests_that_cannot_be_trained_are_refused(made, settings, message):
    lines, notes = checked(manifest(made, **settings), made)
    assert any(message in line for line in lines) and not notes


def test_held_out_clips_that_would_train_are_refused(made, tmp_path):
    other = shutil.copytree(made / "latents", tmp_path / "latents")
    (line,), _ = checked(manifest(made, validation={"latents": other, "every": 1}), made)
    assert f"12 of the 12 clips of {other} are in {made}/latents too, so they would train" in line


def test_every_problem_has_a_line(made):
    several = {
        "batch_size": 5,
        "parallel": {"processes": 3},
        "validation": {"device": "cuda:63"},
        "latents": "/nowhere",
    }
    lines, _ = checked(manifest(made, train={"method": "lora", "targets": ["x"]}, **several), made)
    assert len(lines) == 4


def test_manifests_that_can_be_trained_are_accepted(made):
    lora = {"method": "lora", "targets": ["to_q"]}
    for settings in (
        {},
        {"train": lora},
        {"parallel": {"processes": 2, "context": 2}},
        {"validation": {"device": "cpu"}},
        {"validation": {"held_out": 0.3, "every": 1}},
    ):
        assert checked(manifest(made, **settings), made) == ([], [])


def test_latents_of_other_encoders_are_refused_with_the_trainers_words(made, tmp_path):
    base = shutil.copytree(builtin_folder("builtin:tiny"), tmp_path / "base")
    config = json.loads((base / "vae/config.json").read_text())
    (base / "vae/config.json").write_text(json.dumps({**config, "note": "another"}))
    other = manifest(made, base={"weights": str(base)})
    (line,), _ = checked(other, made)
    assert "latents was made with vae" in line
    with pytest.raises(PusaError) as error:
        finetune(other, tmp_path / "run")
    assert str(error.value) == line


@pytest.mark.parametrize("damage", [lambda index: {**index, "version": 0}, lambda index: {**index, "parts": {}}])
def test_a_damaged_table_is_refused(own_run, damage):
    path = own_run / "latents" / INDEX
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    (line,), notes = checked(manifest(own_run), own_run)
    assert str(own_run / "latents") in line and not notes


def test_an_empty_table_is_refused(own_run):
    edit_index(own_run / "latents", lambda index: index.update(parts={name: [] for name in index["parts"]}))
    (line,), _ = checked(manifest(own_run), own_run)
    assert "has no rows" in line


@pytest.mark.parametrize("latents", [None, "RUN/latents"])
def test_this_runs_latents_need_not_exist_yet(tmp_path, latents, capsys):
    named = f"latents: {latents}\n" if latents else ""
    (tmp_path / "m.yaml").write_text(f'kind: finetune\nbase: {{weights: "builtin:tiny"}}\n{named}')
    assert main(["check", str(tmp_path / "m.yaml"), "--run-dir", str(tmp_path / "run")]) == 0
    assert f"latents {tmp_path}/run/latents do not exist yet" in capsys.readouterr().out
    (tmp_path / "m.yaml").write_text('kind: finetune\nbase: {weights: "builtin:tiny"}\nlatents: elsewhere\n')
    assert main(["check", str(tmp_path / "m.yaml"), "--run-dir", str(tmp_path / "run")]) == 1
    assert f"{tmp_path}/elsewhere has no" in capsys.readouterr().err


def test_the_command_names_each_problem(tmp_path, capsys):
    train = "{method: lora, targets: [to_qu]}"
    text = f'kind: finetune\nbase: {{weights: "builtin:tiny"}}\ntrain: {train}\nparallel: {{processes: 3}}\n'
    (tmp_path / "m.yaml").write_text(text)
    assert main(["check", str(tmp_path / "m.yaml"), "--run-dir", str(tmp_path / "run")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "batch_size is 32" in lines[1] and "'to_qu'" in lines[2]
