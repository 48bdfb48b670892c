"""How far a run is, read off its files: every state, who works, how long it takes, and the command."""

import fcntl
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from flows.commands import main
from flows.commands.status import follow
from pusa.errors import MediaError
from pusa.generate.latents import save_verified
from pusa.generate.ledger import LATER, STATE, WORK
from pusa.generate.listed import JOBS, listed_jobs
from pusa.generate.stage import generate
from pusa.generate.status import StatusReader
from pusa.generate.summary import Status, describe_seconds
from pusa.generate.time_left import HOUR
from pusa.system import disk
from pusa.system.files import own_digest, read_object
from pusa.system.locks import LOCKS_FOLDER, note_holder, open_lock, try_lock
from tests.helpers.stub_model import StubModel, manifest_of

IDS = ("a", "b", "c", "d", "e")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    jobs = [{"id": id, "seed": i} for i, id in enumerate(IDS[:-1])]
    missing = {"id": "e", "task": "image_to_video", "image": folder / "none.png"}
    assert generate(manifest_of(*jobs, missing), folder, StubModel).made == ["a", "b", "c", "d"]
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """Return the videos' folder of a run whose job `e` fails; the other four are done."""
    return Path(shutil.copytree(finished / "videos", tmp_path / "videos"))


def edit(path, **changes):
    record = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({**record, "sha256": own_digest(record)}))


def leave(run, id, *ends):
    """Remove all finished files of a job but those with these ends."""
    for path in run.glob(f"{id}.*"):
        if not path.name.endswith(ends or ("nothing",)):
            path.unlink()


def keys_of(run, id):
    (job,) = (job for job in listed_jobs(run)[0] if job.id == id)
    return job


def held(run, id):
    lock = open_lock(run / LOCKS_FOLDER / f"{id}.lock")
    assert try_lock(lock, fcntl.LOCK_EX, wait=False)
    note_holder(lock)
    return lock


def save_state(run, id, done, total):
    facts = {"jobs": json.dumps([keys_of(run, id).latents_key]), "done": str(done), "total": str(total)}
    save_verified(run / WORK / f"0{STATE}", {"z": torch.zeros(1)}, facts)


def test_every_state_is_read_off_the_files(run):
    leave(run, "b")
    leave(run, "c", ".safetensors")
    save_state(run, "b", 3, 12)
    (run / "of-an-earlier-manifest.mp4").write_bytes(b"video")
    status = StatusReader(run).read()
    assert status.jobs == {"a": "done", "b": "sampling", "c": "sampled", "d": "done", "e": "failed"}
    assert status.counts == {"pending": 0, "sampling": 1, "drafted": 0, "sampled": 1, "done": 2, "failed": 1}
    assert "none.png" in status.failed["e"] and status.earlier == 1
    assert not status.running and not status.ended
    lines = "\n".join(status.lines())
    assert (
        "1 more video there is" in lines
        and "  e: " in lines
        and status.summary().startswith("5 jobs: 1 sampling, 1 sampled")
    )


def test_a_flipped_bit_makes_a_video_not_done_and_latents_useless(run):
    reader = StatusReader(run)
    assert reader.read().jobs["a"] == "done"
    for end, state in ((".mp4", "sampled"), (".latents.safetensors", "pending")):
        content = bytearray((run / f"a{end}").read_bytes())
        content[-9] ^= 1
        (run / f"a{end}").write_bytes(content)
        assert reader.read().jobs["a"] == state


@pytest.mark.parametrize("what", ["record", "one value", "record of another job", "failure of another job"])
def test_files_that_somebody_edited_show_no_state_that_is_not_there(run, what):
    if what == "record":
        (run / "a.json").write_text('{"status": "done", "key": 3, "video_sha256": null}')
    elif what == "one value":
        (run / "a.json").write_text((run / "a.json").read_text().replace('"steps": 1', '"steps": 2'))
    elif what == "record of another job":
        (run / "a.json").write_bytes((run / "b.json").read_bytes())
    else:
        edit(run / "a.json", status="failed", error="old", job={"id": "a"})
    assert StatusReader(run).read().jobs["a"] == "sampled"


