"""The trainer as child processes: what it gets, how its end comes back, and that none is left."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows import launch as launching
from flows import steps
from flows.cli import build_parser, main
from flows.launch import command, environment, launch, tell_error, tell_result
from flows.training import is_trainer
from pusa.errors import StageError, TableError
from pusa.finetune.stage import Finetuned
from pusa.manifest.loading import load_manifest
from pusa.manifest.models import FinetuneManifest, ModelSpec
from pusa.manifest.training import Lora, Parallel, Partial, Probe
from pusa.system.files import read_json
from pusa.system.locks import sole_writer
from tests.flows.test_children import is_alive, python, wait_for

TINY = ModelSpec(weights="builtin:tiny")
TWO = Parallel(processes=2)


@pytest.fixture
def latents(made) -> Path:
    """A table of twelve clips."""
    return made / "latents"


def recipe(latents: Path, **changes) -> FinetuneManifest:
    settings = {"steps": 3, "batch_size": 4, "learning_rate": 1e-3, "checkpoint_every": 2, "density": "uniform"}
    return FinetuneManifest(latents=latents, base=TINY, **{**settings, **changes})


@pytest.fixture
def stand_in(monkeypatch):
    """Have a script run in the trainer's place; its arguments are the trainer's."""

    def set_script(code: str) -> None:
        monkeypatch.setattr(launching, "command", lambda processes, arguments: [*python(code), *arguments])

    return set_script


@pytest.mark.parametrize(
    "manifest",
    [
        FinetuneManifest(base=TINY),
        FinetuneManifest(base=TINY, latents="RUN/here", train=Lora(method="lora", alpha=3), probe=Probe(device="cpu")),
        FinetuneManifest(base={"weights": "some/where"}, train=Partial(method="partial", names=("*",)), parallel=TWO),
    ],
)
def test_the_trainer_gets_the_very_manifest(manifest, tmp_path, stand_in):
    stand_in("pass")
    with pytest.raises(ChildProcessError, match=r"ended with exit code 0; the end of (?s:.*)said nothing"):
        launch(manifest, tmp_path)
    assert load_manifest(tmp_path / "launch/finetune.yaml", tmp_path, "finetune") == manifest.resolve_paths(tmp_path)


def test_the_trainer_gets_the_overrides(tmp_path, stand_in):
    stand_in("import sys; print(*sys.argv[1:])")
    with pytest.raises(ChildProcessError) as caught:
        launch(FinetuneManifest(base=TINY), tmp_path, {"learning_rate": "2e-5", "levels": "ptss(0.1)"})
    (words,) = str(caught.value).splitlines()[1:]
    options = build_parser().parse_args(words.split())
    assert dict(options.override) == {"learning_rate": "2e-5", "levels": "ptss(0.1)"}
    assert is_trainer(options) and not options.prefect and options.run_dir == tmp_path


@pytest.mark.parametrize("error", [TableError("no rows"), StageError("busy")])
def test_a_fault_of_the_input_comes_back_as_it_was_and_gets_no_second_try(tmp_path, stand_in, error):
    told = tmp_path / "told.json"
    tell_error(told, error)
    tell_error(told, TableError("of another process, later"))
    stand_in(f"import shutil, sys; shutil.copy({str(told)!r}, sys.argv[-1]); raise SystemExit(1)")
    with pytest.raises(type(error), match=str(error)) as caught:
        launch(FinetuneManifest(base=TINY), tmp_path)
    assert not worth_retrying(caught.value)


def test_anything_else_says_how_it_ended_and_is_tried_again(tmp_path, stand_in):
    stand_in("import os; print('boom', flush=True); os.kill(os.getpid(), 9)")
    with pytest.raises(ChildProcessError, match=r"SIGKILL; the end of .*launch/log.txt:\n  boom") as caught:
        launch(FinetuneManifest(base=TINY), tmp_path)
    assert worth_retrying(caught.value)


def worth_retrying(error: Exception) -> bool:
    class State:
        def result(self, raise_on_failure):
            return error

    return steps.is_worth_retrying(steps.finetune, None, State())


def test_a_result_comes_back_whole_but_an_error_is_heard_first(tmp_path, stand_in):
    result = Finetuned(tmp_path / "checkpoints/3", tmp_path / "metrics.jsonl", 3, 3, 0, None)
    tell_result(tmp_path / "told.json", result)
    stand_in(f"import shutil, sys; shutil.copy({str(tmp_path / 'told.json')!r}, sys.argv[-1])")
    assert launch(FinetuneManifest(base=TINY), tmp_path) == result
    tell_error(tmp_path / "told.json", TableError("but"))
    tell_result(tmp_path / "told.json", result)
    assert read_json(tmp_path / "told.json") == {"error": {"type": "TableError", "message": "but"}}


def test_there_is_one_launcher_of_a_run(tmp_path, stand_in):
    stand_in("pass")
    with sole_writer(tmp_path / "launch"), pytest.raises(StageError, match="another process"):
        launch(FinetuneManifest(base=TINY), tmp_path)


def test_several_processes_share_the_cores_and_talk_to_themselves(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    cores = len(os.sched_getaffinity(0))
    assert environment(2 * cores)["OMP_NUM_THREADS"] == "1" and "OMP_NUM_THREADS" not in environment(1)
    assert environment(2)["GLOO_SOCKET_IFNAME"] == "eth7"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    assert environment(2)["OMP_NUM_THREADS"] == "5" and environment(2)["GLOO_SOCKET_IFNAME"] == "lo"


@pytest.mark.parametrize("text", ["steps", "=3", ""])
def test_an_override_has_a_key_and_a_value(text, capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "m.yaml", "--override", text])
    assert "is not KEY=VALUE" in capsys.readouterr().err


# The real trainer


def test_the_trainer_tells_what_it_refuses(latents, tmp_path):
    (tmp_path / "finetune.yaml").write_text(recipe(latents).model_dump_json())
    end = tmp_path / "end.json"
    files = [str(tmp_path / "finetune.yaml"), "--run-dir", str(tmp_path), "--result", str(end)]
    assert main(["finetune", *files, "--no-prefect", "--override", "nonsense=1"]) == 1
    error = read_json(end)["error"]
    assert error["type"] == "ManifestError" and "--override nonsense" in error["message"]


def children(pid: int) -> list[int]:
    """Of a process, with theirs."""
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [inner for child in found for inner in children(child)]


def listening(pids: list[int]) -> set[str]:
    """The addresses, as the kernel writes them, at which processes wait for others."""
    sockets = {os.readlink(link) for pid in pids for link in fds(pid) if os.path.lexists(link)}
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    lines = [line.split() for table in tables for line in table]
    return {line[1].split(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in sockets}


def fds(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/fd").iterdir())


def test_two_processes_that_listen_to_nobody_else_die_with_the_launcher_and_go_on(latents, tmp_path):
    manifest = tmp_path / "finetune.yaml"
    endless = recipe(latents, parallel=TWO, steps=100_000)
    manifest.write_text(endless.model_dump_json())
    start = [sys.executable, "-m", "flows", "finetune", str(manifest), "--run-dir", str(tmp_path), "--no-prefect"]
    run = subprocess.Popen(start, env={**os.environ, "OMP_NUM_THREADS": "1"})
    wait_for(lambda: run.poll() is not None or (tmp_path / "checkpoints/last").exists(), 90)
    there = children(run.pid)
    assert len(there) == 3, "an agent and two trainers"
    assert listening(there) == {"0100007F"}
    run.send_signal(signal.SIGKILL)
    run.wait()
    wait_for(lambda: not any(map(is_alive, there)))

    done = int(os.readlink(tmp_path / "checkpoints/last"))
    result = launch(endless.model_copy(update={"steps": done + 2}), tmp_path)
    assert result.checkpoint.is_dir() and (result.steps, result.trained_steps) == (done + 2, 2)


# More than one machine: not run here, but held to the same command

NODES = ("infra/slurm/finetune.sbatch", "infra/k8s/finetune.yaml")


def torchrun(text: str) -> list[str]:
    """The words of the one torchrun command of a script, over several lines."""
    (found,) = re.findall(r"^[^#\n]*\b(torchrun (?:.*\\\n)*.*)$", text, re.MULTILINE)
    return shlex.split(found.replace("\\\n", " "))


def script_of(path: Path) -> str:
    """The script itself, or that in the container's arguments."""
    if path.suffix != ".yaml":
        return path.read_text()
    (job,) = (part for part in yaml.safe_load_all(path.read_text()) if part["kind"] == "Job")
    return job["spec"]["template"]["spec"]["containers"][0]["args"][0]


