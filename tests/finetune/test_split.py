"""Which clips are held out depends on their ids alone; a split without clips on both sides is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pusa.data.latents import Latents
from pusa.data.order import hash_of, split
from pusa.data.reader import Table
from pusa.errors import TableError
from pusa.finetune.split import split_clips
from pusa.manifest.models import FinetuneManifest
from pusa.manifest.training import Validation
from tests.helpers.synthetic_tables import write_synthetic

IDS = [f"{i:04d}.mp4@{i % 3}" for i in range(2000)]


@given(st.floats(0, 1), st.integers(0, 2000), st.integers(1, 5))
def test_a_clip_stays_on_its_side_when_others_are_added(share, count, shapes):
    def sides(number: int):
        buckets = {f"{shape}": list(range(shape, number, shapes)) for shape in range(shapes)}
        return split(buckets, IDS, share)

    (few_train, few_held), (train, held) = sides(count), sides(2000)
    for few, all_ in ((few_train, train), (few_held, held)):
        for shape, rows in few.items():
            assert rows and set(rows) <= set(all_[shape])
    rows = sorted(row for side in (train, held) for bucket in side.values() for row in bucket)
    assert rows == list(range(2000))


def test_about_the_share_is_held_out():
    for share in (0.05, 0.1, 0.5):
        _, held_out = split({"a": range(2000)}, IDS, share)
        assert len(held_out["a"]) == pytest.approx(2000 * share, abs=60)
    assert 0 <= min(map(hash_of, IDS)) < 0.01 and 0.99 < max(map(hash_of, IDS)) < 1


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    write_synthetic(folder / "long", {"64x64x13": 3, "64x64x7": 2})
    write_synthetic(folder / "wide", {"128x64x13": 2})
    return folder


def opened(folder) -> Latents:
    return Latents(Table.open(folder, "rows"))


def test_another_table_is_measured_and_all_of_the_first_one_trains(tables):
    latents = opened(tables / "long")
    divided = split_clips(Validation(latents=tables / "wide"), latents, opened)
    assert divided.training == latents.buckets and divided.held_out == {"128x64x13": [0, 1]}
    assert divided.measured.table.folder == tables / "wide"
    for validation in (None, Validation()):
        divided = split_clips(validation, latents, opened)
        assert (divided.training, divided.measured, divided.held_out) == (latents.buckets, latents, {})


def test_clips_that_would_train_as_well_are_refused(tables):
    latents = opened(tables / "long")
    with pytest.raises(TableError, match=r"5 of the 5 clips of .*long are in .*long too, so they would train"):
        split_clips(Validation(latents=tables / "long"), latents, opened)


def test_a_share_that_leaves_one_side_empty_is_refused(tables):
    latents = opened(tables / "wide")
    with pytest.raises(TableError, match=r"held_out is 1e-06, and none of the 2 clips of .*wide are held out"):
        split_clips(Validation(held_out=1e-6), latents, opened)
    every = Validation.model_construct(held_out=1.0, latents=None)
    with pytest.raises(TableError, match="all of the 2 clips"):
        split_clips(every, latents, opened)


WRONG = {
    "a share and a table": ({"held_out": 0.1, "latents": "x"}, "held_out is 0.1 and latents is "),
    "nothing to measure": ({"every": 5}, "every is 5, and no clips are held out"),
    "the best of nothing": ({"held_out": 0.1, "keep_best": "mean"}, "nothing is measured; set every"),
    "patience for nothing": ({"held_out": 0.1, "every": 5, "patience": 2}, "set keep_best to the loss that has to"),
    "another pattern": (
        {"held_out": 0.1, "every": 5, "patterns": ["keyframes"], "keep_best": "extension"},
        "keep_best is extension; patterns has only keyframes",
    ),
    "a level twice": ({"levels": [0.1, 0.1]}, "each may be there only once"),
    "level 0": ({"levels": [0.0]}, "greater than 0"),
    "more than half": ({"held_out": 0.6}, "less than or equal to 0.5"),
    "no pattern of that name": ({"patterns": ["loop"]}, "loop"),
    "steps that never meet": (
        {"held_out": 0.1, "every": 30, "keep_best": "mean"},
        "with checkpoint_every 100 and validation.every 30 the first is that of step 300, and steps is 200",
    ),
    "a level that is not trained": (
        {"held_out": 0.1, "every": 50, "levels": [0.3, 0.9]},
        "validation.levels 0.3 lie outside of level_range, [0.5, 1]",
    ),
}


@pytest.mark.parametrize("validation, words", WRONG.values(), ids=WRONG)
def test_settings_without_sense_are_refused(validation, words):
    settings = {"base": {"weights": "builtin:tiny"}, "steps": 200, "level_range": [0.5, 1]}
    with pytest.raises(ValidationError) as error:
        FinetuneManifest.model_validate({**settings, "validation": validation})
    assert words in str(error.value)


def test_the_default_levels_are_those_that_are_trained():
    assert Validation().levels_within(0.875, 1) == (0.9,)
    assert Validation().levels_within(0, 1) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    with pytest.raises(ValueError, match="outside of level_range"):
        Validation().levels_within(0.91, 0.99)
