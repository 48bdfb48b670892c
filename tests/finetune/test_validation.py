"""Validation sheets of a fine-tune's checkpoints: the same videos each time, from clips of the latents table."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pusa.data.latents import Latents
from pusa.data.order import is_held_out
from pusa.data.reader import Table
from pusa.errors import ManifestError, PartlyFailed, StageError, TableError, WeightsError
from pusa.finetune.measurements import Measurement
from pusa.finetune.validation import KINDS, SheetRenderer, validate_checkpoints
from pusa.ingest.stage import ingest
from pusa.manifest.models import ClipSettings, FinetuneManifest, IngestManifest, ModelSpec, PrecomputeManifest
from pusa.manifest.training import Validation
from pusa.precompute.stage import precompute
from pusa.system.locks import sole_writer
from pusa.video import sheets as strips
from pusa.video.media import read_image
from pusa.weights.model import Model
from pusa.weights.resolve import builtin_folder

TINY = ModelSpec(weights="builtin:tiny")
draw_text = strips._draw_text


@pytest.fixture(scope="module")
def table(drawn, tmp_path_factory) -> Path:
    """A run's latents."""
    folder = tmp_path_factory.mktemp("run")
    rule = ClipSettings(width=64, height=64, num_frames=13)
    ingest(IngestManifest(source=drawn / "videos", clips=rule), folder)
    precompute(PrecomputeManifest(clips=folder / "clips", model=TINY), folder)
    return folder / "latents"


@pytest.fixture
def manifest(table) -> FinetuneManifest:
    return FinetuneManifest(latents=table, base=TINY, validation=Validation(clips=1, steps=2, guidance=2, device="cpu"))


def changed(manifest: FinetuneManifest, **settings) -> FinetuneManifest:
    return manifest.model_copy(update={"validation": manifest.validation.model_copy(update=settings)})


def put_checkpoint(run_dir: Path, step: int, model: str = "builtin:tiny-pusa") -> Path:
    """Write a checkpoint as the trainer does, of a built-in model."""
    folder = run_dir / f"checkpoints/{step:08d}"
    shutil.copytree(builtin_folder(model) / "transformer", folder / "transformer")
    return recorded(folder)


def put_lora(run_dir: Path, step: int, scale: float) -> Path:
    """Write a checkpoint as the trainer does in a LoRA run."""
    folder, (rank, width) = run_dir / f"checkpoints/{step:08d}", (2, 144)
    names = [f"transformer.transformer_blocks.0.attn1.to_q.lora_{part}.weight" for part in "AB"]
    tensors = dict(zip(names, (torch.ones(rank, width), torch.full((width, rank), scale)), strict=True))
    (folder / "lora").mkdir(parents=True)
    save_file(tensors, folder / "lora/pytorch_lora_weights.safetensors")
    return recorded(folder)


def recorded(folder: Path, **recipe) -> Path:
    record = {"step": int(folder.name), "recipe": {"latent_space": "dit", "backbone": "mochi", **recipe}}
    (folder / "checkpoint.json").write_text(json.dumps(record))
    return folder


def read(run_dir: Path, step: int):
    return json.loads((run_dir / f"validation/{step:08d}.json").read_text())


def test_each_checkpoint_gets_a_sheet_once(manifest, tmp_path):
    manifest = changed(manifest, clips=2)
    assert [path.name for path in validate_checkpoints(manifest, tmp_path)] == ["00000000.jpg"]
    put_checkpoint(tmp_path, 100)
    (tmp_path / "checkpoints/last").symlink_to("00000100")
    (tmp_path / "checkpoints/.lock").touch()
    assert validate_checkpoints(manifest, tmp_path) == [tmp_path / "validation/00000100.jpg"]
    assert validate_checkpoints(manifest, tmp_path) == []
    assert [read(tmp_path, step)["step"] for step in (0, 100)] == [0, 100]
    videos = read(tmp_path, 100)["videos"]
    assert [(video["clip"], video["kind"]) for video in videos] == [
        (clip, kind) for clip in ("0000.mp4@0", "0001.mp4@0") for kind in KINDS
    ]


