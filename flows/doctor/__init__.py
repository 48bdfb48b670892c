"""`pusa doctor`: examine this machine, its server and its runs, and repair what can be repaired.

A check is a function that yields findings. The checks are in machine.py, service.py and folders.py; findings.py runs
them.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from flows.doctor.findings import Line, examine, note, problem
from pusa.errors import PusaError
from pusa.system.text import first_line


def examine_all(runs: Sequence[Path] = (), repair: bool = False) -> Iterator[Line]:
    """Examine this machine, the server of PREFECT_API_URL, and runs; yield the lines of the report.

    Args:
        runs: folders of runs.
        repair: repair what can be repaired.
    """
    from flows.doctor.machine import machine_checks
    from flows.settings import load_prefect

    try:
        load_prefect()
    except Exception as error:  # noqa: BLE001  packages that do not fit together fail in any way
        yield Line("settings", problem(first_line(error), "correct the settings, or see packages"))
        yield from examine(machine_checks(), repair)
    else:
        yield from examine(machine_checks(), repair)
        yield from _examine_server(repair)
    if not runs:
        return
    from flows.doctor.folders import folder_checks

    for run in runs:
        yield from examine(folder_checks(run.absolute()), repair)


def _examine_server(repair: bool) -> Iterator[Line]:
    from prefect.settings import PREFECT_API_URL

    from flows.doctor.service import service_checks
    from flows.runs import connected

    if not PREFECT_API_URL.value():
        text = "PREFECT_API_URL is not set: each run starts a server of its own"
        yield Line("server", note(text, "start one that stays: pusa server"))
        return
    try:
        with connected() as client:
            yield from examine(service_checks(client), repair)
    except PusaError as error:
        yield Line("server", problem(str(error), ""))
