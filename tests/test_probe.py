"""Sheets of a fine-tune's checkpoints: the same videos each time, made of what a latents table holds."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pusa.errors import ManifestError, StageError, WeightsError
from pusa.files import sole_writer
from pusa.ingest import ingest
from pusa.manifest import ClipRule, FinetuneManifest, IngestManifest, ModelSpec, PrecomputeManifest
from pusa.precompute import precompute
from pusa.probe import KINDS, probe
from pusa.training.settings import Probe
from pusa.video import read_image
from pusa.weights.resolve import builtin

TINY = ModelSpec(weights="builtin:tiny")


@pytest.fixture(scope="module")
def table(drawn, tmp_path_factory) -> Path:
    """A run's latents."""
    folder = tmp_path_factory.mktemp("run")
    rule = ClipRule(width=64, height=64, num_frames=13)
    ingest(IngestManifest(source=drawn / "videos", clips=rule), folder)
    precompute(PrecomputeManifest(clips=folder / "clips", model=TINY), folder)
    return folder / "latents"


@pytest.fixture
def manifest(table) -> FinetuneManifest:
    return FinetuneManifest(latents=table, base=TINY, probe=Probe(clips=1, steps=2, guidance=2, device="cpu"))


def changed(manifest: FinetuneManifest, **settings) -> FinetuneManifest:
    return manifest.model_copy(update={"probe": manifest.probe.model_copy(update=settings)})


def put_checkpoint(run_dir: Path, step: int, model: str = "builtin:tiny-pusa") -> Path:
    """One as the trainer leaves it, of a model that is shipped."""
    folder = run_dir / f"checkpoints/{step:08d}"
    shutil.copytree(builtin(model) / "transformer", folder / "transformer")
    return recorded(folder)


def put_lora(run_dir: Path, step: int, scale: float) -> Path:
    """One as the trainer leaves it of a LoRA run."""
    folder, (rank, width) = run_dir / f"checkpoints/{step:08d}", (2, 144)
    names = [f"transformer.transformer_blocks.0.attn1.to_q.lora_{part}.weight" for part in "AB"]
    tensors = dict(zip(names, (torch.ones(rank, width), torch.full((width, rank), scale)), strict=True))
    (folder / "lora").mkdir(parents=True)
    save_file(tensors, folder / "lora/pytorch_lora_weights.safetensors")
    return recorded(folder)


def recorded(folder: Path) -> Path:
    record = {"step": int(folder.name), "recipe": {"latent_space": "dit", "backbone": "mochi"}}
    (folder / "checkpoint.json").write_text(json.dumps(record))
    return folder


def read(run_dir: Path, step: int):
    return json.loads((run_dir / f"probes/{step:08d}.json").read_text())


def test_each_checkpoint_gets_a_sheet_once(manifest, tmp_path):
    manifest = changed(manifest, clips=2)
    assert [path.name for path in probe(manifest, tmp_path)] == ["00000000.jpg"]
    put_checkpoint(tmp_path, 100)
    (tmp_path / "checkpoints/last").symlink_to("00000100")
    (tmp_path / "checkpoints/.lock").touch()
    assert probe(manifest, tmp_path) == [tmp_path / "probes/00000100.jpg"]
    assert probe(manifest, tmp_path) == []
    assert [read(tmp_path, step)["step"] for step in (0, 100)] == [0, 100]
    videos = read(tmp_path, 100)["videos"]
    assert [(video["clip"], video["kind"]) for video in videos] == [
        (clip, kind) for clip in ("0000.mp4@0", "0001.mp4@0") for kind in KINDS
    ]


def test_the_same_model_gives_the_same_sheet_and_another_one_another(manifest, tmp_path):
    put_checkpoint(tmp_path, 7, "builtin:tiny")
    put_checkpoint(tmp_path, 8)
    put_checkpoint(tmp_path, 9)
    assert len(probe(manifest, tmp_path)) == 4
    videos = [read(tmp_path, step)["videos"] for step in (0, 7, 8, 9)]
    assert videos[0] == videos[1] != videos[2] == videos[3]
    sheets = [read_image(tmp_path / f"probes/{step:08d}.jpg")[0][40:] for step in (0, 7, 8, 9)]  # below the title
    assert np.array_equal(sheets[0], sheets[1]) and np.array_equal(sheets[2], sheets[3])
    assert not np.array_equal(sheets[0], sheets[2])
    assert probe(manifest, tmp_path / "elsewhere") and read(tmp_path / "elsewhere", 0) == read(tmp_path, 0)


