"""The order of rows: every row once an epoch, one shape a batch, a function of the step alone."""

import pytest

from pusa.data.order import Order

TABLES = [
    {"a": range(12)},
    {"a": range(7), "b": range(7, 30), "c": [30]},
    {"a": [0, 1, 2], "b": [3, 4]},  # fewer rows than a batch has
]


@pytest.mark.parametrize("buckets", TABLES)
@pytest.mark.parametrize("batch", [1, 4, 6])
def test_a_batch_has_one_shape_and_each_row_comes_once_an_epoch(buckets, batch):
    order = Order(buckets, batch, seed=0)
    seen = {name: [] for name in buckets}
    for step in range(200):
        rows = order.rows(step)
        (name,) = {name for name, some in buckets.items() for row in rows if row in some}
        assert len(rows) == batch
        seen[name] += rows
    for name, rows in seen.items():
        whole = len(rows) // len(buckets[name])
        epochs = [rows[i * len(buckets[name]) :][: len(buckets[name])] for i in range(whole)]
        assert all(sorted(epoch) == list(buckets[name]) for epoch in epochs)


@pytest.mark.parametrize("buckets", TABLES)
def test_shapes_take_turns_in_proportion_to_their_rows(buckets):
    order = Order(buckets, 4, seed=1)
    total = sum(map(len, buckets.values()))
    shown = dict.fromkeys(range(total), 0)
    for step in range(50 * total):
        for row in order.rows(step):
            shown[row] += 1
    assert all(abs(count - 200) <= 4 for count in shown.values()), shown


def test_it_is_shuffled_otherwise_in_each_epoch_and_by_each_seed():
    epochs = [tuple(Order({"a": range(50)}, 50, seed).rows(step)) for seed in (0, 1) for step in (0, 1)]
    assert len(set(epochs)) == 4 and all(sorted(epoch) == list(range(50)) for epoch in epochs)


def test_the_same_in_any_order_of_asking():
    buckets = TABLES[1]
    first = [Order(buckets, 4, 3).rows(step) for step in range(40)]
    again = Order(buckets, 4, 3)
    assert [again.rows(step) for step in reversed(range(40))] == first[::-1]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_a_batch(ranks):
    order = Order(TABLES[1], 6, seed=0)
    for step in range(10):
        shares = [order.share(step, rank, ranks) for rank in range(ranks)]
        assert [row for share in shares for row in share] == order.rows(step)