def test_the_same_model_gives_the_same_sheet_and_another_one_another(manifest, tmp_path):
    put_checkpoint(tmp_path, 7, "builtin:tiny")
    put_checkpoint(tmp_path, 8)
    put_checkpoint(tmp_path, 9)
    assert len(validate_checkpoints(manifest, tmp_path)) == 4
    videos = [read(tmp_path, step)["videos"] for step in (0, 7, 8, 9)]
    assert videos[0] == videos[1] != videos[2] == videos[3]
    sheets = [read_image(tmp_path / f"validation/{step:08d}.jpg")[0][40:] for step in (0, 7, 8, 9)]  # below the title
    assert np.array_equal(sheets[0], sheets[1]) and np.array_equal(sheets[2], sheets[3])
    assert not np.array_equal(sheets[0], sheets[2])
    assert validate_checkpoints(manifest, tmp_path / "elsewhere") and read(tmp_path / "elsewhere", 0) == read(
        tmp_path, 0
    )


def test_held_out_clips_are_shown_with_the_losses_of_their_step(manifest, table, tmp_path):
    latents = Latents(Table.open(table, "rows"))
    ids = latents.clip_ids(range(len(latents)))
    first = min(id for id in ids if is_held_out(id, 0.05))
    assert first != min(ids)
    validate_checkpoints(changed(manifest, held_out=0.05), tmp_path)
    plain, picture = read(tmp_path, 0), read_image(tmp_path / "validation/00000000.jpg")[0]
    assert {video["clip"] for video in plain["videos"]} == {first} and "losses" not in plain
    row = Measurement(0, "k", (0.5,), {"keyframes": (0.25,), "extension": (None,)}).row()
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, **row}) + "\n")
    assert validate_checkpoints(changed(manifest, held_out=0.05), tmp_path) and read(tmp_path, 0)["losses"] == {
        "keyframes": 0.25, "extension": None, "mean": None,
    }  # fmt: skip
    assert read(tmp_path, 0)["videos"] == plain["videos"]
    assert len(read_image(tmp_path / "validation/00000000.jpg")[0]) > len(picture)  # a line more
    assert validate_checkpoints(changed(manifest, held_out=0.05), tmp_path) == []


def test_what_only_measures_renders_no_sheet_again(manifest, tmp_path):
    """A run of an earlier version has sheets whose records lack these keys."""
    validate_checkpoints(manifest, tmp_path)
    assert read(tmp_path, 0)["sampling"] == {"clips": 1, "steps": 2, "guidance": 2.0}
    assert "held_out" not in read(tmp_path, 0)
    assert validate_checkpoints(changed(manifest, every=7, matrix_clips=2, keep_best="mean"), tmp_path) == []


def test_a_lora_checkpoint_is_rendered_on_top_of_the_base(manifest, tmp_path):
    for step, scale in ((1, 0.0), (2, 0.5)):
        put_lora(tmp_path, step, scale)
    validate_checkpoints(manifest, tmp_path)
    videos = [read(tmp_path, step)["videos"] for step in (0, 1, 2)]
    assert videos[0] == videos[1] != videos[2]


def test_given_frames_decode_like_the_clips(manifest, tmp_path):
    """They differ only because the VAE decodes a frame together with those before it."""
    validate_checkpoints(manifest, tmp_path)
    for video in read(tmp_path, 0)["videos"]:
        if video["kind"] == "image_to_video":  # no frame is before the first
            assert video["psnr_given"] == 99 and video["psnr_made"] < 60
        elif video["kind"] == "start_end":
            assert video["psnr_given"] > video["psnr_made"] + 3
        else:
            assert video["psnr_given"] is None


@pytest.mark.parametrize("change", [{"steps": 1}, {"guidance": 1}, {"clips": 2}])
def test_other_settings_render_the_sheets_again(manifest, tmp_path, change):
    validate_checkpoints(manifest, tmp_path)
    other = changed(manifest, **change)
    assert len(validate_checkpoints(other, tmp_path)) == 1
    assert validate_checkpoints(other, tmp_path) == []


def test_a_sheet_of_another_checkpoint_is_rendered_again(manifest, tmp_path):
    """Checkpoints were removed and training began anew."""
    folder = put_checkpoint(tmp_path, 100)
    validate_checkpoints(manifest, tmp_path)
    (folder / "checkpoint.json").write_text((folder / "checkpoint.json").read_text() + " ")
    assert [path.stem for path in validate_checkpoints(manifest, tmp_path)] == ["00000100"]


def test_a_sheet_that_a_kill_left_incomplete_is_rendered_again(manifest, tmp_path):
    validate_checkpoints(manifest, tmp_path)
    (tmp_path / "validation/00000000.json").unlink()
    (tmp_path / "validation/.partial-0123-00000000.jpg").touch()
    assert len(validate_checkpoints(manifest, tmp_path)) == 1
    assert {path.name for path in (tmp_path / "validation").iterdir()} == {".lock", "00000000.jpg", "00000000.json"}


