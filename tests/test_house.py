"""The rules of the repository's layout and style that a test can check."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from pusa.backbones import BACKBONES, all_families
from pusa.diffusion.latent_spaces import LATENT_SPACES
from pusa.diffusion.noise_schedules import NOISE_SCHEDULES
from pusa.diffusion.timesteps import DENSITIES, LEVEL_SAMPLERS
from pusa.errors import Reason
from pusa.manifest.loading import load_manifest
from pusa.registry import find
from pusa.tasks import TASKS
from tests.conftest import LONGEST

ROOT = Path(__file__).parent.parent
TOP = {"pyproject.toml", "README.md", "LICENSE", "flows", "pusa", "manifests", "tests", "infra"}

# The packages of pusa/ from the bottom up: each imports only from those before it.
LAYERS = (
    "errors", "registry", "system", "diffusion", "backbones", "tasks", "manifest", "video", "weights", "data",
    "ingest", "precompute", "finetune", "generate", "inspect", "exchange", "tiny", "evaluate", "api",
)  # fmt: skip
STAGES = ("ingest", "precompute", "finetune", "generate")

# What the command line and the checks of manifests import must not bring in a library that takes seconds to import.
LIGHT = ("flows/commands", "pusa/errors.py", "pusa/registry.py", "pusa/system", "pusa/tasks", "pusa/manifest")
LIGHT += (
    "pusa/generate/gallery.py",
    "pusa/diffusion/windows.py",
    "pusa/backbones/__init__.py",
    "pusa/backbones/family.py",
)
LIGHT += tuple(f"pusa/weights/{name}.py" for name in ("convert", "hub", "inspect", "resolve", "source", "stored"))
HEAVY = ("torch", "prefect", "diffusers", "transformers", "matplotlib")

MAX_FILE, MAX_FUNCTION = 400, 60  # lines


@cache
def sources(*folders: str) -> list[Path]:
    """Return the Python files of these folders, and files that are named themselves."""
    paths = [ROOT / folder for folder in folders]
    return [path for top in paths for path in ([top] if top.is_file() else sorted(top.rglob("*.py")))]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def module(path: Path) -> str:
    """Return the dotted name of a file's module."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the module of every import in a file, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} has a relative import"
            # `from pusa import weights` imports the package `pusa.weights`.
            names = [f"pusa.{name.name}" for name in node.names] if node.module == "pusa" else [node.module or ""]
            yield from ((node.lineno, name) for name in names)


def layer(name: str) -> str:
    """Return the package of pusa/ that a module is in."""
    return name.split(".")[1]


# Layout.


def test_only_the_agreed_files_and_folders_lie_at_the_top():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= TOP


def test_no_module_of_pusa_lies_at_its_top_but_errors_and_registry():
    assert {path.name for path in (ROOT / "pusa").glob("*.py")} == {"__init__.py", "errors.py", "registry.py"}
    packages = {path.parent.name for path in (ROOT / "pusa").glob("*/__init__.py")}
    assert packages | {"errors", "registry"} == set(LAYERS)


def test_no_import_runs_up_the_layers():
    upward = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources("pusa")
        for line, name in imports(path)
        if name.startswith("pusa.")
        and module(path) != "pusa"
        and LAYERS.index(layer(name)) > LAYERS.index(layer(module(path)))
    ]
    assert not upward, "\n".join(upward)


def test_no_stage_imports_another():
    between = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources(*(f"pusa/{stage}" for stage in STAGES))
        for line, name in imports(path)
        if name.startswith("pusa.") and layer(name) in STAGES and layer(name) != layer(module(path))
    ]
    assert not between, "\n".join(between)


def test_pusa_imports_neither_flows_nor_prefect():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources("pusa")
        for line, name in imports(path)
        if name.split(".")[0] in ("prefect", "flows")
    ]
    assert not wrong, "\n".join(wrong)


def test_light_modules_import_nothing_heavy():
    names = [module(path) for path in sources(*LIGHT)]
    code = f"""
import importlib, sys
for name in {names}:
    importlib.import_module(name)
    heavy = [library for library in {HEAVY} if library in sys.modules]
    assert not heavy, f"{{name}} imports {{heavy}}"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_test_files_that_start_first_exist():
    assert [name for name in LONGEST if not (ROOT / "tests" / name).is_file()] == []


# Backbones.


def family_names() -> re.Pattern[str]:
    """Return what matches a family's name as a word, part of an identifier, or part of a class name."""
    names = sorted({part for name in BACKBONES for part in (name, name.split("_")[0])} | {"wan", "hunyuan"})
    words = [rf"(?<![a-z]){name}(?![a-z])|{name.capitalize()}(?![a-z])|{name.upper()}(?![A-Z])" for name in names]
    return re.compile("|".join(words))


@pytest.mark.parametrize("text", ["Wan", "wan2", "a wan b", "x_wan", "PusaMochiTransformer", "MOCHI", "hunyuan_video"])
def test_the_search_for_family_names_finds_them(text):
    assert family_names().search(text)
    assert not family_names().search("wanted, swan, WANTED, mochis")


