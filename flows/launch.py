"""Start the trainer: one child process that trains, or that starts one process for each rank on this machine.

`pusa finetune MANIFEST` (without Prefect and with one process it trains itself)
    -> `launch`: starts `python -P -m flows finetune ... --result FILE` in a session of its own and waits for its end
        -> `run_trainer`: trains itself, or with parallel.processes > 1 spawns the ranks, which meet at a file
On several machines torchrun starts `python -m flows finetune ... --no-prefect` once for each rank, without `launch`.

An error of the input comes back as the error class that it was, and a defect of the code as a TrainingError. Any other
end (a signal, no memory, an error of a disk) is a ChildProcessError: the machine may be the cause, and the next try
resumes from the last checkpoint.
"""

import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event
from time import monotonic
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from pydantic import TypeAdapter, ValidationError

from flows.console import log_to_console, print_error, print_result, show
from pusa.errors import PusaError, TrainingError
from pusa.finetune.torchrun import MARK, Torchrun
from pusa.manifest.loading import load_manifest
from pusa.manifest.models import FinetuneManifest
from pusa.system.failures import may_heal
from pusa.system.files import read_object, remove, write_json, write_text
from pusa.system.locks import sole_writer
from pusa.system.processes import bound_to_parent, end_with_parent
from pusa.system.text import first_line, printable

if TYPE_CHECKING:  # torch is imported by the processes that train, and by no other
    from pusa.finetune.stage import Finetuned

log = logging.getLogger("pusa.finetune")
child_log = logging.getLogger("pusa.child")
# -P: a module in the folder where we were started must not take the place of a library, nor in the ranks.
PUSA = (sys.executable, "-P", "-m", "flows")
STORE = "store-"  # and a random name: the file at which the ranks of one start meet
LITTLE_DISK_MIB = 100  # with less free disk than this, an empty log is explained by a full disk
RANK_GRACE_SECONDS = 5.0  # for the other ranks when one has failed
CHILD_GRACE_SECONDS = 30.0  # for the child between SIGTERM and SIGKILL
POLL_SECONDS = 0.2
SECONDS_BETWEEN_LOG_LINES = 1.0
LONGEST_LINE = 500  # characters
LONGEST_READ = 1 << 20  # bytes of the log that are read at a time


def train(
    manifest: FinetuneManifest, run_dir: Path, overrides: Mapping[str, str] = {}, with_new_clips: bool = False
) -> "Finetuned":
    """Train without Prefect, here or in `parallel.processes` processes, then render the validation sheets."""
    if with_new_clips:
        from pusa.finetune import recipe

        overrides = {**recipe.with_new_clips(manifest, run_dir), **overrides}
    if manifest.parallel.processes > 1:
        result = launch(manifest, run_dir, overrides)
    else:
        from pusa.finetune.stage import finetune

        result = finetune(manifest, run_dir, overrides)
    if manifest.validation is not None:
        from pusa.finetune.validation import validate_after_training

        validate_after_training(manifest, run_dir)
    return result


def launch(
    manifest: FinetuneManifest,
    run_dir: Path,
    overrides: Mapping[str, str] = {},
    stop: Event | None = None,
    pusa: Sequence[str] = PUSA,
) -> "Finetuned":
    """Train in a child process and return its result.

    RUN/launch holds the manifest as the child gets it (finetune.yaml), its output (log.txt) and its result (end.json).

    Args:
        manifest: the recipe; `parallel.processes` processes train.
        run_dir: the run's folder.
        overrides: key -> value, as in YAML, of the recipe's keys that change at the last checkpoint.
        stop: ends the training when it is set.
        pusa: the command that is run with the trainer's arguments.

    Raises:
        PusaError: as `pusa.finetune.stage.finetune`.
        TrainingError: `stop` was set, or the trainer has a defect.
        ChildProcessError: the child ended in any other way.
    """
    run_dir = run_dir.absolute()
    folder = run_dir / "launch"
    with sole_writer(folder):
        manifest_file, result_file, log_file = (folder / name for name in ("finetune.yaml", "end.json", "log.txt"))
        write_text(manifest_file, manifest.resolve_paths(run_dir).model_dump_json(indent=2) + "\n")
        remove(result_file)
        command = [*pusa, "finetune", str(manifest_file), "--run-dir", str(run_dir), "--no-prefect"]
        for key, value in overrides.items():
            command += ["--override", f"{key}={value}"]
        command += ["--result", str(result_file)]
        try:
            code = run_child(command, log_file, trainer_environment(manifest.parallel.processes, os.environ), stop)
        finally:
            for store in folder.glob(f"{STORE}*"):  # also of a start that was killed
                remove(store)
        return _read_result(code, read_object(result_file), log_file)