@pytest.mark.parametrize("list_is_old", [True, False])
def test_a_failure_that_an_earlier_version_recorded_is_still_shown(run, list_is_old):
    record, listed = read_object(run / "e.json"), read_object(run / WORK / JOBS)
    settings = {key: value for key, value in record["job"].items() if key not in LATER}
    edit(run / "e.json", job=settings)
    if list_is_old:
        for row in listed["jobs"]:
            row["settings"] = {key: value for key, value in row["settings"].items() if key not in LATER}
        edit(run / WORK / JOBS, jobs=listed["jobs"])
    status = StatusReader(run).read()
    assert status.jobs["e"] == "failed" and "none.png" in status.failed["e"]
    edit(run / "e.json", job={**settings, "levels": "staircase(2)"})
    assert StatusReader(run).read().jobs["e"] == "pending", "the job was changed since it failed"


def test_a_job_that_is_held_is_running_also_where_it_failed_before(run):
    leave(run, "b")
    save_state(run, "b", 3, 12)
    with held(run, "b"), held(run, "e"):
        status = StatusReader(run).read()
        assert status.jobs["e"] == "pending" and not status.failed and not status.ended
        assert status.running.keys() == {"b", "e"}
        assert status.running["b"].startswith("3 of 12 steps saved, process (")
        assert status.summary().startswith("5 jobs: 2 at work, 3 done") and f"{'at work':<10}{2:>8}" in status.lines()
        assert status.as_json()["at_work"] == 2 and status.as_json()["states"]["sampling"] == 1
        assert not re.search(r"since .*[+-]\d\d:\d\d", "\n".join(status.lines())), "the time is this machine's"
    assert not StatusReader(run).read().running


def test_jobs_that_one_process_makes_together_take_one_line():
    running = {**dict.fromkeys(["a1", "a2", "a3", "a4"], "process (7 on host)"), "b": "process (8 on host)"}
    lines = Status({}, {}, running, 0, None).lines()
    assert lines[-2:] == ["  process (7 on host): 4 jobs, a1, a2, a3, ...", "  process (8 on host): b"]


def timed(run, ids, ended, begun, seconds=10.0):
    """Let jobs have ended at these times, after a command began."""
    os.utime(run / WORK / JOBS, (begun, begun))
    for id, end in zip(ids, ended, strict=True):
        edit(run / f"{id}.json", seconds={"sample": seconds * 0.8, "decode": seconds * 0.2})
        os.utime(run / f"{id}.json", (end, end))


def test_the_time_left_follows_from_the_pace_of_the_last_hour(run):
    now = 1e9
    leave(run, "c")
    leave(run, "d")
    timed(run, "ab", (now - 30, now - 20), begun=now - 60)  # two jobs of 10 s in 40 s
    reader = StatusReader(run, lambda: now)
    assert reader.read().seconds_left == pytest.approx(40)
    assert "time left: 40 s, once a run continues" in reader.read().lines()
    with held(run, "c"):
        assert reader.read().seconds_left == pytest.approx(60)  # they were all that was made in 60 s
    save_state(run, "c", 1, 2)
    os.utime(run / WORK / f"0{STATE}", (now - 20, now - 20))  # half a job more
    assert reader.read().seconds_left == pytest.approx(15 * 40 / 25)
    timed(run, "ab", (now - 2 * HOUR, now - 2 * HOUR), begun=now - 3 * HOUR)
    (run / WORK / f"0{STATE}").unlink()
    assert reader.read().seconds_left == pytest.approx(HOUR)  # it does not grow while nobody works
    with held(run, "c"):
        assert reader.read().seconds_left == pytest.approx(20)  # nothing was made in the last hour: one worker
        assert "time left: 20 s" in reader.read().lines()


def test_what_was_made_before_the_last_command_began_says_nothing_of_its_pace(run):
    now = 1e9
    leave(run, "d")
    timed(run, "abc", (now - 1000, now - 990, now - 10), begun=now - 20)
    with held(run, "d"):
        assert StatusReader(run, lambda: now).read().seconds_left == pytest.approx(20)


