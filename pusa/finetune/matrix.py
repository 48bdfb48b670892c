"""Measure what a training can do, ability by ability: the loss of held-out clips for each pattern of given frames.

A cell of the matrix is a pattern and a level: frames that the pattern gives are clean, all others have the level, and
the loss is that of the others alone. Noise depends on seed, clip and pattern, so the same cell at two steps differs by
the weights alone. Each forward pass is one clip in one cell, so no number depends on how many processes share them.

Shapes: C channels, F latent frames, h, w latent height and width; sigma_F levels; made_F true for frames not given.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean
from time import perf_counter

import torch
from torch import Tensor

from pusa.backbones.base import Backbone
from pusa.backbones.family import Geometry
from pusa.data.latents import Latents
from pusa.data.order import hash_of
from pusa.diffusion.sampler import TextFeatures
from pusa.diffusion.seeds import derived
from pusa.diffusion.timesteps import add_noise
from pusa.errors import TrainingError
from pusa.finetune.loss import frame_errors
from pusa.finetune.measurements import Measurement, comparable, count_since_best
from pusa.finetune.parallel import World, reshard
from pusa.finetune.split import Split
from pusa.finetune.state import Training
from pusa.manifest.models import FinetuneManifest
from pusa.manifest.training import MEAN, Pattern, Validation
from pusa.system.files import digest

log = logging.getLogger(__name__)
KEY_DIGITS = 12
# Pattern -> the latent frames of F that it gives, clean. In `pusa.manifest.training.Pattern` as well.
GIVEN: dict[Pattern, Callable[[int], Sequence[int]]] = {
    "text_to_video": lambda frames: (),
    "image_to_video": lambda frames: (0,),
    "keyframes": lambda frames: (0, frames - 1),
    "extension": lambda frames: range(-(-frames // 3)),
    "independent": lambda frames: (),
}


@dataclass(frozen=True)
class Cell:
    """One forward pass: a clip, by its row, in a cell of the matrix."""

    row: int
    pattern: Pattern
    level: float


@dataclass(frozen=True)
class Clip:
    """A held-out clip: its id, its latents x0_CFhw without sampling, and its text."""

    id: str
    x0: Tensor
    text: TextFeatures


def patterns_for(frames: int, patterns: Sequence[Pattern]) -> dict[Pattern, str]:
    """Return the patterns with "", or the reason why clips of this many latent frames are not measured with it."""
    reasons: dict[Pattern, str] = {}
    same: dict[tuple[int, ...], Pattern] = {}
    for pattern in patterns:
        given = tuple(sorted({*GIVEN[pattern](frames)}))
        if len(given) == frames:
            reasons[pattern] = "all of their frames are given"
        elif pattern == "independent" and frames > 1:
            reasons[pattern] = ""
        elif given in same:
            reasons[pattern] = f"it is the same as {same[given]}"
        else:
            reasons[pattern], same[given] = "", pattern
    return reasons


def cells_of(manifest: FinetuneManifest, split: Split, geometry: Geometry) -> list[Cell]:
    """Return the forward passes of a measurement: the held-out clips with the lowest hashes, in all their cells.

    Raises:
        TrainingError: none of the clips has the pattern of `keep_best`, or any pattern.
    """
    validation = _validation(manifest)
    levels = validation.levels_within(*manifest.level_range)
    frames_of = {row: _latent_frames(shape, geometry) for shape, rows in split.held_out.items() for row in rows}
    rows = [*frames_of]
    ids = dict(zip(rows, split.measured.clip_ids(rows), strict=True))
    chosen = sorted(rows, key=lambda row: (hash_of(ids[row]), ids[row]))[: validation.matrix_clips]
    cells, used = [], set()
    for row in chosen:
        for pattern, reason in patterns_for(frames_of[row], validation.patterns).items():
            if not reason:
                used.add(pattern)
                cells += [Cell(row, pattern, level) for level in levels]
    best = validation.keep_best
    if not cells or (best not in (None, MEAN) and best not in used):
        frames = ", ".join(map(str, sorted({frames_of[row] for row in chosen})))
        what = f"validation.keep_best is {best}" if cells else f"validation.patterns is {list(validation.patterns)}"
        raise TrainingError(
            f"{what}, which held-out clips of {frames} latent frames cannot be measured with; expected longer clips or "
            "other patterns"
        )
    return cells


def notes_on(manifest: FinetuneManifest, split: Split, geometry: Geometry) -> Iterator[str]:
    """Yield a line for each pattern that clips of some length are not measured with."""
    for frames in sorted({_latent_frames(shape, geometry) for shape in split.held_out}):
        for pattern, reason in patterns_for(frames, _validation(manifest).patterns).items():
            if reason:
                yield f"held-out clips of {frames} latent frames are not measured with {pattern}: {reason}"


def count_passes(validation: Validation, level_range: tuple[float, float], frames: int) -> tuple[int, int]:
    """Return the patterns that clips of this many latent frames are measured with, and the levels: their numbers."""
    patterns = [pattern for pattern, reason in patterns_for(frames, validation.patterns).items() if not reason]
    return len(patterns), len(validation.levels_within(*level_range))


def count_measurements(steps: int, every: int) -> int:
    """Return how often a training of `steps` is measured: at step 0, every `every` steps, and after the last."""
    return 1 + -(-steps // every)


def cell_levels(
    pattern: Pattern, level: float, frames: int, bounds: tuple[float, float], order_F: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a clip's levels in a cell (F,), and which frames are made (F,).

    For `independent` the levels are `frames` equal steps around `level`, as far on both sides as `bounds` allow, so
    that their mean is `level`; `order_F`, a permutation, says which frame has which.
    """
    if pattern == "independent":
        reach = min(level - bounds[0], bounds[1] - level)
        steps_F = (2 * order_F.to(torch.float64) + 1) / frames - 1  # in (-1, 1), with mean 0
        return (level + reach * steps_F).float(), torch.ones(frames, dtype=torch.bool)
    made_F = torch.ones(frames, dtype=torch.bool)
    made_F[list(GIVEN[pattern](frames))] = False
    return level * made_F.float(), made_F


