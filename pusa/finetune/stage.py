"""Stage 3: train a transformer on latents in which any mixture of frames is clean or noisy.

A single process and the processes of torchrun run the same code. All random numbers of a step are derived from (seed,
step, place in the batch). So no generator state has to be saved: a resumed run makes the same steps, on any number of
processes.
"""

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from pusa.data.latents import Latents
from pusa.data.loader import load, worker_deaths
from pusa.data.order import Order
from pusa.data.reader import Table
from pusa.diffusion.timesteps import add_noise
from pusa.errors import TableError, TrainingError
from pusa.finetune.batch import Batch, batch_maker
from pusa.finetune.checkpoint import Checkpoints, FindBest
from pusa.finetune.loss import frame_errors, sum_by_band, weighted
from pusa.finetune.matrix import Matrix, notes_on
from pusa.finetune.measurements import comparable, find_best, read_measurements
from pusa.finetune.metrics import BANDS, MetricsWriter, StepMetrics, read_losses
from pusa.finetune.parallel import LocalProcess, World, clip_gradients, process_group
from pusa.finetune.recipe import (
    Recipe,
    changed_keys,
    recipe_of,
    recorded_recipe,
    rename_overrides,
    require_encoders,
    require_same,
    require_same_table,
    versions,
    with_overrides,
)
from pusa.finetune.split import Split, split_clips
from pusa.finetune.state import Training
from pusa.finetune.trainable import build_trainable
from pusa.manifest.models import FinetuneManifest
from pusa.manifest.training import Lora
from pusa.system.disk import Room
from pusa.system.locks import sole_writer
from pusa.system.progress import Progress
from pusa.weights.adapters import LORA_FOLDER
from pusa.weights.lora import write_lora
from pusa.weights.model import Model, default_dtype
from pusa.weights.write import config_of, write_transformer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finetuned:
    """The result of a run: its last checkpoint and metrics file, and how many steps it made and skipped.

    `trained_steps` are those of this call, `skipped_steps` those of the whole run. `ended_early` says when and why
    `validation.patience` ended the run, and is empty otherwise.
    """

    checkpoint: Path
    metrics: Path
    steps: int
    trained_steps: int
    skipped_steps: int
    last_loss: float | None
    ended_early: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """Everything that a step reads and does not change."""

    manifest: FinetuneManifest
    world: World
    model: Model
    latents: Latents
    split: Split
    compute: torch.dtype

    @cached_property
    def order(self) -> Order:
        """Return which rows each step trains on."""
        return Order(self.split.training, self.manifest.batch_size, self.manifest.seed)

    def batches(self, steps: range) -> Iterator[Batch]:
        """Yield this process's share of each step's batch, `micro_batch_size` clips at a time."""
        make_batch = batch_maker(self.manifest, self.latents, self.model.backbone.drop_text)
        share = (self.world.data_rank, self.world.data_ranks)
        clips, workers = self.manifest.micro_batch_size, self.manifest.loader_workers
        return load(self.latents, self.order, steps, *share, workers, clips, make_batch)


def finetune(
    manifest: FinetuneManifest,
    run_dir: Path,
    overrides: Mapping[str, str] | None = None,
    local: LocalProcess | None = None,
) -> Finetuned:
    """Train up to step `manifest.steps`, from the base or from the last complete checkpoint of the same recipe.

    Args:
        manifest: the recipe.
        run_dir: the folder of checkpoints and metrics; with several machines all of them must share it.
        overrides: key -> value, as YAML, of what may differ from the last checkpoint.
        local: which of the processes on this machine this is, where flows/launch.py started several.

    Raises:
        ManifestError: a key cannot be overridden.
        TableError: the latents table is incomplete, empty, or was made with other encoders than the base has.
        TrainingError: `run_dir` holds checkpoints of another recipe, too many steps were not finite, or the processes
            that train together lost each other.
        StageError: another process trains in `run_dir`, or one that reads ahead is gone.
    """
    with process_group(manifest.parallel, local) as world:
        overrides = rename_overrides(overrides or {}, warn=world.is_first)
        given = manifest.resolve_paths(run_dir)
        manifest = with_overrides(given, overrides).resolve_paths(run_dir)
        with sole_writer(run_dir / "checkpoints") if world.is_first else nullcontext():
            world.share(manifest.batch_size)
            model = Model(manifest.base, world.device)
            table = Table.open(manifest.latents or run_dir / "latents", "rows")
            if not table.rows("rows"):
                raise TableError(f"{table.folder} has no rows; there is nothing to train with")
            latents = Latents(table, model.space_of(manifest.part))
            split = split_clips(manifest.validation, latents, partial(_open_other, model, manifest.part))
            for one in (latents, split.measured):
                _require_frames(one, model, world)
            compute = getattr(torch, manifest.precision) if manifest.precision else default_dtype(world.device)
            return _resume(Run(manifest, world, model, latents, split, compute), run_dir, given, overrides)


