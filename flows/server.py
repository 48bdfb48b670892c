"""Prefect's temporary server, in a session of its own."""

import os
import subprocess
import sys
from typing import Any

import prefect
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL
from prefect.settings.context import get_current_settings

from pusa.system.processes import bound_to_parent


class TemporaryServer(SubprocessASGIServer):
    """The server that Prefect starts by itself where PREFECT_API_URL is not set, started in a session of its own.

    Prefect starts it in our process group: Ctrl-C then kills it first, and the run waits without end to report to it.
    And it outlives a kill -9. Here it is sent SIGTERM when the thread that started it ends.

    Prefect keeps one instance of `SubprocessASGIServer` for each port, and for no port the one that its client uses:
    whoever makes it first, also as a subclass, decides how it starts.
    """

    def _run_uvicorn_command(self) -> subprocess.Popen[Any]:
        settings = {
            "PREFECT_UI_ENABLED": "0",
            "PREFECT__SERVER_EPHEMERAL": "1",
            "PREFECT__SERVER_FINAL": "1",
            **get_current_settings().to_environment_variables(exclude_unset=True),
        }
        command = [sys.executable, "-m", "uvicorn", "--app-dir", str(prefect.__module_path__.parent)]
        command += ["--factory", "prefect.server.api.server:create_app"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--log-level", "error", "--lifespan", "on"]
        return subprocess.Popen(  # noqa: S603
            bound_to_parent(command), env={**os.environ, **settings}, start_new_session=True
        )


def start_temporary_server() -> None:
    """Start the temporary server where PREFECT_API_URL is not set. Call this from the main thread.

    The server is sent SIGTERM when the thread that started it ends.
    """
    if not PREFECT_API_URL.value():
        TemporaryServer().start()
