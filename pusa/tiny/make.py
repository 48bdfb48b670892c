"""Remake a tiny model from nothing: VAE, then text encoder and base, then the Pusa model fine-tuned from the base.

At full size this takes about two hours on two cores. Finished parts are kept, so a rerun of the command resumes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pusa.backbones import DEFAULT_BACKBONE, find_family
from pusa.backbones.base import find_backbone
from pusa.backbones.tiny_recipe import TinyRecipe, find_tiny_recipe
from pusa.finetune.stage import finetune
from pusa.ingest.stage import ingest
from pusa.manifest.models import ClipSettings, FinetuneManifest, IngestManifest, ModelSpec, PrecomputeManifest
from pusa.precompute.stage import precompute
from pusa.system.files import atomic, read_json, remove_partials, write_json
from pusa.system.locks import sole_writer
from pusa.system.progress import Progress
from pusa.tiny.dataset import draw_dataset
from pusa.tiny.shapes import FPS, SIZE, clip_length, draw, scenes
from pusa.tiny.training import CaptionedLatents, encode_clips, new_tokenizer, to_pixels, train_base, train_vae
from pusa.weights.source import BASE_KEY
from pusa.weights.tensors import read_file, write_file

SAVED_DTYPE = torch.float16
VAE_START_CLIPS = 160  # from which the VAE's first weights are computed


@dataclass(frozen=True)
class Effort:
    """The drawn clips and the training steps of each part. The defaults are those of the models in pusa/builtin."""

    vae_clips: int = 1200
    vae_steps: int = 2200
    decoder_steps: int = 1200
    base_clips: int = 4800
    base_steps: int = 5000
    pusa_clips: int = 800
    pusa_steps: int = 700


FULL_EFFORT = Effort()


def make(folder: Path, backbone: str = DEFAULT_BACKBONE, effort: Effort = FULL_EFFORT) -> None:
    """Write `folder/tiny`, a base model in diffusers layout, and `folder/tiny-pusa`, its fine-tuned transformer.

    Args:
        folder: where both are written, with the fine-tune's run beside them in `folder/run`.
        backbone: the family.
        effort: how much to train.

    Raises:
        ManifestError: no family has this name, or the family has no recipe for a tiny model.
        StageError: the folder holds something else, or another process is writing it.
    """
    recipe = find_tiny_recipe(backbone)
    with sole_writer(folder):
        _make(folder, backbone, recipe, effort)


def _make(folder: Path, backbone: str, recipe: TinyRecipe, effort: Effort) -> None:
    tiny, tiny_pusa = folder / "tiny", folder / "tiny-pusa"
    for place in (tiny, tiny / "vae", tiny_pusa):
        remove_partials(place)
    if not (tiny / "vae").is_dir():
        _make_vae(tiny, backbone, recipe, effort)
    if not (tiny / "transformer").is_dir():
        _make_base(tiny, backbone, recipe, effort)
    recipe.new_scheduler().save_pretrained(tiny / "scheduler")
    write_json(tiny / "model_index.json", recipe.model_index)
    if not (tiny_pusa / "transformer").is_dir():
        _make_pusa(folder, backbone, recipe, effort)
    write_json(tiny_pusa / "model_index.json", {"_class_name": recipe.model_index["_class_name"], BASE_KEY: "../tiny"})


def _make_vae(tiny: Path, backbone: str, recipe: TinyRecipe, effort: Effort) -> None:
    """Train the VAE, then its decoder alone on noised latents."""
    torch.manual_seed(0)
    num_frames = clip_length(find_family(backbone).geometry)
    clips = np.stack([draw(scene, num_frames=num_frames) for scene in scenes(0, effort.vae_clips)])
    vae = recipe.new_vae(to_pixels(clips[:VAE_START_CLIPS]))
    with Progress("VAE", effort.vae_steps) as progress:
        train_vae(
            vae, clips, steps=effort.vae_steps, batch_size=2, learning_rate=3e-4,
            on_step=lambda step, psnr: progress.advance(note=f"{psnr:.1f} dB"),
        )  # fmt: skip
    with Progress("VAE decoder", effort.decoder_steps) as progress:
        train_vae(
            vae, clips, steps=effort.decoder_steps, batch_size=2, learning_rate=3e-4, decoder_only=True, noise=0.05,
            seed=1, on_step=lambda step, psnr: progress.advance(note=f"{psnr:.1f} dB"),
        )  # fmt: skip
    _save(vae, tiny / "vae", recipe.saved_classes.get("vae"))


def _make_base(tiny: Path, backbone: str, recipe: TinyRecipe, effort: Effort) -> None:
    """Record the latents' statistics in the VAE's config, then train transformer and text encoder together."""
    family = find_backbone(backbone)
    vae = family.classes["vae"].from_pretrained(tiny / "vae").eval()
    drawn, num_frames = list(scenes(0, effort.base_clips)), clip_length(family.geometry)
    latents = encode_clips(vae, np.stack([draw(scene, num_frames=num_frames) for scene in drawn]))
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    config = read_json(tiny / "vae/config.json")
    write_json(tiny / "vae/config.json", {**config, "latents_mean": mean.tolist(), "latents_std": std.tolist()})
    latents = (latents - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)
    clips = CaptionedLatents(latents, [scene.caption for scene in drawn])

    torch.manual_seed(0)
    tokenizer = new_tokenizer(recipe.max_tokens)
    text_encoder = recipe.new_text_encoder(len(tokenizer))
    transformer = recipe.new_transformer()
    with Progress("base", effort.base_steps) as progress:
        train_base(
            recipe, transformer, text_encoder, tokenizer, clips, steps=effort.base_steps, batch_size=32,
            learning_rate=1.5e-3, on_step=lambda step, loss: progress.advance(note=f"loss {loss:.4f}"),
        )  # fmt: skip
    tokenizer.save_pretrained(tiny / "tokenizer")
    _save(text_encoder, tiny / "text_encoder", recipe.saved_classes.get("text_encoder"))
    _save(transformer, tiny / "transformer", recipe.saved_classes.get("transformer"))


def _make_pusa(folder: Path, backbone: str, recipe: TinyRecipe, effort: Effort) -> None:
    """Fine-tune the base with the demo's recipe, on more clips and in more steps."""
    run_dir, geometry = folder / "run", find_family(backbone).geometry
    model = ModelSpec(weights=str(folder / "tiny"), backbone=backbone)
    draw_dataset(run_dir / "drawn", effort.pusa_clips)
    settings = ClipSettings(num_frames=clip_length(geometry), width=SIZE, height=SIZE, fps=FPS)
    clips = ingest(IngestManifest(source=run_dir / "drawn" / "videos", clips=settings, backbone=backbone), run_dir)
    latents = precompute(PrecomputeManifest(clips=clips.table, model=model), run_dir)
    manifest = FinetuneManifest(
        latents=latents.table, base=model, levels="independent", density="uniform", steps=effort.pusa_steps,
        batch_size=32, learning_rate=5e-4, warmup_steps=20, ema_decay=0.99, checkpoint_every=100,
    )  # fmt: skip
    checkpoint = finetune(manifest, run_dir).checkpoint
    transformer_class = recipe.saved_classes.get("transformer", find_backbone(backbone).classes["transformer"])
    _save(transformer_class.from_pretrained(checkpoint, subfolder="transformer"), folder / "tiny-pusa" / "transformer")


def _save(model: Any, folder: Path, saved_class: Any = None) -> None:
    """Save a part in half precision; as `saved_class`, the library's own class, if one is given."""
    if saved_class is not None:
        plain = saved_class.from_config(model.config)
        plain.load_state_dict(model.state_dict())
        model = plain
    with atomic(folder) as partial:
        model.to(SAVED_DTYPE).save_pretrained(partial)
        config = read_json(partial / "config.json")
        config.pop("_name_or_path", None)  # a path of the machine that made it
        write_json(partial / "config.json", config)
        for path in partial.glob("*.safetensors"):  # as of libraries, their metadata and permissions vary
            write_file(path, *read_file(path))
