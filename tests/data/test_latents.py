"""A latents table as tensors, and its batches read ahead."""

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
    """A table of two shapes, and what is in it."""
    folder = tmp_path_factory.mktemp("latents")
    rows = write_synthetic(folder, {"16x16x7": 7, "32x16x13": 5}, request.param)
    return Table.open(folder), rows


def test_any_rows_in_any_order(made):
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


def test_one_batch_has_one_shape(made):
    with pytest.raises(TableError, match=r"rows \[0, 11\] mix the shapes"):
        Latents(made[0]).posterior([0, 11])


def test_the_null_prompt_has_features_and_no_valid_token(made):
    table, rows = made
    blank = next(i for i, row in enumerate(rows) if row.tokens == 0)
    features, mask = Latents(table).text([blank])
    assert features.any() and not mask.any()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_orders_and_go_on_from_any_step(made, workers):
    latents = Latents(made[0])
    order = Order(latents.buckets, 4, seed=0)
    read = [rows for rows in load(latents, order, range(5, 12), workers=workers)]
    assert [rows.indices for rows in read] == [order.rows(step) for step in range(5, 12)]
    assert all(torch.equal(rows.mean, latents.posterior(rows.indices)[0]) for rows in read)


def test_ranks_read_their_shares(made):
    latents = Latents(made[0])
    order = Order(latents.buckets, 4, seed=0)
    shares = [[rows.indices for rows in load(latents, order, range(6), rank, 2)] for rank in (0, 1)]
    assert [a + b for a, b in zip(*shares, strict=True)] == [order.rows(step) for step in range(6)]


def test_a_shard_that_is_gone_is_named(made, tmp_path):
    write_synthetic(tmp_path, {"16x16x7": 3})
    latents = Latents(Table.open(tmp_path))
    next(tmp_path.glob("latents-*.parquet")).unlink()
    with pytest.raises(TableError, match=r"latents-.*\.parquet cannot be read"):
        latents.posterior([0])