def test_a_checkpoint_that_is_removed_meanwhile_is_left_out(manifest, tmp_path, monkeypatch, caplog):
    put_checkpoint(tmp_path, 100)
    put_checkpoint(tmp_path, 200)
    sheet_of = os.fspath(tmp_path / "validation/00000000.json")
    replace = Path.replace

    def and_rotate(path, target):
        if os.fspath(target) == sheet_of:
            shutil.rmtree(tmp_path / "checkpoints/00000100")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", and_rotate)
    assert [path.stem for path in validate_checkpoints(manifest, tmp_path)] == ["00000000", "00000200"]
    assert "checkpoints/00000100 was removed before its validation sheet was rendered" in caplog.text


def test_damaged_checkpoints_are_named_and_the_others_get_their_sheets(manifest, tmp_path, caplog):
    (put_checkpoint(tmp_path, 100) / "transformer/config.json").unlink()
    (put_checkpoint(tmp_path, 200) / "checkpoint.json").unlink()
    put_checkpoint(tmp_path, 300)
    with pytest.raises(StageError, match=r"(?s)00000100/transformer has no config.json.*00000200/checkpoint.json"):
        validate_checkpoints(manifest, tmp_path)
    assert {path.stem for path in (tmp_path / "validation").glob("*.json")} == {"00000000", "00000300"}
    assert len([record for record in caplog.records if "no validation sheet of" in record.message]) == 2


def test_a_damaged_base_is_an_error(manifest, tmp_path):
    base = shutil.copytree(builtin_folder("builtin:tiny"), tmp_path / "base")
    (base / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"")
    put_checkpoint(tmp_path, 100)
    with pytest.raises(WeightsError, match="base/vae"):
        validate_checkpoints(manifest.model_copy(update={"base": ModelSpec(weights=base)}), tmp_path)


def test_a_sheet_depends_on_the_bases_bytes_not_on_its_name(manifest, tmp_path):
    def of(folder: Path) -> list[str]:
        found = validate_checkpoints(manifest.model_copy(update={"base": ModelSpec(weights=folder)}), tmp_path)
        return [path.stem for path in found]

    base = shutil.copytree(builtin_folder("builtin:tiny"), tmp_path / "base")
    assert of(base) == ["00000000"]
    assert of(base.rename(tmp_path / "moved")) == []
    shutil.copytree(
        builtin_folder("builtin:tiny-pusa") / "transformer", tmp_path / "moved/transformer", dirs_exist_ok=True
    )
    for file in (tmp_path / "moved/transformer").iterdir():
        file.touch()  # the copy has the date of its source, which may be that of the file it replaced
    assert of(tmp_path / "moved") == ["00000000"]
    assert str(tmp_path) not in (tmp_path / "validation/00000000.json").read_text()


@pytest.mark.parametrize("frames, kinds", [(1, ["text_to_video"]), (7, ["text_to_video", "image_to_video"])])
def test_kinds_that_would_be_given_the_whole_clip_are_left_out(drawn, tmp_path, frames, kinds):
    rule = ClipSettings(width=64, height=64, num_frames=frames)
    ingest(IngestManifest(source=drawn / "videos", clips=rule), tmp_path)
    precompute(PrecomputeManifest(clips=tmp_path / "clips", model=TINY), tmp_path)
    validate_checkpoints(FinetuneManifest(base=TINY, validation=Validation(steps=1, device="cpu")), tmp_path)
    videos = read(tmp_path, 0)["videos"]
    assert [video["kind"] for video in videos] == kinds and all(video["psnr_made"] is not None for video in videos)


def test_a_sheet_has_its_labels(manifest, tmp_path, monkeypatch):
    drawn_texts: list[str] = []
    monkeypatch.setattr(strips, "_draw_text", lambda text, *size: drawn_texts.append(text) or draw_text(text, *size))
    recorded(put_checkpoint(tmp_path, 100), ema_decay=0.98)
    put_checkpoint(tmp_path, 200)
    validate_checkpoints(manifest, tmp_path)
    titles = [text for text in drawn_texts if text.startswith("step ")]
    assert titles == [
        "step 0, the base: 2 sampling steps, guidance 2",
        "step 100, moving average of the weights (decay 0.98): 2 sampling steps, guidance 2",
        "step 200, the weights as they are: 2 sampling steps, guidance 2",
    ]
    clip, text, image, both = drawn_texts[2:6]
    video = read(tmp_path, 0)["videos"]
    assert clip == "the clip, as its\nlatents decode"
    assert text == f"text_to_video\ngiven nothing\nmade PSNR {video[0]['psnr_made']:.1f} dB"
    assert image.startswith("image_to_video\ngiven latent 0\ngiven PSNR exact\nmade PSNR ")
    assert both.startswith("start_end\ngiven latent 0, 2\ngiven PSNR ")


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 163])
def test_a_strip_shows_no_frame_twice(count):
    frames = strips.strip_indices(count)
    assert len(set(frames)) == len(frames) == min(count, strips.STRIP_FRAMES)
    assert (frames[0], frames[-1]) == (0, count - 1)