def test_no_family_is_named_outside_its_folder():
    pattern = family_names()
    named = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources("pusa", "flows")
        if not path.is_relative_to(ROOT / "pusa/backbones")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not named, "\n".join(named)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_names_no_other_one(name):
    others = [other for other in BACKBONES if other != name]
    for path in sources(f"pusa/backbones/{name}"):
        assert not {other for other in others if re.search(rf"(?<![a-z]){other}(?![a-z])", path.read_text(), re.I)}


def test_families_agree_on_the_presets_that_they_share():
    presets = [preset for family in all_families() for preset in family.presets.items()]
    assert len(set(presets)) == len(dict(presets))


# Tables and manifests.


@pytest.mark.parametrize("table", [BACKBONES, NOISE_SCHEDULES, TASKS], ids=["backbones", "noise schedules", "tasks"])
def test_every_name_in_a_table_leads_somewhere(table):
    for name in table:
        assert find(table, name, "entry") is not None


@pytest.mark.parametrize("table", [DENSITIES, LEVEL_SAMPLERS, LATENT_SPACES], ids=["densities", "samplers", "spaces"])
def test_every_entry_of_a_table_of_functions_can_be_called(table):
    assert table and all(map(callable, table.values()))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "manifests").rglob("*.yaml")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_shipped_manifests_load(path, tmp_path):
    manifest = load_manifest(path, tmp_path / "run")
    assert manifest.kind == path.stem.split("-")[0]  # a folder may have several of a kind: generate-5b.yaml


# Style.


def test_no_file_is_longer_than_400_lines():
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in sources("pusa", "flows")}
    assert not {path: lines for path, lines in lengths.items() if lines > MAX_FILE}


def test_no_function_is_longer_than_60_lines():
    lengths = {
        f"{path.relative_to(ROOT)}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in sources("pusa", "flows")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION}


def test_only_the_console_writes_to_the_terminal():
    """Everything else prints with `flows.console.show`, which escapes what would steer a terminal.

    A slot passes on what its worker prints to that same stderr.
    """
    written = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)[:60]}"
        for path in sources("pusa", "flows")
        if path not in (ROOT / "flows/console.py", ROOT / "pusa/system/slot_worker.py")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
        and re.fullmatch(r"print|(sys\.)?(__)?std(out|err)(__)?(\.buffer)?\.write(lines)?", ast.unparse(node.func))
    ]
    assert not written, "\n".join(written)


def test_production_code_patches_nothing():
    for path in sources("pusa", "flows"):
        patched = [name for _, name in imports(path) if name.startswith(("unittest", "mock"))]
        assert not patched, f"{path} imports {patched}"


# Documentation: every file of it names only commands, options, paths and sections that exist.


def documents() -> list[Path]:
    hidden = (path for path in ROOT.glob("*.md") if not path.name.startswith("."))
    folders = ("flows", "pusa", "manifests", "infra", "tests")
    return [*hidden, *(path for folder in folders for path in sorted((ROOT / folder).rglob("*.md")))]


DOCUMENTS = pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))


@DOCUMENTS
def test_a_documents_commands_and_options_exist(path):
    from flows.commands import build_app

    text = path.read_text()
    lines = re.findall(r"^\s*(?:\$ )?(?:\.venv/bin/)?pusa (.*?)(?: +#.*)?$", text, re.MULTILINE)
    lines += re.findall(r"`pusa ([a-z][^`]*)`", text)
    for line in lines:
        words, app = line.split(), build_app()
        while words and words[0] in set(app) and not words[0].startswith("-"):
            app = app[words.pop(0)]
        where = f"`pusa {line}`"
        assert app.name != ("pusa",) or not words or words[0].startswith("-") or words[0].isupper(), (
            f"{where}: no such command"
        )
        known = {"--help", "--version", "-V", "--install-completion"}
        if app.default_command:
            known |= {name for argument in app.assemble_argument_collection() for name in argument.names}
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= known, where


@DOCUMENTS
def test_a_documents_paths_and_links_exist(path):
    text = path.read_text()
    for name in re.findall(r"`((?:pusa|flows|manifests|infra|tests)/[\w./-]*)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"^\s*(infra/[\w-]+)", text, re.MULTILINE):
        assert (ROOT / name).exists(), name
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in link:
            name, _, section = link.partition("#")
            target = path.parent / name if name else path
            assert target.exists(), link
            assert not section or section in sections(target), link


def sections(path: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_readmes_manifest_shows_every_task_and_is_valid(tmp_path):
    (text,) = re.findall(r"```yaml\n(kind: generate.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "generate.yaml").write_text(text)
    (tmp_path / "stills").mkdir()
    (tmp_path / "stills/surf.png").touch()
    (tmp_path / "stills/surf.txt").write_text("a boat")
    jobs = load_manifest(tmp_path / "generate.yaml", tmp_path / "run").jobs
    assert {job.task for job in jobs} == set(TASKS)
    assert "grid-surf-multiplier0.2-seed1" in {job.id for job in jobs}


def test_every_reason_of_a_reject_is_in_the_readme_of_the_manifests():
    rows = [line for line in (ROOT / "manifests/README.md").read_text().splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert {str(reason) for reason in Reason} <= named
