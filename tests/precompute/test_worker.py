"""Segments in slots: what kills its worker is found and rejected, and processes make the same table."""

import os
import pickle
import shutil
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

import pusa.precompute.stage as stage
from pusa.data.reader import Table
from pusa.errors import StageError
from pusa.manifest.models import ModelSpec, PrecomputeManifest
from pusa.precompute.stage import precompute
from pusa.precompute.worker import Loaded, _kept
from pusa.system.slots import HereSlot, WorkerDied
from tests.helpers.processes import is_alive


class Mortal(HereSlot):
    """This process, as if it were killed by certain clips or captions."""

    def __init__(self, deadly, times: int = 10**6, loaded: bool = True) -> None:
        self.deadly, self.times, self.loaded, self.deaths, self.calls = deadly, times, loaded, 0, []

    def run(self, call, *arguments, on_event):
        given = arguments[2] if len(arguments) == 3 else {}
        self.calls.append(len(given))
        call, arguments = pickle.loads(pickle.dumps((call, arguments)))  # as another process gets them
        if self.deaths < self.times and any(self.deadly(value) for value in given.values()):
            self.deaths += 1
            if self.loaded:
                on_event(Loaded())
            raise WorkerDied("signal 9")
        return super().run(call, *arguments, on_event=on_event)


@pytest.fixture
def run_dir(made, tmp_path) -> Path:
    """A run with the clips of `made`, and no latents."""
    shutil.copytree(made / "clips", tmp_path / "run/clips")
    return tmp_path / "run"


@pytest.fixture
def work_in(monkeypatch):
    """Return a function that has the stage work in other slots."""

    def use(*slots):
        @contextmanager
        def opened(place, folder):
            yield list(slots)

        monkeypatch.setattr(stage, "open_slots", opened)

    return use


def run(run_dir: Path, **changes):
    step = changes.pop("step", stage.call_directly)
    settings = {"model": ModelSpec(weights="builtin:tiny"), "shard_rows": 8, **changes}
    return precompute(PrecomputeManifest.model_validate(settings), run_dir, step=step)


def content(run_dir: Path) -> str:
    return Table.open(run_dir / "latents").fingerprint


def is_clip(name):
    return lambda given: isinstance(given, dict) and given["clip_id"] == name


def test_a_clip_that_kills_its_worker_is_found_in_halves_and_rejected_and_the_rest_is_made(run_dir, work_in, made):
    work_in(slot := Mortal(is_clip("0002.mp4@0")))
    names = []
    result = run(run_dir, step=lambda name, call: (names.append(name), call())[1])
    assert (result.rows, result.rejects, result.encoded, result.failed) == (11, 1, 11, 0)
    (reject,) = Table.open(run_dir / "latents").read("rejects").to_pylist()
    assert (reject["source"], reject["reason"]) == ("0002.mp4@0", "crashed")
    assert reject["detail"] == "its worker died 3 times while it encoded this alone (signal 9)"
    # Eight clips, four of them, two, and the one three times; then the others of each half.
    assert slot.deaths == 6 and slot.calls == [13, 8, 4, 2, 2, 1, 1, 1, 1, 4, 4]
    assert names[:2] == ["texts of 13 captions on cpu", "latents 64x64x31, clips 1-8 on cpu"]
    assert names[5] == "latents 64x64x31, clip 3 (0002.mp4@0) on cpu" and not _kept
    work_in(HereSlot())
    again = run(run_dir)
    assert (again.rows, again.encoded) == (12, 1) and content(run_dir) == content(made)


def test_a_caption_that_kills_its_worker_costs_its_own_clip(run_dir, work_in):
    captions = Table.open(run_dir / "clips").read("clips")["caption"].to_pylist()
    work_in(Mortal(lambda given: given == captions[3]))
    result = run(run_dir)
    assert (result.rows, result.rejects) == (12 - captions.count(captions[3]), captions.count(captions[3]))
    assert {*Table.open(run_dir / "latents").read("rejects")["reason"].to_pylist()} == {"crashed"}


def test_a_worker_that_dies_for_other_reasons_costs_nothing(run_dir, work_in, made):
    work_in(slot := Mortal(lambda given: True, times=4))
    result = run(run_dir)
    assert slot.deaths == 4 and (result.rows, result.rejects, result.encoded) == (12, 0, 12)
    assert content(run_dir) == content(made)
    shutil.rmtree(run_dir / "latents")
    work_in(slot := Mortal(lambda given: True, times=4, loaded=False))
    assert run(run_dir).rows == 12 and slot.calls == [13] * 5 + [8, 4]  # nothing is divided


class WaitsForItsGpu(HereSlot):
    """A slot whose GPU another command has, until that command ends."""

    def __init__(self) -> None:
        self.free = threading.Event()

    def start(self) -> None:
        self.free.wait()

    def run(self, call, *arguments, on_event):
        raise AssertionError("it cannot work")


def test_a_command_that_only_finishes_the_table_does_not_wait_for_another_ones_gpu(run_dir, work_in, made):
    shutil.copytree(made / "latents", run_dir / "latents")
    (run_dir / "latents/index.json").unlink()
    work_in(waiting := WaitsForItsGpu(), HereSlot())
    try:
        assert run(run_dir).encoded == 0 and content(run_dir) == content(made)
    finally:
        waiting.free.set()


@pytest.mark.parametrize(
    ("loaded", "deaths", "message"),
    [
        (True, 32, r"workers died 32 times in a row, and made nothing \(signal 9\); see the log"),
        (False, 8, r"workers died 8 times before the encoders were loaded \(signal 9\); see the log"),
    ],
)
def test_workers_that_die_whatever_they_do_end_the_run_and_reject_nothing_more(
    run_dir, work_in, loaded, deaths, message
):
    work_in(slot := Mortal(lambda given: True, loaded=loaded))
    with pytest.raises(StageError, match=message):
        run(run_dir)
    assert slot.deaths == deaths and not _kept


def test_slots_share_the_segments(run_dir, work_in, made):
    class Apart(HereSlot):  # two of these have a thread each
        used = 0

        def run(self, *arguments, on_event):
            self.used += 1
            if self.used == 1:
                together.wait(60)
            with alone:  # the tiny model is one
                return super().run(*arguments, on_event=on_event)

    together, alone = threading.Barrier(2), threading.Lock()
    work_in(first := Apart(), second := Apart())
    result = run(run_dir, shard_rows=2)
    assert result.encoded == 12 and result.texts == 13 and content(run_dir) == content(made)
    assert first.used + second.used == 1 + 6  # texts, latents


@pytest.mark.slow
def test_processes_make_the_same_table_although_one_is_killed(run_dir, made, monkeypatch):
    opened, pids = stage.open_slots, set()

    @contextmanager
    def watched(place, folder):
        with opened(place, folder) as slots:
            watched.slots = slots
            yield slots

    def kill_once(name, call):
        found = {slot.pid for slot in watched.slots} - {None}
        if found and not pids:
            os.kill(victim := found.pop(), signal.SIGKILL)
            pids.add(victim)
        return call()

    monkeypatch.setattr(stage, "open_slots", watched)
    result = run(run_dir, place={"processes": 2}, shard_rows=2, step=kill_once)
    assert (result.rows, result.rejects) == (12, 0) and content(run_dir) == content(made)
    assert pids and [slot.pid for slot in watched.slots] == [None, None] and not any(map(is_alive, pids))
