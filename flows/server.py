"""Prefect's temporary server, kept out of the way of our signals."""

import subprocess
from functools import partial
from unittest.mock import patch

from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL

from pusa.system.processes import end_with_parent


def start_temporary_server() -> None:
    """Start the server that Prefect would start by itself where no PREFECT_API_URL is set.

    Prefect starts it in our process group: Ctrl-C then kills it first, and the run waits for ever to report its end to
    nobody. And it outlives a kill -9. So it gets a session of its own, and a signal when the thread that started it
    ends: call this from the main thread.
    """
    if PREFECT_API_URL.value():
        return
    server = SubprocessASGIServer()
    popen = partial(subprocess.Popen, start_new_session=True, preexec_fn=end_with_parent)
    with patch("prefect.server.api.server.subprocess.Popen", popen):
        server.start()
