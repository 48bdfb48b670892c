"""What `pusa deploy` registers: names, schedules, triggers and parameters; and the events that start them."""

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pytest
from prefect import states
from prefect.client.orchestration import get_client
from prefect.events import emit_event
from prefect.exceptions import ObjectNotFound
from prefect.server.events.schemas.automations import EventTrigger
from prefect.server.events.schemas.events import ReceivedEvent
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.utilities.schema_tools.validation import is_valid

from flows import events
from flows.commands import main
from flows.deployments import (
    AT_REST,
    FLOWS,
    STAGES,
    Folder,
    Times,
    describe_start,
    full_name,
    heartbeat_automation,
    local_timezone,
    on_demand,
    register,
    require_same_manifest,
    scheduled,
    to_prefect,
)
from flows.events import CHECKPOINT_BEST, CHECKPOINT_WRITTEN, announce_checkpoints
from flows.states import ended
from pusa.errors import PartlyFailed, PusaError
from pusa.finetune.measurements import Measurement
from tests.flows.test_schedules import server  # noqa: F401  a fixture
from tests.helpers.processes import wait_for
from tests.helpers.stand_in_server import unused_address

NIGHT = Folder("night", "/m/night", "/r/night")
TIMES = Times("Europe/Berlin", "0 1 * * *", "30 3 * * 6", "*/5 20 * * *")


def deployment(name: str):
    return next(made for made in scheduled(NIGHT, TIMES) if full_name(made) == name)


def test_the_committed_prefect_yaml_is_what_deploy_prints(root, capsys):
    assert main(["deploy", "--print"]) == 0
    assert capsys.readouterr().out == (root / "infra/prefect.yaml").read_text()


def test_a_folder_has_the_deployments_of_the_stages_that_it_has_manifests_of():
    assert {full_name(made): describe_start(made) for made in scheduled(NIGHT, TIMES)} == {
        "ingest/night-nightly": "each day at 01:00, Europe/Berlin",
        "precompute/night-new-clips": "after each ingest",
        "finetune/night-weekly": "each Saturday at 03:30, Europe/Berlin",
        "generate/night-nightly": "cron */5 20 * * *, Europe/Berlin",
        "generate/night-new-checkpoint": "with each new best checkpoint",
    }
    for stage in STAGES:
        alone = scheduled(Folder("night", "/m", "/r", (stage,)), TIMES)
        assert {full_name(made).partition("/")[0] for made in alone} == {stage} - {"precompute"}


def test_scheduled_runs_wait_for_each_other_and_submitted_ones_do_not():
    for made in map(to_prefect, scheduled(NIGHT, TIMES)):
        assert (made.concurrency_limit, made.concurrency_options.collision_strategy) == (1, "ENQUEUE")
    for made in map(to_prefect, on_demand()):
        assert made.concurrency_limit is None


def test_a_deployment_of_another_folder_is_not_replaced():
    made = deployment("generate/night-nightly")

    class Client:
        parameters: dict | None = None

        def read_deployment_by_name(self, name):
            assert name == "generate/night-nightly"
            if self.parameters is None:
                raise ObjectNotFound(Exception())
            return SimpleNamespace(parameters=self.parameters)

    client = Client()
    require_same_manifest(client, made)
    client.parameters = made["parameters"]
    require_same_manifest(client, made)
    client.parameters = {"manifest": {"path": "/other/night/generate.yaml"}}
    with pytest.raises(PusaError, match=r"runs '/other/night/generate.yaml', and not /m/night/generate.yaml; choose"):
        require_same_manifest(client, made)


def test_a_server_that_is_gone_when_a_deployment_is_sent_is_a_sentence():
    with (
        temporary_settings({PREFECT_API_URL: f"{unused_address()}/api", PREFECT_CLIENT_MAX_RETRIES: 0}),
        pytest.raises(PusaError, match="the server did not take the deployment ingest/on-demand: "),
    ):
        register(on_demand()[0])


def test_paused_deployments_start_nothing_by_themselves():
    paused = scheduled(NIGHT, Times("UTC", *["0 1 * * *"] * 3, active=False))
    assert all(describe_start(made).endswith(", paused") for made in paused)
    for made in map(to_prefect, paused):
        assert not any(schedule.active for schedule in made.schedules or ())
        assert not any(trigger.enabled for trigger in made.triggers)


