"""The environment: loopback addresses are reached without a proxy, and settings that Prefect refuses are sentences."""

import os
import re
import subprocess

import httpx
import pytest

from flows.settings import LOOPBACK, reach_loopback_directly, require_no_settings_in
from pusa.errors import PusaError
from tests.helpers.processes import python
from tests.helpers.stand_in_server import answering, unused_address

OURS = ",".join(LOOPBACK)
LOAD = "import sys; from flows.commands import main; sys.exit(main(sys.argv[1:]))"
PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY")


@pytest.mark.parametrize(
    "before, upper, lower",
    [
        ({}, OURS, OURS),
        ({"NO_PROXY": "a.org, .b.org"}, f"a.org,.b.org,{OURS}", f"a.org,.b.org,{OURS}"),
        ({"no_proxy": "a.org"}, f"a.org,{OURS}", f"a.org,{OURS}"),
        ({"NO_PROXY": "a.org", "no_proxy": "b.org"}, f"a.org,{OURS}", f"b.org,{OURS}"),
        ({"NO_PROXY": "a.org", "no_proxy": ""}, f"a.org,{OURS}", OURS),  # an empty no_proxy hides NO_PROXY
        ({"NO_PROXY": "*"}, "*", "*"),
        ({"no_proxy": OURS}, OURS, OURS),
    ],
)
def test_loopback_is_added_to_what_is_there(before, upper, lower):
    environment = dict(before)
    reach_loopback_directly(environment)
    assert environment == {"NO_PROXY": upper, "no_proxy": lower}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_server_on_this_machine_is_reached_past_every_proxy(monkeypatch, host):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    for name in PROXIES[:6]:
        monkeypatch.setenv(name, unused_address())
    monkeypatch.setenv("NO_PROXY", "example.com")
    monkeypatch.setenv("no_proxy", "")  # so that it is put back
    monkeypatch.delenv("no_proxy")
    reach_loopback_directly(os.environ)
    with answering(200, b"here") as address:
        assert httpx.get(address.replace("127.0.0.1", host)).text == "here"


@pytest.mark.parametrize(
    "variables, profiles, words",
    [
        ({"PREFECT_SERVER_API_PORT": "many"}, "", "PREFECT_SERVER_API_PORT=many: Input should be a valid integer"),
        ({}, "this is [not", "profiles.toml"),
        ({}, 'active = "a"\nprofiles = 3', "profiles.toml"),
    ],
)
def test_a_setting_that_prefect_refuses_is_one_sentence(root, tmp_path, variables, profiles, words):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_API_URL")}
    environment |= {"PREFECT_HOME": str(tmp_path), **variables}
    if profiles:
        (tmp_path / "profiles.toml").write_text(profiles)
    command = [*python(LOAD), "ingest", str(root / "manifests/tiny/ingest.yaml"), "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("pusa: ") and words in line and "--no-prefect" in line


def test_a_folder_in_which_pusa_is_started_runs_no_code_by_settings_of_prefect(root, tmp_path):
    code = """{version: 1, handlers: {x: {"()": os.mkdir, path: ran}}, root: {handlers: [x]}}"""
    (tmp_path / "code.yml").write_text(code)
    (tmp_path / "prefect.toml").write_text('[logging]\nconfig_path = "code.yml"')
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_LOGGING")}
    words = ["ingest", str(root / "manifests/tiny/ingest.yaml"), "--run-dir", str(tmp_path / "run")]
    done = subprocess.run([*python(LOAD), *words], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert not (tmp_path / "ran").exists()
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and f"{tmp_path}/prefect.toml" in line and "--no-prefect" in line


@pytest.mark.parametrize(
    "name, text",
    [
        ("prefect.toml", ""),
        ("pyproject.toml", '[tool.prefect.logging]\nconfig_path = "code.yml"'),
        ("pyproject.toml", "this is [not"),
        (".env", "OTHER=1\nexport prefect_logging_config_path=code.yml"),
        (".env", "\ud800"),
        ("prefect.toml", None),  # a pipe, which Prefect would wait for
        ("pyproject.toml", None),
    ],
)
def test_every_file_of_the_current_folder_with_settings_of_prefect_is_refused(tmp_path, name, text):
    if text is None:
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).write_text(text, errors="surrogatepass")
    with pytest.raises(PusaError, match=re.escape(str(tmp_path / name))):
        require_no_settings_in(tmp_path)


@pytest.mark.parametrize(
    "name, text",
    [
        (".env", "HF_TOKEN=x\n# PREFECT_HOME=y\nMY_PREFECT_HOME=z"),
        ("pyproject.toml", "[tool.ruff]\nline-length = 120"),
    ],
)
def test_a_file_without_settings_of_prefect_is_ignored(tmp_path, name, text):
    require_no_settings_in(tmp_path)
    (tmp_path / name).write_text(text)
    require_no_settings_in(tmp_path)
