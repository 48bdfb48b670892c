"""Small random transformers of HunyuanVideo, built by diffusers' own class, and inputs for them."""

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor

TEXT_WIDTH, POOLED_WIDTH = 16, 12
TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_single_layers": 3,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.5,
    "text_embed_dim": TEXT_WIDTH,
    "pooled_projection_dim": POOLED_WIDTH,
    "rope_axes_dim": (4, 2, 2),
}


def new_hunyuan_transformer(seed: int = 0, **settings: object) -> HunyuanVideoTransformer3DModel:
    """Return diffusers' transformer with random weights, all of which count."""
    torch.manual_seed(seed)
    model = HunyuanVideoTransformer3DModel(**{**TRANSFORMER, **settings})
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:  # biases start as 0 and norms as 1, which would hide what is left out
                weight.add_(torch.randn_like(weight), alpha=0.1)
            else:
                weight.mul_(1.5)
    return model.eval()


def hunyuan_inputs(lengths: tuple[int, ...] = (5, 8, 2), frames: int = 4) -> dict[str, Tensor]:
    """Return a batch with texts of these lengths, 8 tokens at most; each frame has 2 x 3 tokens."""
    generator = torch.Generator().manual_seed(1)
    batch = len(lengths)
    return {
        "hidden_states": torch.randn(batch, 16, frames, 4, 6, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 8, TEXT_WIDTH, generator=generator),
        "encoder_attention_mask": torch.arange(8)[None] < torch.tensor(lengths)[:, None],
        "pooled_projections": torch.randn(batch, POOLED_WIDTH, generator=generator),
        "guidance": torch.linspace(1000, 8000, batch),
    }


def frame_levels(batch: int = 3, frames: int = 4) -> Tensor:
    """Return different timesteps (batch, frames)."""
    return torch.rand(batch, frames, generator=torch.Generator().manual_seed(2)) * 1000
