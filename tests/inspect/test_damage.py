"""A damaged table gives a `TableError` in one sentence, and never any other error."""

import json
import random
import shutil

import pytest

from pusa.errors import TableError
from pusa.inspect.inspection import inspect
from tests.helpers.indexes import edit_index


@pytest.fixture(params=["clips", "latents"])
def table(request, run, tmp_path):
    """A copy of a table that a test may damage."""
    return shutil.copytree(run / request.param, tmp_path / request.param)


def change(table, edit):
    edit_index(table, edit)


def inspect_fully(table, page=True):
    """Inspect a table in every way; return the message of its `TableError`, or an empty text."""
    try:
        inspection = inspect(table)
        json.dumps(inspection.json(), allow_nan=False)
        inspection.text()
        if page:
            inspection.write(table.parent / "page.html", 1)
    except TableError as error:
        assert str(table) in str(error)
        return str(error)
    return ""


@pytest.mark.parametrize("text", ["[]", "{}", "1", "null", "torn", '{"version": 1}'])
def test_an_invalid_index_is_refused(table, text):
    (table / "index.json").write_text(text)
    assert inspect_fully(table)


def test_missing_parts_and_facts_are_reported(table):
    whole = json.loads((table / "index.json").read_text())
    needed = {"sources", "sources_with_clips"} if table.name == "clips" else {"text_tokens", "text_width"}
    for part in whole["parts"]:
        (table / "index.json").write_text(json.dumps(whole))
        change(table, lambda index, part=part: index["parts"].pop(part))
        assert inspect_fully(table), part
    for fact in whole["facts"]:
        (table / "index.json").write_text(json.dumps(whole))
        change(table, lambda index, fact=fact: index["facts"].pop(fact))
        assert (fact in inspect_fully(table)) == (fact in needed), fact


def test_facts_of_another_type_give_no_other_error(table):
    whole = json.loads((table / "index.json").read_text())
    for fact in whole["facts"]:
        for value in ([], {}, "x", None, -1, 10**12, 10**30, float("nan")):
            (table / "index.json").write_text(json.dumps(whole))
            change(table, lambda index, fact=fact, value=value: index["facts"].update({fact: value}))
            inspect_fully(table, page=False)


def test_a_number_that_json_cannot_represent_is_none(run, tmp_path):
    table = shutil.copytree(run / "clips", tmp_path / "clips")
    change(table, lambda index: index["facts"]["rule"].update(fps=float("inf")))
    assert inspect(table).json()["rule"]["fps"] is None


def test_exchanged_shards_are_reported(table):
    paths = {path.name: path.read_bytes() for path in table.glob("*.parquet")}
    for name in paths:
        for other in paths.keys() - {name}:
            (table / name).write_bytes(paths[other])
            assert inspect_fully(table) or len(paths[other]) == len(paths[name]), (name, other)
        (table / name).write_bytes(paths[name])


def test_flipped_bytes_are_reported_or_do_no_harm(table):
    dice, reported = random.Random(0), 0
    paths = sorted(table.glob("*.parquet"))
    for _ in range(40):
        path = dice.choice(paths)
        whole = path.read_bytes()
        data = bytearray(whole)
        for _ in range(dice.choice([1, 4, 40])):
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        path.write_bytes(data[: dice.choice([len(data), dice.randrange(len(data))])])
        reported += bool(inspect_fully(table))
        path.write_bytes(whole)
    assert reported > 10
