"""What a checkpoint's record says about its recipe, and which table the processes of a training read."""

import json
import re
from pathlib import Path

import pytest

from pusa.data.reader import Table
from pusa.errors import TableError, TrainingError
from pusa.finetune.checkpoint import RECORD
from pusa.finetune.recipe import (
    ALWAYS_CHANGEABLE,
    HELD_OUT,
    OVERRIDABLE,
    recorded_recipe,
    require_same,
    require_same_table,
    with_new_clips,
)
from pusa.manifest.models import FinetuneManifest, ModelSpec

CURRENT = FinetuneManifest(base=ModelSpec(weights="builtin:tiny")).model_dump(mode="json")


@pytest.mark.parametrize("key", ["ema_decay", "weighting", "train", "caption_dropout", "batch_size"])
def test_a_record_of_before_a_key_existed_has_the_keys_default(key):
    record = {name: value for name, value in CURRENT.items() if name != key}
    assert recorded_recipe({"recipe": record})[key] == CURRENT[key]


def test_other_values_than_the_default_are_still_refused():
    recorded = recorded_recipe({"recipe": {**CURRENT, "ema_decay": 0.5}})
    with pytest.raises(TrainingError, match=r"ema_decay: 0\.5 there, 0\.0 here"):
        require_same(recorded, CURRENT, (), Path("checkpoints/1"), Path("latents"))


def test_an_override_is_suggested_only_where_it_is_allowed():
    for change, hint in (
        ({"batch_size": 8}, "; a run cannot change batch_size: use another --run-dir"),
        ({"batch_size": 8, "learning_rate": 0.1}, "; a run cannot change batch_size: use another --run-dir"),
        ({"learning_rate": 0.1}, "; use another --run-dir, or resume with the change: --override learning_rate=0.1, "),
    ):
        with pytest.raises(TrainingError, match=re.escape(hint)) as raised:
            require_same(CURRENT, {**CURRENT, **change}, (), Path("checkpoints/1"), Path("latents"))
        assert ("--override" in str(raised.value)) == (len(change) == 1 and "learning_rate" in change)


def test_the_document_lists_the_keys_of_each_kind(root):
    text = (root / "manifests/README.md").read_text().partition("### Resuming")[2].partition("```")[0]
    by_override, never = ({*re.findall(r"`(\w+)`", item)} for item in text.split("\n- ")[2:])
    assert by_override == OVERRIDABLE - {"steps"}  # which also changes in the manifest
    fixed = {*FinetuneManifest.model_fields} - OVERRIDABLE - ALWAYS_CHANGEABLE
    assert never == fixed | {HELD_OUT, "validation"}  # of whose keys it is the only one


@pytest.mark.parametrize(
    "step, table, steps",
    [
        (8, "a", 8),  # complete, and nothing is new
        (8, "b", 16),
        (3, "b", 8),  # on its way
        (11, "c", 16),
        (16, "b", 24),
        (0, "b", 8),
    ],
)
def test_a_training_goes_on_with_new_clips_for_the_manifests_steps(tmp_path, monkeypatch, step, table, steps):
    manifest = FinetuneManifest(base=ModelSpec(weights="builtin:tiny"), steps=8)
    assert with_new_clips(manifest, tmp_path) == {}
    monkeypatch.setattr(Table, "open", lambda folder, kind: Table(folder, {}, {"content": table}))
    (tmp_path / "checkpoints/last").mkdir(parents=True)
    record = {"step": step, "recipe": {**CURRENT, "latents": "a"}}
    (tmp_path / "checkpoints/last" / RECORD).write_text(json.dumps(record))
    expected = {"steps": str(steps), "latents": str(tmp_path / "latents")}
    assert with_new_clips(manifest, tmp_path) == expected


def test_every_process_of_a_training_reads_the_same_table():
    table = Table(Path("latents"), {}, {"content": "a"})
    require_same_table(table, "a")
    with pytest.raises(TableError, match="latents was changed while the training started: the first process has b"):
        require_same_table(table, "b")
