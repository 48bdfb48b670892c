"""Trials of a worker on a real server: it, its runs and its server are killed, ended and cancelled."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling

from flows.runs import TAKEN_UP
from tests.flows.test_schedules import server  # noqa: F401  a fixture
from tests.helpers.processes import descendants, is_alive, wait_for
from tests.helpers.stand_in_server import unused_address

PUSA = (sys.executable, "-m", "flows")
JOBS = 8
ENDLESS = 1000  # steps, which take many minutes


@pytest.fixture(scope="module")
def deployed(server):  # noqa: F811
    """Return the environment of a server that has the deployments."""
    subprocess.run([*PUSA, "deploy"], env=server[1], check=True, stdout=subprocess.DEVNULL)
    return server[1]


@contextmanager
def client_of(environment):
    with (
        temporary_settings({PREFECT_API_URL: environment["PREFECT_API_URL"]}),
        get_client(sync_client=True) as client,
    ):
        yield client


@contextmanager
def working(environment, log):
    """Yield the process of a worker, which is killed at the end."""
    with (
        log.open("ab") as output,
        subprocess.Popen([*PUSA, "worker", "--name", "w"], env=environment, stdout=output, stderr=output) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def manifest_in(folder: Path, last_steps: int = 30) -> Path:
    """Write a manifest with jobs of different sizes, which are made one by one, the last in a number of steps."""
    path = folder / "generate.yaml"
    jobs = [
        f"- {{id: job{i}, task: text_to_video, prompt: a ball, width: {32 + 16 * i}, height: 64}}" for i in range(JOBS)
    ]
    jobs[-1] = jobs[-1].replace("}", f", steps: {last_steps}}}")
    lines = ["kind: generate", "model: {backbone: mochi, weights: 'builtin:tiny'}", "place: {processes: 2}"]
    lines += ["defaults: {num_frames: 31, steps: 30, guidance: 1.5}", "jobs:", *jobs]
    path.write_text("\n".join(lines))
    return path


def submit(environment, folder: Path, last_steps: int = 30):
    """Submit a run and return its id."""
    with client_of(environment) as client:
        on_demand = client.read_deployment_by_name("generate/on-demand")
        parameters = {"manifest": {"path": str(manifest_in(folder, last_steps))}, "run_dir": str(folder)}
        return client.create_flow_run_from_deployment(on_demand.id, parameters=parameters).id


def state(environment, id):
    with client_of(environment) as client:
        return client.read_flow_run(id).state


def made(folder: Path) -> dict[str, int]:
    """Return when each video was recorded as made."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("videos/*.json")}


def in_the_middle(folder: Path, process) -> list[int]:
    """Wait until some videos are made, and return the processes that a worker started."""
    wait_for(lambda: 0 < len(made(folder)) < JOBS, 300)
    return descendants(process.pid)


def all_gone(pids) -> bool:
    return not any(map(is_alive, pids))


@pytest.mark.slow
def test_a_run_goes_on_after_its_worker_was_killed(deployed, tmp_path):
    id = submit(deployed, tmp_path)
    with working(deployed, tmp_path / "log") as process:
        pids = in_the_middle(tmp_path, process)
        process.kill()
        assert len(pids) >= 3 and wait_for(lambda: all_gone(pids), 30)
    before = made(tmp_path)
    assert state(deployed, id).is_running() and 0 < len(before) < JOBS
    with working(deployed, tmp_path / "log") as process:
        watching = subprocess.run(
            [*PUSA, "watch", str(id)], env=deployed, stdout=subprocess.PIPE, text=True, timeout=400
        )
        process.terminate()
        assert process.wait(60) == 0
    after = made(tmp_path)
    assert len(after) == JOBS and before.items() <= after.items()  # each was made once
    assert watching.returncode == 0 and f"{JOBS} done" in watching.stdout and "Completed" in watching.stdout
    with client_of(deployed) as client:
        assert client.read_flow_run(id).labels[TAKEN_UP] >= 1  # also where the server was too busy to answer once


@pytest.mark.slow
def test_a_worker_that_is_ended_puts_its_run_back(deployed, tmp_path):
    id = submit(deployed, tmp_path)
    with working(deployed, tmp_path / "log") as process:
        pids = in_the_middle(tmp_path, process)
        process.terminate()
        assert process.wait(60) == 0 and all_gone(pids)
    assert state(deployed, id).name == "AwaitingRetry"
    assert (tmp_path / "log").read_text().endswith("put back goes on when a worker is there again\n")
    before = made(tmp_path)
    with working(deployed, tmp_path / "log"):
        assert wait_for(lambda: state(deployed, id).is_completed(), 400)
    assert before.items() <= made(tmp_path).items()


@pytest.mark.slow
def test_a_run_that_is_cancelled_on_the_dashboard_ends_with_its_processes(deployed, tmp_path):
    id = submit(deployed, tmp_path, ENDLESS)
    with working(deployed, tmp_path / "log") as process:
        pids = in_the_middle(tmp_path, process)
        with client_of(deployed) as client:
            client.set_flow_run_state(id, Cancelling())
            assert wait_for(lambda: state(deployed, id).is_cancelled(), 30)
        assert wait_for(lambda: all_gone(pids), 10)
    waiting = submit(deployed, tmp_path)
    cancelled = subprocess.run([*PUSA, "cancel", str(waiting)], env=deployed, capture_output=True, text=True)
    assert cancelled.returncode == 0 and "it was not running" in cancelled.stdout
    assert state(deployed, waiting).is_cancelled()


@pytest.mark.slow
def test_a_run_that_was_started_by_hand_is_cancelled(deployed, tmp_path):
    command = [*PUSA, "generate", str(manifest_in(tmp_path, ENDLESS)), "--run-dir", str(tmp_path)]
    with subprocess.Popen(command, env=deployed, stderr=subprocess.PIPE, text=True) as process:
        pids = in_the_middle(tmp_path, process)
        cancelled = subprocess.run(
            [*PUSA, "cancel", f"generate {tmp_path.name}/generate.yaml, {JOBS} jobs"], env=deployed
        )
        _, errors = process.communicate(timeout=60)
    assert cancelled.returncode == 0 and process.returncode == 130
    assert "was cancelled; all finished work is kept" in errors and wait_for(lambda: all_gone(pids), 10)


@pytest.mark.slow
def test_a_worker_outlives_a_restart_of_the_server(tmp_path):
    home = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_API")}
    home |= {"PREFECT_HOME": str(tmp_path / "home")}
    port = unused_address().rpartition(":")[2]
    environment = {**home, "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}

    @contextmanager
    def serving_again():
        with subprocess.Popen(
            [*PUSA, "server", "--port", port], env=home, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout.readline()
            yield
            process.terminate()

    log = tmp_path / "log"
    with serving_again():
        subprocess.run([*PUSA, "deploy"], env=environment, check=True, stdout=subprocess.DEVNULL)
        id = submit(environment, tmp_path)
        worker = subprocess.Popen([*PUSA, "worker", "--name", "w"], env=environment, stderr=log.open("wb"))
        in_the_middle(tmp_path, worker)
    try:
        wait_for(lambda: "does not answer" in log.read_text())
        with serving_again():
            assert wait_for(lambda: state(environment, id).is_completed(), 400)
            assert worker.poll() is None
    finally:
        worker.kill()
        worker.wait()
    assert len(made(tmp_path)) == JOBS and log.read_text().count("answers again, after") >= 1
