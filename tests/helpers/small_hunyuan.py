"""Small random transformers of HunyuanVideo, built by diffusers' own class, and inputs for them."""

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor, nn

from pusa.backbones.hunyuan_video.transformer import PusaHunyuanVideoTransformer3DModel

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
FRAMES, EACH = 4, 2 * 3  # latent frames, and tokens in each
T_B = torch.tensor([100.0, 500.0, 900.0])


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


def hunyuan_inputs(lengths: tuple[int, ...] = (5, 8, 2), frames: int = FRAMES) -> dict[str, Tensor]:
    """Return a batch with texts of these lengths, 8 tokens at most; each frame has `EACH` tokens."""
    generator = torch.Generator().manual_seed(1)
    batch = len(lengths)
    return {
        "hidden_states": torch.randn(batch, 16, frames, 4, 6, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 8, TEXT_WIDTH, generator=generator),
        "encoder_attention_mask": torch.arange(8)[None] < torch.tensor(lengths)[:, None],
        "pooled_projections": torch.randn(batch, POOLED_WIDTH, generator=generator),
        "guidance": torch.linspace(1000, 8000, batch),
    }


def frame_levels(batch: int = 3, frames: int = FRAMES) -> Tensor:
    """Return different timesteps (batch, frames)."""
    return torch.rand(batch, frames, generator=torch.Generator().manual_seed(2)) * 1000


def vectorized(base: HunyuanVideoTransformer3DModel) -> PusaHunyuanVideoTransformer3DModel:
    """Return a Pusa transformer with the weights of a base model."""
    pusa = PusaHunyuanVideoTransformer3DModel(**{**base.config, "image_condition_type": None}).eval()
    pusa.load_state_dict(base.state_dict())
    return pusa


def equal_levels() -> Tensor:
    """Return the timesteps of `T_B` for every frame."""
    return T_B[:, None].repeat(1, FRAMES)


@torch.no_grad()
def run(model: nn.Module, timestep: Tensor, **given: object) -> Tensor:
    """Return a transformer's output."""
    return model(timestep=timestep, **given).sample


def gradients(model: nn.Module, timestep: Tensor, **given: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the mean square of a transformer's output."""
    model.zero_grad()
    model(timestep=timestep, **given).sample.square().mean().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def furthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest difference between tensors of one name."""
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs)
