"""HunyuanVideo's transformer with one noise level per latent frame, and what that of HunyuanVideo 1.5 shares with it.

Shapes: B batch, F latent frames (or 1, for one level a clip), S tokens a frame, N = F * S tokens, L text tokens, D
width, H heads, K head width; C latent channels; h, w latent height and width.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoSingleTransformerBlock,
    HunyuanVideoTransformerBlock,
)
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from pusa.backbones.context import ALONE, Context
from pusa.backbones.joint_attention import JointAttnProcessor, count_valid, pad, runs_of, valid_first


class VectorizedHunyuanVideo(ModelMixin):
    """The function that HunyuanVideo's transformers of both versions share: everything after the embeddings.

    Beside diffusers' classes, which give it the modules.
    """

    context = ALONE
    checkpoint_every_nth_block = 1

    @property
    def blocks(self) -> nn.ModuleList:
        """Return the repeated blocks, which are sharded, compiled and recomputed one by one."""
        blocks: nn.ModuleList = self.transformer_blocks
        return blocks

    def _vectorize(self) -> None:
        """Let the blocks that diffusers has just built take conditioning vectors per latent frame.

        Raises:
            ValueError: a token spans several latent frames.
        """
        if self.config.patch_size_t != 1:
            raise ValueError(f"patch_size_t {self.config.patch_size_t} joins latent frames; allowed is 1")
        for block in self.transformer_blocks:
            block.__class__ = PusaHunyuanVideoTransformerBlock  # a subclass that adds no state
        for attn in self._attentions():
            attn.processor = JointAttnProcessor()

    def share_frames(self, context: Context) -> None:
        """Compute only this process's latent frames; inputs and outputs stay whole.

        Raises:
            ConditionError: the number of heads is not a multiple of the number of processes.
        """
        context.require_even(self.config.num_attention_heads)
        self.context = context
        for attn in self._attentions():
            attn.processor.context = context

    def _attentions(self) -> list[Any]:
        return [block.attn for block in self.blocks]

    def _timesteps(self, timestep: Tensor, z_BCFhw: Tensor) -> Tensor:
        """Return the timesteps (B, F) or, if there is one for a clip, (B, 1).

        Raises:
            ValueError: `timestep` has neither shape (B,) nor (B, F).
        """
        batch, _, frames, _, _ = z_BCFhw.shape
        if timestep.shape not in ((batch,), (batch, frames)):
            raise ValueError(
                f"timestep has shape {tuple(timestep.shape)}; allowed are ({batch},) and ({batch}, {frames})"
            )
        return timestep if timestep.ndim == 2 else timestep[:, None]

    def _refine(self, text_BLD: Tensor, t_B: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return the text stream (B, L, D): each text refined without the tokens beyond its length, which become zeros.

        The base classes mask them, and compute NaN for a text without any valid token.
        """
        length, refined = text_BLD.shape[1], []
        for rows, valid in runs_of(lengths):
            some_BLD = text_BLD[rows, : max(1, valid)]
            some_BLD = self.context_embedder(some_BLD if valid else torch.zeros_like(some_BLD), t_B[rows])
            refined.append(pad(some_BLD[:, :valid], length))
        return torch.cat(refined)

    def _denoise(self, z_BCFhw: Tensor, c_BFD: Tensor, y_BLD: Tensor, text_lengths: Sequence[int]) -> Tensor:
        """Run blocks and output; return (B, output channels, F, h, w).

        Args:
            z_BCFhw: the input.
            c_BFD: the conditioning vectors of all frames, or of one frame that stands for all.
            y_BLD: the text stream.
            text_lengths: the number of valid tokens of each text, which come first.
        """
        frames, height, width = z_BCFhw.shape[2:]
        patch = self.config.patch_size
        c_BD, counts, mine = c_BFD.mean(1), self.context.counts(frames), self.context.part(frames)
        if c_BFD.shape[1] > 1:
            c_BFD = c_BFD[:, mine]
        x_BND = self.x_embedder(z_BCFhw[:, :, mine].to(self.x_embedder.proj.weight.dtype))
        rope = self._rotary(z_BCFhw)
        tokens = [count * rope.shape[1] for count in counts]
        rope = rope[mine].flatten(0, 1)

        for index, block in enumerate(self.blocks):
            if torch.is_grad_enabled() and self.gradient_checkpointing and index % self.checkpoint_every_nth_block == 0:
                x_BND, y_BLD = self._gradient_checkpointing_func(
                    block, x_BND, y_BLD, c_BFD, c_BD, text_lengths, tokens, rope
                )
            else:
                x_BND, y_BLD = block(x_BND, y_BLD, c_BFD, c_BD, text_lengths, tokens, rope)

        scale, shift = self.norm_out.linear(F.silu(c_BFD).to(x_BND.dtype)).chunk(2, dim=-1)
        x_BND = self.proj_out(_modulated(self.norm_out.norm, x_BND, shift, scale))
        x = x_BND.unflatten(2, (-1, patch, patch)).unflatten(1, (-1, height // patch, width // patch))
        sample = x.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
        return self.context.gather(sample, 2, counts)

    def _rotary(self, z_BCFhw: Tensor) -> Tensor:
        """Return cos and sin of the angles (F, S, 1, K / 2, 2), in fp32."""
        # The base classes' tables have each angle twice.
        tables = [table[:, ::2].unflatten(0, (z_BCFhw.shape[2], -1)) for table in self.rope(z_BCFhw)]
        return torch.stack(tables, -1)[:, :, None]


class PusaHunyuanVideoTransformer3DModel(VectorizedHunyuanVideo, HunyuanVideoTransformer3DModel):
    """diffusers' HunyuanVideo transformer whose `timestep` may be (B,) or, with one per latent frame, (B, F).

    Constructor, configuration, parameter names and files are the base class's. With equal levels for all frames of a
    clip it computes the base model's function. Unlike the base model it takes a text without any valid token.
    """

    @functools.wraps(HunyuanVideoTransformer3DModel.__init__)  # type: ignore[misc]  # diffusers reads the signature to rebuild a saved model
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.config.image_condition_type is not None:
            raise ValueError(
                f"image_condition_type {self.config.image_condition_type!r} belongs to an image-to-video model; "
                "allowed is None"
            )
        self._vectorize()
        for block in self.single_transformer_blocks:
            block.__class__ = PusaHunyuanVideoSingleTransformerBlock

    @property
    def blocks(self) -> nn.ModuleList:
        """Return the repeated blocks of both kinds, which are sharded, compiled and recomputed one by one."""
        return nn.ModuleList([*self.transformer_blocks, *self.single_transformer_blocks])

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        pooled_projections: Tensor,
        guidance: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict eps - x0, the negative of Pusa's velocity.

        Args:
            hidden_states: noisy latents (B, C, F, h, w).
            timestep: 1000 * level, (B,) for one level a clip or (B, F) for one level a latent frame.
            encoder_hidden_states: text features (B, L, text width).
            encoder_attention_mask: (B, L), true for valid text tokens, which may lie anywhere; perhaps none.
            pooled_projections: features of a text as a whole (B, pooled width).
            guidance: 1000 * the embedded guidance (B,), of a model that was distilled with it.
            attention_kwargs: as in diffusers; "scale" is the strength of LoRA adapters.
            return_dict: return a `Transformer2DModelOutput`, otherwise a tuple of one tensor.

        Raises:
            ValueError: `timestep` has neither shape (B,) nor (B, F), or `guidance` is missing.
        """
        t_BF, dtype = self._timesteps(timestep, hidden_states), self.x_embedder.proj.weight.dtype
        mask_BL = encoder_attention_mask.bool()
        lengths = count_valid(mask_BL)
        text_BLD, _ = valid_first(encoder_hidden_states.to(dtype), mask_BL, max(1, *lengths))
        c_BFD = self._embed_conditions(t_BF, pooled_projections.to(dtype), guidance)
        y_BLD = self._refine(text_BLD, t_BF.float().mean(1), lengths)
        sample = self._denoise(hidden_states, c_BFD, y_BLD, lengths)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _embed_conditions(self, t_BF: Tensor, pooled_BD: Tensor, guidance_B: Tensor | None) -> Tensor:
        """Return the conditioning vectors (B, F, D) of levels, embedded guidance, and the text as a whole."""
        embed, dtype = self.time_text_embed, pooled_BD.dtype
        c_BFD = embed.timestep_embedder(embed.time_proj(t_BF.flatten()).to(dtype)).unflatten(0, t_BF.shape)
        added_BD = embed.text_embedder(pooled_BD)
        if embed.guidance_embedder is not None:
            if guidance_B is None:
                raise ValueError("guidance is None; this model was distilled with guidance and needs the number")
            added_BD = added_BD + embed.guidance_embedder(embed.time_proj(guidance_B).to(dtype))
        return c_BFD + added_BD[:, None]


class PusaHunyuanVideoTransformerBlock(HunyuanVideoTransformerBlock):
    """diffusers' double-stream block with the video modulated per latent frame, the text by the mean over frames."""

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
        video = self.norm1.linear(F.silu(c_BFD)).chunk(6, dim=-1)
        text = self.norm1_context.linear(F.silu(c_BD))[:, None].chunk(6, dim=-1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = video
        text_shift_msa, text_scale_msa, text_gate_msa, text_shift_mlp, text_scale_mlp, text_gate_mlp = text

        attended_BND, attended_BLD = self.attn(
            _modulated(self.norm1.norm, x_BND, shift_msa, scale_msa),
            _modulated(self.norm1_context.norm, y_BLD, text_shift_msa, text_scale_msa),
            text_lengths=text_lengths,
            video_tokens=video_tokens,
            image_rotary_emb=rope,
        )
        x_BND = _add_gated(x_BND, attended_BND, gate_msa)
        y_BLD = _add_gated(y_BLD, attended_BLD, text_gate_msa)
        x_BND = _add_gated(x_BND, self.ff(_modulated(self.norm2, x_BND, shift_mlp, scale_mlp)), gate_mlp)
        normed_BLD = _modulated(self.norm2_context, y_BLD, text_shift_mlp, text_scale_mlp)
        return x_BND, _add_gated(y_BLD, self.ff_context(normed_BLD), text_gate_mlp)


class PusaHunyuanVideoSingleTransformerBlock(HunyuanVideoSingleTransformerBlock):
    """diffusers' single-stream block; the video part is modulated per latent frame, the text part by the mean."""

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
        """Return the two parts of the stream, shapes unchanged."""
        shift, scale, gate = self.norm.linear(F.silu(c_BFD)).chunk(3, dim=-1)
        text_shift, text_scale, text_gate = self.norm.linear(F.silu(c_BD))[:, None].chunk(3, dim=-1)
        normed_BND = _modulated(self.norm.norm, x_BND, shift, scale)
        normed_BLD = _modulated(self.norm.norm, y_BLD, text_shift, text_scale)
        attended_BND, attended_BLD = self.attn(
            normed_BND, normed_BLD, text_lengths=text_lengths, video_tokens=video_tokens, image_rotary_emb=rope
        )
        return (
            _add_gated(x_BND, self._out(attended_BND, normed_BND), gate),
            _add_gated(y_BLD, self._out(attended_BLD, normed_BLD), text_gate),
        )

    def _out(self, attended: Tensor, normed: Tensor) -> Tensor:
        return self.proj_out(torch.cat([attended, self.act_mlp(self.proj_mlp(normed))], 2))


def _modulated(norm: nn.Module, x_BND: Tensor, shift_BFD: Tensor, scale_BFD: Tensor) -> Tensor:
    """Return norm(x) * (1 + scale) + shift; each of the F vectors is for N / F tokens in a row."""
    x_BFSD = norm(x_BND).unflatten(1, (shift_BFD.shape[1], -1))
    return (x_BFSD * (1 + scale_BFD[:, :, None]) + shift_BFD[:, :, None]).flatten(1, 2)


def _add_gated(x_BND: Tensor, change_BND: Tensor, gate_BFD: Tensor) -> Tensor:
    """Return x + gate * change; each of the F vectors is for N / F tokens in a row."""
    frames = gate_BFD.shape[1]
    gated_BFSD = gate_BFD[:, :, None] * change_BND.unflatten(1, (frames, -1))
    return x_BND + gated_BFSD.flatten(1, 2)
