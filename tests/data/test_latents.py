"""Latents tables are read as tensors, in any order, and in batches that are read ahead."""

import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import pusa.data.latents as module
from pusa.data.latents import Latents
from pusa.data.loader import load
from pusa.data.order import Order
from pusa.data.reader import Table
from pusa.data.schema import TEXTS
from pusa.data.writer import write_hashed_shard, write_index
from pusa.errors import TableError
from tests.helpers.indexes import edit_index
from tests.helpers.synthetic_tables import write_synthetic


@pytest.fixture(scope="module", params=["none", "zstd"])
def made(request, tmp_path_factory):
    """A table of two shapes, and the content of its rows."""
    folder = tmp_path_factory.mktemp("latents")
    rows = write_synthetic(folder, {"16x16x7": 7, "32x16x13": 5}, request.param)
    return Table.open(folder), rows


def test_any_rows_are_read_in_any_order(made):
    table, rows = made
    latents = Latents(table)
    assert len(latents) == 12 and latents.buckets == {"16x16x7": list(range(7)), "32x16x13": list(range(7, 12))}
    for indices in ([6, 0, 3], [11, 7], [2]):
        mean, logvar = latents.posterior(indices)
        assert torch.equal(mean, torch.stack([rows[i].mean.float() for i in indices]))
        assert torch.equal(logvar, torch.stack([rows[i].logvar.float() for i in indices]))
        text = latents.text(indices)
        features, mask = text.features, text.mask
        assert mask.sum(1).tolist() == [rows[i].tokens for i in indices]
        for i, index in enumerate(indices):
            kept = rows[index].features
            assert torch.equal(features[i, : len(kept)], kept.float()) and not features[i, len(kept) :].any()
    assert latents.clip_ids([11, 0]) == ["clip 11", "clip 0"]


def test_a_batch_of_several_shapes_is_refused(made):
    with pytest.raises(TableError, match=r"rows \[0, 11\] mix the shapes"):
        Latents(made[0]).posterior([0, 11])


def test_the_empty_prompt_has_features_but_no_valid_token(made):
    table, rows = made
    blank = next(i for i, row in enumerate(rows) if row.tokens == 0)
    text = Latents(table).text([blank])
    assert text.features.any() and not text.mask.any()


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_pooled_text_features_and_those_of_the_empty_prompt_are_read(tmp_path, compression):
    rows = write_synthetic(tmp_path, {"16x16x7": 7}, compression, pooled_width=5)
    latents = Latents(Table.open(tmp_path))
    text, null = latents.text([6, 0, 3]), latents.null_text()
    assert torch.equal(text.pooled, torch.stack([rows[i].pooled.float() for i in (6, 0, 3)]))
    blank = next(i for i, row in enumerate(rows) if row.tokens == 0)
    assert all(map(torch.equal, vars(null).values(), vars(latents.text([blank])).values()))
    (batch,) = load(latents, Order(latents.buckets, 7, seed=0), range(1), workers=1)
    assert torch.equal(batch.text.pooled, latents.text(batch.indices).pooled)


def test_texts_of_earlier_versions_have_no_column_for_pooled_features(tmp_path):
    earlier = pa.schema([field for field in TEXTS if field.name != "pooled"])
    rows, now = (write_synthetic(tmp_path / n, {"16x16x7": 4}, texts=s) for n, s in (("a", earlier), ("b", TEXTS)))
    (shard,) = (tmp_path / "a").glob("texts-*.parquet")
    assert "pooled" not in pq.read_schema(shard).names
    table = Table.open(tmp_path / "a")
    latents = Latents(table)
    text = latents.text(range(4))
    assert text.pooled is latents.null_text().pooled is None
    assert torch.equal(text.features, Latents(Table.open(tmp_path / "b")).text(range(4)).features)
    assert [row.tokens for row in rows] == [row.tokens for row in now] == text.mask.sum(1).tolist()
    assert table.read("texts")["pooled"].null_count == table.rows("texts")
    assert table.read("rows").drop_columns(["texts_shard"]) == Table.open(tmp_path / "b").read("rows").drop_columns(
        ["texts_shard"]
    )
    # One table may have shards of both kinds.
    parts = {"texts": [*table.parts["texts"], *Table.open(tmp_path / "b").parts["texts"]]}
    shutil.copy(next((tmp_path / "b").glob("texts-*.parquet")), tmp_path / "a")
    assert Table(tmp_path / "a", parts, {}).read("texts")["pooled"].null_count == 2 * table.rows("texts")