MANIFEST = {"path": "/m/night.yaml", "sha256": "0" * 64}
SUBMITTED = {
    "ingest": {"manifest": MANIFEST, "run_dir": "/r"},
    "precompute": {"manifest": MANIFEST, "run_dir": "/r", "place": None},
    "finetune": {"manifest": MANIFEST, "run_dir": "/r", "overrides": {"steps": "500"}},
    "generate": {"manifest": MANIFEST, "run_dir": "/r", "place": {"gpus": [0, 2]}, "retry_failed": False},
    "pipeline": {**dict.fromkeys(STAGES, MANIFEST), "run_dir": "/r"},
}


@pytest.mark.parametrize("made", [*on_demand(), *scheduled(NIGHT, TIMES)], ids=full_name)
def test_the_schema_of_the_parameters_takes_what_is_submitted_and_nothing_else(made):
    prepared, flow = to_prefect(made), full_name(made).partition("/")[0]
    assert prepared.entrypoint == f"flows.{flow}.{flow}" and prepared.enforce_parameter_schema
    schema = prepared._parameter_openapi_schema.model_dump_for_openapi()
    first = "ingest" if flow == "pipeline" else "manifest"
    for parameters in (SUBMITTED[flow], prepared.parameters):
        assert not parameters or is_valid(parameters, schema)
    for wrong in ({"path": 7}, {"path": "/m", "sha256": "short"}, {"path": "/m", "more": 1}, "/m/night.yaml"):
        assert not is_valid({**SUBMITTED[flow], first: wrong}, schema), wrong


def covers(name: str, event: str, *, flow: str = "", by: str = "", run_dir: str = "") -> bool:
    """Return whether the trigger of a deployment starts with an event of the run of a deployment, or of a folder."""
    (trigger,) = to_prefect(deployment(name)).triggers
    return is_covered(trigger, event, flow, by, run_dir)


def is_covered(trigger, event: str, flow: str, by: str = "", run_dir: str = "") -> bool:
    """Return whether the server counts an event for a trigger."""
    related = [
        {
            "prefect.resource.id": f"prefect.{role}.{uuid4()}",
            "prefect.resource.role": role,
            "prefect.resource.name": text,
        }
        for role, text in (("flow", flow), ("deployment", by))
        if text
    ]
    happened = ReceivedEvent(
        id=uuid4(), occurred=datetime.now(UTC), received=datetime.now(UTC), event=event, related=related,
        resource={"prefect.resource.id": f"pusa.run.{run_dir}" if run_dir else f"prefect.flow-run.{uuid4()}"},
    )  # fmt: skip
    return EventTrigger(**trigger.model_dump(include={"posture", "expect", "match", "match_related"})).covers(happened)


def test_precompute_starts_after_each_ingest_of_its_own_run_folder():
    name = "precompute/night-new-clips"
    assert covers(name, "pusa.ingest.ended", run_dir="/r/night")
    assert not covers(name, "pusa.ingest.ended", run_dir="/r/other")
    assert not covers(name, "pusa.generate.ended", run_dir="/r/night")


def test_generate_starts_with_a_best_checkpoint_of_its_own_run_folder():
    name = "generate/night-new-checkpoint"
    assert covers(name, CHECKPOINT_BEST, run_dir="/r/night")
    assert not covers(name, CHECKPOINT_BEST, run_dir="/r/night2") and not covers(name, CHECKPOINT_BEST, run_dir="/r")
    assert not covers(name, CHECKPOINT_WRITTEN, run_dir="/r/night")


def test_no_run_that_rests_or_has_ended_counts_as_one_without_a_heartbeat():
    def require_all():
        raise PartlyFailed("a part failed")

    makers = ("Completed", "Failed", "Crashed", "Cancelled", "Scheduled", "AwaitingRetry", "AwaitingConcurrencySlot")
    resting = [getattr(states, name)() for name in makers] + [ended("result", require_all)]
    assert {state.name for state in resting} <= set(AT_REST)


