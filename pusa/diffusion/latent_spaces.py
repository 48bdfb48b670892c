"""The spaces that a transformer can have been taught in, between the VAE's output x and what is denoised.

Shapes: latents (..., C, F, h, w); mean and std (C, 1, 1, 1), the statistics of the VAE's channels.
"""

from dataclasses import dataclass

from torch import Tensor

from pusa.diffusion.timesteps import target


@dataclass(frozen=True)
class LatentSpace:
    """Normalised latents, noised and predicted as they are ("dit"): what new fine-tunes use."""

    mean: Tensor
    std: Tensor

    def enter(self, x: Tensor) -> Tensor:
        """From the VAE's output to what is noised."""
        return (x - self.mean) / self.std

    def target(self, x0: Tensor, noise: Tensor) -> Tensor:
        """The velocity to learn, of clean latents in this space."""
        return target(x0, noise)

    def leave(self, z: Tensor) -> Tensor:
        """From what sampling ends with to what the VAE decodes; the inverse of `enter`."""
        return z * self.std + self.mean


class PublishedLatentSpace(LatentSpace):
    """As the published Pusa-V0.5 was taught ("vae"): the VAE's output is noised as it is, its velocity is normalised.

    Sampling's result is denormalised all the same, as its authors do: a kept frame decodes from x * std + mean.
    """

    def enter(self, x: Tensor) -> Tensor:
        """The VAE's output, as it is."""
        return x

    def target(self, x0: Tensor, noise: Tensor) -> Tensor:
        """(x0 - eps - mean) / std."""
        return (target(x0, noise) - self.mean) / self.std


LATENT_SPACES: dict[str, type[LatentSpace]] = {"dit": LatentSpace, "vae": PublishedLatentSpace}
