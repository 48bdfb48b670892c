"""Mochi's transformer with one noise level per latent frame.

Shapes: B batch, F latent frames, S tokens a frame, N = F * S tokens, L text tokens, D width, H heads, K head width;
C latent channels; h, w latent height and width.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import MochiTransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_mochi import MochiTransformerBlock
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from pusa.backbones.context import ALONE, Context
from pusa.backbones.joint_attention import JointAttnProcessor, count_valid, valid_first


class PusaMochiTransformer3DModel(MochiTransformer3DModel):
    """diffusers' Mochi transformer whose `timestep` may be (B,) or, with one per latent frame, (B, F).

    Constructor, configuration, parameter names and files are the base class's. With equal levels for all frames of a
    clip it computes the base model's function.
    """

    @functools.wraps(MochiTransformer3DModel.__init__)  # type: ignore[misc]  # diffusers reads the signature to rebuild a saved model
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The block's subclass adds no state, so the blocks that diffusers has just built can change their class.
        # Building them again would double the start-up time of a 10B model.
        for block in self.transformer_blocks:
            block.__class__ = PusaMochiTransformerBlock
            block.attn1.processor = JointAttnProcessor()
        self.context = ALONE
        self.checkpoint_every_nth_block = 1

    @property
    def blocks(self) -> nn.ModuleList:
        """Return the repeated blocks, which are sharded, compiled and recomputed one by one."""
        return self.transformer_blocks

    def share_frames(self, context: Context) -> None:
        """Compute only this process's latent frames; inputs and outputs stay whole.

        Raises:
            ConditionError: the number of heads is not a multiple of the number of processes.
        """
        context.require_even(self.config.num_attention_heads)
        self.context = context
        for block in self.transformer_blocks:
            block.attn1.processor.context = context

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        encoder_attention_mask: Tensor,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the velocity x0 - eps.

        Args:
            hidden_states: noisy latents (B, C, F, h, w).
            encoder_hidden_states: text features (B, L, text width).
            timestep: 1000 * (1 - level), (B,) for one level a clip or (B, F) for one level a latent frame.
            encoder_attention_mask: (B, L), true for valid text tokens, which may lie anywhere.
            attention_kwargs: as in diffusers; "scale" is the strength of LoRA adapters.
            return_dict: return a `Transformer2DModelOutput`, otherwise a tuple of one tensor.

        Raises:
            ValueError: `timestep` has neither shape (B,) nor (B, F).
        """
        dtype = self.pos_frequencies.dtype
        batch, _, frames, height, width = hidden_states.shape
        if timestep.shape not in ((batch,), (batch, frames)):
            raise ValueError(
                f"timestep has shape {tuple(timestep.shape)}; allowed are ({batch},) and ({batch}, {frames})"
            )
        patch = self.config.patch_size
        mask_BL = encoder_attention_mask.bool()
        lengths = count_valid(mask_BL)
        text_BLD, mask_BL = valid_first(encoder_hidden_states, mask_BL, max(1, *lengths))
        c_BFD, y_BLD = self._embed_conditions(timestep, text_BLD.to(dtype), mask_BL, dtype)
        c_BD, counts, mine = c_BFD.mean(1), self.context.counts(frames), self.context.part(frames)
        if c_BFD.shape[1] == frames:
            c_BFD = c_BFD[:, mine]
        z_BFChw = hidden_states[:, :, mine].transpose(1, 2).to(dtype)
        x_BND = self.patch_embed(z_BFChw.flatten(0, 1)).unflatten(0, (batch, -1)).flatten(1, 2)
        rope = self._rotary(frames, height // patch, width // patch, x_BND.device)
        each = len(rope) // frames
        rope, tokens = rope.unflatten(0, (frames, each))[mine].flatten(0, 1), [count * each for count in counts]

        for index, block in enumerate(self.transformer_blocks):
            if torch.is_grad_enabled() and self.gradient_checkpointing and index % self.checkpoint_every_nth_block == 0:
                x_BND, y_BLD = self._gradient_checkpointing_func(
                    block, x_BND, y_BLD, c_BFD, c_BD, lengths, tokens, rope
                )
            else:
                x_BND, y_BLD = block(x_BND, y_BLD, c_BFD, c_BD, lengths, tokens, rope)

        scale, shift = self.norm_out.linear(F.silu(c_BFD).to(x_BND.dtype))[:, :, None].chunk(2, dim=-1)
        x_BFSD = self.norm_out.norm(x_BND).unflatten(1, (c_BFD.shape[1], -1)) * (1 + scale) + shift
        x = self.proj_out(x_BFSD).view(batch, -1, height // patch, width // patch, patch, patch, z_BFChw.shape[2])
        sample = x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
        sample = self.context.gather(sample, 2, counts)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _embed_conditions(
        self, timestep: Tensor, text_BLD: Tensor, mask_BL: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return the conditioning vectors (B, F, D), or (B, 1, D) for one level per clip, and the text stream."""
        embed = self.time_embed
        t_BF = timestep if timestep.ndim == 2 else timestep[:, None]
        time_BFD = embed.timestep_embedder(embed.time_proj(t_BF.flatten()).to(dtype)).unflatten(0, t_BF.shape)
        return time_BFD + embed.pooler(text_BLD, mask_BL)[:, None], embed.caption_proj(text_BLD)

    def _rotary(self, frames: int, height: int, width: int, device: torch.device) -> Tensor:
        """Return cos and sin of the learnt angles, (N, H, K / 2, 2), always in fp32.

        Products and sums replace the base class's einsum, which autocast would compute in bf16 as a matmul.
        """
        positions = self.rope._get_positions(frames, height, width, device, torch.float32)
        time, down, across = (
            place[:, None, None] * frequency
            for place, frequency in zip(positions.unbind(1), self.pos_frequencies.float().unbind(0), strict=True)
        )
        angles = time + down + across
        return torch.stack([angles.cos(), angles.sin()], -1)


class PusaMochiTransformerBlock(MochiTransformerBlock):
    """diffusers' block with the visual stream modulated per latent frame, the text stream by the mean over frames."""

    def forward(
        self,
        x_BND: Tensor,
        y_BLD: Tensor,
        c_BFD: Tensor,
        c_BD: Tensor,
        text_lengths: Sequence[int],
        video_tokens: Sequence[int],
        rope: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the two streams, shapes unchanged.

        The modulation is projected for F vectors, and broadcast over the S tokens of a frame only where it is used.
        """
        frames = c_BFD.shape[1]
        x_BFSD = x_BND.unflatten(1, (frames, -1))

        modulation = self.norm1.linear(F.silu(c_BFD))[:, :, None].chunk(4, dim=-1)
        scale_msa, gate_msa, scale_mlp, gate_mlp = modulation
        normed_BND = (self.norm1.norm(x_BFSD.float()) * (1 + scale_msa.float())).to(x_BFSD.dtype).flatten(1, 2)
        if self.context_pre_only:
            normed_BLD = self.norm1_context(y_BLD, c_BD)
        else:
            normed_BLD, text_gate_msa, text_scale_mlp, text_gate_mlp = self.norm1_context(y_BLD, c_BD)

        attended_BND, attended_BLD = self.attn1(
            normed_BND, normed_BLD, text_lengths=text_lengths, video_tokens=video_tokens, image_rotary_emb=rope
        )

        x_BFSD = x_BFSD + self.norm2(attended_BND.unflatten(1, (frames, -1)), gate_msa.tanh())
        x_BFSD = x_BFSD + self.norm4(self.ff(self.norm3(x_BFSD, 1 + scale_mlp.float())), gate_mlp.tanh())
        if not self.context_pre_only:
            y_BLD = y_BLD + self.norm2_context(attended_BLD, text_gate_msa.tanh()[:, None])
            mlp_BLD = self.ff_context(self.norm3_context(y_BLD, 1 + text_scale_mlp[:, None].float()))
            y_BLD = y_BLD + self.norm4_context(mlp_BLD, text_gate_mlp.tanh()[:, None])
        return x_BFSD.flatten(1, 2), y_BLD
