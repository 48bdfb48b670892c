"""The process of a run that a worker has started: `flows.flow_run` in a session of its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Self

from prefect.client.schemas.objects import FlowRun

from pusa.system.processes import bound_to_parent

GRACE_SECONDS = 20.0  # between SIGTERM and SIGKILL


@dataclass
class Started:
    """A run of this worker, and its process.

    Attributes:
        run: the run as it was when it was taken.
        process: its process.
        kill_at: when SIGKILL follows the SIGTERM that the process was sent; None: it was sent none.
        final_since: when its state was first seen to be a last one; None: not yet.
        is_reviving: whether its state is being set back to Running.
    """

    run: FlowRun
    process: subprocess.Popen[bytes]
    kill_at: float | None = None
    final_since: float | None = None
    is_reviving: bool = False

    @classmethod
    def begin(cls, run: FlowRun, flow: str, environment: Mapping[str, str]) -> Self:
        """Start the process of a run, of the flow of a name. It ends with its worker, also by kill -9."""
        process = subprocess.Popen(  # noqa: S603  no part of the command comes from a deployment
            bound_to_parent([sys.executable, "-P", "-m", "flows.flow_run", str(run.id), flow], signal.SIGKILL),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        return cls(run, process)

    def stop(self) -> None:
        """Send SIGTERM, or SIGKILL once the time for it has come."""
        now = monotonic()
        if self.kill_at is None:
            self.kill_at = now + GRACE_SECONDS
            self._signal(signal.SIGTERM)
        elif now >= self.kill_at:
            self._signal(signal.SIGKILL)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)
