"""`pusa doctor`: what its checks find on pretended machines and in damaged runs, and the repair of a server's slots."""

import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import httpx
import pytest
from prefect import task
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import ConcurrencyLeaseHolder, FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Running

from flows.doctor.findings import Level, examine, note, ok, problem
from flows.doctor.folders import folder_checks
from flows.doctor.machine import OWN_APP, PREFECTS_APP, ServerProcess, check_packages, end_process, find_servers
from flows.doctor.service import check_runs, service_checks
from pusa.system.files import own_digest, sha256_file, write_json
from pusa.system.locks import sole_writer
from tests.helpers.processes import is_alive, python, wait_for


def levels(lines) -> list[tuple[str, str]]:
    return [(line.check, str(line.finding.level)) for line in lines]


def test_a_check_that_fails_is_a_problem_and_the_others_go_on():
    def fails():
        yield ok("a")
        raise OSError("broken")

    lines = list(examine({"one": fails, "two": lambda: [ok("b")]}))
    assert levels(lines) == [("one", "ok"), ("one", "problem"), ("two", "ok")]
    assert "OSError: broken" in lines[1].finding.text and len(lines[1].lines()) == 1
    assert json.loads(json.dumps(lines[0].as_json())) == {"check": "one", "level": "ok", "text": "a", "mend": ""}


def test_a_line_of_the_report_is_followed_by_what_to_do():
    (line,) = examine({"disk": lambda: [problem("full", "make room")]})
    assert line.lines() == ["problem  disk: full", "         -> make room"]


def test_nothing_is_repaired_unless_that_is_asked_for():
    done = []

    def repair():
        done.append(1)
        return "it is whole"

    def fails():
        raise OSError("read-only")

    checks = {"a": lambda: [problem("torn", "mend it", repair)], "b": lambda: [note("torn", "mend it", fails)]}
    assert levels(examine(checks)) == [("a", "problem"), ("b", "note")] and not done
    first, second = examine(checks, repair=True)
    assert done and first.finding == note("torn; repaired: it is whole")
    assert second.finding == problem("torn; the repair failed: read-only", "mend it")


# This machine.


@pytest.mark.parametrize(
    "versions, words",
    [
        ({}, ""),
        ({"prefect": "3.8.8", "sqlalchemy": "2.1.9"}, "prefect 3.8.8 is installed; .*no schedule fires"),
        ({"torch": ""}, "torch is not installed"),
        ({"pydantic": "1.10"}, "pydantic 1.10 is installed; pusa requires"),
    ],
)
def test_packages_that_do_not_fit(versions, words):
    from importlib.metadata import version

    found = list(check_packages(lambda name: versions.get(name, None) if name in versions else version(name)))
    assert re.search(words, " ".join(each.text for each in found))
    assert {each.level for each in found} == {Level.PROBLEM if words else Level.OK}


@pytest.mark.parametrize(
    "command, parent, parents_command, temporary, orphaned",
    [
        (f"uvicorn {OWN_APP}", 1, "/sbin/init", False, True),
        (f"uvicorn {OWN_APP}", 900, "/usr/lib/systemd/systemd --user", True, True),
        (f"uvicorn {PREFECTS_APP}", 1, "/sbin/init", True, True),
        (f"uvicorn {PREFECTS_APP}", 1, "/sbin/init", False, False),  # prefect server start --background
        (f"uvicorn {OWN_APP}", 1, "python /usr/bin/pusa server", False, False),  # in a container
        (f"uvicorn {OWN_APP}", 900, "python -m flows generate", True, False),
        (f"uvicorn {OWN_APP}", 900, "bash", True, False),
    ],
)
def test_a_server_whose_starter_is_gone(command, parent, parents_command, temporary, orphaned):
    assert ServerProcess(5, "", command, parent, parents_command, temporary).is_orphaned == orphaned


def test_a_server_of_this_machine_is_found_and_ended():
    sleeper = "import signal, time; print(1, flush=True); time.sleep(999)"
    command = [*python(sleeper), "uvicorn", PREFECTS_APP]
    variables = {**os.environ, "PREFECT__SERVER_EPHEMERAL": "1"}
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        (found,) = (server for server in find_servers(Path("/proc")) if server.pid == process.pid)
        assert found.parent == os.getpid() and found.temporary
        end_process(ServerProcess(found.pid, f"{found.identity}0", "", 1, "", True))  # another process with its number
        assert is_alive(found.pid)
        end_process(found)
    assert process.returncode == -15


def test_a_process_that_outlives_its_end_is_not_said_to_have_ended(monkeypatch):
    sent = []
    monkeypatch.setattr("flows.doctor.machine.is_running", lambda identity: True)
    monkeypatch.setattr("flows.doctor.machine.END_SECONDS", 0)
    monkeypatch.setattr("os.kill", lambda pid, number: sent.append(number))
    with pytest.raises(TimeoutError, match="process 12 still runs 0 s after SIGKILL"):
        end_process(ServerProcess(12, "a", "", 1, "", True))
    assert sent == [15, 9]


# The server.