def _open_other(model: Model, part: str, folder: Path) -> Latents:
    """Open the table of held-out clips.

    Raises:
        TableError: it cannot be used, or was made with other encoders than the base has.
    """
    table = Table.open(folder, "rows")
    require_encoders(table, model)
    return Latents(table, model.space_of(part))


def _require_frames(latents: Latents, model: Model, world: World) -> None:
    """Refuse clips with fewer latent frames than the processes that share them, each of which needs one."""
    for shape in latents.buckets:  # WIDTHxHEIGHTxFRAMES
        frames = model.backbone.geometry.latent_frames(int(shape.split("x")[2]))
        if frames < world.context.size:
            raise TrainingError(
                f"parallel.context is {world.context.size}; {latents.table.folder} has clips {shape}, "
                f"of {frames} latent frames"
            )


def _resume(run: Run, run_dir: Path, given: FinetuneManifest, overrides: Collection[str]) -> Finetuned:
    """Train the remaining steps, from the last complete checkpoint or, where there is none, from the base.

    Args:
        run: with the overrides applied.
        run_dir: the folder of checkpoints and metrics.
        given: the manifest without the overrides; checkpoints record what these change.
        overrides: their keys.
    """
    manifest, world = run.manifest, run.world
    recipe = world.broadcast(lambda: recipe_of(manifest, run.model, run.latents.table, run.compute))
    require_same_table(run.latents.table, recipe["latents"])
    require_same_table(run.split.measured.table, world.broadcast(lambda: run.split.measured.table.fingerprint))
    with Checkpoints(
        run_dir / "checkpoints", world, manifest.keep_checkpoints, _best(manifest, run_dir)
    ) as checkpoints:
        last = checkpoints.last()
        before = recorded_recipe(last.record) if last else given.model_dump(mode="json")
        if last:
            require_same(before, recipe, overrides, last.path, run.latents.table.folder)
            if last.step >= manifest.steps:
                return _result(run_dir, checkpoints.at(manifest.steps), last.record["skipped"], trained_steps=0)
        start = last.step if last else 0
        changes = [*(last.record["overrides"] if last else ()), *changed_keys(before, recipe, overrides, start)]
        changed_at = max((step for change in changes if type(step := change.get("step")) is int), default=-1)
        matrix = _matrix(run, run_dir / "metrics.jsonl", start, changed_at)
        is_measured = last and matrix and matrix.history and matrix.history[-1].step == last.step
        if last and matrix and matrix.end and is_measured:
            return _result(run_dir, last.path, last.record["skipped"], trained_steps=0, ended_early=matrix.end)
        training = Training.start(build_trainable(run.model, manifest, world, run.compute), manifest)
        if last:
            checkpoints.restore(last, training)
            log.info("resuming from %s", last.path)
        save = partial(_save, run, training, checkpoints, recipe, changes)
        _train(run, run_dir, training, checkpoints, matrix, save)
        end = matrix.end if matrix and training.step < manifest.steps else ""
        return _result(run_dir, checkpoints.at(training.step), training.skipped, training.step - start, end)


