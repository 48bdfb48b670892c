"""Accumulation, two processes, and two processes for each clip give the same training as one process."""

import json

import pytest

from pusa.backbones.context import Context
from pusa.errors import ConditionError
from pusa.finetune.measurements import read_measurements
from pusa.finetune.stage import finetune
from pusa.ingest.stage import ingest
from pusa.manifest.models import ClipSettings, IngestManifest, PrecomputeManifest
from pusa.precompute.stage import precompute
from tests.helpers.training_runs import TINY, furthest, job, losses, on_two_processes, recipe, weights

LORA = {"method": "lora", "rank": 4}
WAYS = {
    "accumulated": {"micro_batch_size": 1},
    "two processes": {},
    "two processes, accumulated": {"micro_batch_size": 1},
    "shared frames": {"parallel": {"context": 2}},
    "shared frames, activation checkpointing": {"parallel": {"context": 2}, "activation_checkpointing": 2},
}
STEPS = 4
MEASURED = {"held_out": 0.3, "every": STEPS, "levels": [0.3, 0.8], "matrix_clips": 3}


@pytest.fixture(scope="module")
def short_clips(drawn, tmp_path_factory):
    """Return a table of latents of single frames."""
    folder = tmp_path_factory.mktemp("short")
    clips = ClipSettings(width=64, height=64, num_frames=1)
    ingest(IngestManifest(source=drawn / "videos", clips=clips), folder)
    return precompute(PrecomputeManifest(model=TINY), folder).table


@pytest.fixture(scope="module")
def runs(made, short_clips, tmp_path_factory):
    """Train `STEPS` steps from the same seed in every way, and a LoRA in two ways; return the folder of the runs."""
    folder = tmp_path_factory.mktemp("ways")
    settings = {"steps": STEPS, "batch_size": 4, "checkpoint_every": STEPS, "ema_decay": 0.9}
    finetune(recipe(made, **settings), folder / "whole")
    finetune(recipe(made, **settings, **WAYS["accumulated"]), folder / "accumulated")
    finetune(recipe(made, **settings, train=LORA), folder / "lora whole")
    finetune(recipe(made, **settings, validation=MEASURED), folder / "measured whole")
    jobs = [job(recipe(made, **settings, **WAYS[way]), folder / way) for way in WAYS if way != "accumulated"]
    half = recipe(made, **{**settings, "steps": STEPS // 2})
    jobs += [
        job(recipe(made, **settings, train=LORA, parallel={"context": 2}), folder / "lora shared"),
        job(recipe(made, **settings, validation=MEASURED), folder / "measured by two"),
        job(recipe(made, **settings, validation=MEASURED, parallel={"context": 2}), folder / "measured with shared"),
        job(half, folder / "resumed"),
        job(recipe(made, batch_size=5), folder / "odd"),
        job(recipe(made, parallel={"context": 5}), folder / "five"),
        job(recipe(made, parallel={"context": 2}, latents=short_clips), folder / "short"),
        {"context": str(folder / "context")},
    ]
    on_two_processes(folder, jobs)
    finetune(recipe(made, **settings), folder / "resumed")
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_the_same_losses_and_weights(runs, way):
    assert len(losses(runs / way)) == STEPS
    assert losses(runs / way) == pytest.approx(losses(runs / "whole"), abs=1e-5)
    assert furthest(weights(runs / way, STEPS), weights(runs / "whole", STEPS)) < 1e-5


def test_a_lora_with_shared_frames_is_the_same(runs):
    assert losses(runs / "lora shared") == pytest.approx(losses(runs / "lora whole"), abs=1e-5)
    assert furthest(weights(runs / "lora shared", STEPS), weights(runs / "lora whole", STEPS)) < 1e-5


@pytest.mark.parametrize("way, difference", [("measured by two", 0.0), ("measured with shared", 1e-6)])
def test_held_out_clips_are_measured_the_same(runs, way, difference):
    """Step 0 has the same weights; 3 clips x 5 patterns x 2 levels = 30 passes are not one process's half each."""
    alone, shared = (read_measurements(runs / name / "metrics.jsonl") for name in ("measured whole", way))
    assert [one.step for one in alone] == [one.step for one in shared] == [0, STEPS]
    assert {one.key for one in (*alone, *shared)} == {alone[0].key}
    for step, limit in ((0, difference), (1, 1e-5)):
        for pattern, expected in alone[step].losses.items():
            assert shared[step].losses[pattern] == pytest.approx(expected, abs=limit, rel=0)


def test_one_process_resumes_what_two_processes_began(runs):
    assert losses(runs / "resumed") == pytest.approx(losses(runs / "whole"), abs=1e-5)
    assert furthest(weights(runs / "resumed", STEPS), weights(runs / "whole", STEPS)) < 1e-5


@pytest.mark.parametrize("frames", [4, 5])
@pytest.mark.parametrize("rank", [0, 1])
def test_shared_frames_give_the_same_output_and_gradients(runs, frames, rank):
    differences = json.loads((runs / f"context.{frames}.{rank}").read_text())
    assert len(differences) > 50 and max(differences.values()) < 1e-4, max(differences, key=differences.get)
    assert differences["output"] < 1e-5


def test_every_process_refuses_what_cannot_be_divided(runs):
    for rank in (0, 1):
        error = (runs / f"odd.{rank}.error").read_text()
        assert error == "batch_size 5 is not a multiple of the 2 processes with data"
        assert (runs / f"five.{rank}.error").read_text() == "parallel.context is 5; it must divide the 2 processes"
        error = (runs / f"short.{rank}.error").read_text()
        assert error.startswith("parallel.context is 2; ") and error.endswith("has clips 64x64x1, of 1 latent frames")


def test_heads_that_cannot_be_divided_are_refused_with_the_allowed_numbers(networks):
    with pytest.raises(ConditionError, match="3 processes cannot split 2 heads evenly; allowed are 1, 2"):
        networks[1].share_frames(Context(0, 3, None))


@pytest.mark.parametrize("frames", [1, 5, 28])
def test_frames_are_divided_whole_and_evenly(frames):
    parts = [Context(rank, 3, None).part(frames) for rank in range(3)]
    assert [frame for part in parts for frame in range(frames)[part]] == list(range(frames))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1 and sizes == Context(0, 3, None).counts(frames)
