"""The finetune flow: latents -> checkpoints, each looked at while the training goes on."""

import logging
import os
from pathlib import Path
from threading import Event

from prefect import flow
from prefect.futures import PrefectFuture

from flows import report, steps
from pusa.finetune.stage import Finetuned
from pusa.manifest.models import FinetuneManifest

log = logging.getLogger("pusa.finetune")
SECONDS_BETWEEN_LOOKS = 5.0


@flow(name="finetune", flow_run_name="finetune {run_dir}")
def finetune(manifest: FinetuneManifest, run_dir: Path, overrides: dict[str, str] | None = None) -> Finetuned:
    """Run the finetune stage in `run_dir`."""
    stop = Event()
    training = steps.finetune.submit(manifest, run_dir, overrides or {}, stop)
    try:
        _watch(training, manifest, run_dir)
        result = training.result()
        if not _look(manifest, run_dir):
            log.warning("the training is done, but not its validation: see above; the next run tries again")
        return result
    except BaseException:
        stop.set()  # or Prefect waits for the trainer's end: that is where the step's thread is
        raise


def _watch(training: PrefectFuture[Finetuned], manifest: FinetuneManifest, run_dir: Path) -> None:
    """Look at each checkpoint until the training ends, in whatever way."""
    done = Event()
    training.add_done_callback(lambda _: done.set())
    seen = _newest(run_dir)
    while not done.wait(SECONDS_BETWEEN_LOOKS):
        if (newest := _newest(run_dir)) != seen:
            seen = newest
            _look(manifest, run_dir)
    _report(run_dir)


def _look(manifest: FinetuneManifest, run_dir: Path) -> bool:
    """Render what has no picture yet, and bring the dashboard up to date; whether all that went well."""
    went_well = True
    if manifest.validation is not None:
        went_well = steps.validation(manifest, run_dir, return_state=True).is_completed()
    _report(run_dir)
    return went_well


def _report(run_dir: Path) -> None:
    if (run_dir / "metrics.jsonl").is_file():  # a training may end before its first step
        report.finetune(run_dir)


def _newest(run_dir: Path) -> str | None:
    """The name of the last checkpoint."""
    last = run_dir / "checkpoints/last"
    return os.readlink(last) if last.is_symlink() else None
