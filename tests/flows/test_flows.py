"""The flows on Prefect's own test server, mainly with a shortened demo."""

import json
import logging
from collections import Counter
from contextvars import copy_context
from errno import ENOSPC
from functools import partial
from threading import Thread

import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.sorting import FlowRunSort
from prefect.testing.utilities import prefect_test_harness

from flows import handover, steps
from flows.commands import main
from flows.finetune import finetune
from flows.generate import generate
from flows.handover import ManifestFile
from flows.ingest import ingest
from flows.launch import launch, write_error, write_result
from flows.pipeline import pipeline
from flows.report import artifact_key
from flows.states import WITH_FAILURES, whole
from pusa.errors import ManifestError, PartlyFailed, StageError, TableError
from pusa.finetune.stage import Finetuned
from pusa.finetune.stage import finetune as train
from pusa.generate.stage import Generated
from pusa.ingest.stage import Ingested
from pusa.manifest.loading import load_manifest
from pusa.manifest.training import Validation
from pusa.precompute.stage import Precomputed
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
    """The manifests of manifests/tiny with few jobs and steps; their drawn data is there."""
    (tmp_path / "drawn").symlink_to(drawn)
    manifests = {stage: load_manifest(root / f"manifests/tiny/{stage}.yaml", tmp_path) for stage in STAGES}
    few = {"steps": 2, "batch_size": 2, "checkpoint_every": 2, "validation": Validation(clips=1, steps=1)}
    manifests["finetune"] = manifests["finetune"].model_copy(update=few)
    kept = [job for job in manifests["generate"].jobs if job.id in ("text", "image", "extension")]
    jobs = tuple(job.model_copy(update={"steps": 2}) for job in kept)
    manifests["generate"] = manifests["generate"].model_copy(update={"jobs": jobs})
    return manifests


@pytest.fixture
def hand_over(tmp_path):
    """Return a function that writes a manifest to a file, which it returns as a flow takes it."""

    def write(manifest) -> ManifestFile:
        path = tmp_path / f"{manifest.kind}.json"
        path.write_text(manifest.model_dump_json(exclude_unset=True))
        return ManifestFile.of(path)

    return write


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


def test_the_whole_chain_and_again(prefect_server, short_demo, hand_over, tmp_path, monkeypatch):
    files = {stage: hand_over(manifest) for stage, manifest in short_demo.items()}
    result = pipeline(**files, run_dir=tmp_path)
    assert result.made == [job.id for job in short_demo["generate"].jobs] and not result.failed
    for path in ("clips/index.json", "latents/index.json", "checkpoints/last/transformer", "videos/gallery.html"):
        assert (tmp_path / path).exists()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    for job in result.made:
        assert json.loads((tmp_path / f"videos/{job}.json").read_text())["status"] == "done"
        assert (tmp_path / f"videos/{job}.mp4").stat().st_size > 500
        assert (tmp_path / f"videos/{job}.latents.safetensors").exists()
    monkeypatch.setattr(steps, "launch", lambda manifest, run_dir, *_: train(manifest, run_dir))  # sooner than a child
    again = pipeline(**files, run_dir=tmp_path)
    assert again.kept == result.made and not again.made

    keys = {stage: artifact_key(stage, file.path, tmp_path) for stage, file in files.items()}
    artifacts, runs = recorded(set(keys.values()))
    pages = {stage: [artifact.data for artifact in artifacts if artifact.key == key] for stage, key in keys.items()}
    assert [len(pages[stage]) for stage in STAGES] == [2, 2, 2, 2]  # one a run, however often it was renewed
    assert all("ended, " in page.splitlines()[0] for stage in STAGES for page in pages[stage])
    assert {path.name for path in tmp_path.glob("validation/*.jpg")} == {f"0000000{step}.jpg" for step in (0, 2)}
    assert "data:image/webp;base64," in pages["generate"][0] and "data:image/jpeg;base64," in pages["finetune"][0]
    assert read_image(result.sheet).shape[1] == 100 * len(result.made)
    tags = {
        run.name.rpartition("-")[0]: set(run.tags) for run in runs
    }  # Prefect names the runs of inner flows generate-0
    assert tags["ingest videos"] == set()
    assert all(tags[name] == {"gpu"} for name in ("precompute latents", "finetune transformer", "generate videos"))


