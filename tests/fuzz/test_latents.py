"""Tables of hostile content: only a `TableError` comes out, and never a value that nobody wrote."""

import json
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pusa.data.latents import Latents
from pusa.data.reader import Table
from pusa.data.schema import PARTS
from pusa.data.writer import write_hashed_shard
from pusa.errors import TableError
from tests.fuzz import examples
from tests.helpers.indexes import list_again
from tests.helpers.synthetic_tables import write_synthetic

BUCKETS = {"16x16x7": 4, "32x16x13": 2}
numbers = st.integers() | st.floats() | st.sampled_from([2**31, 2**63, -1, 10**400, 1e308])
scalars = st.none() | st.booleans() | numbers | st.text(max_size=8) | st.sampled_from(["rows", "vae", "../x.parquet"])
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
columns = st.sampled_from(
    [
        pa.array([1, 2, 3, 4, 5, 6]),
        pa.array([0, -1, 2**31 - 1, 0, 0, 0], pa.int32()),
        pa.array([None] * 6, pa.int32()),
        pa.array(["x"] * 6),
        pa.array([b"\xff\xfe"] * 6),
        pa.array([b"\xff\xfe"] * 6).cast(pa.string(), safe=False),
        pa.array([[]] * 6, pa.list_(pa.int32())),
        pa.array([[4, -2, 2, 2], [2**31 - 1] * 4, [0], [4, 2, 2, 2], [1] * 9, [4, 2, 2, None]], pa.list_(pa.int32())),
        pa.array([b"1"] * 6, pa.binary(1)),
        pa.array(["raw", "planes", "zstd", "", "bfloat16", "float64"]),
        pa.array(["x"] * 6).dictionary_encode(),
        pa.array([{"a": 1}] * 6),
        pa.array([float("nan")] * 6),
    ]
)


@pytest.fixture(scope="module", params=["none", "zstd"])
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return folder, write_synthetic(folder, BUCKETS, request.param)


@pytest.fixture(scope="module")
def copy(made, tmp_path_factory):
    """Return a function that gives a fresh copy of the table."""
    folder = tmp_path_factory.mktemp("copies") / "latents"

    def fresh() -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(made[0], folder))

    return fresh


def read_all(folder: Path, rows=None) -> bool:
    """Read all there is; return whether it can be read. What is read must be what was written, where that is given."""
    try:
        table = Table.open(folder, "rows")
        for part in table.parts:
            table.rows(part)
            if part != "latents":
                table.read(part)
        table.is_intact()
        latents = Latents(table)
        for bucket in latents.buckets.values():
            for row in bucket:
                mean, logvar = latents.posterior([row])
                text = latents.text([row])
                if rows is not None:
                    assert torch.equal(mean[0], rows[row].mean.float())
                    assert torch.equal(logvar[0], rows[row].logvar.float())
                    assert torch.equal(text.features[0, : len(rows[row].features)], rows[row].features.float())
                    assert int(text.mask.sum()) == rows[row].tokens
    except TableError as error:
        assert str(folder) in str(error) and len(str(error)) < 2000
        return False
    return True


def test_the_whole_table_can_be_read(made):
    assert read_all(*made)


@settings(deadline=None, max_examples=examples(25))
@given(st.integers(0, 2**32), st.sampled_from(["flip", "flip", "cut", "swap", "bytes"]))
def test_changed_bytes_give_the_written_values_or_an_error(made, copy, seed, how):
    dice, folder = random.Random(seed), copy()
    path = dice.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())
    place = dice.randrange(len(data))
    if dice.random() < 0.5:  # near the end, where a footer is
        place = max(0, len(data) - 1 - dice.randrange(2000))
    if how == "flip":
        data[place] ^= 1 << dice.randrange(8)
    elif how == "cut":
        del data[place:]
    elif how == "swap":
        data = bytearray(dice.choice([p for p in sorted(folder.iterdir()) if p != path]).read_bytes())
    else:
        data[place : place + 8] = dice.randbytes(8)
    path.write_bytes(data)
    read_all(folder, made[1])


