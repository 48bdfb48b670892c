"""The command line: names, help, mistakes, completion, and that nothing heavy is imported."""

import os
import re
import subprocess
import sys

import pytest

from flows.commands import build_app, main
from pusa.weights.convert import layouts


def test_an_error_is_a_sentence_and_an_exit_code(tmp_path, capsys):
    assert main(["ingest", str(tmp_path / "none.yaml")]) == 1
    assert main(["pipeline", str(tmp_path / "none")]) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.count("pusa: ") == 2


def test_a_lack_of_memory_is_a_sentence(tmp_path, capsys, monkeypatch):
    def fail(*arguments):
        raise MemoryError

    monkeypatch.setattr("flows.handover.sha256_file", fail)
    assert main(["ingest", str(tmp_path / "none.yaml")]) == 1
    assert capsys.readouterr().err.startswith("pusa: out of memory; ")


def run_module(*words: str, code: str = "from flows.commands import main; raise SystemExit(main())", **kwargs):
    """Run `pusa` in a process of its own."""
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, **kwargs)


def test_a_current_folder_that_was_removed_is_a_sentence(tmp_path):
    code = f"import os; os.rmdir({str(tmp_path)!r}); from flows.commands import main; raise SystemExit(main())"
    done = run_module("check", "m.yaml", code=code, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("pusa: the current folder cannot be found")
    assert run_module("--version", code=code.replace("os.rmdir", "len"), cwd="/").returncode == 0


@pytest.mark.parametrize("text", ["", " "])
@pytest.mark.parametrize(
    "words", ["generate m.yaml --run-dir", "check", "weights convert a --to genmo", "quality --folder"]
)
def test_an_empty_name_is_not_the_current_folder(capsys, words, text):
    assert main([*words.split(), text]) == 2
    assert f"{text!r} is empty" in capsys.readouterr().err


def test_a_folder_to_show_that_does_not_exist_is_named_so(tmp_path, capsys):
    assert main(["server", "--runs", str(tmp_path / "none")]) == 2
    assert "does not exist; make the folder" in capsys.readouterr().err


def test_python_without_docstrings_is_refused(root):
    environment = {**os.environ, "PYTHONOPTIMIZE": "2", "PYTHONDONTWRITEBYTECODE": "1"}
    done = run_module("plan", str(root / "manifests/tiny/generate.yaml"), env=environment)
    assert done.returncode == 1 and "PYTHONOPTIMIZE=2" in done.stderr and "Traceback" not in done.stderr


def subcommands(app) -> list[list[str]]:
    """Return the words of every command, also of the groups themselves."""
    names = [name for name in app if not name.startswith("-")]
    return [[name, *rest] for name in names for rest in [[], *subcommands(app[name])]]


COMMANDS = subcommands(build_app())
OPTIONS = {
    "ingest": "--run-dir --no-prefect",
    "precompute": "--run-dir --no-prefect --place",
    "finetune": "--run-dir --no-prefect --override --with-new-clips",
    "generate": "--run-dir --no-prefect --place --until --retry-failed",
    "finish": "--all --list --no-prefect --place --until --submit",
    "pipeline": "--run-dir --no-prefect",
    "demo": "--family --run-dir --no-prefect",
    "check": "--run-dir",
    "plan": "--gpu-memory --gpus --size --frames --run-dir",
    "weights": "",
    "weights inspect": "--json",
    "weights convert": "--to --latent-space --shard-gb",
    "weights export": "--to --base --strength --license",
    "weights fetch": "--parts",
    "status": "--json --watch",
    "gallery": "--serve --host --port",
    "evaluate": "--columns --sort --require --json --html --vbench --measure",
    "inspect": "--json --html --limit --decode --weights",
    "replay": "--manifest --weights --inputs --output --check",
    "import-latents": "--to --weights --backbone --text-encoder --fps --shard-rows --compression --verify",
    "export-latents": "--captions",
    "list": "",
    "describe": "",
    "server": "--host --port --allow-host --runs",
    "deploy": "--run-dir --timezone --ingest-at --finetune-at --generate-at --paused --gpu-steps --name --print",
    "worker": "--name --limit --allow --webhook-host --notify --pool",
    "submit": "--run-dir --at --place --until --retry-failed --override --with-new-clips",
    "watch": "",
    "cancel": "",
    "doctor": "--repair --json",
    "make-tiny": "--family",
    "quality": "--family --base --pusa --clips --folder",
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
        ("generate a.yaml --run-dir /usr/..", "/usr/.. is the root of the file system; name a folder"),
        ("plan m.yaml --size 848", "848 is not WIDTHxHEIGHT"),
        ("plan m.yaml --gpus 1.5", "1.5 is not a whole number above 0"),
        ("plan m.yaml --gpu-memory -3", "-3 is not a number above 0"),
        ("plan m.yaml --gpu-memory 1e300", "1e300 is not a number above 0 and up to 1e+09"),
        (f"plan m.yaml --gpus {'1' * 5000}", f"{'1' * 80} is not a whole number above 0 and up to 1e+09"),
        ("generate m.yaml --place gpu=0", "'gpu=0' is not a place; expected local, gpus=0,2"),
        ("generate m.yaml --place gpus=0,0", "'gpus=0,0' is not a place"),
        ("precompute m.yaml --place processes=0", "'processes=0' is not a place"),
        (f"generate m.yaml --place processes={'1' * 5000}", "is not a place"),
        ("generate m.yaml --place ray=auto", "is not a place; expected local, gpus=0,2"),
        ("generate m.yaml --place ray=auto,slots=0", "'ray=auto,slots=0' is not a place"),
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
    words = "finetune m.yaml --run-dir a --run-dir none --override a=1 --override b=[2]=2 --no-prefect"
    _, bound, _ = build_app().parse_args(words)
    assert str(bound.arguments["run_dir"]) == "none" and bound.arguments["override"] == {"a": "1", "b": "[2]=2"}


def test_one_option_takes_several_parts():
    _, bound, _ = build_app().parse_args(["weights", "fetch", "hf:a/b", "--parts", "vae", "text_encoder"])
    assert bound.arguments["parts"] == ["vae", "text_encoder"]


@pytest.mark.parametrize(
    "command, more", [("convert", ["safetensors"]), ("export", ["pipeline", "lora", "peft", "original-lora"])]
)
def test_every_layout_of_a_backbone_can_be_chosen(command, more, capsys):
    assert main(["weights", command, "a", "b", "--to", "nonsense"]) == 2
    offered = re.search(r"Choose from: (.*?)\.", capsys.readouterr().err)[1]
    assert sorted(re.findall(r"[\w-]+", offered)) == sorted([*layouts(), *more])


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
