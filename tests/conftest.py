"""Fixtures that several folders share: small real models, small real data, and settings for all tests."""

import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings

from flows.settings import set_defaults

set_defaults()
# One thread for torch, here and in child processes: the models are so small that several threads mostly wait for each
# other, ten times as long as the work takes where other processes keep the cores busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# A process that a shell starts in the background ignores interrupts, and so would the programs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
os.environ["PUSA_CACHE"] = ""  # no encodings outlive a test, and none are the user's
# Once a flow ran in this process, its forks (a loader's workers) would fail in Prefect's exit hooks.
os.register_at_fork(after_in_child=lambda: threading._threading_atexits.clear())  # type: ignore[attr-defined]
# The same examples in every run, and no limits of time: a busy machine must not fail a test.
settings.register_profile(
    "pusa",
    derandomize=True,
    deadline=None,
    max_examples=60,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("pusa")

ROOT = Path(__file__).parent.parent
# With several workers the longest files start first, in this order, so that none of them is left for the end.
LONGEST = (
    "flows/test_launch.py",
    "precompute/test_stage.py",
    "flows/test_flows.py",
    "generate/test_ledger.py",
    "finetune/test_resume.py",
    "finetune/test_stage.py",
    "flows/commands/test_stages.py",
    "finetune/test_parallel.py",
    "generate/test_drafts.py",
    "flows/test_server.py",
    "tiny/test_family.py",
    "finetune/test_validation.py",
    "ingest/test_stage.py",
    "backbones/test_wan_vae.py",
    "backbones/test_mochi_vae.py",
    "backbones/test_wan.py",
    "backbones/test_hunyuan_training.py",
    "generate/test_stage.py",
    "gpu/test_check.py",
    "flows/test_schedules.py",
    "finetune/test_killed.py",
)
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
    """Return the folder of the repository."""
    return ROOT


@pytest.fixture
def networks():
    """Return a small Mochi of diffusers and a Pusa transformer with the same random weights."""
    from diffusers import MochiTransformer3DModel

    from pusa.backbones.mochi.transformer import PusaMochiTransformer3DModel

    torch.manual_seed(0)
    base = MochiTransformer3DModel(**SMALL).eval()
    for weight in base.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    pusa = PusaMochiTransformer3DModel(**SMALL).eval()
    pusa.load_state_dict(base.state_dict())
    return base, pusa


def made_once(name: str, factory: pytest.TempPathFactory, make: Callable[[Path], None]) -> Path:
    """Return a folder that the first worker makes and all workers of a run read."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # each worker has its own folder in that of the run
    folder, done = folder / name, folder / f"{name}.done"
    with FileLock(folder.with_suffix(".lock")):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # from a worker that failed
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Path:
    """Return twelve clips of the demo's data set, for reading only."""
    from pusa.tiny.dataset import draw_dataset

    return made_once("drawn", tmp_path_factory, lambda folder: draw_dataset(folder, 12))


@pytest.fixture(scope="session")
def made(drawn, tmp_path_factory) -> Path:
    """Return the folder of a run with clips and latents, for reading only."""
    from pusa.ingest.stage import ingest
    from pusa.manifest.models import ClipSettings, IngestManifest, ModelSpec, PrecomputeManifest
    from pusa.precompute.stage import precompute

    def make(folder: Path) -> None:
        clips = ClipSettings(width=64, height=64, num_frames=31)
        ingest(IngestManifest(source=drawn / "videos", clips=clips), folder)
        model = ModelSpec(weights="builtin:tiny")
        precompute(PrecomputeManifest(clips=folder / "clips", model=model, shard_rows=5), folder)

    return made_once("made", tmp_path_factory, make)


@pytest.fixture
def own_run(made, tmp_path) -> Path:
    """Return a copy of `made` that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "own"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first where several workers share the tests."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        order = {str(ROOT / "tests" / name): place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: order.get(str(item.path), len(order)))
