"""Stage 3: latents -> a transformer that has learnt to denoise any mixture of clean and noisy frames.

Everything random in a step is drawn from (seed, step), so a resumed run needs no saved generators to go on exactly.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from pusa.backbones.base import TextFeatures
from pusa.data.latents import Latents, sample
from pusa.data.loader import Rows, load
from pusa.data.order import Order
from pusa.data.reader import Table
from pusa.errors import TableError, TrainingError
from pusa.files import derived_seed, sole_writer, write_text
from pusa.manifest import FinetuneManifest
from pusa.model import Model
from pusa.progress import Progress
from pusa.timesteps import DENSITIES, LEVEL_SAMPLERS, add_noise
from pusa.training.checkpoint import Checkpoints, Training
from pusa.weights import ENCODERS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finetuned:
    """What a run made."""

    checkpoint: Path
    metrics: Path
    steps: int
    trained_steps: int
    last_loss: float


@dataclass(frozen=True)
class Batch:
    """Clean latents (B, C, F, h, w), their text, the noise and levels they are trained at, and what is to be learnt."""

    rows: list[int]
    x0: Tensor
    text: TextFeatures
    noise: Tensor
    sigma_BF: Tensor
    target: Tensor


def finetune(manifest: FinetuneManifest, run_dir: Path) -> Finetuned:
    """Train from the base, or from the last checkpoint of the same recipe, to `manifest.steps`.

    Raises:
        TableError: the latents table is not complete, or was made with other encoders than the base has.
        TrainingError: `run_dir` holds checkpoints of another recipe, or the loss is not finite.
        StageError: another process is at it.
    """
    manifest = manifest.located(run_dir)
    model = Model(manifest.base)
    latents = Latents(Table.open(manifest.latents or run_dir / "latents", "rows"), model.space_name)
    _require_same_encoders(latents.table, model)
    recipe = _recipe(manifest, model, latents.table)
    with sole_writer(run_dir / "checkpoints"):
        return _train(manifest, run_dir, latents, model, recipe)


def _train(
    manifest: FinetuneManifest, run_dir: Path, latents: Latents, model: Model, recipe: dict[str, Any]
) -> Finetuned:
    checkpoints, metrics = Checkpoints(run_dir / "checkpoints"), run_dir / "metrics.jsonl"
    found = checkpoints.last(recipe)
    if found is not None and checkpoints.step(found) >= manifest.steps:
        return _finished(checkpoints.at(manifest.steps), metrics, manifest.steps, 0)

    training = Training.start(model.trainable_transformer(), manifest)
    if found is not None:
        checkpoints.restore(found, training)
    start = training.step
    _keep_metrics(metrics, start)
    with metrics.open("a", encoding="utf-8") as log_file, Progress("finetune", manifest.steps, start) as progress:
        steps = range(start, manifest.steps)
        for rows in load(latents, order_of(latents, manifest), steps, workers=manifest.loader_workers):
            began, rate = monotonic(), training.learning_rate
            batch = draw_batch(rows, latents, manifest, training.step)
            loss, norm = train_step(model, training, batch, manifest, latents)
            row = {"step": training.step, "loss": loss, "learning_rate": rate, "grad_norm": norm}
            log_file.write(json.dumps({**row, "seconds": round(monotonic() - began, 4)}) + "\n")
            log_file.flush()
            if training.step % manifest.checkpoint_every == 0 or training.step == manifest.steps:
                found = checkpoints.save(training, recipe)
            progress.advance(note=f"loss {loss:.4f}")
    assert found is not None, "the last step saves a checkpoint"
    return _finished(found, metrics, manifest.steps, manifest.steps - start)


def order_of(latents: Latents, manifest: FinetuneManifest) -> Order:
    """Which rows each step takes."""
    return Order(latents.buckets, manifest.batch_size, manifest.seed)


def draw_batch(rows: Rows, latents: Latents, manifest: FinetuneManifest, step: int) -> Batch:
    """The batch of this step: of the rows' posteriors fresh samples, and noise and levels of its own."""
    generator = Generator().manual_seed(derived_seed("step", manifest.seed, step))
    x0 = sample(rows.mean, rows.logvar, latents.space, generator)
    kept = torch.rand(len(x0), 1, generator=generator) >= manifest.caption_dropout
    text = TextFeatures(rows.features * kept[..., None], rows.mask & kept)
    noise = torch.randn(x0.shape, generator=generator)
    sampler = LEVEL_SAMPLERS[manifest.levels]
    sigma_BF = sampler(DENSITIES[manifest.density], len(x0), x0.shape[2], generator)
    return Batch(rows.indices, x0, text, noise, sigma_BF, latents.space.target(x0, noise))


def train_step(
    model: Model, training: Training, batch: Batch, manifest: FinetuneManifest, latents: Latents
) -> tuple[float, float]:
    """One optimizer step; the loss and the gradient's norm before clipping.

    Raises:
        TrainingError: the loss or the gradient is not finite; nothing was changed.
    """
    device = model.device
    x0, noise, sigma_BF = (tensor.to(device) for tensor in (batch.x0, batch.noise, batch.sigma_BF))
    text = TextFeatures(batch.text.features.to(device), batch.text.mask.to(device))
    with torch.autocast(device.type, model.dtype, enabled=model.dtype != torch.float32):
        velocity = model.backbone.predict(training.transformer, add_noise(x0, noise, sigma_BF), sigma_BF, text)
    loss = F.mse_loss(velocity, batch.target.to(device))
    loss.backward()
    norm = nn.utils.clip_grad_norm_(training.transformer.parameters(), manifest.clip_norm)
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        raise TrainingError(
            f"loss {loss.item()}, gradient norm {norm.item()} with clips {latents.clip_ids(batch.rows)}"
        )
    training.apply()
    return loss.item(), norm.item()


def _require_same_encoders(table: Table, model: Model) -> None:
    theirs, ours = table.fact("made_with"), model.fingerprints(*ENCODERS)
    for part in ENCODERS:
        if theirs[part] != ours[part]:
            raise TableError(f"{table.folder} was made with {part} {theirs[part]}; the base has {part} {ours[part]}")


def _recipe(manifest: FinetuneManifest, model: Model, table: Table) -> dict[str, Any]:
    """What may not change between a run and its resumption."""
    free = {"steps", "checkpoint_every", "latents", "base", "kind", "loader_workers"}
    return {
        **manifest.model_dump(mode="json", exclude=free),
        "base": model.fingerprints("transformer")["transformer"],
        "latents": table.fingerprint,
        "latent_space": model.space_name,
        "backbone": manifest.base.backbone,
    }


def _keep_metrics(path: Path, steps: int) -> None:
    """Drop what a killed run logged beyond its last checkpoint: those steps will be made again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]
    write_text(path, "".join(line for line in whole if json.loads(line)["step"] <= steps))


def _finished(checkpoint: Path, metrics: Path, steps: int, trained: int) -> Finetuned:
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    loss = json.loads(lines[-1])["loss"] if lines else float("nan")
    return Finetuned(checkpoint, metrics, steps, trained, loss)
