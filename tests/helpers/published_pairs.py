"""Write pairs of files in the layout of the published data set, at the size of builtin:tiny (16 tokens of width 64)."""

from pathlib import Path

import torch

from pusa.exchange.importing import Settings, import_latents
from pusa.manifest.models import ModelSpec

TOKENS, WIDTH = 16, 64
TINY = ModelSpec(weights="builtin:tiny")


def latent(seed=0, shape=(1, 12, 2, 4, 4), dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name in ("mean", "logvar")}


def embed(seed=0, valid=5, dtype=torch.bfloat16, tokens=TOKENS, width=WIDTH):
    """Return fp32 features whose values fit in `dtype`, as a model of that dtype computes them."""
    features = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype).float()
    return {"y_feat": [features], "y_mask": [torch.arange(tokens)[None] < valid]}


def save(path: Path, value) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)
    return path


def write_pair(folder: Path, name: str, latents=None, features=None, beside=False, seed=0):
    """Write the two files of a clip, random ones by default; with `beside`, both in one folder."""
    latents, features = latents or latent(seed), features or embed(seed)
    places = (folder, folder) if beside else (folder / "videos", folder / "captions")
    save(places[0] / f"{name}.latent.pt", latents)
    save(places[1] / f"{name}.embed.pt", features)
    return latents, features


def run(folder: Path, table: Path, **settings):
    return import_latents(folder, table, Settings(TINY, **settings))
