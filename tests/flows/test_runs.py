"""Runs on a server are found by what `pusa submit` prints."""

from types import SimpleNamespace
from uuid import uuid4

from prefect.client.schemas.objects import FlowRun
from prefect.states import Scheduled

from flows.runs import find_run


def test_a_part_of_the_id_finds_a_run_that_is_not_due_yet():
    run = FlowRun(id=uuid4(), name="generate studio/generate.yaml, 5 jobs", flow_id=uuid4(), state=Scheduled())

    def read(*, flow_run_filter, **_):
        due = flow_run_filter.expected_start_time
        return [run] if due is not None and due.before_ is None else []

    assert find_run(SimpleNamespace(read_flow_runs=read), str(run.id)[:8]) is run
