"""`pusa pipeline` and the stages: with Prefect, without it, and interrupted."""

import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from flows.commands import main
from pusa.errors import ManifestError
from pusa.system.locks import sole_writer
from tests.helpers.processes import wait_for


def test_the_pipeline_without_prefect_and_one_stage_again(short_manifests, capsys):
    folder, run_dir = short_manifests
    assert main(["pipeline", str(folder), "--run-dir", str(run_dir), "--no-prefect"]) == 0
    assert "made: text, image, keyframes, transition, extension, completion" in capsys.readouterr().out
    assert main(["generate", str(folder / "generate.yaml"), "--run-dir", str(run_dir), "--no-prefect"]) == 0
    assert "made already: text, image" in capsys.readouterr().out
    assert main(["check", str(folder / "generate.yaml"), "--run-dir", str(run_dir)]) == 0
    assert "extension: extension, ok" in capsys.readouterr().out


def test_a_pipeline_whose_jobs_wait_for_each_other_is_refused_first(short_manifests, capsys):
    folder, run_dir = short_manifests
    job = "  - {{id: {}, task: extension, video: RUN/videos/{}.mp4, given: [0]}}\n"
    jobs = job.format("a", "b") + job.format("b", "a")
    (folder / "generate.yaml").write_text(f'kind: generate\nmodel: {{weights: "builtin:tiny"}}\njobs:\n{jobs}')
    assert main(["pipeline", str(folder), "--run-dir", str(run_dir), "--no-prefect"]) == 1
    err = capsys.readouterr().err
    assert "a: its input" in err and "no order of the jobs makes that first" in err and not (run_dir / "clips").exists()


def interrupted(run: subprocess.Popen) -> str:
    """Press Ctrl-C, and again as one would: Python drops an interrupt that comes while it is in a finalizer."""
    for _ in range(3):
        os.killpg(run.pid, signal.SIGINT)
        try:
            return run.communicate(timeout=60)[0]
        except subprocess.TimeoutExpired:
            continue
    run.kill()
    pytest.fail(f"still there after three interrupts: {run.communicate()[0][-2000:]}")


def test_ctrl_c_in_a_terminal_ends_the_run_and_its_server(short_manifests, made):
    """The terminal signals the whole process group, Prefect's temporary server too, were it in it."""
    folder, run_dir = short_manifests
    endless = (folder / "finetune.yaml").read_text().replace("\nsteps: 2", "\nsteps: 100000")
    (folder / "finetune.yaml").write_text(endless)
    run_dir.mkdir(exist_ok=True)
    (run_dir / "latents").symlink_to(made / "latents")
    command = [sys.executable, "-m", "flows", "finetune", str(folder / "finetune.yaml"), "--run-dir", str(run_dir)]
    home = {**os.environ, "PREFECT_HOME": str(run_dir.parent / "prefect")}
    run = subprocess.Popen(
        command, env=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
    )
    wait_for(lambda: run.poll() is not None or (run_dir / "metrics.jsonl").exists(), 300)
    assert run.poll() is None, run.stdout.read()
    out = interrupted(run)
    assert run.returncode == 130 and "run the same command again to resume" in out
    port = re.search(r"temporary server on http://127.0.0.1:(\d+)", out)[1]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(port)), timeout=5)
    with sole_writer(run_dir / "checkpoints"):
        pass  # the trainer has ended too


@pytest.mark.parametrize("folder, run", [("a\udcff", "run"), ("a", "run\udcff")])
def test_paths_that_prefect_cannot_record_are_refused_in_a_sentence(tmp_path, capsys, folder, run):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "ingest.yaml").write_text("kind: ingest\nsource: clips\n")
    assert main(["ingest", str(tmp_path / folder / "ingest.yaml"), "--run-dir", str(tmp_path / run)]) == 1
    assert "since it is not UTF-8: rename it, or use --no-prefect" in capsys.readouterr().err


def test_the_message_of_an_error_can_be_recorded_whatever_name_is_in_it():
    assert str(ManifestError("a\udcff is missing")).encode() == rb"a\udcff is missing"
