"""Remake the tiny family from nothing: VAE, text encoder and base, then the Pusa fine-tuned from it.

On two cores it takes about two hours. A part that is there already is kept, so an interrupted run goes on.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiTransformer3DModel

from pusa.backbones.mochi.vae import PusaAutoencoderKLMochi
from pusa.finetune.stage import finetune
from pusa.ingest.stage import ingest
from pusa.manifest.models import ClipSettings, FinetuneManifest, IngestManifest, ModelSpec, PrecomputeManifest
from pusa.precompute.stage import precompute
from pusa.system.files import atomic, read_json, write_json
from pusa.system.progress import Progress
from pusa.tiny.base import Clips, encode, new_transformer, train_base
from pusa.tiny.dataset import draw_dataset
from pusa.tiny.shapes import FPS, NUM_FRAMES, SIZE, draw, scenes
from pusa.tiny.text import new_text_encoder, new_tokenizer
from pusa.tiny.vae import new_vae, train_vae
from pusa.weights.source import BASE_KEY

log = logging.getLogger(__name__)
SHIPPED = torch.float16
VAE_CLIPS, BASE_CLIPS, PUSA_CLIPS = 1200, 4800, 800
VAE_STEPS, DECODER_STEPS, BASE_STEPS, PUSA_STEPS = 2200, 1200, 5000, 700
INDEX = {
    "_class_name": "MochiPipeline",
    "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "MochiTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLMochi"],
}


def make(folder: Path) -> None:
    """Write `folder/tiny` in the layout of genmo/mochi-1-preview, and `folder/tiny-pusa`."""
    tiny = folder / "tiny"
    if not (tiny / "vae").is_dir():
        _make_vae(tiny)
    if not (tiny / "transformer").is_dir():
        _make_base(tiny)
    FlowMatchEulerDiscreteScheduler(invert_sigmas=True).save_pretrained(tiny / "scheduler")
    write_json(tiny / "model_index.json", INDEX)
    if not (folder / "tiny-pusa" / "transformer").is_dir():
        _make_pusa(folder)
    write_json(folder / "tiny-pusa" / "model_index.json", {"_class_name": "MochiPipeline", BASE_KEY: "../tiny"})


def _make_vae(tiny: Path) -> None:
    torch.manual_seed(0)
    clips = np.stack([draw(scene) for scene in scenes(0, VAE_CLIPS)])
    vae = new_vae(clips[:160])
    with Progress("VAE", VAE_STEPS) as progress:
        train_vae(vae, clips, steps=VAE_STEPS, batch_size=2, learning_rate=3e-4, report=_decibels(progress))
    with Progress("VAE decoder", DECODER_STEPS) as progress:
        train_vae(
            vae, clips, steps=DECODER_STEPS, batch_size=2, learning_rate=3e-4,
            decoder_only=True, noise=0.05, seed=1, report=_decibels(progress),
        )  # fmt: skip
    _save(vae, tiny / "vae", AutoencoderKLMochi)


def _make_base(tiny: Path) -> None:
    vae = PusaAutoencoderKLMochi.from_pretrained(tiny / "vae").eval()
    latents = encode(vae, np.stack([draw(scene) for scene in scenes(0, BASE_CLIPS)]))
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    config = read_json(tiny / "vae/config.json")
    write_json(tiny / "vae/config.json", {**config, "latents_mean": mean.tolist(), "latents_std": std.tolist()})
    captions = [scene.caption for scene in scenes(0, BASE_CLIPS)]
    clips = Clips((latents - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1), captions)

    torch.manual_seed(0)
    tokenizer = new_tokenizer()
    text_encoder, transformer = new_text_encoder(len(tokenizer)), new_transformer()
    with Progress("base", BASE_STEPS) as progress:
        train_base(
            transformer, text_encoder, tokenizer, clips, steps=BASE_STEPS, batch_size=32, learning_rate=1.5e-3,
            report=lambda step, loss: progress.advance(note=f"loss {loss:.4f}"),
        )  # fmt: skip
    tokenizer.save_pretrained(tiny / "tokenizer")
    _save(text_encoder, tiny / "text_encoder")
    _save(transformer, tiny / "transformer", MochiTransformer3DModel)


def _make_pusa(folder: Path) -> None:
    """The demo's own recipe, on more clips and for longer."""
    run_dir = folder / "run"
    model = ModelSpec(weights=str(folder / "tiny"))
    draw_dataset(run_dir / "drawn", PUSA_CLIPS)
    rule = ClipSettings(num_frames=NUM_FRAMES, width=SIZE, height=SIZE, fps=FPS)
    clips = ingest(IngestManifest(source=run_dir / "drawn" / "videos", clips=rule), run_dir)
    latents = precompute(PrecomputeManifest(clips=clips.table, model=model), run_dir)
    recipe = FinetuneManifest(
        latents=latents.table, base=model, levels="independent", density="uniform", steps=PUSA_STEPS, batch_size=32,
        learning_rate=5e-4, warmup_steps=20, ema_decay=0.99, checkpoint_every=100,
    )  # fmt: skip
    trained = MochiTransformer3DModel.from_pretrained(finetune(recipe, run_dir).checkpoint, subfolder="transformer")
    _save(trained, folder / "tiny-pusa" / "transformer")


def _save(model: Any, folder: Path, plain_class: Any = None) -> None:
    """Whole; as diffusers' own class where one is named, since that is what it is."""
    if plain_class is not None:
        plain = plain_class.from_config(model.config)
        plain.load_state_dict(model.state_dict())
        model = plain
    with atomic(folder) as partial:
        model.to(SHIPPED).save_pretrained(partial)
        config = read_json(partial / "config.json")
        config.pop("_name_or_path", None)  # a path of the machine that made it
        write_json(partial / "config.json", config)


def _decibels(progress: Progress) -> Callable[[int, float], None]:
    return lambda step, decibels: progress.advance(note=f"{decibels:.1f} dB")