@pytest.mark.parametrize(
    "width, facts, problem",
    [
        (5, {"pooled_width": 4}, "has 5 pooled text features; the index says 4"),
        (5, {"pooled_width": None}, "has 5 pooled text features; the index says none"),
        (0, {"pooled_width": 5}, "has no pooled text features; the index says 5"),
        (5, {"pooled_width": 0}, "invalid facts in its index: pooled text features of width 0"),
        (5, {"pooled_width": 2**40}, "invalid facts in its index: pooled text features of width 1099511627776"),
        (5, {"pooled_width": "x"}, "invalid facts in its index"),
        (5, {"null_key": "0" * 32}, "no features of the empty prompt"),
    ],
)
def test_pooled_features_that_are_not_those_of_the_index_are_refused(tmp_path, width, facts, problem):
    write_synthetic(tmp_path, {"16x16x7": 3}, pooled_width=width)
    edit_index(tmp_path, lambda index: index["facts"].update(facts))
    with pytest.raises(TableError, match=problem):
        latents = Latents(Table.open(tmp_path))
        if "null_key" not in facts:
            latents.text([0])
        latents.null_text()


@pytest.mark.parametrize(
    "pooled, problem",
    [
        ([None, b"\0\0" * 5], "has no pooled text features; the index says 5"),
        ([b"\0\0" * 5, b"\0\0" * 4], "has 4 pooled text features; the index says 5"),
        ([b"\0\0" * 5, b"\0\0\0"], "has 1.5 pooled text features; the index says 5"),
        ([b"\0\0" * 5, b""], "has no pooled text features; the index says 5"),
        ([b"\0\0" * 5, b"\xff" * 10], "the pooled text features of 'clip 2' are not finite"),
    ],
)
def test_pooled_features_of_single_rows_are_checked(tmp_path, pooled, problem):
    """The null prompt, whose pooled features the index describes, stays right."""
    write_synthetic(tmp_path, {"16x16x7": 3}, pooled_width=5)
    table = Table.open(tmp_path)
    keys = table.read("rows", ["text_key"])["text_key"].to_pylist()
    (old,) = tmp_path.glob("texts-*.parquet")
    rows = pq.read_table(old).to_pylist()
    for row in rows:
        if row["text_key"] in keys[1:]:
            row["pooled"] = pooled[keys.index(row["text_key"]) - 1]
    old.unlink()
    encoding = {"encoding": "planes", "compression": "zstd", "dtype": "bfloat16"}
    new = write_hashed_shard(tmp_path, old.name[: len("texts-") + 12], rows, TEXTS, "zstd", encoding)
    write_index(
        tmp_path,
        {
            part: [tmp_path / entry["name"] if part != "texts" else new for entry in entries]
            for part, entries in table.parts.items()
        },
        table.facts,
        hashed=("latents", "texts"),
    )
    latents = Latents(Table.open(tmp_path))
    assert latents.null_text().pooled.shape == (1, 5)
    with pytest.raises(TableError, match=problem):
        latents.text([0, 1, 2])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_follow_the_order_from_any_step(made, workers):
    latents = Latents(made[0])
    order = Order(latents.buckets, 4, seed=0)
    batches = [rows for rows in load(latents, order, range(5, 12), workers=workers)]
    assert [rows.indices for rows in batches] == [order.rows(step) for step in range(5, 12)]
    assert all(torch.equal(rows.mean, latents.posterior(rows.indices)[0]) for rows in batches)


def test_ranks_read_their_shares(made):
    latents = Latents(made[0])
    order = Order(latents.buckets, 4, seed=0)
    shares = [[rows.indices for rows in load(latents, order, range(6), rank, 2)] for rank in (0, 1)]
    assert [a + b for a, b in zip(*shares, strict=True)] == [order.rows(step) for step in range(6)]


def test_the_error_of_a_missing_shard_names_it(made, tmp_path):
    write_synthetic(tmp_path, {"16x16x7": 3})
    latents = Latents(Table.open(tmp_path))
    next(tmp_path.glob("latents-*.parquet")).unlink()
    with pytest.raises(TableError, match=r"latents-.*\.parquet cannot be read"):
        latents.posterior([0])


