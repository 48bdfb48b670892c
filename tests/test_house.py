"""The rules of the house that a test can hold."""

import ast
import re
import subprocess
import sys

import pytest

from pusa.backbones import BACKBONES
from pusa.diffusion.noise_schedules import NOISE_SCHEDULES
from pusa.manifest.loading import load_manifest
from pusa.registry import find
from pusa.tasks import TASKS

WEIGHTS = ("tensors", "genmo", "found", "convert", "describe", "wanted", "hub")
LIGHT = ["flows.commands", "pusa.manifest.models", *(f"pusa.weights.{name}" for name in WEIGHTS)]
GIVEN = {"pyproject.toml", "README.md", "LICENSE", "flows", "pusa", "manifests", "tests", "infra"}


def imported(path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def packages(path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def test_pusa_knows_nothing_of_prefect_or_flows(root):
    offenders = [path for path in (root / "pusa").rglob("*.py") if packages(path) & {"prefect", "flows"}]
    assert not offenders


def test_stages_know_each_other_only_through_files(root):
    stages = ("ingest", "precompute", "finetune", "generate")
    for stage in stages:
        others = {f"pusa.{other}" for other in stages if other != stage}
        assert not imported(root / f"pusa/{stage}.py") & others


def test_only_what_is_given_lies_at_the_top(root):
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= GIVEN


@pytest.mark.parametrize("table", [BACKBONES, NOISE_SCHEDULES, TASKS])
def test_every_name_in_a_table_leads_somewhere(table):
    for name in table:
        assert callable(find(table, name, "entry"))


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_stay_light(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'prefect', 'diffusers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_readme_names_only_commands_and_files_that_exist(root):
    from flows.commands import build_app

    text = (root / "README.md").read_text()
    known = {name for name in build_app() if not name.startswith("-")}
    assert set(re.findall(r"^\s*(?:\.venv/bin/)?pusa ([a-z-]+)", text, re.MULTILINE)) <= known
    for path in re.findall(r"`((?:pusa|flows|manifests|infra|tests)/[\w./-]*)`", text):
        assert (root / path).exists(), path


def test_the_readmes_manifest_shows_every_task_and_is_one(root, tmp_path):
    (text,) = re.findall(r"```yaml\n(kind: generate.*?)```", (root / "README.md").read_text(), re.DOTALL)
    (tmp_path / "generate.yaml").write_text(text)
    (tmp_path / "stills").mkdir()
    (tmp_path / "stills/surf.png").touch()
    (tmp_path / "stills/surf.txt").write_text("a boat")
    jobs = load_manifest(tmp_path / "generate.yaml", tmp_path / "run").jobs
    assert {job.task for job in jobs} == set(TASKS)
    assert "grid-surf-multiplier0.2-seed1" in {job.id for job in jobs}
