"""Prefect's temporary server: a session of its own, and an end with the process that started it."""

import os
import signal
import subprocess

from tests.helpers.processes import is_alive, python, wait_for

SCRIPT = """
import time
from flows.settings import set_defaults
set_defaults()
from flows.server import start_temporary_server
start_temporary_server()
from prefect.server.api.server import SubprocessASGIServer
server = SubprocessASGIServer()  # as Prefect's client asks for it
assert server.running
print("started", server.server_process.pid, flush=True)
time.sleep(999)
"""


def test_the_server_has_its_own_session_and_ends_with_a_process_that_is_killed(tmp_path):
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path)}
    environment.pop("PREFECT_API_URL", None)  # a test harness may have set it
    starter = subprocess.Popen(python(SCRIPT), env=environment, stdout=subprocess.PIPE, text=True)
    line = next((line for line in starter.stdout if line.startswith("started ")), "")
    assert line, "the script ended before the server was up"
    server = int(line.split()[1])
    assert is_alive(server) and os.getsid(server) == server != os.getsid(starter.pid)
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    wait_for(lambda: not is_alive(server))
