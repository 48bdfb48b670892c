"""The files of infra/ fit their schemas, each other and the command line. What runs them is not here."""

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from configparser import ConfigParser
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
import yaml

from flows.commands import build_app

ROOT = Path(__file__).parent.parent
INFRA = ROOT / "infra"
UNITS = sorted(INFRA.glob("systemd/*.service"))
KUBERNETES = [
    (path.name, part) for path in sorted(INFRA.glob("k8s/*.yaml")) for part in yaml.safe_load_all(path.read_text())
]
OLDEST, NEWEST = "1.28", "1.37"  # of Kubernetes
COMPOSE = yaml.safe_load((INFRA / "compose.yaml").read_text())
POOL = json.loads((INFRA / "k8s/work-pool.json").read_text())
JOB = POOL["job_configuration"]["job_manifest"]


def ids(value):
    return value["kind"] if isinstance(value, dict) else value


def inner(value, key: str):
    """Yield what a key has, anywhere in a document."""
    for name, child in value.items() if isinstance(value, dict) else enumerate(value):
        if name == key:
            yield child
        if isinstance(child, dict | list):
            yield from inner(child, key)


def containers() -> list[dict]:
    """Return the containers of all documents for Kubernetes."""
    return [container for _, part in KUBERNETES for found in inner(part, "containers") for container in found]


# Schemas


def require_valid(part: dict) -> None:
    import kubernetes_validate

    for version in (OLDEST, NEWEST):
        kubernetes_validate.validate(part, version, strict=True)


@pytest.mark.parametrize(("file", "part"), [(f, p) for f, p in KUBERNETES if p["kind"] != "RayCluster"], ids=ids)
def test_kubernetes_knows_every_field(file, part):
    require_valid(part)


def test_the_ray_cluster_has_the_fields_that_kuberay_knows():
    """The operator's own schema is on no package index; it was tried by hand. The pods in it are Kubernetes' own."""
    ((_, cluster),) = [(f, p) for f, p in KUBERNETES if p["kind"] == "RayCluster"]
    spec = cluster["spec"]
    assert set(spec) == {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        require_valid({"apiVersion": "v1", "kind": "PodTemplate", "template": group["template"]})
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    for container in (group["template"]["spec"]["containers"][0] for group in groups):
        environment = {variable["name"]: variable for variable in container["env"]}
        assert environment["RAY_AUTH_MODE"]["value"] == "token" and "secretKeyRef" in str(environment["RAY_AUTH_TOKEN"])


def test_compose_fits_its_schema():
    schema = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())
    jsonschema.validate(COMPOSE, schema)


