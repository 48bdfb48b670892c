"""Stage 3: latents -> a transformer that has learnt to denoise any mixture of clean and noisy frames.

One process, or as many as torchrun starts, take the same path. Everything random in a step is drawn from (seed, step,
place in the batch), so a resumed run needs no saved generators to go on exactly, on any number of processes.
"""

import logging
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, Self

import torch
from torch import Tensor

from pusa.data.latents import Latents
from pusa.data.loader import load
from pusa.data.order import Order
from pusa.data.reader import Table
from pusa.diffusion.timesteps import add_noise
from pusa.errors import TableError, TrainingError
from pusa.finetune.batch import Batch, drawn
from pusa.finetune.checkpoint import Checkpoints, WriteResult
from pusa.finetune.loss import by_band, frame_errors, weighted
from pusa.finetune.metrics import BANDS, Measured, Metrics, losses
from pusa.finetune.parallel import LocalProcess, World, clip_gradients, process_group
from pusa.finetune.recipe import Recipe, overridden, recipe_of, require_same, versions, with_overrides
from pusa.finetune.state import Training
from pusa.finetune.trainable import build_trainable
from pusa.manifest.models import FinetuneManifest
from pusa.manifest.training import Full, Lora, Partial
from pusa.system.locks import sole_writer
from pusa.system.progress import Progress
from pusa.weights.adapters import LORA_FOLDER
from pusa.weights.lora import write_lora
from pusa.weights.model import Model, default_dtype
from pusa.weights.write import config_of, write_transformer

log = logging.getLogger(__name__)


class Watch:
    """A context manager. Of several processes, all but the first see to nothing."""

    def __init__(self, run_dir: Path, start: int, steps: int, is_first: bool) -> None:
        self._run_dir, self._start, self._steps, self._is_first = run_dir, start, steps, is_first
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        if self._is_first:
            self._metrics = self._opened.enter_context(Metrics(self._run_dir, self._start))
            self._progress = self._opened.enter_context(Progress("finetune", self._steps, self._start))
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened.close()

    def add(self, measured: Measured) -> None:
        """A step was made."""
        if self._is_first:
            self._metrics.add(measured)
            loss = "skipped" if measured.loss is None else f"loss {measured.loss:.4f}"
            self._progress.advance(note=f"{loss}, {measured.per_second(measured.samples):.2f} clips/s")


def result_writer(transformer: Any, method: Full | Partial | Lora, record: Mapping[str, Any]) -> WriteResult:
    """How a checkpoint's folder gets it."""
    config = config_of(transformer)

    def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
        if isinstance(method, Lora):
            write_lora(folder / LORA_FOLDER, tensors, method, record)
        else:
            write_transformer(folder / "transformer", tensors, config, record)

    return write


@dataclass(frozen=True)
class Finetuned:
    """What a run made."""

    checkpoint: Path
    metrics: Path
    steps: int
    trained_steps: int
    skipped_steps: int
    last_loss: float | None


@dataclass(frozen=True)
class Run:
    """What a step needs beside what it changes."""

    manifest: FinetuneManifest
    world: World
    model: Model
    latents: Latents
    compute: torch.dtype

    @cached_property
    def order(self) -> Order:
        """Which rows each step takes."""
        return Order(self.latents.buckets, self.manifest.batch_size, self.manifest.seed)

    def batches(self, steps: range) -> Iterator[Batch]:
        """This process's share of each step's batch, `micro_batch_size` clips at a time."""
        prepare = drawn(self.manifest, self.latents.space, self.model.backbone.drop_text)
        share = (self.world.data_rank, self.world.data_ranks)
        at_once, workers = self.manifest.micro_batch_size, self.manifest.loader_workers
        return load(self.latents, self.order, steps, *share, workers, at_once, prepare)