def test_the_heartbeats_of_other_flows_are_not_waited_for():
    trigger, beat = heartbeat_automation().trigger, "prefect.flow-run.heartbeat"
    assert all(is_covered(trigger, beat, flow) for flow in FLOWS) and not is_covered(trigger, beat, "nightly-report")


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["{folder}/none"], 1, "is not a folder"),
        (["{folder}"], 1, "has no manifest; expected some of ingest.yaml"),
        (["{folder}/a%b"], 1, "'a%b' cannot begin a deployment's name"),
        (["{folder}/good", "--name", "a\x1bb"], 1, "'a\\x1bb' cannot begin a deployment's name"),
        (["{folder}/n\udcff"], 1, "since it is not UTF-8: rename it\n"),
        (["{folder}/wrong"], 1, "generate.yaml"),
        (["{folder}/good", "--generate-at", "each night"], 1, "'each night' is not a cron expression"),
        (["{folder}/good", "--generate-at", "@daily"], 1, "'@daily' is not a cron expression; expected minute"),
        (["{folder}/good", "--ingest-at", "0 1 * * * 30"], 1, "'0 1 * * * 30' is not a cron expression"),
        (["{folder}/good", "--timezone", "Mars/Base"], 2, "Mars/Base is not the name of a time zone"),
        (["{folder}/good", "--gpu-steps", "0"], 2, "is not a whole number above 0"),
        (["{folder}/good"], 1, "no server is named: start one with `pusa server`"),
    ],
)
def test_what_cannot_be_deployed_is_refused_in_a_sentence(root, tmp_path, capsys, arguments, code, sentence):
    for name in ("a%b", "good", "wrong", "n\udcff"):
        (tmp_path / name).mkdir()
        text = (root / "manifests/tiny-pusa/generate.yaml").read_text() if name != "wrong" else "kind: generate"
        (tmp_path / name / "generate.yaml").write_text(text)
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        assert main(["deploy", *(word.format(folder=tmp_path) for word in arguments)]) == code
    assert sentence in capsys.readouterr().err


def test_the_time_zone_of_the_machine_is_found_or_not_known(tmp_path):
    link = tmp_path / "localtime"
    assert local_timezone({"TZ": ":Europe/Berlin"}, link) == "Europe/Berlin"
    assert local_timezone({"TZ": "CET-1CEST"}, link) is None
    link.symlink_to("/usr/share/zoneinfo/Asia/Tokyo")
    assert local_timezone({}, link) == "Asia/Tokyo"


# The events of a training.