def test_the_pool_of_kubernetes_makes_a_job_of_variables_and_nothing_else():
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.utilities.templating import apply_values

    WorkPoolCreate(name="pusa", type="kubernetes", base_job_template=POOL)
    variables = POOL["variables"]["properties"]
    assert set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(JOB))) == set(variables) == {"gpus", "cpus", "memory"}
    assert "env" not in POOL["job_configuration"], "Prefect would add what a submitter gives"
    defaults = {name: variable["default"] for name, variable in variables.items()}
    hostile = {"env": {"LD_PRELOAD": "hostile"}, "command": "hostile", "image": "hostile"}
    job = apply_values(JOB, {**defaults, **hostile})
    assert "hostile" not in json.dumps(job)
    pod = job["spec"]["template"]["spec"]
    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)  # Prefect insists on them, in the wrong place
    require_valid(job)
    (run,) = pod["containers"]
    assert run["name"] == "prefect-job" and run["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_the_pools_job_starts_the_program_of_a_flow_run():
    (run,) = JOB["spec"]["template"]["spec"]["containers"]
    assert run["command"] == ["python", "-P", "-m", "flows.flow_run"]
    assert run["args"] == ["$(PREFECT__FLOW_RUN_ID)", "$(PREFECT__FLOW_NAME)"]
    for name in ("ingest", "precompute", "finetune", "generate", "pipeline"):  # a flow has the name of its module
        assert f'@flow(name="{name}"' in (ROOT / f"flows/{name}.py").read_text()


# The command line


def commands() -> dict[str, list[str]]:
    """Return the words after `pusa` in every file that runs it."""
    found = {f"compose.yaml {name}": service.get("command") for name, service in COMPOSE["services"].items()}
    found |= {f"k8s {box['name']} {box['image']}": box["args"] for box in containers() if box.get("args")}
    for unit in UNITS:
        found[unit.name] = shlex.split(settings_of(unit)["Service"]["ExecStart"])[1:]
    for box in containers():
        if started := re.search(r"until pusa (.*?);", " ".join(box.get("command", ()))):
            found[f"k8s {box['name']}"] = started[1].split()
    text = (INFRA / "slurm/generate.sbatch").read_text()
    found["generate.sbatch"] = shlex.split(re.findall(r"^  pusa (.*)$", text, re.MULTILINE)[0])
    return {where: words for where, words in found.items() if words and words[0] != "set"}


def settings_of(unit: Path) -> ConfigParser:
    parser = ConfigParser(interpolation=None, comment_prefixes="#", delimiters="=")
    parser.optionxform = str
    parser.read_string(unit.read_text())
    return parser


@pytest.mark.parametrize("where", [where for where in commands() if "trainer" not in where])
def test_every_command_exists_with_its_options(where, tmp_path):
    words = [str(tmp_path) if word.startswith("/") else word for word in commands()[where]]
    words = [re.sub(r"%\w|\$\(\w+\)", "x", word) for word in words]  # what systemd and Kubernetes fill in
    _, bound, _ = build_app().parse_args(words, print_error=False, exit_on_error=False)
    assert bound.arguments


def test_the_script_of_slurm_is_valid_shell_and_makes_what_tasks_share():
    path = INFRA / "slurm/generate.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "set -euo pipefail" in path.read_text()
    assert commands()["generate.sbatch"] == ["generate", "$MANIFEST", "--run-dir", "$RUN", "--no-prefect"]


# What a file says must fit the others and the code


def test_there_is_more_time_to_end_than_a_worker_gives_its_runs():
    grace = float(re.findall(r"^GRACE_SECONDS = (\S+)", (ROOT / "flows/run_process.py").read_text(), re.MULTILINE)[0])
    limits = [int(COMPOSE["services"]["worker"]["stop_grace_period"].removesuffix("s"))]
    limits += [int(settings_of(unit)["Service"]["TimeoutStopSec"]) for unit in UNITS if "worker" in unit.name]
    limits += [
        next(inner(part, "terminationGracePeriodSeconds"))
        for file, part in KUBERNETES
        if any((box.get("args") or [""])[0] == "worker" for found in inner(part, "containers") for box in found)
    ]
    assert len(limits) == 3 and min(limits) > grace


def test_images_and_versions_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", (INFRA / "constraints.txt").read_text(), re.MULTILINE))
    images = {image for part in (COMPOSE, POOL, [p for _, p in KUBERNETES]) for image in inner(part, "image")}
    ours = {image for image in images if "/pusa" in image}
    assert {image.rpartition(":")[2] for image in ours} == {project["version"]}
    assert images - ours == {"postgres:15"}
    assert [part["spec"]["rayVersion"] for _, part in KUBERNETES if "rayVersion" in part["spec"]] == [pinned["ray"]]
    dockerfile = (INFRA / "Dockerfile").read_text()
    (python,) = re.findall(r"^FROM python:(\S+)-slim$", dockerfile, re.MULTILINE)
    assert project["requires-python"] == f">={python}"
    for names in re.findall(r"^COPY (.*) \S+$", dockerfile, re.MULTILINE):
        assert all((ROOT / name).exists() for name in names.split())


def test_nothing_is_published_beyond_this_machine_and_no_secret_is_written_down():
    for name, service in COMPOSE["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|AUTH_STRING|CONNECTION_URL", variable):
                assert "${" in value, f"{name} {variable}"
    assert not any(part["kind"] == "Service" and part["spec"].get("type") for _, part in KUBERNETES)
    for box in containers():
        for variable in box.get("env", ()):
            if re.search("PASSWORD|AUTH_STRING|TOKEN", variable["name"]):
                assert "secretKeyRef" in variable["valueFrom"], variable
    for unit in UNITS:
        assert "EnvironmentFile" in settings_of(unit)["Service"] and "AUTH" not in str(
            dict(settings_of(unit)["Service"])
        )


def test_every_pod_is_confined():
    for found in [*inner([p for _, p in KUBERNETES], "containers"), *inner(JOB, "containers")]:
        for box in found:
            assert box["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_no_comment_is_behind_a_setting_of_a_unit_where_systemd_would_take_it_for_words():
    for unit in UNITS:
        assert not [value for section in settings_of(unit).values() for value in section.values() if "#" in value]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not on this machine")
def test_systemd_accepts_the_units(tmp_path):
    for unit in UNITS:
        (tmp_path / unit.name).write_text(unit.read_text().replace("/opt/pusa/.venv/bin/pusa", shutil.which("true")))
    done = subprocess.run(
        ["systemd-analyze", "verify", *map(str, sorted(tmp_path.iterdir()))], capture_output=True, text=True
    )
    assert done.returncode == 0 and str(tmp_path) not in done.stderr, done.stderr


def test_the_readme_lists_every_file():
    text = (INFRA / "README.md").read_text()
    names = [path for path in INFRA.rglob("*") if path.is_file() and path.name != "README.md"]
    assert not [path for path in names if f"`{path.relative_to(ROOT)}`" not in text]
