"""Schedules fire: the server plans runs ahead of an active schedule, and a served flow runs when its time has come.

With Prefect 3.8 and SQLAlchemy 2.1 the server's scheduler failed at each turn, and everything else worked.
"""

import os
import re
import subprocess
import sys
from datetime import timedelta

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.settings import PREFECT_API_URL, temporary_settings

from tests.helpers.processes import wait_for

SERVED = """
import sys
from pathlib import Path
from prefect import flow

@flow
def nightly(path: str) -> None:
    Path(path).write_text("ran")

if __name__ == "__main__":
    nightly.serve(name="each-second", interval=1, parameters={"path": sys.argv[1]})
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Yield the address of the API of `pusa server`, and an environment that names it."""
    home = tmp_path_factory.mktemp("home")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_API")}
    command = [sys.executable, "-m", "flows", "server", "--port", "0"]
    with subprocess.Popen(
        command, env={**environment, "PREFECT_HOME": str(home)}, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        found = next((m for line in process.stdout if (m := re.search(r"PREFECT_API_URL=(\S+)", line))), None)
        assert found, "the server ended before it was up"
        yield found[1], {**environment, "PREFECT_HOME": str(home), "PREFECT_API_URL": found[1]}
        process.terminate()


def test_an_active_schedule_has_runs_ahead_and_a_paused_one_has_none(server):
    with temporary_settings({PREFECT_API_URL: server[0]}), get_client(sync_client=True) as client:
        flow = client.create_flow_from_name("nightly")
        schedule = IntervalSchedule(interval=timedelta(hours=24))
        deployments = {
            active: client.create_deployment(
                flow, str(active), schedules=[DeploymentScheduleCreate(schedule=schedule, active=active)]
            )
            for active in (False, True)
        }
        ahead = wait_for(client.read_flow_runs)
    assert {run.deployment_id for run in ahead} == {deployments[True]}
    assert all(run.state.is_scheduled() for run in ahead)


@pytest.mark.slow
def test_a_served_flow_runs_when_its_time_has_come(server, tmp_path):
    script, ran = tmp_path / "served.py", tmp_path / "ran"
    script.write_text(SERVED)
    with subprocess.Popen([sys.executable, str(script), str(ran)], env=server[1], cwd=tmp_path) as process:
        wait_for(lambda: ran.exists() or process.poll() is not None)
        process.terminate()
    assert ran.read_text() == "ran"
