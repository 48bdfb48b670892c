"""The environment: loopback addresses are reached without a proxy, and settings that Prefect refuses are sentences."""

import os
import subprocess

import httpx
import pytest

from flows.settings import LOOPBACK, reach_loopback_directly
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