@pytest.mark.parametrize("name", NODES)
def test_what_machines_run_is_a_command_of_ours(root, name):
    from torch.distributed.run import get_args_parser

    words = torchrun(script_of(root / name))
    launcher = get_args_parser().parse_args([re.sub(r"\$\{?GPUS\}?", "8", word) for word in words[1:]])
    assert launcher.rdzv_backend == "c10d" and launcher.module and launcher.training_script == "flows"
    options = build_parser().parse_args(launcher.training_script_args)
    assert options.stage == "finetune" and options.run_dir and not options.prefect


def test_machines_of_every_kind_run_the_same(root):
    slurm, k8s = (torchrun(script_of(root / name)) for name in NODES)
    assert [word for word in slurm if not word.startswith("$")] == [word for word in k8s if not word.startswith("$")]


def test_shell_scripts_are_shell(root):
    for name in NODES:
        subprocess.run(["bash", "-n"], input=script_of(root / name), text=True, check=True)
    assert "set -euo pipefail" in script_of(root / NODES[0]) and "set -euo pipefail" in script_of(root / NODES[1])


def test_one_machine_runs_the_same_command_too():
    assert command(1, ["a"]) == [sys.executable, "-m", "flows", "a"]
    assert command(2, ["a"]) == [sys.executable, "-m", "flows.agent", "2", "a"]
