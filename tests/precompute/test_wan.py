"""Precompute with small Wan models: text is padded to the encoder's length, and the VAE's dtype is in the keys."""

import shutil
from pathlib import Path

import pytest
import torch

from pusa.data.latents import Latents
from pusa.data.reader import Table
from pusa.ingest.stage import ingest
from pusa.manifest.models import ClipSettings, IngestManifest, ModelSpec, PrecomputeManifest
from pusa.precompute.stage import precompute
from pusa.weights.model import Model
from tests.helpers.small_wan import TEXT_WIDTH, write_wan_2_1, write_wan_2_2_5b

SIZE = {"width": 64, "height": 64, "num_frames": 9}


@pytest.fixture(scope="module")
def videos(drawn, tmp_path_factory) -> Path:
    """Return a folder with two clips; one has no caption."""
    folder = tmp_path_factory.mktemp("videos")
    for path in (drawn / "videos").glob("000[01].*"):
        shutil.copy(path, folder)
    (folder / "0001.txt").write_text("")
    return folder


def ingest_for(backbone: str, videos: Path, run_dir: Path) -> None:
    clips = ClipSettings(**SIZE, fps=None)
    ingest(IngestManifest(source=videos, backbone=backbone, clips=clips, missing_captions="empty"), run_dir)


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> ModelSpec:
    return ModelSpec(backbone="wan2.1", weights=str(write_wan_2_1(tmp_path_factory.mktemp("wan"))))


@pytest.fixture(scope="module")
def run_dir(videos, spec, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    ingest_for("wan2.1", videos, folder)
    assert precompute(PrecomputeManifest(model=spec, dtype="float32"), folder).rows == 2
    return folder


def keys(run_dir: Path) -> tuple[list[str], list[str]]:
    rows = Table.open(run_dir / "latents").read("rows").to_pylist()
    return [row["key"] for row in rows], [row["text_key"] for row in rows]


def test_text_of_a_table_is_what_the_transformer_is_given_when_it_generates(run_dir, spec):
    table, model = Table.open(run_dir / "latents"), Model(spec)
    latents, captions = Latents(table), table.read("rows")["caption"].to_pylist()
    assert sum(not caption for caption in captions) == 1
    text = latents.text(range(2))
    expected = model.encode_text(captions)
    assert text.features.shape == (2, 512, TEXT_WIDTH) and text.pooled is None
    torch.testing.assert_close(text.features, expected.features, atol=1e-5, rtol=0)
    assert torch.equal(text.mask, expected.mask) and min(text.mask.sum(1)) == 1
    stored = {row["tokens"]: row["text_shape"][0] for row in table.read("texts").to_pylist()}
    assert stored.pop(1) == 512  # of the empty prompt, whose length is the table's
    assert all(tokens == rows for tokens, rows in stored.items())


def test_latents_are_in_the_vaes_space_with_the_statistics_that_normalise_them(run_dir, spec):
    latents, model = Latents(Table.open(run_dir / "latents")), Model(spec)
    mean, logvar = latents.posterior(range(2))
    assert mean.shape == logvar.shape == (2, 16, 3, 8, 8)
    center, deviation = model.backbone.latent_statistics(model.vae)
    torch.testing.assert_close(latents.space.enter(mean), (mean - center) / deviation)


def test_the_dtype_of_the_vae_is_part_of_the_keys_of_latents_where_it_is_set(run_dir, spec, tmp_path):
    own = Path(shutil.copytree(run_dir, tmp_path / "own"))
    before, texts = keys(own)
    for vae_dtype, encoded in ((None, 0), ("bfloat16", 2), ("bfloat16", 0), ("float32", 2), (None, 0)):
        manifest = PrecomputeManifest(
            clips=run_dir / "clips", model=spec.model_copy(update={"vae_dtype": vae_dtype}), dtype="float32"
        )
        result = precompute(manifest, own)
        assert (result.rows, result.encoded, result.texts) == (2, encoded, 0)
        now, texts_now = keys(own)
        assert texts_now == texts and (set(now) == set(before)) == (vae_dtype is None)
        assert Table.open(own / "latents").facts["weights"]["vae_dtype"] == vae_dtype
        if vae_dtype == "bfloat16":
            (mean, _), (other, _) = (
                Latents(Table.open(path / "latents")).posterior(range(2)) for path in (own, run_dir)
            )
            assert 1e-4 < (mean - other).abs().max() < 0.1


def test_the_vae_of_5b_makes_48_channels_at_a_sixteenth_of_the_size(videos, tmp_path):
    ingest_for("wan2.2-5b", videos, tmp_path)
    spec = ModelSpec(backbone="wan2.2-5b", weights=str(write_wan_2_2_5b(tmp_path / "wan")))
    precompute(PrecomputeManifest(model=spec), tmp_path)
    mean, _ = Latents(Table.open(tmp_path / "latents")).posterior(range(2))
    assert mean.shape == (2, 48, 3, 4, 4)