def test_a_loras_checkpoint_is_the_base_and_what_it_adds(manifest, tmp_path):
    for step, scale in ((1, 0.0), (2, 0.5)):
        put_lora(tmp_path, step, scale)
    probe(manifest, tmp_path)
    videos = [read(tmp_path, step)["videos"] for step in (0, 1, 2)]
    assert videos[0] == videos[1] != videos[2]


def test_given_frames_decode_like_the_clips(manifest, tmp_path):
    """All that is left between them is what the VAE draws from the frames before."""
    probe(manifest, tmp_path)
    for video in read(tmp_path, 0)["videos"]:
        if video["kind"] == "image_to_video":  # the first frame has none before it
            assert video["psnr_given"] == 99 and video["psnr_made"] < 60
        elif video["kind"] == "start_end":
            assert video["psnr_given"] > video["psnr_made"] + 3
        else:
            assert video["psnr_given"] is None


@pytest.mark.parametrize("change", [{"steps": 1}, {"guidance": 1}, {"clips": 2}])
def test_other_settings_make_the_sheets_again(manifest, tmp_path, change):
    probe(manifest, tmp_path)
    other = changed(manifest, **change)
    assert len(probe(other, tmp_path)) == 1
    assert probe(other, tmp_path) == []


def test_another_runs_sheet_is_not_taken_for_this_ones(manifest, tmp_path):
    """Checkpoints were removed and training began anew."""
    folder = put_checkpoint(tmp_path, 100)
    probe(manifest, tmp_path)
    (folder / "checkpoint.json").write_text((folder / "checkpoint.json").read_text() + " ")
    assert [path.stem for path in probe(manifest, tmp_path)] == ["00000100"]


def test_a_sheet_that_a_kill_left_half_done_is_made_again(manifest, tmp_path):
    probe(manifest, tmp_path)
    (tmp_path / "probes/00000000.json").unlink()
    (tmp_path / "probes/.partial-0123-00000000.jpg").touch()
    assert len(probe(manifest, tmp_path)) == 1
    assert {path.name for path in (tmp_path / "probes").iterdir()} == {".lock", "00000000.jpg", "00000000.json"}


def test_a_checkpoint_that_is_removed_meanwhile_is_left_out(manifest, tmp_path, monkeypatch, caplog):
    put_checkpoint(tmp_path, 100)
    put_checkpoint(tmp_path, 200)
    sheet_of = os.fspath(tmp_path / "probes/00000000.json")
    replace = Path.replace

    def and_rotate(path, target):
        if os.fspath(target) == sheet_of:
            shutil.rmtree(tmp_path / "checkpoints/00000100")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", and_rotate)
    assert [path.stem for path in probe(manifest, tmp_path)] == ["00000000", "00000200"]
    assert "checkpoints/00000100 was removed before there was a probe of it" in caplog.text


def test_a_checkpoint_that_is_there_and_damaged_is_told(manifest, tmp_path):
    (put_checkpoint(tmp_path, 100) / "transformer/config.json").unlink()
    with pytest.raises(WeightsError, match=r"00000100/transformer has no config.json"):
        probe(manifest, tmp_path)
    assert [path.name for path in (tmp_path / "probes").glob("*.json")] == ["00000000.json"]


def test_two_at_once_are_refused(manifest, tmp_path):
    with sole_writer(tmp_path / "probes"), pytest.raises(StageError, match="being written by another process"):
        probe(manifest, tmp_path)


def test_a_device_that_is_not_there_is_refused(manifest, tmp_path):
    with pytest.raises(ManifestError, match=r"probe\.device is 'cuda:63'; of CUDA devices there are"):
        probe(changed(manifest, device="cuda:63"), tmp_path)
