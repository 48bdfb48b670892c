"""A model of the tiny model's sizes that computes nothing: jobs pass through the whole stage in a fraction of a second.

Its latents and frames depend on the inputs, so that other inputs give other videos.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pusa.backbones.mochi.backbone import Mochi
from pusa.diffusion.sampler import TextFeatures
from pusa.manifest.models import GenerateManifest, ModelSpec
from pusa.weights.model import Model

TINY = ModelSpec(weights="builtin:tiny")
SIZE = {"width": 32, "height": 32, "num_frames": 7, "steps": 1, "guidance": 1}


class StubBackbone(Mochi):
    """Predicts zero velocity at each place."""

    def predict(self, transformer, z_BCFhw, sigma_BF, text, embedded_guidance=None):
        return torch.zeros_like(z_BCFhw)


class StubModel(Model):
    """No part is loaded."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec, "cpu")
        self.backbone = StubBackbone()

    transformer = vae = None

    def denoiser(self, expert):
        return None

    def fingerprints(self, *parts: str) -> dict[str, str]:
        return {"transformer": "stub"}

    def encode_text(self, prompts, padded=True) -> TextFeatures:
        return TextFeatures(torch.zeros(len(prompts), 1, 4), torch.ones(len(prompts), 1, dtype=torch.bool))

    def encode(self, frames_THWC: np.ndarray) -> Tensor:
        shape = self.backbone.geometry.latent_shape(frames_THWC.shape[2], frames_THWC.shape[1], len(frames_THWC))
        return torch.full(shape, float(frames_THWC.mean()) / 255)

    def decode_chunks(self, z_CFhw: Tensor) -> Iterator[np.ndarray]:
        geometry = self.backbone.geometry
        pixels = ((z_CFhw[:3] + 2) * 50).clamp(0, 255).to(torch.uint8)
        large = pixels.repeat_interleave(geometry.spatial, 2).repeat_interleave(geometry.spatial, 3)
        yield large.repeat_interleave(geometry.temporal, 1)[:, geometry.temporal - 1 :].permute(1, 2, 3, 0).numpy()


def manifest_of(*jobs, **defaults) -> GenerateManifest:
    """Return a manifest of small jobs for the tiny model."""
    settings = {**SIZE, **defaults}
    return GenerateManifest.model_validate(
        {"model": TINY, "jobs": [{"task": "text_to_video", **settings, **job} for job in jobs]}
    )