def test_a_sampled_job_takes_the_time_of_decoding_and_untimed_jobs_an_unknown_one(run):
    now = 1e9
    leave(run, "d", ".safetensors")
    timed(run, "abc", (now - 20, now - 10, now), begun=now - 30)
    reader = StatusReader(run, lambda: now)
    assert reader.read().seconds_left == pytest.approx(2)
    (run / "d.latents.safetensors").rename(run / WORK / "d.latents.safetensors")
    os.utime(run / WORK / "d.latents.safetensors", (now, now))  # 8 of its 10 s, too, were made in these 30 s
    assert reader.read().seconds_left == pytest.approx(2 * 30 / 38)
    for id in "abc":
        edit(run / f"{id}.json", seconds=None)
    assert reader.read().seconds_left is None


def test_a_job_whose_key_is_not_known_yet_is_done_if_its_record_has_its_settings(tmp_path):
    jobs = [{"id": "a"}, {"id": "b", "task": "extension", "video": tmp_path / "videos/a.mp4", "given": [0]}]
    run = generate(manifest_of(*jobs), tmp_path, StubModel).videos
    assert keys_of(run, "b").key is None
    assert StatusReader(run).read().jobs == {"a": "done", "b": "done"}
    edit(run / "b.json", job={})
    assert StatusReader(run).read().jobs["b"] == "pending"


def test_the_command_prints_a_table_or_json_and_refuses_what_is_not_a_run(run, tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "done             4" in out and "  e: " in out
    assert main(["status", str(tmp_path), "--json", "--watch"]) == 0  # all are done or failed
    read = json.loads(capsys.readouterr().out)
    assert read["states"]["done"] == 4 and read["failed"].keys() == {"e"} and read["jobs"]["a"] == "done"
    (run / WORK / JOBS).write_text("{}")
    assert main(["status", str(tmp_path)]) == 1
    assert "missing or damaged" in capsys.readouterr().err
    assert main(["status", str(tmp_path / "none")]) == 1
    assert "is not the folder of a generate run: " in capsys.readouterr().err
    with pytest.raises(MediaError):
        StatusReader(tmp_path / "none").read()


@pytest.mark.parametrize("on_terminal", [False, True])
def test_watching_prints_each_change_and_ends_when_all_are_done_or_failed(run, capsys, on_terminal):
    video = (run / "a.mp4").read_bytes()
    (run / "a.mp4").unlink()
    steps = iter([lambda: None, lambda: (run / "a.mp4").write_bytes(video)])
    follow(StatusReader(run).read, False, True, on_terminal, lambda seconds: next(steps)())
    assert next(steps, None) is None
    out = capsys.readouterr().out
    if on_terminal:  # drawn three times, at the same place
        assert out.count("\x1b[11A") == 2 and out.count("\njobs") == 3 and out.endswith("\n\x1b[K\n")
    else:
        first, last = out.splitlines()
        assert first.startswith("5 jobs: 1 sampled, 3 done, 1 failed, ") and last == "5 jobs: 4 done, 1 failed"


def test_times_read_well():
    texts = [describe_seconds(s) for s in (0, 59.4, 59.6, 3600, 3 * 3600 + 65, 47.4 * 3600, 52 * 3600)]
    assert texts == ["0 s", "59 s", "1 min", "1 h 00 min", "3 h 01 min", "47 h 24 min", "2 days 4 h"]


def test_a_run_that_waits_for_room_on_the_disk_says_so(run, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 0.4 * disk.GIB)
    assert StatusReader(run).read().as_json()["paused"] == f"0.4 GiB free of 1 in {run}"
    assert "paused" not in StatusReader(run).read().summary()  # nothing is left to make
    leave(run, "a")
    status = StatusReader(run).read()
    assert f"paused: 0.4 GiB free of 1 in {run}" in status.lines()
    assert status.summary().endswith(f"paused: 0.4 GiB free of 1 in {run}")
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 2 * disk.GIB)
    assert StatusReader(run).read().paused == ""
