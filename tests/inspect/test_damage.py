import json
import random
import shutil

import pytest

from pusa.errors import TableError
from pusa.inspect.inspection import inspect


@pytest.fixture(params=["clips", "latents"])
def table(request, run, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(run / request.param, tmp_path / request.param)


def change(table, edit):
    index = json.loads((table / "index.json").read_text())
    edit(index)
    (table / "index.json").write_text(json.dumps(index))


def look(table, page=True):
    """All that can be made of a table; a `TableError` in one sentence is the only error there may be."""
    try:
        found = inspect(table)
        json.dumps(found.json(), allow_nan=False)
        found.text()
        if page:
            found.write(table.parent / "page.html", 1)
    except TableError as error:
        assert str(table) in str(error)
        return str(error)
    return ""


@pytest.mark.parametrize("text", ["[]", "{}", "1", "null", "torn", '{"version": 1}'])
def test_an_index_that_is_none_is_told(table, text):
    (table / "index.json").write_text(text)
    assert look(table)


def test_whatever_an_index_lacks_is_told(table):
    whole = json.loads((table / "index.json").read_text())
    needed = {"sources", "sources_with_clips"} if table.name == "clips" else {"text_tokens", "text_width"}
    for part in whole["parts"]:
        (table / "index.json").write_text(json.dumps(whole))
        change(table, lambda index, part=part: index["parts"].pop(part))
        assert look(table), part
    for fact in whole["facts"]:
        (table / "index.json").write_text(json.dumps(whole))
        change(table, lambda index, fact=fact: index["facts"].pop(fact))
        assert (fact in look(table)) == (fact in needed), fact


def test_facts_of_another_kind_are_told(table):
    whole = json.loads((table / "index.json").read_text())
    for fact in whole["facts"]:
        for value in ([], {}, "x", None, -1, float("nan")):
            (table / "index.json").write_text(json.dumps(whole))
            change(table, lambda index, fact=fact, value=value: index["facts"].update({fact: value}))
            look(table, page=False)


def test_a_number_that_json_has_no_word_for_is_none(run, tmp_path):
    table = shutil.copytree(run / "clips", tmp_path / "clips")
    change(table, lambda index: index["facts"]["rule"].update(fps=float("inf")))
    assert inspect(table).json()["rule"]["fps"] is None


def test_shards_in_each_others_place_are_told(table):
    paths = {path.name: path.read_bytes() for path in table.glob("*.parquet")}
    for name in paths:
        for other in paths.keys() - {name}:
            (table / name).write_bytes(paths[other])
            assert look(table) or len(paths[other]) == len(paths[name]), (name, other)
        (table / name).write_bytes(paths[name])


def test_flipped_bytes_are_told_or_do_no_harm(table):
    chance, told = random.Random(0), 0
    paths = sorted(table.glob("*.parquet"))
    for _ in range(40):
        path = chance.choice(paths)
        whole = path.read_bytes()
        data = bytearray(whole)
        for _ in range(chance.choice([1, 4, 40])):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data[: chance.choice([len(data), chance.randrange(len(data))])])
        told += bool(look(table))
        path.write_bytes(whole)
    assert told > 10
