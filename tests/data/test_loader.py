"""What goes wrong in a process that reads ahead is raised in one sentence, with its own type."""

import multiprocessing
import os

import pytest

from pusa.data.latents import Latents
from pusa.data.loader import load, worker_deaths
from pusa.data.order import Order
from pusa.data.reader import Table
from pusa.errors import TableError
from tests.helpers.synthetic_tables import write_synthetic


@pytest.fixture
def latents(tmp_path):
    write_synthetic(tmp_path, {"16x16x7": 6}, "none")
    return Latents(Table.open(tmp_path))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_table_error_of_a_worker_has_no_traceback_in_its_message(latents, workers):
    for path in latents.table.folder.glob("latents-*.parquet"):
        path.write_bytes(b"")
    with pytest.raises(TableError) as caught:
        next(load(latents, Order(latents.buckets, 2, 0), range(1), workers=workers))
    message = str(caught.value)
    assert message.startswith(f"{latents.table.folder}/latents-") and "\n" not in message


def train_with_a_killed_worker(latents, end):
    """Send what is raised. In a process of its own, since torch's handler of signals reports the death again there."""
    try:
        with worker_deaths():
            batches = load(latents, Order(latents.buckets, 2, 0), range(1_000_000), workers=1)
            next(batches)
            multiprocessing.active_children()[0].kill()
            for _ in batches:
                pass
    except RuntimeError as error:
        end.send((type(error).__name__, str(error)))
    os._exit(0)


def test_a_worker_that_is_killed_ends_the_training_in_a_sentence(latents):
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=train_with_a_killed_worker, args=(latents, sender))
    process.start()
    sender.close()
    kind, message = receiver.recv()
    process.join()
    assert kind == "StageError" and "\n" not in message, message
    assert message.startswith("a process that reads data ahead ended: ") and "fewer loader_workers" in message


def test_other_errors_are_left_as_they_are():
    with pytest.raises(RuntimeError, match="of a library"), worker_deaths():
        raise RuntimeError("of a library")


def test_processes_that_read_ahead_start_in_a_rank_that_was_spawned(latents):
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)  # as it is in such a rank
    try:
        batches = load(latents, Order(latents.buckets, 2, 0), range(1), workers=1, prepare=lambda *_: 7)
        assert list(batches) == [7]
    finally:
        multiprocessing.set_start_method(before, force=True)