def _best(manifest: FinetuneManifest, run_dir: Path) -> FindBest | None:
    """Return the function that finds the best of some steps in the metrics, or None where none is kept."""
    if manifest.validation is None or (name := manifest.validation.keep_best) is None:
        return None

    def find(steps: Collection[int]) -> int | None:
        best = find_best(comparable(read_measurements(run_dir / "metrics.jsonl")), name, steps)
        return best.step if best else None

    return find


def _matrix(run: Run, metrics: Path, step: int, changed_at: int) -> Matrix | None:
    """Return what measures the held-out clips, with the measurements up to `step`; None where nothing is asked for."""
    if run.manifest.validation is None or not run.manifest.validation.every:
        return None
    if run.world.is_first:
        for note in notes_on(run.manifest, run.split, run.model.backbone.geometry):
            log.info("%s", note)
    history = run.world.broadcast(lambda: read_measurements(metrics, step))
    return Matrix(run.manifest, run.world, run.model.backbone, run.split, history, changed_at)


def _result(
    run_dir: Path, checkpoint: Path, skipped_steps: int, trained_steps: int, ended_early: str = ""
) -> Finetuned:
    metrics, steps = run_dir / "metrics.jsonl", int(checkpoint.name)
    last_loss = next((loss for step, loss in read_losses(metrics) if step == steps), None)
    early = [ended_early] if ended_early else []
    return Finetuned(checkpoint, metrics, steps, trained_steps, skipped_steps, last_loss, early)


def _train(
    run: Run,
    run_dir: Path,
    training: Training,
    checkpoints: Checkpoints,
    matrix: Matrix | None,
    save: Callable[[], None],
) -> None:
    """Make the remaining steps, or as many as help. Each is in the metrics before its checkpoint is written.

    Raises:
        TrainingError: more steps were skipped than `non_finite_limit` allows.
        StageError: a process that reads ahead is gone.
        OSError: metrics or a checkpoint could not be written.
    """
    manifest = run.manifest
    batches = run.batches(range(training.step, manifest.steps))
    with ExitStack() as stack:
        stack.enter_context(worker_deaths())
        if run.world.is_first:
            metrics = stack.enter_context(MetricsWriter(run_dir, training.step))
            progress = stack.enter_context(Progress("finetune", manifest.steps, training.step))
        if matrix and training.step == 0 and matrix.is_due(0):
            start = matrix.measure(training)
            if run.world.is_first:
                metrics.add_start(start)
        ended = False
        while training.step < manifest.steps and not ended:
            measured = train_step(run, training, batches)
            validation = matrix.measure(training) if matrix and matrix.is_due(training.step) else None
            if run.world.is_first:
                metrics.add(measured, validation)
                loss = "skipped" if measured.loss is None else f"loss {measured.loss:.4f}"
                progress.advance(note=f"{loss}, {measured.per_second(measured.samples):.2f} clips/s")
            if measured.skipped:
                problem = f"step {measured.step}: loss or gradient not finite, with clips {list(measured.skipped)}"
                if training.skipped > manifest.non_finite_limit:
                    raise TrainingError(
                        f"{problem}; {training.skipped} steps of this run were skipped so far, "
                        f"non_finite_limit is {manifest.non_finite_limit}"
                    )
                log.warning("%s; skipped", problem)
            checkpoints.raise_if_failed()
            ended = bool(matrix and validation and matrix.end)
            if training.step % manifest.checkpoint_every == 0 or training.step == manifest.steps or ended:
                save()
    checkpoints.wait()


def _save(
    run: Run, training: Training, checkpoints: Checkpoints, recipe: Recipe, changes: list[dict[str, Any]]
) -> None:
    """Start to write a checkpoint of the present step, once the one before is written and there is room."""
    manifest = run.manifest
    record = {
        "step": training.step,
        "latent_space": recipe["latent_space"],
        "backbone": recipe["backbone"],
        **({"expert": manifest.expert, "boundary": run.model.boundary} if manifest.expert else {}),
        "base": manifest.base.model_dump(mode="json", exclude_none=True),
        "recipe": recipe,
        "data": _count_data(run),
        "overrides": changes,
        "skipped": training.skipped,
        "versions": versions(),
    }
    checkpoints.wait()  # its messages between the processes, and those that follow, must not mix
    _wait_for_room(run.world, Room(checkpoints.folder, manifest.min_free_gib))
    write = partial(write_result, manifest, config_of(training.transformer), record)
    checkpoints.save(training, record, run.compute, write)


