"""The flows on Prefect's own test server, mainly with a shortened demo."""

import json
import logging
from collections import Counter
from functools import partial

import pytest
from prefect.client.orchestration import get_client
from prefect.testing.utilities import prefect_test_harness

from flows import steps
from flows.finetune import finetune
from flows.generate import generate
from flows.launch import launch, write_error, write_result
from flows.pipeline import pipeline
from pusa.errors import StageError, TableError
from pusa.finetune.stage import Finetuned
from pusa.manifest.loading import load_manifest
from pusa.manifest.training import Validation
from pusa.system.locks import sole_writer
from pusa.video.media import read_image
from tests.helpers.processes import python, wait_for

STAGES = ("ingest", "precompute", "finetune", "generate")


@pytest.fixture(scope="session")
def prefect_server():
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def short_demo(root, drawn, tmp_path):
    """The manifests of manifests/tiny with a few steps instead of hundreds, and their drawn data."""
    (tmp_path / "drawn").symlink_to(drawn)
    manifests = {stage: load_manifest(root / f"manifests/tiny/{stage}.yaml", tmp_path) for stage in STAGES}
    few = {"steps": 2, "batch_size": 4, "checkpoint_every": 1, "validation": Validation(clips=1, steps=2)}
    manifests["finetune"] = manifests["finetune"].model_copy(update=few)
    jobs = tuple(job.model_copy(update={"steps": 2}) for job in manifests["generate"].jobs)
    manifests["generate"] = manifests["generate"].model_copy(update={"jobs": jobs})
    return manifests


def recorded(keys: set[str]):
    """Return Prefect's artifacts and task runs, once every expected one is there and no run is unfinished.

    The server records them after the flow has returned.
    """

    def fact():
        with get_client(sync_client=True) as client:
            artifacts, runs = client.read_artifacts(), client.read_task_runs()
        # Two pipelines ran, each with one run of each stage's step.
        ended = [run for run in runs if run.state is not None and run.state.is_final()]
        counts = Counter(run.name.split("-")[0].split(" ")[0] for run in ended)
        whole = len(ended) == len(runs) and all(counts[stage] >= 2 for stage in STAGES)
        return (artifacts, runs) if whole and {artifact.key for artifact in artifacts} >= keys else None

    return wait_for(fact)


def test_the_whole_chain_and_again(prefect_server, short_demo, tmp_path):
    result = pipeline(**short_demo, run_dir=tmp_path)
    assert result.made == [job.id for job in short_demo["generate"].jobs] and not result.failed
    for path in ("clips/index.json", "latents/index.json", "checkpoints/last/transformer", "videos/gallery.html"):
        assert (tmp_path / path).exists()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    for job in result.made:
        assert json.loads((tmp_path / f"videos/{job}.json").read_text())["status"] == "done"
        assert (tmp_path / f"videos/{job}.mp4").stat().st_size > 500
        assert (tmp_path / f"videos/{job}.latents.safetensors").exists()
    again = pipeline(**short_demo, run_dir=tmp_path)
    assert again.kept == result.made and not again.made

    artifacts, runs = recorded({*STAGES, "validation"})
    assert {artifact.key for artifact in artifacts} >= {*STAGES, "validation"}
    assert {path.name for path in tmp_path.glob("validation/*.jpg")} == {f"0000000{step}.jpg" for step in (0, 1, 2)}
    assert "data:image/jpeg;base64," in next(artifact for artifact in artifacts if artifact.key == "generate").data
    assert read_image(result.sheet).shape[1] == 100 * len(result.made)
    tags = {run.name.split("-")[0].split(" ")[0]: set(run.tags) for run in runs}
    assert tags["ingest"] == set() and all(tags[stage] == {"gpu"} for stage in STAGES[1:])


def test_a_failed_job_fails_the_flow_but_not_the_others(prefect_server, short_demo, tmp_path):
    model = short_demo["generate"].model.model_copy(update={"checkpoint": None})
    jobs = short_demo["generate"].jobs[:2]
    missing = jobs[1].model_copy(update={"image": tmp_path / "none.png"})
    manifest = short_demo["generate"].model_copy(update={"model": model, "jobs": (jobs[0], missing)})
    with pytest.raises(StageError, match=r"1 jobs failed \('image'\)"):
        generate(manifest, tmp_path)
    assert (tmp_path / "videos/text.mp4").exists()


def test_a_flow_accepts_its_manifest_as_json(prefect_server, short_demo, tmp_path):
    """Deployments and the dashboard's form hand over JSON."""
    data = json.loads(short_demo["ingest"].model_dump_json())
    from flows.ingest import ingest

    assert ingest(data, tmp_path).clips == 12


@pytest.fixture
def end_training(monkeypatch, tmp_path):
    """Return a function that has a script write the trainer's end, in place of a trainer."""

    def set_end(write, value) -> None:
        write(tmp_path / "end.json", value)
        script = f"import shutil, sys; shutil.copy({str(tmp_path / 'end.json')!r}, sys.argv[-1])"
        monkeypatch.setattr(steps, "launch", partial(launch, pusa=python(script)))

    return set_end


@pytest.fixture
def reported(monkeypatch):
    """The folders of the runs that were reported to the dashboard, one for each time."""
    folders = []
    monkeypatch.setattr("flows.report.finetune", folders.append)
    return folders


def test_a_failed_training_fails_the_flow_at_once(prefect_server, short_demo, tmp_path, end_training, reported):
    end_training(write_error, TableError("no rows"))
    with pytest.raises(TableError, match="no rows"):
        finetune(short_demo["finetune"], tmp_path)
    assert reported == [tmp_path]


def test_a_failed_validation_is_logged_and_fails_nothing(
    prefect_server, short_demo, tmp_path, end_training, reported, caplog
):
    result = Finetuned(tmp_path / "checkpoints/3", tmp_path / "metrics.jsonl", 3, 3, 0, 0.5)
    end_training(write_result, result)
    with sole_writer(tmp_path / "validation"), caplog.at_level(logging.WARNING, "pusa"):
        assert finetune(short_demo["finetune"], tmp_path) == result
    assert "the training is complete, but its validation failed" in caplog.text
    assert reported == [tmp_path]


@pytest.mark.parametrize("error, again", [(StageError("no"), False), (OSError("disk"), True)])
def test_an_error_of_the_input_is_not_retried(error, again):
    class State:
        def result(self, raise_on_failure):
            return error

    assert steps.is_worth_retrying(steps.generate, None, State()) is again


@pytest.mark.parametrize("stage", STAGES)
def test_every_step_is_retried_and_persists_no_result(stage):
    step = getattr(steps, stage)
    assert step.retries == 2 and not step.persist_result
