"""Prefect's tasks: each does one stage's work, with retries, and with the tag "gpu" where it needs the device.

Prefect's cache is not used: a stage finds out from its own files, which it checks, what is done already. Chunks of a
stage's work are tasks within its task, so that the dashboard shows them: `as_task`.
"""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Failed
from prefect.tasks import exponential_backoff
from prefect.transactions import CommitMode, transaction

from flows.launch import launch
from flows.watch import at_work
from pusa.finetune.stage import Finetuned
from pusa.finetune.validation import validate_checkpoints
from pusa.generate.stage import Generated
from pusa.generate.stage import generate as run_generate
from pusa.ingest.stage import Ingested
from pusa.ingest.stage import ingest as run_ingest
from pusa.manifest.models import FinetuneManifest, GenerateManifest, IngestManifest, PrecomputeManifest
from pusa.precompute.stage import Precomputed
from pusa.precompute.stage import precompute as run_precompute
from pusa.system.failures import may_heal
from pusa.system.text import first_line

log = logging.getLogger("pusa.server")


def is_worth_retrying(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Return whether a failed step may succeed when it runs again: not after an error of the input or of our code."""
    return may_heal(state.result(raise_on_failure=False))


RETRIED: dict[str, Any] = {
    "retries": 2,
    "retry_delay_seconds": exponential_backoff(backoff_factor=5),
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": is_worth_retrying,
    "cache_policy": NO_CACHE,
    "persist_result": False,
}
GPU: dict[str, Any] = {"tags": ["gpu"]}

Result = TypeVar("Result")


def as_task(name: str, call: Callable[[], Result]) -> Result:
    """Call `call` as a Prefect task of a name, and return its result or raise its error.

    The task is for the dashboard alone. It is not retried, since the stage does that, and has no tag: a limit of "gpu"
    counts the stage's own task already, and asking for it would need the server. If Prefect fails, the call is made all
    the same.
    """
    outcome: Future[Result] = Future()

    @task(name=name, task_run_name=lambda: name, retries=0, cache_policy=NO_CACHE, persist_result=False)
    def chunk() -> State[None] | None:
        try:
            outcome.set_result(call())
        except Exception as error:  # noqa: BLE001  it is raised below
            outcome.set_exception(error)
            return Failed(message=f"{type(error).__name__}: {first_line(error)}")
        return None

    try:
        # Committed at once: a later chunk that fails would mark those before it, which are done, as rolled back.
        with transaction(commit_mode=CommitMode.EAGER):
            chunk(return_state=True)
    except Exception as error:  # noqa: BLE001  Prefect's own, whose server may be gone
        log.warning("Prefect cannot show %r: %s: %s", name, type(error).__name__, first_line(error))
        if not outcome.done():
            return call()
    return outcome.result()


@task(name="ingest videos", **RETRIED)
def ingest(manifest: IngestManifest, run_dir: Path) -> Ingested:
    """Cut videos with captions into clips."""
    with at_work():
        return run_ingest(manifest, run_dir)


@task(name="precompute latents", **RETRIED, **GPU)
def precompute(manifest: PrecomputeManifest, run_dir: Path) -> Precomputed:
    """Encode clips as latents."""
    with at_work():
        return run_precompute(manifest, run_dir, step=as_task)


@task(name="finetune transformer", **RETRIED, **GPU)
def finetune(
    manifest: FinetuneManifest, run_dir: Path, overrides: Mapping[str, str] = {}, stop: Event | None = None
) -> Finetuned:
    """Train on latents, in processes of its own, to the last checkpoint or until `stop` is set."""
    with at_work():
        return launch(manifest, run_dir, overrides, stop)


@task(name="render validation", cache_policy=NO_CACHE, persist_result=False, **GPU)
def validation(manifest: FinetuneManifest, run_dir: Path) -> list[Path]:
    """Render the validation sheets of checkpoints. It is not retried: the next checkpoint renders what is missing."""
    with at_work():
        return validate_checkpoints(manifest, run_dir)


@task(name="generate videos", **RETRIED, **GPU)
def generate(
    manifest: GenerateManifest,
    run_dir: Path,
    retry_failed: bool = False,
    chosen: frozenset[str] | None = None,
    stop_at: float | None = None,
) -> Generated:
    """Render jobs as videos; with `retry_failed`, only those that have failed; or finish those that are chosen."""
    with at_work():
        return run_generate(manifest, run_dir, retry_failed=retry_failed, step=as_task, chosen=chosen, stop_at=stop_at)
