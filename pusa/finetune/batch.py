"""What is drawn for each sample of a batch: a sample of the posterior, whether it has its caption, noise, and levels.

All of it comes from (seed, step, place in the batch): no generator has a state to be saved, and it matters neither how
many processes share the batch nor how much of it each takes at once.

Shapes: B samples, C channels, F latent frames, h, w latent height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from pusa.data.latents import sample_posterior
from pusa.data.loader import MicroBatch, Rows
from pusa.diffusion.latent_spaces import LatentSpace
from pusa.diffusion.sampler import TextFeatures
from pusa.diffusion.timesteps import DENSITIES, LEVEL_SAMPLERS
from pusa.manifest.models import FinetuneManifest
from pusa.manifest.training import parse_levels
from pusa.system.files import derived_seed

Draw = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Batch:
    """Clean latents (B, C, F, h, w), their text, the noise and levels they are trained at, and what is to be learnt."""

    x0: Tensor
    text: TextFeatures
    noise: Tensor
    sigma_BF: Tensor
    target: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same there."""
        text = TextFeatures(self.text.features.to(device), self.text.mask.to(device))
        x0, noise, sigma_BF, target = (t.to(device) for t in (self.x0, self.noise, self.sigma_BF, self.target))
        return Batch(x0, text, noise, sigma_BF, target)


DropText = Callable[[TextFeatures, Tensor], TextFeatures]  # `Backbone.drop_text`


def batch_maker(
    manifest: FinetuneManifest, space: LatentSpace, drop_text: DropText
) -> Callable[[MicroBatch, Rows], Batch]:
    """How rows become a batch."""
    draw = _sampler(manifest)

    def prepare(take: MicroBatch, rows: Rows) -> Batch:
        seeds = [derived_seed("sample", manifest.seed, take.step, place) for place in take.places]
        draws = [
            draw(mean, logvar, space, Generator().manual_seed(seed))
            for mean, logvar, seed in zip(rows.mean, rows.logvar, seeds, strict=True)
        ]
        x0, kept_B, noise, sigma_BF = (torch.stack(parts) for parts in zip(*draws, strict=True))
        text = drop_text(TextFeatures(rows.features, rows.mask), kept_B)
        return Batch(x0, text, noise, sigma_BF, space.target(x0, noise))

    return prepare


def _sampler(manifest: FinetuneManifest) -> Callable[[Tensor, Tensor, LatentSpace, Generator], Draw]:
    name, number = parse_levels(manifest.levels)
    levels, density = LEVEL_SAMPLERS[name], DENSITIES[manifest.density]

    def draw(mean: Tensor, logvar: Tensor, space: LatentSpace, generator: Generator) -> Draw:
        x0 = sample_posterior(mean, logvar, space, generator)
        kept = torch.rand((), generator=generator) >= manifest.caption_dropout
        noise = torch.randn(mean.shape, generator=generator)
        return x0, kept, noise, levels(density, mean.shape[1], generator, number)

    return draw
