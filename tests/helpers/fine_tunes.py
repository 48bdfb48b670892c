"""Helpers for tests of fine-tunes: the output of a transformer, and changes to LoRA files."""

import json
from pathlib import Path

import torch
from diffusers import MochiTransformer3DModel
from safetensors.torch import load_file, save_file

from pusa.manifest.training import Lora
from pusa.weights.tensors import read_file

METHOD = Lora(method="lora", rank=4, alpha=6, targets=("to_q", "to_out.0", "norm1.linear"))
LORA_FILE = "pytorch_lora_weights.safetensors"


def output(transformer, levels=(100.0, 100.0)) -> torch.Tensor:
    """Return the output for fixed inputs. diffusers' own class accepts one level per clip."""
    transformer = with_own_memory(transformer)
    generator = torch.Generator().manual_seed(5)
    timestep = torch.tensor([levels]) if len(set(levels)) > 1 else torch.tensor(levels[:1])
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(1, 12, 2, 4, 4, generator=generator),
            encoder_hidden_states=torch.randn(1, 8, 16, generator=generator),
            timestep=timestep,
            encoder_attention_mask=torch.ones(1, 8),
            return_dict=False,
        )[0]


def with_own_memory(transformer):
    """Copy the weights into new memory: kernels differ in the last bit for unaligned weights of a mapped file."""
    transformer.load_state_dict({name: w.clone() for name, w in transformer.state_dict().items()}, assign=True)
    return transformer


def plain(trained) -> MochiTransformer3DModel:
    """Return diffusers' transformer with the same weights."""
    own = MochiTransformer3DModel.from_config(trained.config).eval()
    own.load_state_dict(trained.state_dict())
    return own


def recipe(base: str) -> dict:
    return {"base": base, "latents": "0ff1ce", "latent_space": "dit", "backbone": "mochi", "train": {}}


def lineage(path: Path) -> dict:
    """Return the record of the files at a path, which must all have the same."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    (record,) = {read_file(file)[1]["pusa"] for file in files}
    return json.loads(record)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def edit(checkpoint: Path, change, keep=("pusa", "lora_adapter_metadata")) -> None:
    path = checkpoint / "lora" / LORA_FILE
    tensors, metadata = load_file(path), read_file(path)[1]
    change(tensors)
    save_file(tensors, path, {key: value for key, value in metadata.items() if key in keep})


def layers_of(trained) -> list[str]:
    return [name for name, module in trained.named_modules() if hasattr(module, "lora_A")]


def with_settings(checkpoint: Path, settings: str) -> None:
    path = checkpoint / "lora" / LORA_FILE
    save_file(load_file(path), path, {"lora_adapter_metadata": settings})