def test_values_that_are_not_finite_are_refused_with_the_name_of_their_clip(tmp_path, monkeypatch):
    write_synthetic(tmp_path, {"16x16x7": 3})
    latents, unpack = Latents(Table.open(tmp_path)), module.unpack
    for spoilt, what in ((2, "latents of 'clip 1'"), (2, "text features of 'clip 2'")):
        calls = iter(range(100))

        def spoil(*arguments, spoilt=spoilt, calls=calls):
            tensor = unpack(*arguments)
            return tensor * float("nan") if next(calls) == spoilt else tensor

        monkeypatch.setattr(module, "unpack", spoil)
        read = latents.posterior if "latents" in what else latents.text
        with pytest.raises(TableError, match=f"the {what} are not finite"):
            read([0, 1, 2])


@pytest.mark.parametrize("how", ["replaced", "written over", "removed"])
def test_a_shard_that_is_changed_while_a_training_reads_it_is_noticed(made, tmp_path, how):
    """A mapped file shows what is written over it, and a removed or replaced one is of another table."""
    shutil.copytree(made[0].folder, tmp_path / "table")
    latents = Latents(Table.open(tmp_path / "table"))
    latents.posterior([0])
    path = tmp_path / "table" / latents.table.parts["latents"][0]["name"]
    data = path.read_bytes()
    if how == "written over":
        path.write_bytes(bytes(len(data)))
    else:
        path.unlink()
    if how == "replaced":
        path.write_bytes(data)
    with pytest.raises(TableError, match=r"latents-.*\.parquet (was changed|cannot be read)"):
        latents.posterior([0])


def test_an_index_that_another_run_wrote_does_not_change_a_table_that_is_open(made, tmp_path):
    shutil.copytree(made[0].folder, tmp_path / "table")
    latents = Latents(Table.open(tmp_path / "table"))
    write_synthetic(tmp_path / "table", {"16x16x7": 1, "32x16x13": 5})
    for row, expected in enumerate(made[1]):
        assert torch.equal(latents.posterior([row])[0][0], expected.mean.float())


@pytest.mark.parametrize("fact, value", [("statistics", [[0.5] * 4, [1.0] * 4]), ("text_tokens", 17)])
def test_an_index_with_another_digit_is_refused(tmp_path, fact, value):
    """Training normalises latents by its numbers."""
    write_synthetic(tmp_path, {"16x16x7": 3})
    index = json.loads((tmp_path / "index.json").read_text())
    index["facts"][fact] = value
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(TableError, match=r"index\.json is damaged: its SHA-256"):
        Table.open(tmp_path)


def test_tables_of_earlier_versions_have_fewer_hashes_and_are_read(tmp_path):
    rows = write_synthetic(tmp_path, {"16x16x7": 3})
    index = json.loads((tmp_path / "index.json").read_text())
    del index["sha256"]
    for shard in (shard for shards in index["parts"].values() for shard in shards):
        del shard["footer"]
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert torch.equal(Latents(Table.open(tmp_path)).posterior([2])[0][0], rows[2].mean.float())


@pytest.mark.parametrize(
    "statistics", [[[0.0] * 4, [0.0] * 4], [[float("nan")] * 4, [1.0] * 4], [[0.0] * 3, [1.0] * 3]]
)
def test_statistics_that_latents_cannot_have_are_refused(tmp_path, statistics):
    write_synthetic(tmp_path, {"16x16x7": 3})
    edit_index(tmp_path, lambda index: index["facts"].update(statistics=statistics))
    with pytest.raises(TableError, match=r"statistics"):
        Latents(Table.open(tmp_path)).posterior([0])


def test_a_named_pipe_in_place_of_a_shard_is_no_file(tmp_path):
    write_synthetic(tmp_path, {"16x16x7": 3})
    for part in ("rows", "latents"):
        path = next(tmp_path.glob(f"{part}-*.parquet"))
        path.unlink()
        os.mkfifo(path)
    with pytest.raises(TableError, match=r"rows-.*cannot be read: it is not a file"):
        Latents(Table.open(tmp_path))