def test_a_second_validation_is_refused(manifest, tmp_path):
    with sole_writer(tmp_path / "validation"), pytest.raises(StageError, match="being written by another process"):
        validate_checkpoints(manifest, tmp_path)


def test_a_missing_device_is_refused(manifest, tmp_path):
    with pytest.raises(ManifestError, match=r"validation\.device is 'cuda:63'; this machine has \d+ CUDA devices"):
        validate_checkpoints(changed(manifest, device="cuda:63"), tmp_path)


def test_a_sheet_whose_bytes_have_changed_is_rendered_again(manifest, tmp_path):
    (sheet,) = validate_checkpoints(changed(manifest, steps=1), tmp_path)
    before = sheet.read_bytes()
    sheet.write_bytes(b"")
    assert validate_checkpoints(changed(manifest, steps=1), tmp_path) == [sheet] and sheet.read_bytes() == before


@pytest.mark.parametrize("where", ["clip", "video", "decoding"])
def test_a_clip_that_fails_leaves_the_others_on_the_sheet(manifest, tmp_path, monkeypatch, where):
    manifest, broken = changed(manifest, clips=2), "0000.mp4@0"
    posterior, sample, decode = Latents.posterior, SheetRenderer._sample, Model.decode

    def no_latents(self, indices, finite=True):
        if self.clip_ids(indices) == [broken]:
            raise TableError("a shard is damaged")
        return posterior(self, indices, finite)

    def no_video(self, clip, kind, model):
        if clip.name == broken and kind == "image_to_video":
            raise RuntimeError("no memory")
        return sample(self, clip, kind, model)

    decoded = []

    def no_decoding(self, z_CFhw):
        decoded.append(1)
        if len(decoded) == 2:  # of the clips themselves, the second one
            raise RuntimeError("no memory")
        return decode(self, z_CFhw)

    place, replacement = {
        "clip": ((Latents, "posterior"), no_latents),
        "video": ((SheetRenderer, "_sample"), no_video),
        "decoding": ((Model, "decode"), no_decoding),
    }[where]
    monkeypatch.setattr(*place, replacement)
    with pytest.raises(PartlyFailed, match=r"without a validation sheet:\s+.*mp4@0"):
        validate_checkpoints(manifest, tmp_path)
    record = read(tmp_path, 0)
    assert len(record["videos"]) == {"clip": 3, "video": 5, "decoding": 3}[where] and len(record["missing"]) == 1
    monkeypatch.undo()
    assert len(validate_checkpoints(manifest, tmp_path)) == 1, "rendered again, since it lacked videos"
    assert len(read(tmp_path, 0)["videos"]) == 6 and validate_checkpoints(manifest, tmp_path) == []


def test_any_error_of_a_checkpoint_leaves_the_others(manifest, tmp_path, monkeypatch):
    for step in (1, 2):
        put_lora(tmp_path, step, 0.0)
    facts = SheetRenderer._facts

    def fail(self, step, checkpoint):
        if step == 1:
            raise RuntimeError("of a library")
        return facts(self, step, checkpoint)

    monkeypatch.setattr(SheetRenderer, "_facts", fail)
    with pytest.raises(PartlyFailed, match="00000001: RuntimeError: of a library"):
        validate_checkpoints(manifest, tmp_path)
    assert sorted(path.name for path in (tmp_path / "validation").glob("*.jpg")) == ["00000000.jpg", "00000002.jpg"]


def test_a_checkpoint_that_is_replaced_while_its_sheet_is_rendered_gets_none(manifest, tmp_path, monkeypatch):
    checkpoint, sample = put_lora(tmp_path, 1, 0.0), SheetRenderer._sample_all

    def replaced(self, spec):
        sampled = sample(self, spec)
        if spec.adapters:
            recorded(checkpoint, other=True)
        return sampled

    monkeypatch.setattr(SheetRenderer, "_sample_all", replaced)
    with pytest.raises(PartlyFailed, match="00000001 was replaced while its sheet was rendered"):
        validate_checkpoints(manifest, tmp_path)
    assert not (tmp_path / "validation/00000001.jpg").exists()
