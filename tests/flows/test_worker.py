"""What a worker runs and how it ends runs, without a server."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import httpx
import pytest
from prefect.client.schemas.objects import FlowRun, WorkerStatus
from prefect.client.schemas.responses import SetStateStatus
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from prefect.states import AwaitingRetry, Cancelled, Cancelling, Completed, Crashed, Failed, Pending, Running, Scheduled

from flows import flow_run as flow_run_module
from flows import runs, watch
from flows import worker as worker_module
from flows.admission import environment, require_own_flow, sole_worker
from flows.commands import main
from flows.deployments import heartbeat_automation
from flows.runs import GIVEN_UP, MOST_TIMES, TAKEN_UP, WORKER, cancel, connected, exit_code, find_run, will_be_taken_up
from flows.states import WITH_FAILURES
from flows.worker import Worker
from pusa.errors import PusaError
from pusa.system.processes import identity, is_running
from tests.helpers.processes import wait_for
from tests.helpers.stand_in_server import answering

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


# What a worker runs.


def deployment(**values):
    return SimpleNamespace(
        **{"name": "on-demand", "entrypoint": "flows.ingest.ingest", "pull_steps": [], "storage_document_id": None}
        | values
    )


def test_each_flow_of_pusa_is_run_by_its_entry_point():
    names = ("ingest", "precompute", "finetune", "generate", "pipeline")
    assert [require_own_flow(deployment(entrypoint=f"flows.{name}.{name}")) for name in names] == list(names)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"entrypoint": "os.system"}, "runs 'os.system'; this worker runs flows.ingest.ingest, "),
        ({"entrypoint": "/tmp/flows/ingest.py:ingest"}, "runs '/tmp/flows/ingest.py:ingest'"),
        ({"entrypoint": "flows.ingest.ingest "}, "runs 'flows.ingest.ingest '"),
        ({"entrypoint": "flows.ingest.steps"}, "runs 'flows.ingest.steps'"),
        ({"entrypoint": None}, "runs None"),
        ({"pull_steps": [{"prefect.deployments.steps.run_shell_script": {"script": "id"}}]}, "has pull steps"),
        ({"storage_document_id": uuid4()}, "has a storage block"),
    ],
)
def test_a_deployment_of_other_code_is_refused(values, words):
    with pytest.raises(PusaError, match="make the deployment with `pusa deploy`") as raised:
        require_own_flow(deployment(**values))
    assert words in str(raised.value)


def test_the_environment_of_runs_has_what_the_worker_allows(tmp_path):
    ours = {"HOME": "/h", "PREFECT__FLOW_RUN_ID": "x", "PUSA_WEBHOOK_HOSTS": "ours"}
    theirs = environment(ours, [tmp_path, Path("/data")], ["/bin/mail", "-s", "a b"], [])
    assert theirs == {
        "HOME": "/h",
        "PUSA_WEBHOOK_HOSTS": "ours",
        "PUSA_ALLOWED_FOLDERS": f"{tmp_path}{os.pathsep}/data",
        "PUSA_NOTIFY_COMMAND": json.dumps(["/bin/mail", "-s", "a b"]),
    }


@pytest.mark.parametrize(
    "options",
    [
        ["--name", "a/b"],
        ["--name", ""],
        ["--limit", "0"],
        ["--limit", "201"],
        ["--allow", "/none/such"],
        ["--notify", "no-such-program now"],
        ["--notify", "'"],
        ["--webhook-host", "http://a"],
    ],
)
def test_a_wrong_option_of_the_worker_is_a_mistake_in_the_command_line(options, capsys):
    assert main(["worker", *options]) == 2
    assert options[0] in capsys.readouterr().err


def test_a_name_has_one_worker_on_a_machine(tmp_path):
    with temporary_settings({PREFECT_HOME: tmp_path}), sole_worker("one"):
        with sole_worker("two"):
            pass
        with (
            pytest.raises(PusaError, match=rf"process \({os.getpid()} .*is a worker named 'one' already"),
            sole_worker("one"),
        ):
            pass


def test_settings_that_were_spoilt_are_not_a_lost_server(tmp_path, monkeypatch, capsys):
    (tmp_path / "prefect.toml").touch()
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert flow_run_module.main([str(uuid4()), "generate"]) == 1  # a worker would start it again without end
    finally:
        signal.signal(signal.SIGTERM, before)
    problem = capsys.readouterr().err
    assert "prefect.toml" in problem and "--no-prefect" not in problem


# Whose process is dead.


def test_a_process_is_known_by_its_number_and_start():
    with subprocess.Popen(SLEEP) as process:
        name = identity(process.pid)
        assert is_running(name)
        assert is_running(name + "1") is False  # the number was used again
        assert is_running(name.replace(":", ":another-boot", 1)) is False
        assert is_running(f"elsewhere{name}") is None
        assert is_running(name.replace(":", ":", 2).replace(name.split(":")[2], "1")) is None  # another container
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert is_running(name) is False  # it was not reaped yet
    assert is_running(name) is False


@pytest.mark.parametrize("name", ["", ":", "host:12", "a:b:c:d:e", ":::::"])
def test_what_is_not_a_process_is_unknown(name):
    assert is_running(name) is None


# A worker and a server that only takes notes.


class Notes:
    """The runs of a server, and the states that they were set to."""

    api_url = httpx.URL("http://user:secret@server/api")

    def __init__(self, *runs):
        self.runs = {run.id: run for run in runs}
        self.states = []
        self.earlier = []  # the states that runs had before
        self.inner = []  # the stages of a pipeline
        self.granted = SetStateStatus.ACCEPT

    def read_flow_run_states(self, id):
        return [*self.earlier, self.runs[id].state]

    def read_flow_run(self, id):
        return self.runs[id]

    def read_flow_runs(self, flow_run_filter, **_):
        if flow_run_filter.parent_flow_run_id:
            return self.inner
        if flow_run_filter.name:
            return [run for run in self.runs.values() if run.name in flow_run_filter.name.any_]
        return list(self.runs.values())

    def set_flow_run_state(self, id, state, force=False):
        known = self.runs | {run.id: run for run in self.inner}
        self.states.append((known[id].name, state.name, state.message, force))
        return SimpleNamespace(status=self.granted)

    def request(self, *_, **__):
        pass

    def read_workers_for_work_pool(self, _):
        return [
            SimpleNamespace(name="online", status=WorkerStatus.ONLINE),
            SimpleNamespace(name="w1", status="OFFLINE"),
        ]


def run(name, state, pid=None, **labels):
    state.timestamp = datetime.now(UTC)
    return FlowRun(
        name=name,
        work_pool_name="pusa",
        flow_id=uuid4(),
        deployment_id=uuid4(),
        state=state,
        infrastructure_pid=pid,
        labels=labels,
    )


def serving(notes):
    return Worker(notes, "w1", "pusa", 1, {})


def gone(seconds=0):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        name = identity(process.pid)
    return name


OURS = {WORKER: "w1"}


def test_the_dead_runs_of_a_workers_predecessor_are_reported():
    dead, alive = gone(), identity(os.getpid())
    notes = Notes(
        run("dead", Running(), dead, **OURS),
        run("alive", Running(), alive, **OURS),
        run("elsewhere", Running(), f"other{dead}", **OURS),
        run("theirs", Running(), dead, **{WORKER: "w2"}),
        run("by hand", Running(), dead),
        run("begun", Pending(message="taken by worker 'w1'")),
        run("begun by another", Pending(message="taken by worker 'w2'")),
    )
    serving(notes)._report_dead()
    assert [(name, state, force) for name, state, _, force in notes.states] == [
        ("dead", "Crashed", False),
        ("begun", "Crashed", False),
    ]


def test_a_run_that_never_began_is_reported_once():
    never = run("never", Pending(message="taken by worker 'w1'"))
    never.state.timestamp -= worker_module.LONGEST_START + timedelta(seconds=1)
    notes = Notes(never)
    serving(notes)._report_dead()
    assert notes.states == [("never", "Crashed", "it did not begin within 10 minutes", False)]


def silent(name="r", age=60, **labels):
    """Return a run that the automation of heartbeats marked as crashed, some seconds ago."""
    marked = run(name, Crashed(message=heartbeat_automation().actions[0].message), **labels)
    marked.state.timestamp -= timedelta(seconds=age)
    return marked


def test_a_crashed_run_is_taken_up_and_at_last_given_up(caplog):
    again = silent("again", **{TAKEN_UP: MOST_TIMES - 1})
    often = silent("often", **{TAKEN_UP: MOST_TIMES})
    over = run("over", Crashed(message=f"{GIVEN_UP}it crashed"))
    notes = Notes(again, often, over)
    assert [each.name for each in serving(notes)._crashed()] == ["again"]
    ((name, state, message, force),) = notes.states
    assert (name, state, force) == ("often", "Crashed", True)
    assert message.startswith(f"{GIVEN_UP}it crashed {MOST_TIMES + 1} times, the last time because no heartbeat")
    assert not will_be_taken_up(run("often", Crashed(message=message)))


def test_a_run_whose_server_stood_still_while_it_was_put_back_has_not_crashed(caplog):
    back = silent(**{TAKEN_UP: MOST_TIMES})
    notes = Notes(back)
    notes.earlier = [AwaitingRetry()]
    notes.earlier[0].timestamp = back.state.timestamp - timedelta(seconds=100)
    assert list(serving(notes)._crashed()) == [back] and not notes.states


@pytest.mark.parametrize(("labels", "age", "waits"), [({WORKER: "w2"}, 0, True), (OURS, 0, False), ({}, 30, False)])
def test_the_worker_of_a_run_without_heartbeats_may_object_that_its_process_lives(labels, age, waits):
    notes = Notes(silent(age=age, **labels))
    assert len(list(serving(notes)._crashed())) == (not waits)


def test_a_crashed_run_goes_before_those_that_are_due_also_between_heartbeats(monkeypatch):
    crashed, due = run("crashed", Crashed()), run("due", Scheduled())
    notes = Notes(crashed)
    notes.get_scheduled_flow_runs_for_work_pool = lambda *_, **__: [SimpleNamespace(flow_run=due)]
    begun = []
    ours = serving(notes)
    ours._next_heartbeat = math.inf
    monkeypatch.setattr(ours, "_start", lambda each: begun.append(each.name))
    ours._turn()
    assert begun == ["crashed", "due"]


@contextmanager
def with_process(notes, flow_run):
    """Yield a worker that has started a run as a process that sleeps."""
    process = subprocess.Popen(SLEEP, start_new_session=True)
    ours = serving(notes)
    ours.started[flow_run.id] = worker_module.Started(flow_run, process)
    try:
        yield ours, process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("now", "stops"),
    [
        (run("r", Running(), **OURS), False),
        (run("r", Completed(), **OURS), False),  # it ends by itself
        (run("r", Failed(), **OURS), False),
        (run("r", Crashed(), **OURS), True),
        (run("r", Cancelled(), **OURS), True),
        (run("r", Scheduled(), **OURS), True),
        (run("r", Running(), **{WORKER: "w2"}), True),
        (None, True),  # deleted
    ],
)
def test_the_process_of_a_run_ends_when_the_run_is_not_the_workers_any_more(now, stops):
    before = run("r", Running())
    notes = Notes(*([now.model_copy(update={"id": before.id})] if now else []))
    with with_process(notes, before) as (ours, process):
        ours._follow()
        if stops:
            assert wait_for(lambda: process.poll() is not None)
        else:
            assert ours.started[before.id].kill_at is None


def test_a_run_whose_process_lives_is_running_again_after_its_server_stood_still():
    marked = silent("pipeline", **OURS, **{TAKEN_UP: MOST_TIMES})
    notes = Notes(marked)
    notes.inner = [silent("ingest"), run("precompute", Completed())]
    with with_process(notes, marked) as (ours, process):
        ours._follow()
        assert [(name, state, force) for name, state, _, force in notes.states] == [
            ("pipeline", "Pending", False),  # as for one that is taken up, so that it has one worker
            ("pipeline", "Running", False),
            ("ingest", "Running", True),
        ]
        assert "lives; the server had missed its heartbeats" in notes.states[1][2]
        assert ours.started[marked.id].kill_at is None and process.poll() is None
        del ours.started[marked.id], notes.states[:]
        marked.state = Crashed(message="the place in the deployment's limit was lost")
        assert list(ours._crashed()) == [marked] and not notes.states  # it is not counted


def test_a_run_without_heartbeats_that_another_worker_was_granted_is_left_to_it():
    marked = silent(**OURS)
    notes = Notes(marked)
    notes.granted = SetStateStatus.REJECT
    with with_process(notes, marked) as (ours, process):
        ours._follow()
        assert [name for _, name, *_ in notes.states] == ["Pending"]
        marked.state, marked.labels = Pending(message="taken by worker 'w2'"), {WORKER: "w2"}
        ours._follow()
        assert wait_for(lambda: process.poll() is not None)


def test_a_run_is_running_again_though_the_server_failed_in_between():
    marked = silent(**OURS)
    notes = Notes(marked)
    with with_process(notes, marked) as (ours, _):
        marked.state, ours.started[marked.id].is_reviving = Pending(message="taken by worker 'w1'"), True
        ours._follow()
        ours._follow()
    assert [(name, state) for name, state, *_ in notes.states] == [("r", "Running")]


def test_a_run_that_ended_for_want_of_its_server_is_put_back_also_if_it_was_marked_as_crashed():
    marked = silent(**OURS)
    notes = Notes(marked)
    serving(notes)._settle_one(marked, flow_run_module.SERVER_LOST)
    assert [(name, state, force) for name, state, _, force in notes.states] == [("r", "AwaitingRetry", True)]


@pytest.mark.parametrize(
    ("state", "stopped_by", "then"),
    [
        (Running(), None, ("r", "Crashed", "its process on worker 'w1' ended with signal 9", False)),
        (
            Running(),
            signal.SIGTERM,
            ("r", "AwaitingRetry", "worker 'w1' was ended; the run goes on where it was", True),
        ),
    ],
)
def test_a_run_whose_process_has_ended_is_settled(state, stopped_by, then):
    flow_run = run("r", state, **OURS)
    notes = Notes(flow_run)
    with with_process(notes, flow_run) as (ours, process):
        process.kill()
        process.wait()
        ours.stopped_by = stopped_by
        ours._settle()
    assert notes.states == [then] and not ours.started


def test_a_server_that_is_lost_is_missed_once_and_welcomed_once(caplog):
    caplog.set_level("INFO", "pusa.worker")

    def fail():
        raise httpx.ConnectError("refused")

    ours = serving(Notes())
    assert [ours._try(step) for step in (fail, fail, list, list)] == [False, False, True, True]
    assert caplog.text.count("http://server/api does not answer") == 1
    assert len(caplog.records) == 2 and "answers again, after" in caplog.text


def test_a_server_that_answers_with_an_error_is_not_one_that_does_not_answer(caplog):
    def fail():
        request = httpx.Request("GET", "http://server/api/x")
        httpx.Response(503, request=request).raise_for_status()

    assert not serving(Notes())._try(fail)
    assert caplog.messages == ["http://server/api answers with the error HTTP 503; waiting for it, runs go on"]


# Which run is meant.


@pytest.mark.parametrize("error", [httpx.ReadTimeout(""), httpx.HTTPStatusError("503", request=None, response=None)])
def test_a_server_that_fails_at_a_request_is_a_sentence(error):
    with (
        answering(200, b'"3.9.1"') as address,
        temporary_settings({PREFECT_API_URL: f"{address}/api"}),
        pytest.raises(PusaError, match=r"/api .*did not do what it was asked: \w+; try again$"),
        connected(),
    ):
        raise error


def test_a_run_is_found_by_link_id_and_name():
    latest, earlier = run("twice", Completed()), run("twice", Running())
    notes = Notes(latest, earlier, run("once", Completed()))
    for text in (str(latest.id), f"http://host:4200/runs/flow-run/{latest.id}?tab=Logs", str(latest.id)[-8:].upper()):
        assert find_run(notes, text) is latest
    assert find_run(notes, "twice") is earlier  # the only one that has not ended
    assert find_run(notes, None) is latest
    for text in ("", "%", "none", "\x1b[2J"):
        with pytest.raises(PusaError, match="is not a run; expected the link"):
            find_run(notes, text)
    notes.runs[latest.id].state = Running()
    with pytest.raises(PusaError, match="can be 2 runs"):
        find_run(notes, "twice")


# A run is cancelled.


@pytest.mark.parametrize("now", [Scheduled(), Crashed(message="no heartbeat for 100 s")])
def test_a_run_that_does_not_run_is_cancelled_at_once(now):
    notes = Notes(run("r", now))
    assert cancel(notes, *notes.runs.values()) == "r is cancelled; it was not running"
    assert notes.states == [("r", "Cancelled", "cancelled before it was started", True)]


@pytest.mark.parametrize("now", [Completed(), Failed(message="why"), Cancelled(), Crashed(message=f"{GIVEN_UP}x")])
def test_a_run_that_has_ended_cannot_be_cancelled(now):
    notes = Notes(run("r", now))
    with pytest.raises(PusaError, match="r has ended: "):
        cancel(notes, *notes.runs.values())
    assert not notes.states


@pytest.mark.parametrize(
    ("pid", "labels", "words"),
    [
        (gone, OURS, "r is cancelled: its process had ended before"),
        (None, OURS, "r is cancelled: its worker 'w1' is gone, and its processes with it"),
        (None, {WORKER: "online"}, "its worker 'online' sends heartbeats"),
        (lambda: identity(os.getpid()), OURS, "its process .* runs on this machine"),
        (None, {}, "it was not started by a worker"),
    ],
)
def test_a_run_that_nobody_ends_is_cancelled_if_it_is_certain_that_it_does_not_run(pid, labels, words, monkeypatch):
    monkeypatch.setattr(runs, "CANCEL_SECONDS", 0)
    notes = Notes(run("r", Running(), pid and pid(), **labels))
    try:
        sentence = cancel(notes, *notes.runs.values())
    except PusaError as error:
        sentence = str(error)
    assert re.search(words, sentence)
    assert [name for _, name, *_ in notes.states] == ["Cancelling", "Cancelled"][: 1 + ("is cancelled" in sentence)]


def test_a_run_that_is_deleted_while_it_is_cancelled_is_a_sentence(monkeypatch):
    def deleted(self, id):
        raise ObjectNotFound(Exception())

    monkeypatch.setattr(Notes, "read_flow_run", deleted)
    notes = Notes(run("r", Running()))
    with pytest.raises(PusaError, match="r was deleted on the server while it was being cancelled"):
        cancel(notes, *notes.runs.values())


def test_a_step_of_a_pipeline_notices_that_the_pipeline_is_cancelled(monkeypatch):
    pipeline, stage = run("pipeline", Cancelling(), "p"), run("stage", Running(), "p")
    stage.parent_task_run_id = uuid4()
    notes = Notes(pipeline, stage)
    notes.read_task_run = lambda id: SimpleNamespace(flow_run_id=pipeline.id)
    monkeypatch.setattr(watch, "_runs", {stage.id})
    assert watch._cancelled_run(notes) == "pipeline"
    assert [(name, state) for name, state, *_ in notes.states] == [("stage", "Cancelled"), ("pipeline", "Cancelled")]
    pipeline.state = Running()
    assert watch._cancelled_run(notes) == ""


@pytest.mark.parametrize("label", ["3", "x" * 1000, None, -(10**30), True, 1.5])
def test_a_label_that_somebody_else_wrote_harms_nothing(label):
    crashed = run("r", Crashed(message="no heartbeat"))
    crashed.labels = {TAKEN_UP: label}
    assert list(serving(Notes(crashed))._crashed()) == [crashed]


def test_the_exit_code_of_a_run():
    states = [Completed(), Completed(name=WITH_FAILURES), Cancelled(), Failed(), Crashed()]
    assert [exit_code(run("r", state)) for state in states] == [0, 3, 130, 1, 1]
