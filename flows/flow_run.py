"""Run one of Pusa's flows for a run that a worker took: `python -P -m flows.flow_run ID FLOW`.

The worker chose the flow by the deployment's entry point, and nothing that a submitter can write names code or
environment. SIGTERM ends this process at once and reports nothing: the worker sets the run's state.
"""

import importlib
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextvars import copy_context
from inspect import signature
from threading import Thread
from types import FrameType
from typing import TYPE_CHECKING, Any
from uuid import UUID

from flows.console import flush_streams, open_streams, print_error
from flows.settings import WITHOUT, load_prefect, reach_loopback_directly
from pusa.errors import PusaError
from pusa.system.text import MAX_LISTED, preview

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.schemas.objects import FlowRun

STOPPED = 128 + signal.SIGTERM  # the exit code after SIGTERM
RESUMED = "the worker starts the run again"
SERVER_LOST = 75  # the exit code when the server has gone: the work is kept, and the run can be started again


def main(words: Sequence[str]) -> int:
    """Run a flow, and return 0 once its end is reported, whatever it is; or SERVER_LOST, or 1 after another problem.

    Args:
        words: the run's id and the name of the flow.
    """
    open_streams()
    # The flow runs in another thread: in the main one Prefect would report a run that gets SIGTERM as crashed.
    signal.signal(signal.SIGTERM, _stop)
    reach_loopback_directly(os.environ)
    id, flow = UUID(words[0]), words[1]
    code = 1  # of settings that were spoilt since the worker read them: it tries such a run a few times only
    try:
        load_prefect()
        code = SERVER_LOST
        logging.getLogger("pusa").setLevel(logging.INFO)
        from flows.server import require_server

        server = require_server()
    except PusaError as error:
        print_error(str(error).removesuffix(f", {WITHOUT}"))
        return code
    codes: list[int] = []
    thread = Thread(target=copy_context().run, args=(_run, id, flow, server, codes), name="flow run")
    thread.start()
    thread.join()
    return codes[0] if codes else 1


def _stop(number: int, frame: FrameType | None) -> None:
    """End this process; those that it started end with it."""
    flush_streams()
    os._exit(STOPPED)


def _run(id: UUID, name: str, server: str, codes: list[int]) -> None:
    """Run the flow of a name, and append the exit code to `codes`."""
    from prefect.client.orchestration import get_client
    from prefect.engine import handle_engine_signals
    from prefect.flow_engine import run_flow
    from prefect.states import Failed

    from flows.watch import watched

    with get_client(sync_client=True) as client:
        run: FlowRun = client.read_flow_run(id)
        flow = getattr(importlib.import_module(f"flows.{name}"), name)
        try:
            require_parameters(flow, run.parameters)
        except PusaError as error:
            print_error(f"{run.name} is refused: {error}")
            client.set_flow_run_state(id, Failed(message=f"refused: {error}"))
            codes.append(0)
            return
    try:
        with watched(server, _end_without_server, cancelled=None, then=RESUMED), handle_engine_signals(id):
            run_flow(flow, flow_run=run, return_type="state")
    except SystemExit as end:  # the server refused the run, because it was cancelled meanwhile
        codes.append(end.code if isinstance(end.code, int) else 1)
    else:
        codes.append(0)


def require_parameters(flow: "Flow[Any, Any]", given: Mapping[str, Any]) -> None:
    """Raise PusaError if a flow lacks a parameter, or has none of a name that is given.

    Prefect would end with a traceback then, and the worker would start the run again and again.
    """
    known = signature(flow.fn).parameters
    unknown = [name for name in given if name not in known]
    missing = [name for name, each in known.items() if each.default is each.empty and name not in given]
    if unknown or missing:
        problems = [f"has no parameter {preview(name)}" for name in unknown[:MAX_LISTED]]
        problems += [f"needs {name}" for name in missing]
        raise PusaError(f"the flow {flow.name} {' and '.join(problems)}; its parameters are {', '.join(known)}")


def _end_without_server(problem: str) -> None:
    print_error(problem)
    flush_streams()
    os._exit(SERVER_LOST)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