def _count_data(run: Run) -> dict[str, Any]:
    """Return what trains: the table's fingerprint, and the clips of each bucket, WIDTHxHEIGHTxFRAMES, and of all."""
    buckets = {shape: len(rows) for shape, rows in sorted(run.split.training.items())}
    return {"table": run.latents.table.fingerprint, "clips": sum(buckets.values()), "buckets": buckets}


def _wait_for_room(world: World, room: Room) -> None:
    """Return in all processes once the first one sees room for a checkpoint: all of them take part in writing it."""
    while world.broadcast(room.is_short):
        room.rest()


def write_result(
    manifest: FinetuneManifest,
    config: Mapping[str, Any],
    record: Mapping[str, Any],
    folder: Path,
    tensors: Mapping[str, Tensor],
) -> None:
    """Write the trained transformer, or its LoRA, into a checkpoint's folder."""
    if isinstance(manifest.train, Lora):
        write_lora(folder / LORA_FOLDER, tensors, manifest.train, record)
    else:
        write_transformer(folder / manifest.part, tensors, config, record)


def train_step(run: Run, training: Training, batches: Iterator[Batch]) -> StepMetrics:
    """Make one optimizer step with the batch, of which this process computes its share, a micro-batch at a time.

    Where the loss or the gradient is not finite, the step is skipped: the weights stay.
    """
    manifest, world, started = run.manifest, run.world, perf_counter()
    step, learning_rate, share = training.step, training.learning_rate, world.share(manifest.batch_size)
    loss, bands = torch.zeros((), device=world.device), torch.zeros(2, BANDS, device=world.device)
    clips, tokens, waited = 0, 0, 0.0
    while clips < share:
        asked = perf_counter()
        batch = next(batches)
        waited += perf_counter() - asked
        batch_loss, batch_bands = backward(run, training, batch, len(batch.x0) / share)
        loss, bands = loss + batch_loss, bands + batch_bands
        clips, tokens = clips + len(batch.x0), tokens + run.model.backbone.geometry.tokens(batch.x0.shape)
    norm = clip_gradients(training.transformer, manifest.max_grad_norm)

    loss_sum, *band_sums = world.all_reduce([loss.item(), *bands.flatten().tolist()])
    errors, counts = band_sums[:BANDS], band_sums[BANDS:]
    mean_loss = loss_sum / world.size
    finite = math.isfinite(mean_loss) and math.isfinite(norm)
    if finite:
        training.apply()
    else:
        training.skip()
    return StepMetrics(
        step=training.step,
        loss=mean_loss if finite else None,
        learning_rate=learning_rate,
        grad_norm=norm if finite else None,
        by_level=tuple(error / count if count else None for error, count in zip(errors, counts, strict=True)),
        samples=manifest.batch_size,
        tokens=tokens * world.data_ranks,
        seconds=perf_counter() - started,
        waited=waited,
        memory=world.peak_memory(),
        skipped=() if finite else tuple(run.latents.clip_ids(run.order.rows(step))),
    )


def backward(run: Run, training: Training, batch: Batch, weight: float) -> tuple[Tensor, Tensor]:
    """Add `weight` times the gradient of a micro-batch.

    Returns:
        Its loss times `weight`, and the sums of its frames' errors and their counts in each band of levels (2, 10).
    """
    batch = batch.to(run.world.device)
    z = add_noise(batch.x0, batch.noise, batch.sigma_BF)
    embedded = run.manifest.embedded_guidance
    velocity = run.model.backbone.predict(training.transformer, z, batch.sigma_BF, batch.text, embedded)
    error_BF = frame_errors(velocity, batch.target)
    loss = weight * weighted(error_BF, batch.sigma_BF, run.manifest.weighting)
    loss.backward()
    return loss.detach(), sum_by_band(error_BF.detach(), batch.sigma_BF)
