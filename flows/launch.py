"""The trainer as child processes: the same command, the manifest in a file, its end told in another.

A fault of the input comes back as the error it was. Any other end - a signal, no memory, a defect - is a
ChildProcessError: that may have been the machine, and the next try goes on from the last checkpoint.
"""

import os
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from flows.children import last_lines, run
from pusa.errors import PusaError
from pusa.manifest.models import FinetuneManifest
from pusa.system.files import read_json, write_json, write_text
from pusa.system.locks import sole_writer

LITTLE_MIB = 100  # of free disk: then a log may be empty for that

if TYPE_CHECKING:
    from pusa.finetune.stage import Finetuned


def launch(
    manifest: FinetuneManifest, run_dir: Path, overrides: Mapping[str, str] = {}, stop: Event | None = None
) -> "Finetuned":
    """Train in `manifest.parallel.processes` processes on this machine.

    In RUN/launch are the manifest as they get it, what they say (log.txt), and how they ended.

    Raises:
        PusaError: as `pusa.finetune.stage.finetune`; or `stop` was set.
        ChildProcessError: they ended in another way.
    """
    folder = run_dir.absolute() / "launch"
    with sole_writer(folder):
        manifest_file, end_file, log_file = (folder / name for name in ("finetune.yaml", "end.json", "log.txt"))
        write_text(manifest_file, manifest.resolve_paths(run_dir).model_dump_json(indent=2) + "\n")
        end_file.unlink(missing_ok=True)
        arguments = ["finetune", str(manifest_file), "--run-dir", str(run_dir.absolute()), "--no-prefect"]
        arguments += ["--result", str(end_file)]
        for key, value in overrides.items():
            arguments += ["--override", f"{key}={value}"]
        processes = manifest.parallel.processes
        code = run(command(processes, arguments), log_file, environment(processes), stop)
        return _result(code, read_json(end_file), log_file)


def command(processes: int, arguments: list[str]) -> list[str]:
    """`pusa ARGUMENTS` in so many processes."""
    module = ["flows"] if processes == 1 else ["flows.agent", str(processes)]
    return [sys.executable, "-m", *module, *arguments]


def environment(processes: int) -> dict[str, str]:
    """Ours; for several, where it does not say otherwise, a fair share of the cores and talk on loopback alone."""
    if processes == 1:
        return dict(os.environ)
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    loopback = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return {"OMP_NUM_THREADS": str(threads), **loopback, **os.environ}


def tell_result(path: Path, result: "Finetuned") -> None:
    """For a child: it ended well, unless another says that something was wrong."""
    if not path.exists():
        write_json(path, {"result": TypeAdapter(type(result)).dump_python(result, mode="json")})


def tell_error(path: Path, error: PusaError) -> None:
    """For a child: what was wrong. Of several the first to say so is heard."""
    if "error" not in (read_json(path) or {}):
        write_json(path, {"error": {"type": type(error).__name__, "message": str(error)}})


def _result(code: int, end: Any, log_file: Path) -> "Finetuned":
    from pusa.finetune.stage import Finetuned

    if end is not None and "error" in end:
        kinds = {kind.__name__: kind for kind in PusaError.__subclasses__()}
        raise kinds.get(end["error"]["type"], PusaError)(end["error"]["message"])
    if code == 0 and end is not None:
        return TypeAdapter(Finetuned).validate_python(end["result"])
    free = shutil.disk_usage(log_file.parent).free // 2**20
    full = f"; {log_file.parent} has {free} MiB left" if free < LITTLE_MIB else ""
    said = "\n  ".join(last_lines(log_file)) or f"(it said nothing{full})"
    raise ChildProcessError(f"the trainer ended with {_named(code)}; the end of {log_file}:\n  {said}")


def _named(code: int) -> str:
    """An exit code, or the signal that it stands for."""
    number = -code if code < 0 else code - 128
    names = {value.value: value.name for value in signal.Signals}
    return names.get(number, f"exit code {code}")