class Training:
    """A run folder with the metrics and checkpoints of a training, a checkpoint every 2 steps."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.steps = folder, 0

    def train(self, *losses: float | None) -> None:
        with (self.folder / "metrics.jsonl").open("a") as file:
            for loss in losses:
                self.steps += 1
                file.write(json.dumps({"step": self.steps, "loss": loss}) + "\n")
                if self.steps % 2 == 0:
                    (self.folder / f"checkpoints/{self.steps:08d}").mkdir(parents=True)


@pytest.fixture
def training(tmp_path, monkeypatch):
    """A training; and what a call of `announce_checkpoints` sends, as (event, step, loss)."""
    sent = []

    def keep(event, resource, payload):
        assert resource["prefect.resource.id"] == f"pusa.run.{tmp_path}" and payload["run_dir"] == str(tmp_path)
        sent.append((event.rpartition(".")[2], payload["step"], payload["loss"]))

    def announced(keep_best=None):
        sent.clear()
        announce_checkpoints(tmp_path, every=2, keep_best=keep_best)
        return list(sent)

    monkeypatch.setattr(events, "emit_event", keep)
    return Training(tmp_path), announced


def test_each_checkpoint_is_announced_once_and_the_best_once(training):
    run, announced = training
    assert announced() == []
    run.train(4.0, 2.0)
    assert announced() == [("written", 2, 3.0), ("best", 2, 3.0)]
    assert announced() == []  # nor by the next run of the flow, which has only the files
    run.train(3.0, 3.0, None, 4.0)
    assert announced() == [("written", 4, 3.0), ("written", 6, 4.0)]
    run.train(2.0, 2.0, 1.0, 1.0, 1.5, 1.5)
    assert announced() == [("written", 8, 2.0), ("written", 10, 1.0), ("written", 12, 1.5), ("best", 10, 1.0)]
    run.train(None, None, 1.0, 1.5)
    assert announced() == [("written", 14, None), ("written", 16, 1.25)]
    (run.folder / events.ANNOUNCED).write_text("torn")
    assert [event for event, *_ in announced()] == ["written"] * 8 + ["best"]


def test_with_held_out_clips_their_loss_says_which_checkpoint_is_the_best(training):
    run, announced = training

    def measure(step: int, loss: float) -> None:
        row = Measurement(step, "k", (0.5,), {"keyframes": (loss,), "extension": (0.0,)}).row()
        with (run.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **row}) + "\n")

    run.train(4.0, 4.0, 2.0, 2.0)
    measure(2, 0.2)
    measure(4, 0.3)
    assert announced("keyframes") == [("written", 2, 0.2), ("written", 4, 0.3), ("best", 2, 0.2)]
    run.train(1.0, 1.0, 3.0, 3.0)
    measure(8, 0.1)
    assert announced("keyframes") == [("written", 6, None), ("written", 8, 0.1), ("best", 8, 0.1)]


def test_an_event_that_cannot_be_sent_costs_a_warning_alone(training, monkeypatch, caplog):
    run, _ = training

    def refuse(*arguments, **named):
        raise RuntimeError("no server")

    monkeypatch.setattr(events, "emit_event", refuse)
    run.train(1.0, 1.0)
    announce_checkpoints(run.folder, every=2)
    events.job_failed(run.folder, "a", "it is torn")
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3 and "no server" in caplog.text


# On a real server.


def facts(client) -> dict[str, dict]:
    """Return what a server knows of the deployments: all that matters for their runs."""
    flows = {flow.id: flow.name for flow in client.read_flows()}
    found = {}
    for made in client.read_deployments():
        automations = client.read_resource_related_automations(f"prefect.deployment.{made.id}")
        found[f"{flows[made.flow_id]}/{made.name}"] = {
            "schedules": [(each.schedule.model_dump(), each.active, each.slug) for each in made.schedules],
            "triggers": [(each.name, each.enabled, each.trigger.model_dump(exclude={"id"})) for each in automations],
            "limit": made.global_concurrency_limit and made.global_concurrency_limit.limit,
            "pull": made.pull_steps or [],
            **made.model_dump(
                include={"concurrency_options", "entrypoint", "parameters", "work_pool_name", "path", "description"}
                | {"enforce_parameter_schema", "parameter_openapi_schema", "paused", "tags", "job_variables"}
            ),
        }
    return found


@pytest.mark.slow
def test_both_ways_to_deploy_make_the_same_and_its_triggers_start_runs(root, server, tmp_path):  # noqa: F811
    folder, run_dir, environment = tmp_path / "studio", tmp_path / "run", server[1]
    folder.mkdir()
    for stage in STAGES:
        (folder / f"{stage}.yaml").write_text((root / f"manifests/tiny/{stage}.yaml").read_text())

    def deploy(*words):
        command = [sys.executable, "-m", "flows", "deploy", str(folder), "--run-dir", str(run_dir), *words]
        return subprocess.run(command, env=environment, cwd=root, check=True, capture_output=True, text=True).stdout

    with temporary_settings({PREFECT_API_URL: server[0]}), get_client(sync_client=True) as client:
        assert "generate/studio-new-checkpoint" in deploy("--timezone", "UTC", "--gpu-steps", "3")
        ours = facts(client)
        assert client.read_concurrency_limit_by_tag("gpu").concurrency_limit == 3
        deploy("--timezone", "UTC")
        assert facts(client) == ours and len(ours) == len(FLOWS) + 5
        assert wait_for(client.read_flow_runs)[0].state.is_scheduled()

        for made in client.read_deployments():
            client.delete_resource_owned_automations(f"prefect.deployment.{made.id}")
            client.delete_deployment(made.id)
        placed = {"PUSA_MANIFESTS": str(folder), "PUSA_RUN_DIR": str(run_dir)}
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file"]
        subprocess.run([*command, root / "infra/prefect.yaml"], env={**environment, **placed}, cwd=root, check=True)
        assert facts(client) == ours

        def started(name):
            made = client.read_deployment_by_name(name)
            return [run for run in client.read_flow_runs() if run.deployment_id == made.id]

        events.stage_ended("ingest", run_dir)
        emit_event(CHECKPOINT_BEST, {"prefect.resource.id": f"pusa.run.{run_dir}"})
        (precompute,) = wait_for(lambda: started("precompute/studio-new-clips"))
        (generate,) = wait_for(lambda: started("generate/studio-new-checkpoint"))
        assert precompute.parameters["run_dir"] == generate.parameters["run_dir"] == str(run_dir)
