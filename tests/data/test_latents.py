"""Latents tables are read as tensors, in any order, and in batches that are read ahead."""

import pytest
import torch

from pusa.data.latents import Latents
from pusa.data.loader import load
from pusa.data.order import Order
from pusa.data.reader import Table
from pusa.errors import TableError
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
        features, mask = latents.text(indices)
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
    features, mask = Latents(table).text([blank])
    assert features.any() and not mask.any()


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
