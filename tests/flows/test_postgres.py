"""The server with PostgreSQL, credentials and two workers: nothing is lost when a worker or the database is killed."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from tests.helpers.postgres import PostgreSQL, program
from tests.helpers.processes import wait_for

CREDENTIALS = "pusa:some-password"
RUNS, JOBS = 6, 10
WORKERS = ("first", "second")
MANIFEST = """
kind: generate
model: {backbone: mochi, weights: "builtin:tiny"}
defaults: {width: 64, height: 64, num_frames: 7, steps: 2}
batch_tokens: 0
jobs:
  - {id: ball, task: text_to_video, prompt: "a red ball", sweep: {seed: [%s]}}
"""


def start(*words: str, environment: dict[str, str], log: Path) -> subprocess.Popen:
    with log.open("a") as output:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "flows", *words], env=environment, stdout=output, stderr=output
        )


def command(*words: str, environment: dict[str, str]) -> None:
    subprocess.run([sys.executable, "-P", "-m", "flows", *words], env=environment, check=True)


@pytest.fixture
def database():
    with PostgreSQL() as server:
        yield server


@pytest.fixture
def served(database, tmp_path):
    """Yield the environment of a server's clients, with the deployments made."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_API")}
    ours["PREFECT_HOME"] = str(tmp_path / "home")
    secrets = {
        "PREFECT_API_DATABASE_CONNECTION_URL": database.url,
        "PREFECT_SERVER_API_AUTH_STRING": CREDENTIALS,
        "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
    }
    log = tmp_path / "server.log"
    server = start("server", "--port", "0", environment={**ours, **secrets}, log=log)
    try:
        wait_for(lambda: server.poll() is not None or "PREFECT_API_URL=" in log.read_text())
        url = re.findall(r"PREFECT_API_URL=(\S+)", log.read_text())
        assert url, log.read_text()
        clients = {**ours, "PREFECT_API_URL": url[0], "PREFECT_API_AUTH_STRING": CREDENTIALS}
        command("deploy", environment=clients)
        yield clients
    finally:
        server.terminate()
        server.wait(60)


@pytest.mark.slow
@pytest.mark.skipif(not program("initdb"), reason="PostgreSQL is not installed")
def test_every_job_is_done_once_when_a_worker_and_the_database_end(served, database, tmp_path):
    folders = [tmp_path / f"run-{number}" for number in range(RUNS)]

    def records() -> dict[Path, bytes]:
        return {path: path.read_bytes() for folder in folders for path in folder.glob("videos/ball-seed*.json")}

    def start_worker(name: str) -> subprocess.Popen:
        words = ["worker", "--name", name, "--allow", str(tmp_path)]
        return start(*words, environment=served, log=tmp_path / f"{name}.log")

    settings = {PREFECT_API_URL: served["PREFECT_API_URL"], PREFECT_API_AUTH_STRING: CREDENTIALS}
    with ExitStack() as stack:
        stack.enter_context(temporary_settings(settings))
        client = stack.enter_context(get_client(sync_client=True))
        for number, folder in enumerate(folders):
            path = tmp_path / f"night-{number}.yaml"
            path.write_text(MANIFEST % ", ".join(str(JOBS * number + job) for job in range(JOBS)))
            command("submit", str(path), "--run-dir", str(folder), environment=served)
        workers = {name: start_worker(name) for name in WORKERS}
        try:
            wait_for(lambda: len(records()) >= RUNS, 600)
            workers["first"].send_signal(signal.SIGKILL)
            workers["first"].wait()
            before = records()
            workers["first"] = start_worker("first")
            wait_for(lambda: len(records()) >= 3 * RUNS, 600)
            database.control("restart")
            wait_for(lambda: all(run.state.is_final() for run in client.read_flow_runs()), 900)
            runs = client.read_flow_runs()
        finally:
            for worker in workers.values():
                worker.terminate()
        assert [worker.wait(60) for worker in workers.values()] == [0, 0]

    assert len(runs) == RUNS and {run.state.name for run in runs} == {"Completed"}
    after = records()
    assert len(after) == RUNS * JOBS and all(json.loads(record)["status"] == "done" for record in after.values())
    assert {path: after[path] for path in before} == before, "a job that was done before the kill was made again"
    seeds = sorted(json.loads(record)["job"]["seed"] for record in after.values())
    assert seeds == list(range(RUNS * JOBS))
