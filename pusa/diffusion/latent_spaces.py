"""The spaces that a transformer can be trained in: how the VAE's output x maps to the latents that are denoised.

Shapes: latents (..., C, F, h, w); mean and std (C, 1, 1, 1), the statistics of the VAE's channels.
"""

from dataclasses import dataclass

from torch import Tensor

from pusa.diffusion.timesteps import target


@dataclass(frozen=True)
class LatentSpace:
    """Normalised latents, noised and predicted in that space ("dit"): the default for new fine-tunes."""

    mean: Tensor
    std: Tensor

    def enter(self, x: Tensor) -> Tensor:
        """Map the VAE's output to the latents that are noised."""
        return (x - self.mean) / self.std

    def target(self, x0: Tensor, noise: Tensor) -> Tensor:
        """Return the velocity to learn, for clean latents in this space."""
        return target(x0, noise)

    def leave(self, z: Tensor) -> Tensor:
        """Map the result of sampling to what the VAE decodes; the inverse of `enter`."""
        return z * self.std + self.mean


class PublishedLatentSpace(LatentSpace):
    """The space of the published Pusa-V0.5 ("vae"): the VAE's output is noised unnormalised, its velocity normalised.

    The result of sampling is denormalised all the same, as its authors do: a kept frame decodes from x * std + mean.
    """

    def enter(self, x: Tensor) -> Tensor:
        """Return the VAE's output unchanged."""
        return x

    def target(self, x0: Tensor, noise: Tensor) -> Tensor:
        """Return (x0 - eps - mean) / std."""
        return (target(x0, noise) - self.mean) / self.std


LATENT_SPACES: dict[str, type[LatentSpace]] = {"dit": LatentSpace, "vae": PublishedLatentSpace}