@pytest.mark.parametrize("age, level", [(timedelta(seconds=5), "ok"), (timedelta(days=2, seconds=5), "problem")])
def test_a_run_on_another_machine_without_heartbeats_is_a_problem_however_old_it_is(age, level):
    state = Running()
    state.timestamp = datetime.now(UTC) - age
    run = FlowRun(name="r", flow_id=uuid4(), state=state, infrastructure_pid="elsewhere:1:2:3:4")
    nothing = httpx.Response(200, json={"events": []}, request=httpx.Request("POST", "http://server"))
    client = SimpleNamespace(read_flow_runs=lambda **_: [run], _client=SimpleNamespace(post=lambda *_, **__: nothing))
    (line,) = examine({"runs": lambda: check_runs(client)})
    assert line.finding.level == level


# The folder of a run.


def add_job(videos: Path, id: str, status: str = "done") -> None:
    """Write a video and its record."""
    (videos / f"{id}.mp4").write_bytes(id.encode())
    record = {"id": id, "status": status, "video_sha256": sha256_file(videos / f"{id}.mp4")}
    write_json(videos / f"{id}.json", {**record, "sha256": own_digest(record)})


def report(run: Path, repair: bool = False) -> str:
    return "\n".join(text for line in examine(folder_checks(run), repair) for text in line.lines())


def test_what_is_torn_in_a_run_is_named_and_nothing_of_it_is_changed(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    for id in ("good", "cut", "torn", "failed"):
        add_job(videos, id, "failed" if id == "failed" else "done")
    (videos / "cut.mp4").write_bytes(b"")
    (videos / "torn.json").write_text((videos / "torn.json").read_text().replace("done", "gone"))
    (videos / "alone.mp4").touch()
    (tmp_path / "checkpoints/00000020").mkdir(parents=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    text = report(tmp_path, repair=True)
    assert "2 files are not as they were written: 'cut.mp4', 'torn.json'" in text
    assert "1 videos have no record: 'alone.mp4'" in text and "checkpoint.json is missing or torn" in text
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_a_whole_run_has_no_problem_and_a_torn_table_is_one(own_run):
    assert "problem" not in report(own_run) and "nobody works there" in report(own_run)
    shard = next((own_run / "latents").glob("*.parquet"))
    os.truncate(shard, 10)
    assert f"problem  tables of {own_run}: {own_run / 'latents'}: a shard is not as it was written" in report(own_run)
    (own_run / "clips/index.json").write_text("{")
    assert f"{own_run / 'clips/index.json'} is damaged" in report(own_run)


def test_unfinished_files_are_removed_only_when_nobody_works_there(tmp_path):
    left = tmp_path / "clips/.partial-0123-a.mp4"
    with sole_writer(tmp_path / "clips"):
        left.touch()
        text = report(tmp_path, repair=True)
        assert f"clips/.lock is held by another process ({os.getpid()} on" in text and "killed writers" not in text
    assert "1 unfinished files of killed writers" in report(tmp_path) and left.exists()
    assert "repaired: they were removed" in report(tmp_path, repair=True) and not left.exists()


def test_a_folder_that_does_not_exist_is_a_problem(tmp_path):
    assert "problem  work of" in report(tmp_path / "none") and not (tmp_path / "none").exists()


# A real server: a slot of a task that has ended, one that nobody holds, and one whose holder and server are killed.


@pytest.mark.slow
def test_slots_that_nobody_holds_are_found_and_freed(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_API")}
    environment["PREFECT_HOME"] = str(tmp_path / "home")

    def start(port: str) -> tuple[subprocess.Popen, str]:
        command = [sys.executable, "-m", "flows", "server", "--port", port]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        return process, next(m[1] for line in process.stdout if (m := re.search(r"PREFECT_API_URL=(\S+)", line)))

    @task
    def chunk() -> None:
        pass

    process, url = start("0")
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        checks = service_checks(client)
        (unlimited,) = examine({"gpu slots": checks["gpu slots"]})
        assert unlimited.finding.level == "note" and "pusa deploy --gpu-steps" in unlimited.finding.mend
        client.create_concurrency_limit("gpu", 4)
        ended = client.create_task_run(chunk, None, "0", state=Completed())
        running = client.create_task_run(chunk, None, "1", state=Running())
        for run in (ended, running):
            holder = ConcurrencyLeaseHolder(type="task_run", id=run.id)
            client.increment_concurrency_slots_with_lease(["tag:gpu"], 1, "concurrency", 60, holder)
        client.increment_concurrency_slots(["tag:gpu"], 1, "concurrency")

        def taken() -> int:
            return client.read_global_concurrency_limit_by_name("tag:gpu").active_slots

        gpu = {"gpu slots": checks["gpu slots"]}
        found = " ".join(line.finding.text for line in examine(gpu))
        assert f"task run {ended.id}, which has ended" in found and "1 of 4 slots are taken" in found
        assert taken() == 3
        assert "problem" not in dict(levels(examine(gpu, repair=True))).values() and taken() == 1
        assert levels(examine(gpu)) == [("gpu slots", "ok")]
        process.kill()
        process.wait()
        process, _ = start(url.split(":")[2].split("/")[0])
        try:
            assert taken() == 1
            wait_for(lambda: taken() == 0, 300)  # the lease was in PREFECT_HOME, and ends after a minute
        finally:
            process.terminate()
            process.wait()
    assert process.returncode == 0