def trainer_environment(processes: int, ours: Mapping[str, str]) -> dict[str, str]:
    """Return the child's environment: ours, with defaults for what is not set.

    Several processes share the cores evenly and exchange messages over the loopback interface alone.
    """
    if processes == 1:
        return dict(ours)
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    loopback = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return {"OMP_NUM_THREADS": str(threads), **loopback, **ours}


def _read_result(code: int, end: Mapping[str, Any], log_file: Path) -> "Finetuned":
    """Return the child's result, or raise its error."""
    from pusa.finetune.stage import Finetuned

    if isinstance(error := end.get("error"), dict):
        kinds = {kind.__name__: kind for kind in PusaError.__subclasses__()}
        raise kinds.get(str(error.get("type")), PusaError)(str(error.get("message")))
    if isinstance(defect := end.get("defect"), str):
        raise TrainingError(f"the trainer has a defect, {defect}; its traceback is in {log_file}")
    if code == 0:
        with suppress(ValidationError):
            return TypeAdapter(Finetuned).validate_python(end.get("result"))
    number = -code if code < 0 else code - 128  # a shell, and a rank's launcher, give a signal as 128 + its number
    ending = {value.value: value.name for value in signal.Signals}.get(number, f"exit code {code}")
    free = shutil.disk_usage(log_file.parent).free // 2**20
    full = f"; {log_file.parent} has {free} MiB left" if free < LITTLE_DISK_MIB else ""
    output = "\n  ".join(last_lines(log_file)) or f"(it printed nothing{full})"
    raise ChildProcessError(f"the trainer ended with {ending}; the end of {log_file}:\n  {output}")


# In the child


def is_trainer(result_file: Path | None) -> bool:
    """Return whether this process was started by `launch` or torchrun, to train and for nothing else."""
    return MARK in os.environ or result_file is not None


def run_trainer(
    manifest_file: Path, run_dir: Path, overrides: Mapping[str, str] = {}, result_file: Path | None = None
) -> int:
    """Train as the child of `launch` or as one rank of torchrun, and return the exit code.

    The first rank prints the result, or writes it to `result_file`.
    """
    torchrun = Torchrun.find()
    rank = torchrun.rank if torchrun else 0
    _log_as(rank)
    if torchrun:
        end_with_parent(signal.SIGKILL)  # torchrun gave this process a session of its own
    run_dir = run_dir.absolute()
    try:
        manifest = load_manifest(manifest_file, run_dir, "finetune")
        assert isinstance(manifest, FinetuneManifest)
        if result_file and not torchrun and manifest.parallel.processes > 1:
            return _run_ranks(manifest, run_dir, overrides, result_file)
        from pusa.finetune.stage import finetune

        result = finetune(manifest, run_dir, overrides)
    except Exception as error:
        if result_file:
            write_error(result_file, error)
        raise
    if rank == 0:
        write_result(result_file, result) if result_file else print_result(result)
    return 0


def _run_ranks(manifest: FinetuneManifest, run_dir: Path, overrides: Mapping[str, str], result_file: Path) -> int:
    """Spawn the ranks; return 0, or the exit code of the first that failed: 128 + N if signal N ended it."""
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

    size, store = manifest.parallel.processes, result_file.with_name(f"{STORE}{uuid4().hex}")
    arguments = (manifest, run_dir, overrides, result_file, size, store, os.getpid())
    ranks = start_processes(_run_rank, arguments, size, join=False)
    try:
        while not ranks.join(grace_period=RANK_GRACE_SECONDS):
            pass
    except ProcessRaisedException as error:
        show(error, error=True)
        return 1
    except ProcessExitedException as error:
        code = error.exit_code
        show(f"process {error.error_index + 1} of {size} ended first, with {code}", error=True)
        return code if code > 0 else 128 - code
    return 0


