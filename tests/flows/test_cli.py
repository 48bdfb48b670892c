import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from flows.commands import build_app, main
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
    assert run.returncode == 130 and "run the same command again to resume" in out
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


def run_module(*words: str, code: str = "from flows.commands import main; raise SystemExit(main())", **kwargs):
    """Run `pusa` in a process of its own."""
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, **kwargs)


def subcommands(app) -> list[list[str]]:
    """Return the words of every command, also of the groups themselves."""
    names = [name for name in app if not name.startswith("-")]
    return [[name, *rest] for name in names for rest in [[], *subcommands(app[name])]]


COMMANDS = subcommands(build_app())
OPTIONS = {
    "ingest": "--run-dir --no-prefect",
    "precompute": "--run-dir --no-prefect",
    "finetune": "--run-dir --no-prefect --override",
    "generate": "--run-dir --no-prefect",
    "pipeline": "--run-dir --no-prefect",
    "demo": "--run-dir --no-prefect",
    "check": "--run-dir",
    "plan": "--gpu-memory --gpus --size --frames --run-dir",
    "weights": "",
    "weights inspect": "--json",
    "weights convert": "--to --latent-space --shard-gb",
    "weights export": "--to --base",
    "weights fetch": "--parts",
    "inspect": "--json --html --limit --decode --weights",
    "import-latents": "--to --weights --text-encoder --fps --shard-rows --compression --verify",
    "export-latents": "--captions",
    "list": "",
    "describe": "",
    "dashboard": "--port",
    "make-tiny": "",
    "quality": "--base --pusa --clips --folder",
}


def test_help_names_every_command():
    text = subprocess.run([sys.executable, "-m", "flows", "--help"], capture_output=True, text=True, check=True).stdout
    for command in ("pipeline", "ingest", "precompute", "finetune", "generate", "check", "list", "demo"):
        assert f"  {command} " in text
    for command, *rest in COMMANDS:
        assert rest or f"  {command} " in text
    assert text.startswith("pusa ") and "--install-completion" in text


def test_the_commands_keep_their_names():
    assert {" ".join(words) for words in COMMANDS} == set(OPTIONS)


@pytest.mark.parametrize("command, options", OPTIONS.items())
def test_the_options_keep_their_names_and_have_a_help_text(command, options, capsys):
    assert main([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert set(re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE)) == set(options.split())
    for line in text.splitlines():
        assert not re.fullmatch(r"  (--[a-z-]+|[A-Z]+)( [A-Z]+)? *", line), f"{line} has no help text"


@pytest.mark.parametrize("flag", ["-V", "--version"])
def test_the_version(flag, capsys):
    assert main([flag]) == 0
    assert re.fullmatch(r"pusa \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "a command is missing"),
        ("weights", "a command is missing"),
        ("fintune m.yaml", 'Did you mean "finetune"?'),
        ("weights exprt a b", 'Did you mean "export"?'),
        ("finetune m.yaml --no-prefct", "Did you mean --no-prefect?"),
        ("list taks", 'Did you mean "tasks"?'),
        ("list", "WHAT requires an argument"),
        ("generate", "MANIFEST requires an argument"),
        ("generate a.yaml b.yaml", "b.yaml"),
        ("generate a.yaml --run-dir", "--run-dir requires an argument"),
        ("plan m.yaml --size 848", "848 is not WIDTHxHEIGHT"),
        ("plan m.yaml --gpus 1.5", "1.5 is not a whole number above 0"),
        ("plan m.yaml --gpu-memory -3", "-3 is not a number above 0"),
        ("plan m.yaml --gpu-memory much", "much is not a number above 0"),
        ("inspect t --json --html f", "--json, --html"),
        ("weights fetch hf:a/b --parts", "--parts requires at least 1"),
        ("weights convert a b", "--to requires an argument"),
        ("weights convert a b --to gguf", "Choose from"),
        ("quality --clips 0", "0 is not a whole number above 0"),
        ("quality --clips \x1b[2J", "\\x1b[2J is not a whole number above 0"),
    ],
)
def test_a_mistake_in_the_command_line_is_a_line_of_plain_text_and_exit_code_2(words, message, capsys):
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert not out and first.startswith("pusa: ") and message in first
    assert second.startswith("for help: pusa") and second.endswith(" --help")


def test_the_last_value_wins_but_overrides_add_up_and_none_is_a_name():
    words = [
        "finetune",
        "m.yaml",
        "--run-dir",
        "a",
        "--run-dir",
        "none",
        "--override",
        "a=1",
        "--override",
        "b=[2]=2",
        "--no-prefect",
    ]
    _, bound, _ = build_app().parse_args(words)
    assert str(bound.arguments["run_dir"]) == "none" and bound.arguments["override"] == {"a": "1", "b": "[2]=2"}


def test_one_option_takes_several_parts():
    _, bound, _ = build_app().parse_args(["weights", "fetch", "hf:a/b", "--parts", "vae", "text_encoder"])
    assert bound.arguments["parts"] == ["vae", "text_encoder"]


@pytest.mark.parametrize("words", [["--help"], ["finetune", "--help"], ["nonsense"], ["list", "tasks"], ["-V"]])
def test_nothing_heavy_is_imported_before_it_is_needed(words):
    code = (
        "import sys; from flows.commands import main; main(); "
        "print(sorted({'torch', 'prefect', 'diffusers', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules)))"
    )
    assert run_module(*words, code=code).stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion_is_installed_in_the_home_folder(shell, tmp_path):
    run = run_module("--install-completion", "--shell", shell, env={**os.environ, "HOME": str(tmp_path)})
    assert run.returncode == 0, run.stderr
    scripts = [path for path in tmp_path.rglob("*pusa*") if path.is_file()]
    assert any("no-prefect" in path.read_text() for path in scripts), list(tmp_path.rglob("*"))


def test_check_reports_the_problems_of_the_valid_jobs_too(tmp_path, capsys):
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
def test_describe_names_every_key_of_a_task(task, capsys):
    assert main(["describe", task]) == 0
    out = capsys.readouterr().out
    for key in find(TASKS, task, "task").model_fields:
        assert key == "task" or (f"\n  {key} " in out and find(TASKS, task, "task").model_fields[key].description)
    assert "\n  seed " in out.partition("as every task:")[2]


@pytest.mark.parametrize("kind", KINDS)
def test_describe_names_every_key_of_a_manifest(kind, capsys):
    assert main(["describe", kind]) == 0
    named = {line.split()[0] for line in capsys.readouterr().out.splitlines()[2:] if line.strip()}
    assert set(KINDS[kind].model_fields) - {"kind"} <= named


def test_describe_lists_the_allowed_names(capsys):
    assert main(["describe", "loopy"]) == 1
    assert (
        "unknown name 'loopy'; allowed are ingest, precompute, finetune, generate, text_to_video"
        in capsys.readouterr().err
    )
