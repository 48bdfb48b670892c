import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from flows.cli import build_parser, main
from pusa.manifest.models import KINDS
from pusa.registry import find
from pusa.system.locks import sole_writer
from pusa.tasks import TASKS
from tests.helpers.short_demo import shortened_demo


@pytest.fixture
def short_manifests(root, drawn, tmp_path):
    """A folder of the demo's manifests with a few steps, and a run folder with its data."""
    folder = shortened_demo(root, tmp_path / "manifests", {"steps": 2, "batch_size": 4})
    (tmp_path / "run").mkdir()
    (tmp_path / "run/drawn").symlink_to(drawn)
    return folder, tmp_path / "run"


def test_the_pipeline_without_prefect_and_one_stage_again(short_manifests, capsys):
    folder, run_dir = short_manifests
    assert main(["pipeline", str(folder), "--run-dir", str(run_dir), "--no-prefect"]) == 0
    assert "made: text, image, keyframes, transition, extension, completion" in capsys.readouterr().out
    assert main(["generate", str(folder / "generate.yaml"), "--run-dir", str(run_dir), "--no-prefect"]) == 0
    assert "kept: text, image" in capsys.readouterr().out
    assert main(["check", str(folder / "generate.yaml"), "--run-dir", str(run_dir)]) == 0
    assert "extension: extension, ok" in capsys.readouterr().out


def test_check_names_every_bad_job(short_manifests, capsys):
    folder, run_dir = short_manifests
    text = (
        (folder / "generate.yaml")
        .read_text()
        .replace("box-first.png", "none.png")
        .replace("given: [0, 2, 5]", "given: [9]")
    )
    (folder / "generate.yaml").write_text(text)
    assert main(["check", str(folder / "generate.yaml"), "--run-dir", str(run_dir)]) == 1
    out, err = capsys.readouterr()
    assert (
        "none.png cannot be read" in out
        and "9 is outside the 6 latent frames" in out
        and "text: text_to_video, ok" in out
    )
    assert "2 of 8 jobs cannot be made" in err


@pytest.mark.parametrize(
    "what, names", [("tasks", "keyframes"), ("backbones", "mochi"), ("noise-schedules", "linear_quadratic")]
)
def test_list(capsys, what, names):
    assert main(["list", what]) == 0
    assert names in capsys.readouterr().out.splitlines()


def test_check_refuses_weights_that_are_not_there(tmp_path, capsys):
    path = tmp_path / "finetune.yaml"
    path.write_text('kind: finetune\nbase: {weights: "builtin:tny"}\n')
    assert main(["check", str(path)]) == 1
    assert "unknown built-in model 'builtin:tny'" in capsys.readouterr().err


def test_a_manifest_that_prefect_would_refuse_is_refused_first(short_manifests, capsys):
    folder, run_dir = short_manifests
    jobs = "".join(f"  - {{id: j{i}, task: text_to_video}}\n" for i in range(4000))
    (folder / "many.yaml").write_text(f'kind: generate\nmodel: {{weights: "builtin:tiny"}}\njobs:\n{jobs}')
    assert main(["generate", str(folder / "many.yaml"), "--run-dir", str(run_dir)]) == 1
    assert "use --no-prefect" in capsys.readouterr().err


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


def test_ctrl_c_in_a_terminal_ends_the_run_and_its_server(short_manifests):
    """The terminal signals the whole process group, Prefect's temporary server too, were it in it."""
    folder, run_dir = short_manifests
    endless = (folder / "finetune.yaml").read_text().replace("\nsteps: 2", "\nsteps: 100000")
    (folder / "finetune.yaml").write_text(endless)
    command = [sys.executable, "-m", "flows", "pipeline", str(folder), "--run-dir", str(run_dir)]
    home = {**os.environ, "PREFECT_HOME": str(run_dir.parent / "prefect")}
    run = subprocess.Popen(
        command, env=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
    )
    while not (run_dir / "metrics.jsonl").exists():
        assert run.poll() is None, run.stdout.read()
        time.sleep(0.2)
    out = interrupted(run)
    assert run.returncode == 130 and "the same command goes on from what was finished" in out
    port = re.search(r"temporary server on http://127.0.0.1:(\d+)", out)[1]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(port)), timeout=5)
    with sole_writer(run_dir / "checkpoints"):
        pass  # the trainer has ended too


def test_an_error_is_a_sentence_and_an_exit_code(tmp_path, capsys):
    assert main(["ingest", str(tmp_path / "none.yaml")]) == 1
    assert main(["pipeline", str(tmp_path / "none")]) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.count("pusa: ") == 2


def test_help_names_every_command():
    text = subprocess.run([sys.executable, "-m", "flows", "--help"], capture_output=True, text=True, check=True).stdout
    for command in ("pipeline", "ingest", "precompute", "finetune", "generate", "check", "list", "demo"):
        assert f"  {command} " in text
    assert build_parser().prog == "pusa"


def test_check_tells_what_is_wrong_with_the_rest_of_a_manifest_that_is_no_manifest(tmp_path, capsys):
    (tmp_path / "m.yaml").write_text(
        'kind: generate\nmodel: {weights: "builtin:huge"}\njobs:\n'
        "  - {id: a, task: text_to_video, width: 70}\n  - {id: b, task: text_to_video, sede: 3}\n"
        "  - {id: c, task: completion, video: none.mp4, given: [99, 0]}\n  - {id: a, task: text_to_video}\n"
        "  - {id: d, task: keyframes, frames: {99: {image: none.png}}}\n"
    )
    assert main(["check", str(tmp_path / "m.yaml")]) == 1
    out, err = capsys.readouterr()
    assert "width 70 is not a multiple" in out and "given 99 is outside" in out
    assert "position 99 is outside" in out and "none.png cannot be read" in out
    assert "did you mean 'seed'" in err and "allowed are builtin:tiny" in err and "3 of 3 jobs cannot be made" in err


@pytest.mark.parametrize("task", TASKS)
def test_describe_tells_every_key_of_a_task(task, capsys):
    assert main(["describe", task]) == 0
    out = capsys.readouterr().out
    for key in find(TASKS, task, "task").model_fields:
        assert key == "task" or (f"\n  {key} " in out and find(TASKS, task, "task").model_fields[key].description)
    assert "\n  seed " in out.partition("as every task:")[2]


@pytest.mark.parametrize("kind", KINDS)
def test_describe_tells_every_key_of_a_manifest(kind, capsys):
    assert main(["describe", kind]) == 0
    told = {line.split()[0] for line in capsys.readouterr().out.splitlines()[2:] if line.strip()}
    assert set(KINDS[kind].model_fields) - {"kind"} <= told


def test_describe_knows_the_tasks_there_are(capsys):
    assert main(["describe", "loopy"]) == 1
    assert (
        "unknown name 'loopy'; allowed are ingest, precompute, finetune, generate, text_to_video"
        in capsys.readouterr().err
    )