class Matrix:
    """Measures the held-out clips of a training, and says when that is due and when it no longer helps to train.

    Args:
        manifest: the recipe.
        world: the processes that share the work.
        backbone: predicts the velocities.
        split: the held-out clips.
        history: the measurements of the run's earlier steps.
        changed_at: the step at which the recipe was changed last: patience begins anew.

    Raises:
        TrainingError: as `cells_of`.
    """

    def __init__(
        self,
        manifest: FinetuneManifest,
        world: World,
        backbone: Backbone,
        split: Split,
        history: Sequence[Measurement],
        changed_at: int = -1,
    ) -> None:
        self.manifest, self.world, self.backbone, self.changed_at = manifest, world, backbone, changed_at
        self.settings, self.latents = _validation(manifest), split.measured
        self.levels = self.settings.levels_within(*manifest.level_range)
        self.cells = cells_of(manifest, split, backbone.geometry)
        self.key = _key(manifest, self.latents, self.cells)
        self.history = comparable(history, self.key)
        self._read = lru_cache(maxsize=1)(self._read_clip)  # the cells of a clip follow each other

    def is_due(self, step: int) -> bool:
        """Return whether a step is to be measured that is not."""
        assert self.settings.every is not None
        planned = step % self.settings.every == 0 or step == self.manifest.steps
        return planned and all(one.step != step for one in self.history)

    @property
    def end(self) -> str:
        """Return why the training should end before its last step; "" while it should not."""
        name, patience = self.settings.keep_best, self.settings.patience
        if name is None or patience is None:
            return ""
        if (since := count_since_best(self.history, name, self.changed_at)) < patience:
            return ""
        return (
            f"at step {self.history[-1].step}: the held-out loss ({name}) was not improved by the last {since} "
            f"measurements, validation.patience is {patience}"
        )

    @torch.no_grad()
    def measure(self, training: Training) -> Measurement:
        """Return the losses with the weights that a checkpoint would offer. All processes must call this.

        Raises:
            TableError: a clip cannot be read.
        """
        started, count = perf_counter(), len(self.cells)
        share = -(-count // self.world.data_ranks)
        first = self.world.data_rank * share
        losses = [0.0] * count
        with _for_use(training):
            for number in range(first, first + share):  # all ranks make as many calls, since these are collective
                loss = self._loss(training, self.cells[min(number, count - 1)])
                if number < count and self.world.context.rank == 0:
                    losses[number] = loss
        losses = self.world.all_reduce(losses)  # each is one process's alone: adding zeros changes no bit
        by_cell: dict[tuple[Pattern, float], list[float]] = {}
        for cell, loss in zip(self.cells, losses, strict=True):
            by_cell.setdefault((cell.pattern, cell.level), []).append(loss)
        patterns = [pattern for pattern in self.settings.patterns if (pattern, self.levels[0]) in by_cell]
        means = {str(name): tuple(fmean(by_cell[name, level]) for level in self.levels) for name in patterns}
        measured = Measurement(training.step, self.key, self.levels, means)
        self.history.append(measured)
        if self.world.is_first:
            values = ", ".join(f"{name} {value:.4f}" for name, value in measured.values().items() if value is not None)
            log.info("held-out loss at step %d: %s; %.1f s", measured.step, values, perf_counter() - started)
        return measured

    def _loss(self, training: Training, cell: Cell) -> float:
        """Return the mean square error of the velocity on the frames that are made."""
        clip, frames = self._read(cell.row), self._read(cell.row).x0.shape[1]
        generator = derived("matrix", self.manifest.seed, clip.id, cell.pattern)
        noise = torch.randn(clip.x0.shape, generator=generator)
        order_F = torch.randperm(frames, generator=generator)
        sigma_F, made_F = cell_levels(cell.pattern, cell.level, frames, self.manifest.level_range, order_F)
        z = add_noise(clip.x0[None], noise[None], sigma_F[None]).to(self.world.device)
        text, embedded = clip.text.to(self.world.device), self.manifest.embedded_guidance
        sigma_BF = sigma_F[None].to(self.world.device)
        velocity = self.backbone.predict(training.transformer, z, sigma_BF, text, embedded)
        target = self.latents.space.target(clip.x0[None], noise[None]).to(self.world.device)
        error_F = frame_errors(velocity.float(), target)[0].cpu()
        return float(error_F[made_F].double().mean())

    def _read_clip(self, row: int) -> Clip:
        mean_BCFhw, _ = self.latents.posterior([row])
        x0_CFhw = self.latents.space.enter(mean_BCFhw)[0]
        return Clip(self.latents.clip_ids([row])[0], x0_CFhw, self.latents.text([row]))


@contextmanager
def _for_use(training: Training) -> Iterator[None]:
    """Give the transformer the weights that a checkpoint offers, in evaluation mode; restore both afterwards."""
    transformer = training.transformer
    try:
        with training.averaged():
            transformer.eval()
            try:
                yield
            finally:
                # Without a backward pass FSDP keeps some weights gathered, and would compute with these values again.
                reshard(transformer)
    finally:
        transformer.train()


def _validation(manifest: FinetuneManifest) -> Validation:
    assert manifest.validation is not None and manifest.validation.every
    return manifest.validation


def _latent_frames(shape: str, geometry: Geometry) -> int:
    """Return the latent frames of clips of a shape, WIDTHxHEIGHTxFRAMES."""
    return geometry.latent_frames(int(shape.split("x")[2]))


def _key(manifest: FinetuneManifest, latents: Latents, cells: Sequence[Cell]) -> str:
    """Return a short hash of all that decides the losses beside the weights."""
    clips = [*dict.fromkeys(cell.row for cell in cells)]
    contents = latents.table.read("rows", ("clip_id", "key", "text_key")).take(clips).to_pylist()
    decided = [contents, [[clips.index(cell.row), cell.pattern, cell.level] for cell in cells]]
    more = [manifest.seed, list(manifest.level_range), manifest.embedded_guidance]
    return digest([*decided, *more])[:KEY_DIGITS]
