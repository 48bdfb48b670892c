"""Latents tables are read as tensors, in any order, and in batches that are read ahead."""

import json
import os
import shutil

import pytest
import torch

import pusa.data.latents as module
from pusa.data.latents import Latents
from pusa.data.loader import load
from pusa.data.order import Order
from pusa.data.reader import Table
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
