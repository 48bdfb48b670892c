"""What tests share: small real models and small real data."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from flows.settings import set_defaults

set_defaults()
# What a shell starts in the background ignores interrupts, and so would the programs that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
ROOT = Path(__file__).parent.parent
SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 3,
    "pooled_projection_dim": 12,
    "text_embed_dim": 16,
    "time_embed_dim": 8,
    "max_sequence_length": 8,
}


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture
def networks():
    """A small Mochi of diffusers and a Pusa with the same random weights."""
    from diffusers import MochiTransformer3DModel

    from pusa.backbones.mochi.transformer import PusaMochiTransformer3DModel

    torch.manual_seed(0)
    base = MochiTransformer3DModel(**SMALL).eval()
    for weight in base.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    pusa = PusaMochiTransformer3DModel(**SMALL).eval()
    pusa.load_state_dict(base.state_dict())
    return base, pusa


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Path:
    """The demo's data set, twelve clips of it."""
    from pusa.tiny.dataset import draw_dataset

    folder = tmp_path_factory.mktemp("drawn")
    draw_dataset(folder, 12)
    return folder


@pytest.fixture(scope="session")
def made(drawn, tmp_path_factory) -> Path:
    """A run with the clips and latents of it made. To be read only: `own_run` is a copy to break."""
    from pusa.ingest.stage import ingest
    from pusa.manifest.models import ClipSettings, IngestManifest, ModelSpec, PrecomputeManifest
    from pusa.precompute.stage import precompute

    folder = tmp_path_factory.mktemp("run")
    rule = ClipSettings(width=64, height=64, num_frames=31)
    ingest(IngestManifest(source=drawn / "videos", clips=rule), folder)
    model = ModelSpec(weights="builtin:tiny")
    precompute(PrecomputeManifest(clips=folder / "clips", model=model, shard_rows=5), folder)
    return folder


@pytest.fixture
def own_run(made, tmp_path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(made, tmp_path / "own"))