def finetune(
    manifest: FinetuneManifest,
    run_dir: Path,
    overrides: Mapping[str, str] | None = None,
    local: LocalProcess | None = None,
) -> Finetuned:
    """Train from the base, or from the last whole checkpoint of the same recipe, to `manifest.steps`.

    Args:
        manifest: the recipe.
        run_dir: where checkpoints and metrics go; several machines must share it.
        overrides: key -> value, as in YAML, of what may be another than it was at the checkpoint.
        local: which of the processes on this machine this is, where flows/launch.py started several.

    Raises:
        ManifestError: an override is not allowed.
        TableError: the latents table is not complete, or was made with other encoders than the base has.
        TrainingError: `run_dir` holds checkpoints of another recipe, or too many steps were not finite.
        StageError: another process is at it.
    """
    given = manifest.located(run_dir)
    manifest = with_overrides(given, overrides or {}).located(run_dir)
    with process_group(manifest.parallel, local) as world, _alone(world, run_dir / "checkpoints"):
        world.share(manifest.batch_size)
        model = Model(manifest.base, world.device)
        table = Table.open(manifest.latents or run_dir / "latents", "rows")
        if not table.rows("rows"):
            raise TableError(f"{table.folder} has no rows; there is nothing to train with")
        latents = Latents(table, model.space_name)
        _require_frames(latents, model, world.context.size)
        compute = getattr(torch, manifest.precision) if manifest.precision else default_dtype(world.device)
        return _train(Run(manifest, world, model, latents, compute), run_dir, given, overrides or {})


def _train(run: Run, run_dir: Path, given: FinetuneManifest, overrides: Collection[str]) -> Finetuned:
    """Find out where to go on from, and go on."""
    manifest, world = run.manifest, run.world
    recipe = world.broadcast(lambda: recipe_of(manifest, run.model, run.latents.table, run.compute))
    with Checkpoints(run_dir / "checkpoints", world, manifest.keep_checkpoints) as checkpoints:
        found = checkpoints.last()
        if found:
            require_same(found.record["recipe"], recipe, overrides, found.path, run.latents.table.folder)
            if found.step >= manifest.steps:
                return _finished(run_dir, checkpoints.at(manifest.steps), found.record["skipped"], 0)
        training = Training.start(build_trainable(run.model, manifest, world, run.compute), manifest)
        if found:
            checkpoints.restore(found, training)
            log.info("going on from %s", found.path)
        start = training.step
        before = found.record["recipe"] if found else given.model_dump(mode="json")
        changes = [*(found.record["overrides"] if found else ()), *overridden(before, recipe, overrides, start)]
        with Watch(run_dir, start, manifest.steps, world.is_first) as watch:
            for measured in _steps(run, training, checkpoints, recipe, changes):
                watch.add(measured)
        checkpoints.wait()
        return _finished(run_dir, checkpoints.at(manifest.steps), training.skipped, manifest.steps - start)


def _steps(
    run: Run, training: Training, checkpoints: Checkpoints, recipe: Recipe, changes: list[dict[str, Any]]
) -> Iterator[Measured]:
    """The steps that are left, each told before it is saved."""
    manifest = run.manifest
    batches = run.batches(range(training.step, manifest.steps))
    while training.step < manifest.steps:
        measured = train_step(run, training, batches)
        yield measured
        if measured.skipped:
            _tell_skipped(training, measured)
        checkpoints.raise_if_failed()
        if training.step % manifest.checkpoint_every == 0 or training.step == manifest.steps:
            record = _record(training, recipe, changes)
            write = result_writer(training.transformer, manifest.train, record)
            checkpoints.save(training, record, run.compute, write)


