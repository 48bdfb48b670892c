"""The order of rows: every row once an epoch, one shape a batch, and a function of the step alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pusa.data.order import Order

TABLES = [
    {"a": range(12)},
    {"a": range(7), "b": range(7, 30), "c": [30]},
    {"a": [0, 1, 2], "b": [3, 4]},  # fewer rows than a batch has
]


@st.composite
def tables(draw):
    """Draw a table of up to four shapes with up to 40 rows each."""
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return {f"{i}": range(start, start + size) for i, (start, size) in enumerate(zip(starts, sizes, strict=True))}


batch_sizes, seeds, steps = st.integers(1, 12), st.integers(0, 2**31), st.integers(0, 10_000)


@given(tables(), batch_sizes, seeds)
def test_every_row_comes_once_an_epoch_and_a_batch_has_one_shape(buckets, batch_size, seed):
    order = Order(buckets, batch_size, seed)
    read = {name: [] for name in buckets}
    for step in range(3 * sum(map(len, buckets.values())) // batch_size + 3):
        rows = order.rows(step)
        assert len(rows) == batch_size
        (name,) = {name for name, its_rows in buckets.items() for row in rows if row in its_rows}
        read[name] += rows
    for name, rows in read.items():
        size = len(buckets[name])
        for start in range(0, len(rows), size):
            epoch = rows[start : start + size]  # the last one may not be complete
            assert len(set(epoch)) == len(epoch) and (len(epoch) < size or sorted(epoch) == list(buckets[name]))


@given(tables(), st.integers(1, 4), st.integers(1, 4), seeds, steps)
def test_the_shares_of_all_ranks_join_to_the_batch(buckets, share, ranks, seed, step):
    order = Order(buckets, share * ranks, seed)
    shares = [order.share(step, rank, ranks) for rank in range(ranks)]
    assert [len(rows) for rows in shares] == [share] * ranks
    assert [row for rows in shares for row in rows] == order.rows(step)


@given(tables(), batch_sizes, seeds, st.lists(steps, max_size=5), steps)
def test_the_rows_depend_on_the_step_and_not_on_earlier_calls(buckets, batch_size, seed, earlier, step):
    used, fresh = Order(buckets, batch_size, seed), Order(dict(reversed(buckets.items())), batch_size, seed)
    for other in earlier:
        used.rows(other)
    assert used.rows(step) == used.rows(step) == fresh.rows(step)


@pytest.mark.parametrize("buckets", TABLES)
@pytest.mark.parametrize("batch", [1, 4, 6])
def test_every_row_comes_once_an_epoch_over_many_epochs(buckets, batch):
    order = Order(buckets, batch, seed=0)
    read = {name: [] for name in buckets}
    for step in range(200):
        rows = order.rows(step)
        (name,) = {name for name, its_rows in buckets.items() for row in rows if row in its_rows}
        assert len(rows) == batch
        read[name] += rows
    for name, rows in read.items():
        whole = len(rows) // len(buckets[name])
        epochs = [rows[i * len(buckets[name]) :][: len(buckets[name])] for i in range(whole)]
        assert all(sorted(epoch) == list(buckets[name]) for epoch in epochs)


@pytest.mark.parametrize("buckets", TABLES)
def test_shapes_take_turns_in_proportion_to_their_rows(buckets):
    order = Order(buckets, 4, seed=1)
    total = sum(map(len, buckets.values()))
    reads = dict.fromkeys(range(total), 0)
    for step in range(50 * total):
        for row in order.rows(step):
            reads[row] += 1
    assert all(abs(count - 200) <= 4 for count in reads.values()), reads


def test_each_epoch_and_each_seed_has_its_own_order():
    epochs = [tuple(Order({"a": range(50)}, 50, seed).rows(step)) for seed in (0, 1) for step in (0, 1)]
    assert len(set(epochs)) == 4 and all(sorted(epoch) == list(range(50)) for epoch in epochs)


def test_steps_may_be_asked_for_in_any_order():
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
