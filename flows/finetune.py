"""The finetune flow: train on latents, and validate each checkpoint during the training."""

import logging
import os
from pathlib import Path
from threading import Event

from prefect import flow
from prefect.futures import PrefectFuture

from flows import events, live, report, steps
from flows.handover import ManifestFile, read, run_name
from flows.notices import noticed
from pusa.finetune import recipe
from pusa.finetune.stage import Finetuned
from pusa.manifest.models import FinetuneManifest

log = logging.getLogger("pusa.finetune")
POLL_SECONDS = 5.0


@flow(name="finetune", flow_run_name=run_name)
def finetune(
    manifest: ManifestFile, run_dir: Path, overrides: dict[str, str] | None = None, with_new_clips: bool = False
) -> Finetuned:
    """Train a transformer on the latents of a run, from its last checkpoint on.

    Args:
        manifest: the file of the recipe.
        run_dir: the folder of the run; the checkpoints are in its folder checkpoints.
        overrides: other values of keys of the recipe, with which a training resumes.
        with_new_clips: train on with a table that has changed, for as many steps again as the manifest says.
    """
    loaded = read(manifest, run_dir, FinetuneManifest)
    overrides = {**(recipe.with_new_clips(loaded, run_dir) if with_new_clips else {}), **(overrides or {})}
    with (
        noticed("finetune", loaded, manifest.path, run_dir) as outcome,
        live.reporting(report.FinetunePage(manifest, run_dir, loaded, overrides)),
    ):
        outcome.result = _finetune(loaded, run_dir, overrides)
    events.stage_ended("finetune", run_dir)
    return outcome.result


def _finetune(manifest: FinetuneManifest, run_dir: Path, overrides: dict[str, str]) -> Finetuned:
    """Train, and validate each checkpoint."""
    stop = Event()
    training = steps.finetune.submit(manifest, run_dir, overrides, stop)
    try:
        _watch(training, manifest, run_dir)
        training.wait()
        _announce(manifest, run_dir)
        complete = training.state.is_completed() and _validate(manifest, run_dir)
        result = training.result()
        if not complete:
            log.warning("the training is complete, but its validation failed (see above); the next run repeats it")
        return result
    except BaseException:
        stop.set()  # otherwise Prefect waits for the step's thread, which waits for the trainer's end
        raise


def _watch(training: PrefectFuture[Finetuned], manifest: FinetuneManifest, run_dir: Path) -> None:
    """Announce and validate each checkpoint until the training ends or fails."""
    done = Event()
    training.add_done_callback(lambda _: done.set())
    validated = _last_checkpoint(run_dir)
    while not done.wait(POLL_SECONDS):
        _announce(manifest, run_dir)
        if (last := _last_checkpoint(run_dir)) != validated:
            validated = last
            _validate(manifest, run_dir)


def _announce(manifest: FinetuneManifest, run_dir: Path) -> None:
    keep_best = manifest.validation.keep_best if manifest.validation else None
    events.announce_checkpoints(run_dir, manifest.checkpoint_every, keep_best)


def _validate(manifest: FinetuneManifest, run_dir: Path) -> bool:
    """Render the missing validation sheets, and return whether that succeeded."""
    if manifest.validation is None:
        return True
    return steps.validation(manifest, run_dir, return_state=True).is_completed()


def _last_checkpoint(run_dir: Path) -> str | None:
    """Return the name of the last checkpoint; None if there is none."""
    last = run_dir / "checkpoints/last"
    return os.readlink(last) if last.is_symlink() else None
