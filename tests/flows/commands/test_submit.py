"""What `pusa submit` sends to a server, and what it refuses before it asks one."""

import json
import time
from contextlib import contextmanager
from datetime import datetime
from hashlib import sha256
from types import SimpleNamespace
from uuid import UUID

import pytest
from cyclopts import Token
from prefect.client.schemas.objects import WorkerStatus
from prefect.exceptions import ObjectNotFound

from flows.commands import main
from flows.commands.submit import to_time
from flows.generate import generate
from flows.pipeline import pipeline
from pusa.backbones import find_family
from pusa.generate.ledger import InputHashes, Ledger
from pusa.generate.listed import list_jobs
from pusa.manifest.loading import load_manifest

NOW = datetime.fromisoformat("2026-11-29T20:00:00+01:00")
RUN = UUID("12345678-0000-0000-0000-000000000000")


@pytest.fixture
def berlin(monkeypatch):
    """Have the machine in Berlin's time zone."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def time_of(text: str, now: datetime = NOW) -> datetime:
    return to_time(datetime, [Token(value=text)], now)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("22:30", "2026-11-29T22:30:00+01:00"),
        ("20:00", "2026-11-30T20:00:00+01:00"),
        ("7:05", "2026-11-30T07:05:00+01:00"),
        ("2026-12-01T22:30+05:00", "2026-12-01T22:30:00+05:00"),
        ("2026-11-29T19:30Z", "2026-11-29T19:30:00+00:00"),
    ],
)
def test_a_time_is_the_next_one(text, expected, berlin):
    assert time_of(text) == datetime.fromisoformat(expected)


@pytest.mark.parametrize(
    "now, expected",
    [
        ("2026-10-24T23:00:00+02:00", "2026-10-25T03:30:00+01:00"),
        ("2026-03-28T23:00:00+01:00", "2026-03-29T03:30:00+02:00"),
    ],
)
def test_a_time_of_the_clock_is_that_of_its_own_day(now, expected, berlin):
    assert time_of("03:30", datetime.fromisoformat(now)) == datetime.fromisoformat(expected)


@pytest.mark.parametrize("text", ["25:00", "12:60", "soon", "", "2026-13-01"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match="is not a time; expected 22:30, or such as"):
        time_of(text)


def test_a_time_that_is_over_is_refused():
    with pytest.raises(ValueError, match="2026-11-29T19:00Z is over: it is 2026-11-29T20:00:00"):
        time_of("2026-11-29T19:00Z")


class Client:
    """The part of Prefect's client that is used, which keeps what it was asked for."""

    def __init__(self, workers) -> None:
        self.workers, self.sent = workers, []

    def read_deployment_by_name(self, name):
        if name.startswith("precompute/"):
            raise ObjectNotFound(Exception())
        return SimpleNamespace(id=name, work_pool_name="pusa")

    def create_flow_run_from_deployment(self, deployment, **settings):
        self.sent.append((deployment, settings))
        return SimpleNamespace(id=RUN)

    def read_workers_for_work_pool(self, pool):
        return [SimpleNamespace(status=status) for status in self.workers]


@pytest.fixture
def client(monkeypatch):
    """A server with all deployments but that of precompute, and a worker."""
    client = Client([WorkerStatus.OFFLINE, WorkerStatus.ONLINE])

    @contextmanager
    def connected():
        yield client

    monkeypatch.setattr("flows.runs.connected", connected)
    return client


@pytest.fixture
def manifest(tmp_path):
    """A manifest of two jobs."""
    path = tmp_path / "night" / "jobs.yaml"
    path.parent.mkdir()
    path.write_text(
        "kind: generate\nmodel: {weights: builtin:tiny}\ndefaults: {width: 64, height: 64, num_frames: 7}\njobs:\n"
        "  - {id: a, task: text_to_video, prompt: a ball}\n  - {id: b, task: text_to_video, prompt: a cube}\n"
    )
    return path