def last_states(*names: str) -> list:
    """Return the state, on the server, of the last run of each of these flows."""
    with get_client(sync_client=True) as client:
        flows = {flow.id: flow.name for flow in client.read_flows()}
        runs = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC)
    latest = {flows[run.flow_id]: run.state for run in reversed(runs)}
    return [latest[name] for name in names]


def test_a_failed_job_leaves_the_flow_completed_with_failures(prefect_server, short_demo, hand_over, tmp_path):
    model = short_demo["generate"].model.model_copy(update={"checkpoint": None})
    jobs = short_demo["generate"].jobs[:2]
    missing = jobs[1].model_copy(update={"image": tmp_path / "none.png"})
    manifest = short_demo["generate"].model_copy(update={"model": model, "jobs": (jobs[0], missing)})
    result = generate(hand_over(manifest), tmp_path)  # what a caller gets, also from a deployment
    assert result.made == ["text"] and list(result.failed) == ["image"]
    assert (tmp_path / "videos/text.mp4").exists()
    (state,) = last_states("generate")
    assert state.type == "COMPLETED" and state.name == WITH_FAILURES
    assert state.message.startswith("1 job failed ('image')") and state.data is None


@pytest.fixture
def partly_failing_stages(monkeypatch, tmp_path):
    """Stages that do nothing; of ingest, precompute and generate a part fails."""
    table, videos = tmp_path / "clips", tmp_path / "videos"
    ingested = Ingested(table, 9, 8, 1, 0, 0, 0, failed=1, kinds={})
    generated = Generated(videos, videos / "gallery.html", videos / "gallery.jpg", ["a"], [], {"b": "it is torn"})
    trained = Finetuned(tmp_path / "checkpoints/1", tmp_path / "metrics.jsonl", 1, 1, 0, 0.5)
    results = {"run_ingest": ingested, "run_precompute": Precomputed(table, 8, 7, 1, failed=1)}
    for name, result in {**results, "run_generate": generated, "launch": trained}.items():
        monkeypatch.setattr(steps, name, lambda *args, result=result, **named: result)
    return generated


def test_what_failed_in_the_stages_of_a_pipeline_is_its_last_state(
    prefect_server, short_demo, hand_over, tmp_path, partly_failing_stages
):
    short_demo["finetune"] = short_demo["finetune"].model_copy(update={"validation": None})
    files = {stage: hand_over(manifest) for stage, manifest in short_demo.items()}
    state = pipeline(**files, run_dir=tmp_path, return_state=True)
    assert state.result() is partly_failing_stages
    for message in ("1 sources failed", "1 clips failed", "1 job failed ('b')"):
        assert message in state.message
    for recorded_state in last_states("ingest", "precompute", "generate", "pipeline"):
        assert (recorded_state.type, recorded_state.name) == ("COMPLETED", WITH_FAILURES)
        assert recorded_state.data is None  # nothing is persisted
    with pytest.raises(PartlyFailed, match="1 sources failed"):
        whole(state)


def test_the_command_prints_what_failed_and_exits_with_3(
    prefect_server, short_demo, tmp_path, partly_failing_stages, capsys
):
    (tmp_path / "m.yaml").write_text('kind: ingest\nsource: ".."\n')
    assert main(["ingest", str(tmp_path / "m.yaml"), "--run-dir", str(tmp_path)]) == 3
    assert "pusa: 1 sources failed" in capsys.readouterr().err


def test_an_error_of_a_stage_fails_its_flow_and_the_pipeline(
    prefect_server, short_demo, hand_over, tmp_path, monkeypatch
):
    def refuse(*args, **named):
        raise TableError("no clips")

    monkeypatch.setattr(steps, "run_ingest", refuse)
    with pytest.raises(TableError, match="no clips"):
        pipeline(**{stage: hand_over(manifest) for stage, manifest in short_demo.items()}, run_dir=tmp_path)
    assert [state.type for state in last_states("ingest", "pipeline")] == ["FAILED", "FAILED"]


