"""JSON files of ours as strangers leave them: any value, at any place of what we wrote, is refused or set aside."""

import json
import os
from contextlib import suppress

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from pusa.errors import PusaError
from pusa.finetune.checkpoint import Checkpoints
from pusa.finetune.metrics import MetricsWriter, read_columns, read_losses, read_metrics
from pusa.finetune.parallel import process_group
from pusa.finetune.recipe import recorded_recipe, require_same
from pusa.manifest.training import Parallel
from pusa.system.files import read_json, read_object, require_own, sha256_file, write_json
from pusa.system.locks import holder_of, join_work, open_lock, sole_writer
from pusa.weights.tensors import read_sharded
from tests.fuzz import examples

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
NAMES = st.sampled_from(["step", "files", "recipe", "skipped", "holder", "made_from", "weight_map"]) | st.text(
    max_size=8
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4))
# JSON, near JSON, and bytes.
TEXTS = st.one_of(VALUES.map(lambda value: json.dumps(value).encode()), st.binary(max_size=60))
RECORD = {
    "step": 4,
    "recipe": {"seed": 0, "train": {"method": "full"}},
    "overrides": [{"step": 2, "key": "learning_rate", "from": 1, "to": 2}],
    "skipped": 0,
    "files": {"state/a": [1, "0"]},
}


def places(value, path=()):
    """Return the place of each value inside a JSON value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


def replaced(value, path, other):
    """Return a JSON value with another value at a place."""
    if not path:
        return other
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], other)
    return copy


@pytest.fixture(scope="module")
def world():
    with process_group(Parallel()) as world:
        yield world


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=examples(40))
@given(st.sampled_from(list(places(RECORD))), VALUES)
@example(("recipe",), {"decay": "cosine", "lr_schedule": "cosine"})
def test_a_checkpoint_resumes_or_is_set_aside(folder, world, place, value):
    path = folder / "checkpoints/00000004"
    (path / "state").mkdir(parents=True, exist_ok=True)
    (path / "state/a").write_text("a")
    record = {**RECORD, "files": {"state/a": [1, sha256_file(path / "state/a")]}}
    write_json(path / "checkpoint.json", replaced(record, place, value))
    found = Checkpoints(path.parent, world, 2).last()
    assert path.exists() == (found is not None)
    if found:
        assert found.step == found.record["step"] == 4 and type(found.record["skipped"]) is int
        with suppress(PusaError):
            require_same(recorded_recipe(found.record), RECORD["recipe"], (), path, folder)


@settings(max_examples=examples(40))
@given(st.lists(TEXTS, max_size=6))
@example([b"[" * 100_000])
def test_metrics_are_rows_whatever_the_file_holds(folder, lines):
    path = folder / "metrics.jsonl"
    path.write_bytes(b"\n".join(lines))
    list(read_losses(path)), read_columns(path, ("step", "loss"))
    with MetricsWriter(folder, 0):
        pass
    assert not [row for row in read_metrics(path) if row["step"] > 0]


@settings(max_examples=examples(40))
@given(TEXTS)
@example(b'{"made_from": "a"}')
@example(b'{"holder": {"process": 1, "host": "\\ud800", "since": "\\u001b[2J"}}')
@example(b"1" * 5000)
def test_no_content_of_a_lock_keeps_us_out(folder, content):
    place = folder / "locked"
    place.mkdir(exist_ok=True)
    (place / ".lock").write_bytes(content)
    with open_lock(place / ".lock") as lock:
        assert "\x1b" not in holder_of(lock)
    with join_work(place, lambda: None, {"made_from": "a"}) as group:
        assert group.plan == {"made_from": "a"}
    (place / ".lock").write_bytes(content)
    with sole_writer(place):
        pass


@settings(max_examples=examples(40))
@given(TEXTS)
def test_a_json_file_is_a_value_or_none_and_an_object_or_empty(folder, content):
    path = folder / "a.json"
    path.write_bytes(content)
    value = read_json(path)
    assert read_object(path) == (value if isinstance(value, dict) else {})


@settings(max_examples=examples(40))
@given(TEXTS)
def test_an_index_of_shards_is_read_or_refused(folder, content):
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "a.safetensors.index.json").write_bytes(content)
    with pytest.raises(PusaError):  # its files do not exist
        read_sharded(model)


@settings(max_examples=examples(40))
@given(st.text(min_size=1, max_size=20))
@example("\udcff")
@example("\x1b[2J")
def test_a_folder_with_any_file_is_named_or_ours(tmp_path_factory, name):
    assume(name not in (".", "..") and not set(name) & {"/", "\0"} and all(not "\ud800" <= c < "\udc80" for c in name))
    folder = tmp_path_factory.mktemp("somebody")
    try:
        (folder / name).touch()
    except UnicodeEncodeError:
        assume(False)
    before = os.listdir(folder)
    try:
        require_own(folder)
    except PusaError as error:
        assert "\x1b" not in str(error) and str(error).isprintable()
    assert os.listdir(folder) == before
