"""Of a damaged table what can be read is shown, and the rest named: in sentences, and never by another error."""

import json
import random
import shutil

import pytest

from pusa.errors import PartlyFailed, TableError
from pusa.inspect.inspection import inspect
from tests.helpers.indexes import edit_index


@pytest.fixture(params=["clips", "latents"])
def table(request, run, tmp_path):
    """A copy of a table that a test may damage."""
    return shutil.copytree(run / request.param, tmp_path / request.param)


def change(table, edit):
    edit_index(table, edit)


def inspect_fully(table, page=True):
    """Inspect a table in every way; return what it says of the damage, or an empty text."""
    try:
        inspection = inspect(table)
        json.dumps(inspection.json(), allow_nan=False)
        inspection.text()
        if page:
            inspection.write(table.parent / "page.html", 1)
    except TableError as error:
        assert str(table) in str(error)
        return str(error)
    assert all(str(table) in reason for reason in inspection.unreadable)
    return "; ".join(inspection.unreadable)


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


@pytest.mark.parametrize("part", ["clips", "rows", "rejects", "texts", "latents"])
def test_of_a_table_with_damaged_shards_the_others_are_shown(run, tmp_path, part):
    table = shutil.copytree(run / ("clips" if part == "clips" else "latents"), tmp_path / "table")
    whole = inspect(table)
    (path,) = table.glob(f"{part}-*.parquet")
    path.write_bytes(path.read_bytes()[:-10])
    inspection = inspect(table)
    (reason,) = inspection.unreadable
    assert str(path) in reason and inspection.json()["unreadable"] == [reason] and whole.json()["unreadable"] == []
    others = (
        ("rejects", "hours", "captions")
        if part == "latents"
        else ("rejects",)
        if part in ("clips", "rows")
        else ("hours",)
    )
    assert all(inspection.json().get(name) == whole.json().get(name) for name in others)
    inspection.write(tmp_path / "page.html", 3)
    assert path.name in (tmp_path / "page.html").read_text()
    with pytest.raises(PartlyFailed, match=path.name):
        inspection.require_readable()


def test_rows_that_cannot_be_decoded_are_named(run, tmp_path):
    table = shutil.copytree(run / "latents", tmp_path / "latents")
    (path,) = table.glob("latents-*.parquet")
    data = bytearray(path.read_bytes())
    data[40] ^= 1  # in the row group of all three rows, of which decoding is the only reader
    path.write_bytes(data)
    inspection = inspect(table, decode=9)
    assert [(row.is_unreadable, path.name in row.note) for row in inspection.decoded] == [(True, True)] * 3
    assert inspection.json()["rows"] == 3 and inspection.text().count(path.name) == 3
    with pytest.raises(PartlyFailed, match=path.name):
        inspection.require_readable()


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
