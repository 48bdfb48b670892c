"""Draw the random parts of a batch: posterior samples, dropped captions, noise and levels.

Each sample's draw depends only on (seed, step, place in the batch). So no generator state has to be saved, and neither
the number of processes nor the size of a micro-batch changes it.

Shapes: B samples, C channels, F latent frames, h, w latent height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from pusa.data.latents import Latents, sample_posterior
from pusa.data.loader import MicroBatch, Rows
from pusa.diffusion.sampler import TextFeatures
from pusa.diffusion.seeds import derived
from pusa.diffusion.timesteps import DENSITIES, LEVEL_SAMPLERS, Density, within
from pusa.errors import TrainingError
from pusa.manifest.models import FinetuneManifest
from pusa.manifest.training import parse_levels

LEAST_SHARE = 0.01  # of a density in `level_range`: levels are drawn until they are in it
DropText = Callable[[TextFeatures, Tensor, TextFeatures], TextFeatures]  # `Backbone.drop_text`


@dataclass(frozen=True)
class Batch:
    """Clean latents x0 (B, C, F, h, w), their text, noise, levels sigma_BF, and the velocity to predict."""

    x0: Tensor
    text: TextFeatures
    noise: Tensor
    sigma_BF: Tensor
    target: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on another device."""
        x0, noise, sigma_BF, target = (t.to(device) for t in (self.x0, self.noise, self.sigma_BF, self.target))
        return Batch(x0, self.text.to(device), noise, sigma_BF, target)


def density_of(manifest: FinetuneManifest) -> Density:
    """Return the density of a recipe's levels, within its range.

    Raises:
        TrainingError: almost none of the density lies in the range.
    """
    density, (low, high) = DENSITIES[manifest.density], manifest.level_range
    if (low, high) == (0, 1):
        return density
    trials = density((10_000,), derived("level_range"))
    share = float(((trials >= low) & (trials <= high)).float().mean())
    if share < LEAST_SHARE:
        raise TrainingError(
            f"level_range is [{low:g}, {high:g}], in which {share:.2%} of the density {manifest.density} lies; "
            f"expected a range with {LEAST_SHARE:.0%} or more"
        )
    return within(density, low, high)


def batch_maker(
    manifest: FinetuneManifest, latents: Latents, drop_text: DropText
) -> Callable[[MicroBatch, Rows], Batch]:
    """Return the function that makes a batch from rows of the latents table.

    Raises:
        TableError: the table lacks the features of the empty prompt.
    """
    space, null = latents.space, latents.null_text()
    level_sampler, number = parse_levels(manifest.levels)
    draw_levels, density = LEVEL_SAMPLERS[level_sampler], density_of(manifest)

    def draw(mean: Tensor, logvar: Tensor, generator: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x0 = sample_posterior(mean, logvar, space, generator)
        kept = torch.rand((), generator=generator) >= manifest.caption_dropout
        noise = torch.randn(mean.shape, generator=generator)
        return x0, kept, noise, draw_levels(density, mean.shape[1], generator, number)

    def make_batch(micro_batch: MicroBatch, rows: Rows) -> Batch:
        generators = [derived("sample", manifest.seed, micro_batch.step, place) for place in micro_batch.places]
        draws = [draw(*row) for row in zip(rows.mean, rows.logvar, generators, strict=True)]
        x0, kept_B, noise, sigma_BF = (torch.stack(parts) for parts in zip(*draws, strict=True))
        text = drop_text(rows.text, kept_B, null)
        return Batch(x0, text, noise, sigma_BF, space.target(x0, noise))

    return make_batch
