"""A small random HunyuanVideo with all of its parts, written in diffusers' layout by the libraries' own classes."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from pusa.backbones.hunyuan_video.tiny import CLIP, LLAMA, MAX_TOKENS, RECIPE, TEMPLATE_TOKENS, TRANSFORMER, VAE
from pusa.system.files import write_json
from pusa.tiny.training import new_tokenizer


def write_hunyuan(folder: Path, seed: int = 0) -> Path:
    """Write the model, of the sizes of the tiny one. Return the folder."""
    limits = {"tokenizer": TEMPLATE_TOKENS + MAX_TOKENS, "tokenizer_2": MAX_TOKENS}
    for part, limit in limits.items():
        (tokenizer := new_tokenizer(limit)).save_pretrained(folder / part)
    torch.manual_seed(seed)
    HunyuanVideoTransformer3DModel(**TRANSFORMER).save_pretrained(folder / "transformer")
    AutoencoderKLHunyuanVideo(**VAE).save_pretrained(folder / "vae")
    LlamaModel(LlamaConfig(vocab_size=len(tokenizer), **LLAMA)).save_pretrained(folder / "text_encoder")
    CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **CLIP)).save_pretrained(folder / "text_encoder_2")
    RECIPE.new_scheduler().save_pretrained(folder / "scheduler")
    write_json(folder / "model_index.json", RECIPE.model_index)
    return folder
