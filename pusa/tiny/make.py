"""Remake a tiny model from nothing: VAE, then text encoder and base, then the Pusa model fine-tuned from the base.

At full size this takes hours on two cores. Finished parts are kept, so a rerun of the command resumes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pusa.backbones import DEFAULT_BACKBONE, find_family
from pusa.backbones.base import find_backbone
from pusa.backbones.family import Family
from pusa.backbones.tiny_recipe import Effort, TinyRecipe, find_tiny_recipe
from pusa.diffusion.latent_spaces import LATENT_SPACES
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
from pusa.weights.adapters import SETTINGS, find_adapter
from pusa.weights.load import read_tensor
from pusa.weights.source import BASE_KEY
from pusa.weights.tensors import read_file, write_file
from pusa.weights.write import save_tensors

SAVED_DTYPE = torch.float16
VAE_START_CLIPS = 160  # from which the VAE's first weights are computed


def tiny_name(family: Family) -> str:
    """Return the name of a family's tiny model, without "builtin:"."""
    return family.tiny.removeprefix("builtin:")


def make(folder: Path, backbone: str = DEFAULT_BACKBONE, effort: Effort | None = None) -> None:
    """Write a base model in diffusers layout, such as `folder/tiny`, and its fine-tune, such as `folder/tiny-pusa`.

    Args:
        folder: where both are written, with the fine-tune's run beside them in `folder/run`.
        backbone: the family.
        effort: how much to train; default: the recipe's.

    Raises:
        ManifestError: no family has this name, or the family has no recipe for a tiny model.
        StageError: the folder holds something else, or another process is writing it.
    """
    recipe = find_tiny_recipe(backbone)
    with sole_writer(folder):
        _make(folder, backbone, recipe, effort or recipe.effort)


def _make(folder: Path, backbone: str, recipe: TinyRecipe, effort: Effort) -> None:
    name = tiny_name(find_family(backbone))
    tiny, tiny_pusa = folder / name, folder / f"{name}-pusa"
    for place in (tiny, tiny / "vae", tiny_pusa):
        remove_partials(place)
    if not (tiny / "vae").is_dir():
        _make_vae(tiny, backbone, recipe, effort)
    if not (tiny / "transformer").is_dir():
        _make_base(tiny, backbone, recipe, effort)
    recipe.new_scheduler().save_pretrained(tiny / "scheduler")
    write_json(tiny / "model_index.json", recipe.model_index)
    if not (find_adapter(tiny_pusa) or (tiny_pusa / "transformer").is_dir()):
        _make_pusa(folder, tiny, tiny_pusa, backbone, recipe, effort)
    index = {"_class_name": recipe.model_index["_class_name"], BASE_KEY: f"../{name}"}
    write_json(tiny_pusa / "model_index.json", index)


def _make_vae(tiny: Path, backbone: str, recipe: TinyRecipe, effort: Effort) -> None:
    """Train the VAE in the phases of its recipe."""
    torch.manual_seed(0)
    num_frames = clip_length(find_family(backbone).geometry)
    clips = np.stack([draw(scene, num_frames=num_frames) for scene in scenes(0, effort.vae_clips)])
    vae = recipe.new_vae(to_pixels(clips[:VAE_START_CLIPS]))
    with Progress("VAE", sum(effort.vae_steps)) as progress:
        for seed, (phase, steps) in enumerate(zip(recipe.vae_phases, effort.vae_steps, strict=True)):
            train_vae(
                recipe, vae, clips, phase, steps=steps, seed=seed,
                on_step=lambda step, psnr: progress.advance(note=f"{psnr:.1f} dB"),
            )  # fmt: skip
    _save(vae, tiny / "vae", recipe.saved_classes.get("vae"))


def _make_base(tiny: Path, backbone: str, recipe: TinyRecipe, effort: Effort) -> None:
    """Record the latents' statistics in the VAE's config, then train transformer and text encoder together."""
    family = find_backbone(backbone)
    vae = family.classes["vae"].from_pretrained(tiny / "vae").eval()
    drawn, num_frames = list(scenes(0, effort.base_clips)), clip_length(family.geometry)
    latents = encode_clips(vae, np.stack([draw(scene, num_frames=num_frames) for scene in drawn]))
    config = read_json(tiny / "vae/config.json") | recipe.statistics(latents)
    write_json(tiny / "vae/config.json", config)
    vae.register_to_config(**config)
    latents = LATENT_SPACES["dit"](*family.latent_statistics(vae)).enter(latents)
    clips = CaptionedLatents(latents, [scene.caption for scene in drawn])

    torch.manual_seed(0)
    tokenizers = {part: new_tokenizer(length) for part, length in recipe.max_tokens.items()}
    tokenizer = next(iter(tokenizers.values()))
    text_encoders = {part: build(len(tokenizer)) for part, build in recipe.new_text_encoders.items()}
    transformer = recipe.new_transformer()
    with Progress("base", effort.base_steps) as progress:
        train_base(
            recipe, transformer, text_encoders, tokenizer, clips, steps=effort.base_steps, batch_size=32,
            learning_rate=1.5e-3, on_step=lambda step, loss: progress.advance(note=f"loss {loss:.4f}"),
        )  # fmt: skip
    for part, own in tokenizers.items():
        own.save_pretrained(tiny / part)
    for part, text_encoder in text_encoders.items():
        _save(text_encoder, tiny / part, recipe.saved_classes.get(part))
    _save(transformer, tiny / "transformer", recipe.saved_classes.get("transformer"))


def _make_pusa(folder: Path, tiny: Path, tiny_pusa: Path, backbone: str, recipe: TinyRecipe, effort: Effort) -> None:
    """Fine-tune the base with the demo's recipe, on more clips and in more steps."""
    run_dir, geometry = folder / "run", find_family(backbone).geometry
    model = ModelSpec(weights=str(tiny), backbone=backbone)
    draw_dataset(run_dir / "drawn", effort.pusa_clips)
    settings = ClipSettings(num_frames=clip_length(geometry), width=SIZE, height=SIZE, fps=FPS)
    clips = ingest(IngestManifest(source=run_dir / "drawn" / "videos", clips=settings, backbone=backbone), run_dir)
    latents = precompute(PrecomputeManifest(clips=clips.table, model=model), run_dir)
    recipe_keys = {
        "levels": "independent", "density": "uniform", "steps": effort.pusa_steps, "batch_size": 32, "warmup_steps": 20,
        "ema_decay": 0.99, "checkpoint_every": 100, **recipe.train,
    }  # fmt: skip
    manifest = FinetuneManifest.model_validate({"latents": latents.table, "base": model, **recipe_keys})
    checkpoint = finetune(manifest, run_dir).checkpoint
    if adapter := find_adapter(checkpoint):
        _save_lora(adapter, tiny_pusa)
        return
    transformer_class = recipe.saved_classes.get("transformer", find_backbone(backbone).classes["transformer"])
    _save(transformer_class.from_pretrained(checkpoint, subfolder="transformer"), tiny_pusa / "transformer")


def _save_lora(adapter: Path, folder: Path) -> None:
    """Save a LoRA in half precision, with its settings alone: its record names paths of the machine that made it."""
    tensors, metadata = read_file(adapter)
    halves = {name: read_tensor(name, stored, SAVED_DTYPE) for name, stored in tensors.items()}
    save_tensors(folder / adapter.name, halves, {key: metadata[key] for key in ("format", SETTINGS)})


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