def train_step(run: Run, training: Training, batches: Iterator[Batch]) -> Measured:
    """One optimizer step, over this process's share of the batch; what is not finite changes nothing."""
    began, waited, rate, step = perf_counter(), 0.0, training.learning_rate, training.step
    share, taken, tokens = run.world.share(run.manifest.batch_size), 0, 0
    loss, bands = torch.zeros((), device=run.world.device), torch.zeros(2, BANDS, device=run.world.device)
    while taken < share:
        asked = perf_counter()
        batch = next(batches)
        waited += perf_counter() - asked
        part, bands_of_part = backward(run, training, batch, len(batch.x0) / share)
        loss, bands = loss + part, bands + bands_of_part
        taken, tokens = taken + len(batch.x0), tokens + run.model.backbone.geometry.tokens(batch.x0.shape)
    norm = clip_gradients(training.transformer, run.manifest.max_grad_norm)

    total, *sums = run.world.all_reduce([loss.item(), *bands.flatten().tolist()])
    mean = total / run.world.size
    finite = math.isfinite(mean) and math.isfinite(norm)
    training.apply() if finite else training.skip()
    return Measured(
        step=training.step,
        loss=mean if finite else None,
        learning_rate=rate,
        grad_norm=norm if finite else None,
        by_level=tuple(
            error / count if count else None for error, count in zip(sums[:BANDS], sums[BANDS:], strict=True)
        ),
        samples=run.manifest.batch_size,
        tokens=tokens * run.world.data_ranks,
        seconds=perf_counter() - began,
        waited=waited,
        memory=run.world.peak_memory(),
        skipped=() if finite else tuple(run.latents.clip_ids(run.order.rows(step))),
    )


def backward(run: Run, training: Training, batch: Batch, weight: float) -> tuple[Tensor, Tensor]:
    """Add a part's gradient, `weight` times; its loss, times `weight`, and its errors and frames by level (2, 10)."""
    batch = batch.to(run.world.device)
    z = add_noise(batch.x0, batch.noise, batch.sigma_BF)
    velocity = run.model.backbone.predict(training.transformer, z, batch.sigma_BF, batch.text)
    error_BF = frame_errors(velocity, batch.target)
    loss = weight * weighted(error_BF, batch.sigma_BF, run.manifest.weighting)
    loss.backward()
    return loss.detach(), by_band(error_BF.detach(), batch.sigma_BF)


def _alone(world: World, folder: Path) -> AbstractContextManager[None]:
    return sole_writer(folder) if world.is_first else nullcontext()


def _require_frames(latents: Latents, model: Model, context: int) -> None:
    """Each process of a context needs a latent frame of every clip."""
    for shape in latents.buckets:  # WIDTHxHEIGHTxFRAMES
        frames = model.backbone.geometry.latent_frames(int(shape.split("x")[2]))
        if frames < context:
            raise TrainingError(
                f"parallel.context is {context}; {latents.table.folder} has clips {shape}, of {frames} latent frames"
            )


def _tell_skipped(training: Training, measured: Measured) -> None:
    told = f"step {measured.step}: loss or gradient not finite, with clips {list(measured.skipped)}"
    if training.skipped > training.manifest.non_finite_limit:
        limit = f"non_finite_limit is {training.manifest.non_finite_limit}"
        raise TrainingError(f"{told}; {training.skipped} steps of this run were skipped so far, {limit}")
    log.warning("%s; skipped", told)


def _record(training: Training, recipe: Recipe, changes: list[dict[str, Any]]) -> dict[str, Any]:
    """What a checkpoint, and every file made from it, says of itself."""
    return {
        "step": training.step,
        "latent_space": recipe["latent_space"],
        "backbone": recipe["backbone"],
        "base": training.manifest.base.model_dump(mode="json", exclude_none=True),
        "recipe": recipe,
        "overrides": changes,
        "skipped": training.skipped,
        "versions": versions(),
    }


def _finished(run_dir: Path, checkpoint: Path, skipped: int, trained: int) -> Finetuned:
    metrics = run_dir / "metrics.jsonl"
    step = int(checkpoint.name)
    loss = next((loss for made, loss in losses(metrics) if made == step), None)
    return Finetuned(checkpoint, metrics, step, trained, skipped, loss)
