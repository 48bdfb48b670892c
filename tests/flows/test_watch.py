"""A run whose server has died ends in a sentence, and not before the step that works."""

import os
from contextlib import contextmanager

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import watch
from flows.flow_run import RESUMED
from flows.watch import at_work, watched
from pusa.errors import TableError
from tests.helpers.processes import wait_for
from tests.helpers.stand_in_server import answering, unused_address


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    for name in ("LOOK_SECONDS", "GONE_SECONDS", "MUTE_SECONDS"):
        monkeypatch.setattr(watch, name, 0.01)
    monkeypatch.setattr(watch.logging, "raiseExceptions", True)  # so that it is put back


@contextmanager
def watching(address: str, **options):
    """Watch a server; yield the sentences that the run was ended with."""
    sentences: list[str] = []
    with temporary_settings({PREFECT_API_URL: f"{address}/api"}), watched("the server", sentences.append, **options):
        yield sentences


def test_a_run_without_a_server_ends_and_says_how_to_continue():
    with watching(unused_address()) as sentences:
        wait_for(lambda: sentences)
    (sentence,) = sentences
    assert sentence.startswith("the server has not answered for ") and "Connection refused" in sentence
    assert "all finished work is kept: run the same command again to resume, or use --no-prefect" in sentence


def test_a_run_of_a_worker_is_not_to_be_started_by_hand():
    with watching(unused_address(), then=RESUMED) as sentences:
        wait_for(lambda: sentences)
    assert sentences[0].endswith("all finished work is kept: the worker starts the run again")


def test_a_step_that_works_is_not_ended(caplog):
    with watching(unused_address()) as sentences:
        with at_work(), at_work():
            wait_for(lambda: "whose work continues" in caplog.text)
            assert not sentences
        wait_for(lambda: sentences)
    assert caplog.text.count("whose work continues") == 1


def test_a_server_that_answers_again_is_forgiven(caplog):
    caplog.set_level("INFO", "pusa.server")
    address = unused_address()
    with watching(address) as sentences, at_work():
        wait_for(lambda: "whose work continues" in caplog.text)
        with answering(404, b"", port=int(address.rpartition(":")[2])):
            wait_for(lambda: "the server answers again" in caplog.text)
        assert not sentences


def test_a_server_that_only_fails_does_not_answer():
    with answering(500, b"") as address, watching(address) as sentences:
        wait_for(lambda: sentences)
    assert "500" in sentences[0]


def test_the_end_of_a_run_is_a_sentence_and_a_failure(monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    watch._end_run("the server is gone")
    assert codes == [1] and capsys.readouterr().err == "pusa: the server is gone\n"


@pytest.mark.parametrize("error", [ValueError("no a\udcff.mp4"), TableError("no a\udcff.mp4"), KeyError("a\udcff.mp4")])
def test_the_error_of_a_step_has_a_message_that_a_server_takes(error):
    with pytest.raises(Exception, match=r"a\\udcff\.mp4") as raised, at_work():
        raise error
    assert str(raised.value).isascii() and isinstance(
        raised.value, RuntimeError if type(error) is ValueError else type(error)
    )