def test_chunks_of_a_stage_are_tasks_of_its_run_whatever_thread_they_are_in(prefect_server):
    """Neither retried nor tagged: the stage's own task is both."""

    def fail():
        raise OSError(ENOSPC, "disk full", "a\udcff")

    @task(retries=2, tags=["gpu"], task_run_name="chunk stage")
    def stage() -> list[object]:
        def work() -> None:
            outcomes.append(steps.as_task("chunk a {b} .. c", lambda: 3))
            with pytest.raises(OSError, match="disk full") as failed:
                steps.as_task("chunk d", fail)
            outcomes.append(failed.value.errno)

        outcomes: list[object] = []
        thread = Thread(target=copy_context().run, args=(work,))
        thread.start()
        thread.join()
        return outcomes

    assert flow(name="of chunks")(lambda: stage())() == [3, ENOSPC]

    def fact():
        with get_client(sync_client=True) as client:
            runs = {run.name: run for run in client.read_task_runs() if run.name.startswith("chunk ")}
        return runs if len(runs) == 3 and all(run.state.is_final() for run in runs.values()) else None

    runs = wait_for(fact)
    made, failed = runs["chunk a {b} .. c"], runs["chunk d"]
    assert [run.state.name for run in (made, failed, runs["chunk stage"])] == ["Completed", "Failed", "Completed"]
    assert "disk full" in failed.state.message
    assert not made.tags and failed.run_count == 1 and made.flow_run_id == failed.flow_run_id is not None


def test_a_chunk_that_prefect_cannot_show_is_made_all_the_same(monkeypatch, caplog):
    def broken(**settings):
        def refuse(**how):
            raise ConnectionError("no server")

        return lambda call: refuse

    monkeypatch.setattr(steps, "task", broken)
    with caplog.at_level(logging.WARNING, "pusa"):
        assert steps.as_task("chunk a", lambda: 3) == 3
    assert "Prefect cannot show 'chunk a': ConnectionError: no server" in caplog.text


def test_a_flow_takes_its_parameters_as_json_and_refuses_a_file_that_was_changed(
    prefect_server, short_demo, hand_over, tmp_path
):
    """Deployments and the dashboard's form hand over JSON."""
    file = hand_over(short_demo["ingest"])
    parameters = json.loads(file.model_dump_json())
    assert ingest(parameters, str(tmp_path)).clips == 12
    file.path.write_text(file.path.read_text() + "\n")
    handover._read_once.cache_clear()  # a worker's run is a process of its own
    with pytest.raises(ManifestError, match="was changed after it was handed over: its sha256 is "):
        ingest(parameters, str(tmp_path))
    assert ingest({"path": str(file.path)}, str(tmp_path)).clips == 12


@pytest.fixture
def end_training(monkeypatch, tmp_path):
    """Return a function that has a script write the trainer's end, in place of a trainer."""

    def set_end(write, value) -> None:
        write(tmp_path / "end.json", value)
        script = f"import shutil, sys; shutil.copy({str(tmp_path / 'end.json')!r}, sys.argv[-1])"
        monkeypatch.setattr(steps, "launch", partial(launch, pusa=python(script)))

    return set_end


def test_a_failed_training_fails_the_flow_at_once(prefect_server, short_demo, hand_over, tmp_path, end_training):
    end_training(write_error, TableError("no rows"))
    with pytest.raises(TableError, match="no rows"):
        finetune(hand_over(short_demo["finetune"]), tmp_path)


def test_a_failed_validation_is_logged_and_fails_nothing(
    prefect_server, short_demo, hand_over, tmp_path, end_training, caplog
):
    result = Finetuned(tmp_path / "checkpoints/3", tmp_path / "metrics.jsonl", 3, 3, 0, 0.5)
    end_training(write_result, result)
    with sole_writer(tmp_path / "validation"), caplog.at_level(logging.WARNING, "pusa"):
        assert finetune(hand_over(short_demo["finetune"]), tmp_path) == result
    assert "the training is complete, but its validation failed" in caplog.text


@pytest.mark.parametrize(
    "error, again",
    [
        (StageError("no"), False),
        (TypeError("our own fault"), False),
        (OSError("disk"), True),
        (RuntimeError("CUDA error: an illegal memory access"), True),
    ],
)
def test_only_what_can_heal_is_retried(error, again):
    class State:
        def result(self, raise_on_failure):
            return error

    assert steps.is_worth_retrying(steps.generate, None, State()) is again


@pytest.mark.parametrize("stage", STAGES)
def test_every_step_is_retried_and_persists_no_result(stage):
    step = getattr(steps, stage)
    assert step.retries == 2 and not step.persist_result