@settings(deadline=None, max_examples=examples(40))
@given(st.sampled_from(["version", "parts", "facts", "sha256", "all", "entry", "fact"]), values, st.data())
def test_an_index_of_any_json_gives_only_table_errors(made, copy, key, value, data):
    folder = copy()
    index = json.loads((folder / "index.json").read_text())
    if key == "all":
        index = value
    elif key == "entry":
        entry = index["parts"]["latents"][0]
        entry[data.draw(st.sampled_from(sorted(entry)))] = value
    elif key == "fact":
        index["facts"][data.draw(st.sampled_from(sorted(index["facts"])))] = value
    else:
        index[key] = value
    if isinstance(index, dict) and key != "sha256":
        index.pop("sha256", None)  # as an index of an earlier version, which has no hash
    (folder / "index.json").write_text(json.dumps(index))
    read_all(folder)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000 + b"]" * 100_000,
        b'{"version": 3, "parts": {}, "facts": ' + b'{"a":' * 400 + b"1" + b"}" * 400 + b"}",
        b'{"version": ' + b"9" * 5000 + b"}",
        b'{"version": 1e999}',
        b"\xff\xfe\x00",
        b'{"version": 3, "parts": {"rows": null}, "facts": []}',
        b'{"version": "' + b"x" * 100_000 + b'"}',
        b"",
    ],
)
def test_an_index_of_another_shape_is_named_in_one_sentence(copy, text):
    folder = copy()
    (folder / "index.json").write_bytes(text)
    with pytest.raises(TableError, match=r"schema version|damaged") as error:
        Table.open(folder)
    assert len(str(error.value)) < 500


@settings(deadline=None, max_examples=examples(40))
@given(st.sampled_from(["rows", "texts", "latents"]), st.data(), columns)
def test_shards_with_other_columns_give_only_table_errors(made, copy, part, data, column):
    folder = copy()
    table = Table.open(folder)
    path = folder / table.parts[part][0]["name"]
    content = pq.ParquetFile(path).read()
    name = data.draw(st.sampled_from(content.schema.names))
    place = content.schema.names.index(name)
    how = data.draw(st.sampled_from(["replace", "cast", "drop", "twice", "fewer"]))
    column = column[: len(content)]
    if how == "replace" or (how == "cast" and part == "latents"):
        content = content.set_column(place, name, pa.chunked_array([column]))
    elif how == "cast":
        try:
            typed = pa.array(column.to_pylist(), PARTS[part].field(name).type)
        except (pa.ArrowException, ValueError, TypeError, OverflowError):
            return
        content = content.set_column(place, name, pa.chunked_array([typed]))
    elif how == "drop":
        content = content.drop_columns([name])
    elif how == "twice":
        content = content.append_column(name, column)
    else:
        content = content.slice(1)
    pq.write_table(content, path, compression=data.draw(st.sampled_from(["none", "zstd"])))
    list_again(table)
    read_all(folder)


@pytest.mark.parametrize("facts", [b"[]", b"[" * 100_000, b"\xff", b'{"encoding": 3}', b"{}"])
def test_facts_of_a_shard_that_are_no_object_are_named(copy, facts):
    folder = copy()
    table = Table.open(folder)
    path = folder / table.parts["latents"][0]["name"]
    content = pq.ParquetFile(path).read().replace_schema_metadata({"pusa": facts})
    pq.write_table(content, path)
    list_again(table)
    read_all(folder)


def test_rows_of_other_clips_are_noticed_by_their_keys(made, copy):
    folder = copy()
    table = Table.open(folder)
    entry = table.parts["latents"][0]
    content = pq.ParquetFile(folder / entry["name"]).read()
    rows = content.to_pylist()
    facts = {"encoding": rows[0]["encoding"]}
    path = write_hashed_shard(folder, "latents-other", rows[::-1], content.schema, table.facts["compression"], facts)
    list_again(table, latents=[path, *(folder / other["name"] for other in table.parts["latents"][1:])])
    with pytest.raises(TableError, match="does not hold the rows that"):
        Latents(Table.open(folder)).posterior([0])
