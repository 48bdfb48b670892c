"""`pusa watch` follows a run by the server's words, and by the files of its folder."""

import json
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, Log, TaskRun
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed

from flows.following import follow
from pusa.generate.ledger import WORK
from pusa.generate.listed import JOBS, JOBS_VERSION
from pusa.system.files import own_digest


def client_of(run, flow):
    """Return what answers as a server that has one run, of the flow of a name; None: of a deleted one."""

    def read_flow(_):
        if flow is None:
            raise ObjectNotFound(None)
        return SimpleNamespace(name=flow)

    return SimpleNamespace(
        read_flow_run=lambda _: run, read_flow_runs=lambda **_: [], read_logs=lambda *_, **__: [], read_flow=read_flow
    )


@pytest.mark.parametrize("flow", ["generate", "pipeline", "ingest", "precompute", "finetune", None])
def test_the_jobs_of_a_run_that_makes_videos_are_shown(flow, tmp_path, capsys):
    content = {"version": JOBS_VERSION, "weights": {}, "min_free_gib": 0.0, "jobs": []}
    (tmp_path / "videos" / WORK).mkdir(parents=True)
    (tmp_path / "videos" / WORK / JOBS).write_text(json.dumps(content | {"sha256": own_digest(content)}))
    # As `pusa submit` and schedules give them: an option that was not given is not among them.
    given = {"manifest": {}, "run_dir": str(tmp_path)}
    run = FlowRun(name="run", flow_id=uuid4(), parameters=given, state=Completed())
    assert follow(client_of(run, flow), run, on_terminal=False, pause=lambda: None) == 0
    assert ("0 jobs: 0 done" in capsys.readouterr().out) == (flow in ("generate", "pipeline"))


def test_the_lines_of_a_step_begin_with_its_name(capsys):
    run = FlowRun(name="run", flow_id=uuid4(), state=Completed())
    step = TaskRun(id=uuid4(), name="loop, job 5", task_key="make", dynamic_key="0")
    ended = {"name": "prefect", "level": 20, "message": "Finished in state Completed()", "flow_run_id": run.id}
    client, asked = client_of(run, "ingest"), []
    now = datetime.now(UTC)
    client.read_logs = lambda *_, **__: [
        Log(**ended, timestamp=now, task_run_id=step.id),
        Log(**ended, timestamp=now + timedelta(seconds=1)),
    ]
    client.read_task_runs = lambda **which: asked.append(which) or [step]
    assert follow(client, run, on_terminal=False, pause=lambda: None) == 0
    lines = [line[9:] for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == ["loop, job 5: Finished in state Completed()", "Finished in state Completed()"]
    assert len(asked) == 1