def test_a_manifest_is_sent_as_a_path_and_a_hash(client, manifest, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["submit", "night/jobs.yaml", "--run-dir", "runs/a", "--place", "processes=2", "--retry-failed"]) == 0
    ((deployment, settings),) = client.sent
    assert deployment == "generate/on-demand" and settings["name"] == "generate night/jobs.yaml, 2 jobs"
    parameters = json.loads(json.dumps(settings["parameters"]))  # it is JSON
    assert parameters == {
        "manifest": {"path": str(manifest), "sha256": sha256(manifest.read_bytes()).hexdigest()},
        "run_dir": str(tmp_path / "runs/a"),
        "place": {"processes": 2},
        "retry_failed": True,
    }
    generate.validate_parameters(parameters)  # the worker takes them
    out = capsys.readouterr().out
    assert f"/runs/flow-run/{RUN}" in out and "pusa watch 12345678" in out and "to start now" in out
    assert "waits for a worker" not in out


def test_the_jobs_of_a_run_are_finished_by_a_worker_until_a_time(client, manifest, tmp_path, capsys):
    run = tmp_path / "runs" / "night"
    manifest.write_text(manifest.read_text() + "drafts: {steps: 1}\n")
    assert main(["submit", str(manifest), "--run-dir", str(run), "--until", "07:00"]) == 0
    ledger = Ledger(run / "videos", find_family().geometry, {}, InputHashes())
    (run / "videos").mkdir(parents=True)
    list_jobs(ledger, {}, load_manifest(manifest, run))
    assert main(["finish", str(run), "b", "--submit", "--until", "08:00"]) == 0
    assert main(["finish", str(run), "c", "--submit"]) == 1 and "'c'" in capsys.readouterr().err
    assert main(["finish", str(run), "b", "--submit", "--no-prefect"]) == 1
    (_, drafts), (deployment, finish) = client.sent
    assert drafts["parameters"]["until"] == "07:00"
    assert (deployment, finish["name"]) == ("generate/on-demand", "finish night")
    generate.validate_parameters(finish["parameters"])  # the worker takes them
    assert finish["parameters"]["finish"]["ids"] == ["b"] and finish["parameters"]["until"] == "08:00"


def test_without_a_worker_the_run_waits_and_the_user_is_told(client, manifest, capsys):
    client.workers = [WorkerStatus.OFFLINE]
    assert main(["submit", str(manifest), "--at", "2999-01-01T01:00"]) == 0
    out = capsys.readouterr().out
    assert "to start at 2999-01-01 01:00:00" in out and "start one with `pusa worker`" in out
    assert client.sent[0][1]["state"].state_details.scheduled_time.year == 2999


def test_a_folder_is_sent_to_the_pipeline(client, root, tmp_path):
    assert main(["submit", str(root / "manifests/tiny"), "--run-dir", str(tmp_path)]) == 0
    ((deployment, settings),) = client.sent
    assert deployment == "pipeline/on-demand"
    pipeline.validate_parameters(settings["parameters"])


@pytest.mark.parametrize(
    "words, problem",
    [
        (["--override", "steps=3"], "--override is for finetune; "),
        (["--place", "processes=0"], "is not a place"),
        (["--at", "yesterday"], "is not a time"),
    ],
)
def test_what_does_not_fit_the_manifest_is_refused(client, manifest, words, problem, capsys):
    assert main(["submit", str(manifest), *words]) in (1, 2)
    assert problem in capsys.readouterr().err and not client.sent


def test_problems_of_the_manifest_show_before_a_server_is_asked(monkeypatch, manifest, capsys):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    manifest.write_text(manifest.read_text().replace("text_to_video, prompt: a cube", "text_to_vdeo, prompt: a cube"))
    assert main(["submit", str(manifest)]) == 1
    assert "jobs.1" in capsys.readouterr().err
    manifest.write_text("kind: generator\n")
    assert main(["submit", str(manifest)]) == 1
    assert "kind is 'generator'; allowed are ingest" in capsys.readouterr().err
    assert main(["submit", str(manifest.with_name("none.yaml"))]) == 1
    assert "none.yaml cannot be read" in capsys.readouterr().err


def test_a_server_that_was_not_set_up_names_the_command(client, tmp_path, capsys):
    path = tmp_path / "precompute.yaml"
    path.write_text("kind: precompute\nmodel: {weights: builtin:tiny}\n")
    assert main(["submit", str(path)]) == 1
    assert "the server has no deployment precompute/on-demand; make it with `pusa deploy`" in capsys.readouterr().err