def _run_rank(
    rank: int,
    manifest: FinetuneManifest,
    run_dir: Path,
    overrides: Mapping[str, str],
    result_file: Path,
    size: int,
    store: Path,
    parent: int,
) -> None:
    """Train as one of the spawned ranks. An error that names its cause needs no traceback."""
    end_with_parent(signal.SIGKILL, parent)
    _log_as(rank)
    from pusa.finetune.parallel import LocalProcess
    from pusa.finetune.stage import finetune

    try:
        result = finetune(manifest, run_dir, overrides, LocalProcess(rank, size, store))
    except Exception as error:
        write_error(result_file, error)
        if not isinstance(error, PusaError | OSError):
            raise
        print_error(error)
        raise SystemExit(1) from error
    if rank == 0:
        write_result(result_file, result)


def _log_as(rank: int) -> None:
    """Log to the console; only the first rank logs more than warnings, and shows a progress bar."""
    log_to_console()
    if rank:
        logging.getLogger("pusa").setLevel(logging.WARNING)
        os.environ["TQDM_DISABLE"] = "1"


def write_result(path: Path, result: "Finetuned") -> None:
    """Write the result of the training for `launch`. An error that another rank wrote is kept."""
    if not path.exists():
        write_json(path, {"result": TypeAdapter(type(result)).dump_python(result, mode="json")})


def write_error(path: Path, error: Exception) -> None:
    """Write an error for `launch` that the next try would meet again. The first rank that writes one is heard."""
    if may_heal(error) or read_object(path).keys() & {"error", "defect"}:
        return
    if isinstance(error, PusaError):
        write_json(path, {"error": {"type": type(error).__name__, "message": str(error)}})
    else:
        write_json(path, {"defect": f"{type(error).__name__}: {first_line(error)}"})


# Any child process


def run_child(
    command: Sequence[str],
    log_file: Path,
    environment: Mapping[str, str],
    stop: Event | None = None,
    grace: float = CHILD_GRACE_SECONDS,
) -> int:
    """Run a command in a session of its own; return its exit code, or minus the signal that ended it.

    Its output goes to `log_file`, and the log before it is kept as log.1.txt. The last line of the output is logged,
    at most once a second. The child is sent SIGTERM when the thread that called this ends, also by kill -9. When an
    exception ends this call, the session's processes are sent SIGTERM, and SIGKILL `grace` seconds later.

    Raises:
        TrainingError: `stop` was set.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(log_file):
        before = log_file.with_suffix(f".1{log_file.suffix}")
        remove(before)
        log_file.rename(before)
    with log_file.open("xb") as output:  # follows no link
        child = subprocess.Popen(  # noqa: S603
            bound_to_parent(command),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _watch(child, log_file, stop or Event())
    finally:
        _end_session(child, grace)
    return child.returncode


def last_lines(log_file: Path, count: int = 12) -> list[str]:
    """Return the last lines of a log, safe to print."""
    with log_file.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4 * LONGEST_LINE * count))
        lines = file.read().decode(errors="replace").splitlines()
    return [printable(line, LONGEST_LINE) for line in lines if line.strip()][-count:]


def _watch(child: subprocess.Popen[bytes], log_file: Path, stop: Event) -> None:
    """Wait for the child's end and log the last whole line of its output, at most once a second."""
    unfinished, line, logged = b"", b"", -SECONDS_BETWEEN_LOG_LINES
    with log_file.open("rb") as output:
        running = True
        while running:
            running = not _has_ended(child)  # asked first, so that the last read sees all of the output
            output.seek(max(output.tell(), os.fstat(output.fileno()).st_size - LONGEST_READ))
            *lines, unfinished = (unfinished + output.read(LONGEST_READ)).split(b"\n")
            unfinished = unfinished[: 4 * LONGEST_LINE]
            line = next((text for text in reversed(lines) if text.strip()), line)
            if line and (not running or monotonic() - logged >= SECONDS_BETWEEN_LOG_LINES):
                child_log.info("%s", printable(line.decode(errors="replace").rstrip(), LONGEST_LINE))
                line, logged = b"", monotonic()
            if running and stop.wait(POLL_SECONDS):
                raise TrainingError("the training was stopped; run it again to resume from its last checkpoint")


def _has_ended(child: subprocess.Popen[bytes]) -> bool:
    """Return whether the child has ended. It is not reaped yet, so that its number, its group's, stays its own."""
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _end_session(child: subprocess.Popen[bytes], grace: float) -> None:
    """End every process of the child's group."""
    try:
        if not _has_ended(child):
            os.killpg(child.pid, signal.SIGTERM)
        deadline = monotonic() + grace
        while not _has_ended(child) and monotonic() < deadline:
            Event().wait(POLL_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
