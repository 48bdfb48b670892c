"""The trainer as child processes: what they get, how they end, how that is reported, and that none is left behind."""

import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import yaml
from torch import multiprocessing

from flows import steps
from flows.commands import build_app, main, stages
from flows.launch import (
    PUSA,
    is_trainer,
    last_lines,
    launch,
    run_child,
    run_trainer,
    trainer_environment,
    write_error,
    write_result,
)
from pusa.errors import StageError, TableError, TrainingError
from pusa.finetune.stage import Finetuned, finetune
from pusa.manifest.loading import load_manifest
from pusa.manifest.models import FinetuneManifest, ModelSpec
from pusa.manifest.training import Lora, Parallel, Partial, Validation
from pusa.system.files import read_json
from pusa.system.locks import sole_writer
from tests.helpers.processes import command_line, descendants, is_alive, python, wait_for

TINY = ModelSpec(weights="builtin:tiny")
TWO = Parallel(processes=2)
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
inner = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(999)"
inner = subprocess.Popen([sys.executable, "-c", inner], stdout=subprocess.PIPE)
inner.stdout.readline()
print(os.getpid(), inner.pid, flush=True)
time.sleep(999)
"""


def numbers_in(path: Path) -> list[int]:
    """Return the process numbers that a script printed, once its line is whole."""
    text = path.read_text() if path.exists() else ""
    return [int(word) for word in text.split()] if text.endswith("\n") else []


# Any child process


def test_a_module_in_the_current_folder_takes_no_librarys_place_in_a_child(tmp_path):
    for name in ("flows", "random", "yaml"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('code of the current folder ran')")
    done = subprocess.run([*PUSA, "check", "none.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "code of" not in done.stderr and "none.yaml" in done.stderr


def test_output_is_kept_and_its_last_line_is_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    log = tmp_path / "launch/log.txt"
    for number in (1, 2, 3):
        script = f"import sys; print('step {number}'); print('\\x1b[2Jdone', file=sys.stderr)"
        assert run_child(python(script), log, os.environ) == 0
    assert sorted(log.read_text().splitlines()) == ["\x1b[2Jdone", "step 3"]
    assert "step 2" in log.with_name("log.1.txt").read_text()
    assert "step 3" in last_lines(log) and "\\x1b[2Jdone" in last_lines(log)
    assert caplog.messages and not any("\x1b" in message for message in caplog.messages)


def test_much_output_is_logged_as_a_line_now_and_then(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    script = "for i in range(100_000): print(i, 'x' * 100)"
    assert run_child(python(script), tmp_path / "log.txt", os.environ) == 0
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 100_000
    assert 1 <= len(caplog.messages) <= 20 and caplog.messages[-1].startswith("99999 ")


@pytest.mark.parametrize("code, ended", [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", -9)])
def test_the_exit_code_or_signal_is_returned(tmp_path, code, ended):
    assert run_child(python(code), tmp_path / "log.txt", os.environ) == ended


def test_a_child_that_ignores_sigterm_is_killed_with_all_its_children(tmp_path):
    log, stop = tmp_path / "log.txt", threading.Event()
    stopper = threading.Thread(target=lambda: (wait_for(lambda: len(numbers_in(log)) == 2), stop.set()))
    stopper.start()
    with pytest.raises(TrainingError, match="resume from its last checkpoint"):
        run_child(python(STUBBORN), log, os.environ, stop, grace=0.5)
    stopper.join()
    wait_for(lambda: not any(map(is_alive, numbers_in(log))))


def test_processes_that_a_child_leaves_behind_are_ended(tmp_path):
    code = (
        "import subprocess, sys; inner = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(999)']); "
        "print(inner.pid, flush=True)"
    )
    assert run_child(python(code), tmp_path / "log.txt", os.environ) == 0
    wait_for(lambda: not is_alive(numbers_in(tmp_path / "log.txt")[0]))


def test_a_child_ends_with_a_launcher_that_is_killed(tmp_path):
    log = tmp_path / "log.txt"
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(999)"
    begin = "import os, sys; from pathlib import Path; from flows.launch import run_child"
    launcher = subprocess.Popen(python(f"{begin}; run_child({python(child)!r}, Path({str(log)!r}), os.environ)"))
    (pid,) = wait_for(lambda: numbers_in(log))
    assert is_alive(pid)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    wait_for(lambda: not is_alive(pid))


def test_a_child_starts_without_a_fork_of_python(tmp_path):
    """A fork can crash in a process that has trained: see `bound_to_parent`."""
    forks: list[int] = []
    os.register_at_fork(before=lambda: forks.append(1))
    assert run_child(python("pass"), tmp_path / "log.txt", os.environ) == 0
    assert not forks


# A script in the trainer's place: its arguments are the trainer's


@pytest.fixture
def latents(made) -> Path:
    """A table of twelve clips."""
    return made / "latents"


def recipe(latents: Path, **changes) -> FinetuneManifest:
    settings = {"steps": 3, "batch_size": 4, "learning_rate": 1e-3, "checkpoint_every": 2, "density": "uniform"}
    return FinetuneManifest(latents=latents, base=TINY, **{**settings, **changes})


@pytest.mark.parametrize(
    "manifest",
    [
        FinetuneManifest(base=TINY),
        FinetuneManifest(
            base=TINY, latents="RUN/here", train=Lora(method="lora", alpha=3), validation=Validation(device="cpu")
        ),
        FinetuneManifest(base={"weights": "some/where"}, train=Partial(method="partial", names=("*",)), parallel=TWO),
    ],
)
def test_the_trainer_gets_the_same_manifest(manifest, tmp_path):
    with pytest.raises(ChildProcessError, match=r"ended with exit code 0; the end of (?s:.*)printed nothing"):
        launch(manifest, tmp_path, pusa=python("pass"))
    assert load_manifest(tmp_path / "launch/finetune.yaml", tmp_path, "finetune") == manifest.resolve_paths(tmp_path)


def test_the_trainer_gets_the_overrides(tmp_path):
    with pytest.raises(ChildProcessError) as caught:
        overrides = {"learning_rate": "2e-5", "levels": "ptss(0.1)"}
        launch(FinetuneManifest(base=TINY), tmp_path, overrides, pusa=python("import sys; print(*sys.argv[1:])"))
    (words,) = str(caught.value).splitlines()[1:]
    command, bound, _ = build_app().parse_args(words.split())
    assert command is stages.finetune and bound.arguments["override"] == overrides
    assert is_trainer(bound.arguments["result"])
    assert bound.arguments["no_prefect"] and bound.arguments["run_dir"] == tmp_path


@pytest.mark.parametrize("error", [TableError("no rows"), StageError("busy")])
def test_an_error_of_the_input_comes_back_as_its_class_and_is_not_retried(tmp_path, error):
    end = tmp_path / "end.json"
    write_error(end, error)
    write_error(end, TableError("of another rank, later"))
    script = f"import shutil, sys; shutil.copy({str(end)!r}, sys.argv[-1]); raise SystemExit(1)"
    with pytest.raises(type(error), match=str(error)) as caught:
        launch(FinetuneManifest(base=TINY), tmp_path, pusa=python(script))
    assert not worth_retrying(caught.value)


def test_a_defect_of_the_trainer_is_not_retried(tmp_path):
    end = tmp_path / "end.json"
    for error in (OSError("no route"), RuntimeError("CUDA"), MemoryError()):  # these may heal
        write_error(end, error)
    assert not end.exists()
    write_error(end, AttributeError("no attribute 'x'\nmore"))
    write_error(end, TableError("of another rank, later"))
    write_result(end, None)
    script = f"import shutil, sys; shutil.copy({str(end)!r}, sys.argv[-1]); raise SystemExit(1)"
    with pytest.raises(TrainingError, match=r"^the trainer has a defect, AttributeError: no attribute 'x'; ") as caught:
        launch(FinetuneManifest(base=TINY), tmp_path, pusa=python(script))
    assert not worth_retrying(caught.value)


def test_any_other_end_names_the_signal_and_is_retried(tmp_path):
    script = "import os; print('boom', flush=True); os.kill(os.getpid(), 9)"
    with pytest.raises(ChildProcessError, match=r"SIGKILL; the end of .*launch/log.txt:\n  boom") as caught:
        launch(FinetuneManifest(base=TINY), tmp_path, pusa=python(script))
    assert worth_retrying(caught.value)


def worth_retrying(error: Exception) -> bool:
    class State:
        def result(self, raise_on_failure):
            return error

    return steps.is_worth_retrying(steps.finetune, None, State())


def test_a_result_comes_back_whole_but_an_error_wins(tmp_path):
    end = tmp_path / "end.json"
    result = Finetuned(tmp_path / "checkpoints/3", tmp_path / "metrics.jsonl", 3, 3, 0, None)
    write_result(end, result)
    script = f"import shutil, sys; shutil.copy({str(end)!r}, sys.argv[-1])"
    assert launch(FinetuneManifest(base=TINY), tmp_path, pusa=python(script)) == result
    write_error(end, TableError("but"))
    write_result(end, result)
    assert read_json(end) == {"error": {"type": "TableError", "message": "but"}}


@pytest.mark.parametrize("end", ["[1]", "7", '{"error": 3}', '{"result": {"steps": 1}}', "[" * 100_000, '{"resu'])
def test_a_result_of_another_shape_is_none(tmp_path, end):
    script = f"import sys; open(sys.argv[-1], 'w').write({end!r}); print('done')"
    with pytest.raises(ChildProcessError, match="ended with exit code 0"):
        launch(FinetuneManifest(base=TINY), tmp_path, pusa=python(script))


def test_no_file_of_the_launcher_is_written_through_a_link(tmp_path):
    folder, mine = tmp_path / "launch", tmp_path / "mine"
    (folder / "log.1.txt").mkdir(parents=True)
    (folder / ".lock").touch()
    for name in ("log.txt", "end.json", "finetune.yaml", "store-x"):
        (folder / name).symlink_to(mine)  # to a file that does not exist: it would be made
    with pytest.raises(ChildProcessError, match=r"log.txt:\n  done"):
        launch(FinetuneManifest(base=TINY), tmp_path, pusa=python("print('done')"))
    assert not mine.exists() and (folder / "log.txt").read_text() == "done\n"


def test_a_run_has_one_launcher(tmp_path):
    with sole_writer(tmp_path / "launch"), pytest.raises(StageError, match="another process"):
        launch(FinetuneManifest(base=TINY), tmp_path, pusa=python("pass"))


def test_several_processes_share_the_cores_and_use_the_loopback_interface():
    cores = len(os.sched_getaffinity(0))
    assert trainer_environment(1, {"HOME": "/"}) == {"HOME": "/"}
    assert trainer_environment(2 * cores, {"HOME": "/"}) == {
        "HOME": "/", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    ours = {"OMP_NUM_THREADS": "5", "GLOO_SOCKET_IFNAME": "eth7"}
    assert trainer_environment(2, ours) == {**ours, "NCCL_SOCKET_IFNAME": "lo"}


@pytest.mark.parametrize("text", ["steps", "=3", ""])
def test_an_override_has_a_key_and_a_value(text, capsys):
    assert main(["finetune", "m.yaml", "--override", text]) == 2
    assert "is not KEY=VALUE" in capsys.readouterr().err


# The real trainer


def test_the_trainer_writes_the_error_that_ends_it(latents, tmp_path):
    (tmp_path / "finetune.yaml").write_text(recipe(latents).model_dump_json())
    end = tmp_path / "end.json"
    files = [str(tmp_path / "finetune.yaml"), "--run-dir", str(tmp_path), "--result", str(end)]
    assert main(["finetune", *files, "--no-prefect", "--override", "nonsense=1"]) == 1
    error = read_json(end)["error"]
    assert error["type"] == "ManifestError" and "--override nonsense" in error["message"]


@pytest.mark.parametrize("kind", [AttributeError, OSError])
def test_the_trainer_writes_the_defect_that_ends_it(latents, tmp_path, monkeypatch, kind):
    def fail(*_):
        raise kind("of this test")

    monkeypatch.setattr("pusa.finetune.stage.finetune", fail)
    manifest, end = tmp_path / "finetune.yaml", tmp_path / "end.json"
    manifest.write_text(recipe(latents).model_dump_json())
    with pytest.raises(kind):
        run_trainer(manifest, tmp_path, result_file=end)
    assert end.exists() == (kind is AttributeError)
    if end.exists():
        assert read_json(end) == {"defect": "AttributeError: of this test"}


@pytest.fixture
def forked_ranks(monkeypatch):
    """Fork the ranks from this process: a new one takes long to start."""
    monkeypatch.setattr(
        multiprocessing, "start_processes", partial(multiprocessing.start_processes, start_method="fork")
    )


def test_an_error_of_the_input_comes_back_from_forked_ranks(latents, tmp_path, forked_ranks, capfd):
    manifest, end = tmp_path / "finetune.yaml", tmp_path / "end.json"
    manifest.write_text(recipe(latents, parallel=TWO, batch_size=3).model_dump_json())
    assert run_trainer(manifest, tmp_path, result_file=end) == 1
    message = "batch_size 3 is not a multiple of the 2 processes with data"
    assert read_json(end) == {"error": {"type": "TrainingError", "message": message}}
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_rank_that_is_killed_is_named_and_the_others_are_ended(latents, tmp_path, forked_ranks, monkeypatch, capsys):
    def rank_of(rank, *_):
        if rank == 0:
            (tmp_path / "pid").write_text(f"{os.getpid()}\n")
            threading.Event().wait()
        wait_for(lambda: numbers_in(tmp_path / "pid"))
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("flows.launch._run_rank", rank_of)
    manifest = tmp_path / "finetune.yaml"
    manifest.write_text(recipe(latents, parallel=TWO).model_dump_json())
    assert run_trainer(manifest, tmp_path, result_file=tmp_path / "end.json") == 128 + signal.SIGKILL
    assert "process 2 of 2 ended first, with -9" in capsys.readouterr().err
    assert not any(map(is_alive, numbers_in(tmp_path / "pid")))


@pytest.mark.slow  # the same with forked ranks is above
def test_an_error_of_the_input_comes_back_from_several_ranks(latents, tmp_path):
    with pytest.raises(TrainingError, match=r"^batch_size 3 is not a multiple of the 2 processes with data$"):
        launch(recipe(latents, parallel=TWO, batch_size=3), tmp_path)
    assert "Traceback" not in (tmp_path / "launch/log.txt").read_text()


def listening(pids: list[int]) -> set[str]:
    """Return the addresses, as the kernel writes them, at which processes listen for TCP connections."""
    sockets = {os.readlink(link) for pid in pids for link in fds(pid) if os.path.lexists(link)}
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    lines = [line.split() for table in tables for line in table]
    return {line[1].split(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in sockets}


def fds(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/fd").iterdir())


def ranks_of(pids: list[int]) -> list[int]:
    return [pid for pid in pids if "multiprocessing.spawn" in command_line(pid)]


def start_endless(manifest: FinetuneManifest, run_dir: Path) -> subprocess.Popen:
    """Start a training by its command, and wait until it writes a checkpoint newer than those before."""
    last = run_dir / "checkpoints/last"
    before = os.readlink(last) if last.is_symlink() else None
    path = run_dir / "finetune.yaml"
    path.write_text(manifest.model_dump_json())
    command = [sys.executable, "-m", "flows", "finetune", str(path), "--run-dir", str(run_dir), "--no-prefect"]
    run = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: run.poll() is not None or (last.is_symlink() and os.readlink(last) != before))
    assert run.poll() is None, run.stderr.read()
    return run


def test_two_ranks_listen_on_loopback_alone_end_with_the_launcher_and_resume(latents, tmp_path):
    run = start_endless(recipe(latents, parallel=TWO, steps=100_000), tmp_path)
    pids = descendants(run.pid)
    assert len(ranks_of(pids)) == 2 and len(pids) == 4, "a trainer, its resource tracker and two ranks"
    assert listening(pids) <= {"0100007F"} and len(list((tmp_path / "launch").glob("store-*"))) == 1
    run.send_signal(signal.SIGKILL)
    run.wait()
    wait_for(lambda: not any(map(is_alive, pids)))

    done = int(os.readlink(tmp_path / "checkpoints/last"))
    result = finetune(recipe(latents, steps=done + 2), tmp_path)  # one process goes on: two take long to start
    assert result.checkpoint.is_dir() and (result.steps, result.trained_steps) == (done + 2, 2)


@pytest.mark.slow  # what follows from a rank's end is tested with forks above
def test_the_end_of_a_rank_ends_the_others_and_the_launcher(latents, tmp_path):
    run = start_endless(recipe(latents, parallel=TWO, steps=100_000), tmp_path)
    pids = descendants(run.pid)
    os.kill(ranks_of(pids)[1], signal.SIGKILL)
    error = run.communicate(timeout=120)[1]
    assert run.returncode == 1 and "the trainer ended with SIGKILL" in error and "process 2 of 2 ended first" in error
    assert not any(map(is_alive, pids)) and not list((tmp_path / "launch").glob("store-*"))


# Several machines: not run here, but their scripts hold the same command

NODES = ("infra/slurm/finetune.sbatch", "infra/k8s/finetune.yaml")


def torchrun(text: str) -> list[str]:
    """Return the words of a script's only torchrun command, which may span several lines."""
    (command,) = re.findall(r"^[^#\n]*\b(torchrun (?:.*\\\n)*.*)$", text, re.MULTILINE)
    return shlex.split(command.replace("\\\n", " "))


