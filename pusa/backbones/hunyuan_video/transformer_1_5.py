"""HunyuanVideo 1.5's transformer with one noise level per latent frame. Shapes: as in `transformer`."""

import functools
from typing import Any

import torch
from diffusers import HunyuanVideo15Transformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from torch import Tensor

from pusa.backbones.hunyuan_video.transformer import VectorizedHunyuanVideo
from pusa.backbones.joint_attention import count_valid, valid_first

QWEN, BYT5, IMAGE = range(3)  # rows of `cond_type_embed`: the kinds of tokens in the text stream


class PusaHunyuanVideo15Transformer3DModel(VectorizedHunyuanVideo, HunyuanVideo15Transformer3DModel):
    """diffusers' HunyuanVideo 1.5 transformer whose `timestep` may be (B,) or, with one per latent frame, (B, F).

    Constructor, configuration, parameter names and files are the base class's. With equal levels for all frames of a
    clip it computes the base model's function. Unlike the base model it takes texts without any valid token, and
    decides for each sample, not for the whole batch, whether it has a picture.
    """

    @functools.wraps(HunyuanVideo15Transformer3DModel.__init__)  # type: ignore[misc]  # diffusers reads the signature to rebuild a saved model
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.config.use_meanflow:
            raise ValueError(
                f"use_meanflow {self.config.use_meanflow} belongs to a model with a second timestep; allowed is False"
            )
        self._vectorize()

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        *,
        encoder_hidden_states_2: Tensor,
        encoder_attention_mask_2: Tensor,
        image_embeds: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict eps - x0, the negative of Pusa's velocity.

        Args:
            hidden_states: (B, 2 * C + 1, F, h, w): noisy latents, latents of given frames, and a mask of these
                frames. Text to video has zeros for the last two.
            timestep: 1000 * level, (B,) for one level a clip or (B, F) for one level a latent frame.
            encoder_hidden_states: Qwen's text features (B, L, text width).
            encoder_attention_mask: (B, L), true for valid text tokens, which may lie anywhere; perhaps none.
            encoder_hidden_states_2: ByT5's features (B, L2, its width) of the words in quotes, which a video shows.
            encoder_attention_mask_2: (B, L2), as the other mask.
            image_embeds: features of a picture (B, L3, image width); None or zeros for a sample without one.
            attention_kwargs: as in diffusers; "scale" is the strength of LoRA adapters.
            return_dict: return a `Transformer2DModelOutput`, otherwise a tuple of one tensor.

        Raises:
            ValueError: `timestep` has neither shape (B,) nor (B, F).
        """
        t_BF, dtype = self._timesteps(timestep, hidden_states), self.x_embedder.proj.weight.dtype
        # Text has no positions here. The base class has pictures first, then ByT5's tokens, then Qwen's.
        streams = [
            self._embed_byt5(encoder_hidden_states_2.to(dtype), encoder_attention_mask_2.bool()),
            self._embed_qwen(encoder_hidden_states.to(dtype), encoder_attention_mask.bool(), t_BF),
        ]
        if image_embeds is not None:
            streams.insert(0, self._embed_image(image_embeds.to(dtype)))
        y_BLD, mask_BL = (torch.cat(parts, 1) for parts in zip(*streams, strict=True))
        lengths = count_valid(mask_BL)
        y_BLD, _ = valid_first(y_BLD, mask_BL, max(1, *lengths))
        time = self.time_embed
        c_BFD = time.timestep_embedder(time.time_proj(t_BF.flatten()).to(dtype)).unflatten(0, t_BF.shape)
        sample = self._denoise(hidden_states, c_BFD, y_BLD, lengths)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _embed_qwen(self, text_BLW: Tensor, mask_BL: Tensor, t_BF: Tensor) -> tuple[Tensor, Tensor]:
        """Return Qwen's tokens (B, L, D) and mask (B, L), with L the length of the longest text."""
        lengths = count_valid(mask_BL)
        text_BLW, mask_BL = valid_first(text_BLW, mask_BL, max(1, *lengths))
        refined_BLD = self._refine(text_BLW, t_BF.float().mean(1), lengths)
        return refined_BLD + self.cond_type_embed.weight[QWEN], mask_BL

    def _embed_byt5(self, text_BLW: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Return ByT5's tokens (B, L, D) and mask (B, L)."""
        return self.context_embedder_2(text_BLW) + self.cond_type_embed.weight[BYT5], mask_BL

    def _embed_image(self, image_BLW: Tensor) -> tuple[Tensor, Tensor]:
        """Return a picture's tokens (B, L, D) and mask (B, L), false for samples whose features are zeros."""
        mask_B = (image_BLW != 0).any(2).any(1)
        tokens_BLD = self.image_embedder(image_BLW) + self.cond_type_embed.weight[IMAGE]
        return tokens_BLD, mask_B[:, None].expand(image_BLW.shape[:2])
