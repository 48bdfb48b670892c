"""What a checkpoint's record says about its recipe, and which table the processes of a training read."""

from pathlib import Path

import pytest

from pusa.data.reader import Table
from pusa.errors import TableError, TrainingError
from pusa.finetune.recipe import recorded_recipe, require_same, require_same_table
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


def test_every_process_of_a_training_reads_the_same_table():
    table = Table(Path("latents"), {}, {"content": "a"})
    require_same_table(table, {"latents": "a"})
    with pytest.raises(TableError, match="latents was changed while the training started: the first process has b"):
        require_same_table(table, {"latents": "b"})