def script_of(path: Path) -> str:
    """Return the script itself, or the one in the container's arguments."""
    if path.suffix != ".yaml":
        return path.read_text()
    (job,) = (part for part in yaml.safe_load_all(path.read_text()) if part["kind"] == "Job")
    return job["spec"]["template"]["spec"]["containers"][0]["args"][0]


@pytest.mark.parametrize("name", NODES)
def test_the_scripts_for_several_machines_run_a_valid_command(root, name):
    from torch.distributed.run import get_args_parser

    words = torchrun(script_of(root / name))
    launcher = get_args_parser().parse_args([re.sub(r"\$\{?GPUS\}?", "8", word) for word in words[1:]])
    assert launcher.rdzv_backend == "c10d" and launcher.module and launcher.training_script == "flows"
    command, bound, _ = build_app().parse_args(launcher.training_script_args)
    assert command is stages.finetune and bound.arguments["run_dir"] and bound.arguments["no_prefect"]


def test_slurm_and_kubernetes_run_the_same_command(root):
    slurm, k8s = (torchrun(script_of(root / name)) for name in NODES)
    assert [word for word in slurm if not word.startswith("$")] == [word for word in k8s if not word.startswith("$")]


def test_the_scripts_are_valid_shell(root):
    for name in NODES:
        subprocess.run(["bash", "-n"], input=script_of(root / name), text=True, check=True)
    assert "set -euo pipefail" in script_of(root / NODES[0]) and "set -euo pipefail" in script_of(root / NODES[1])
