"""Wan's transformer with one noise level per latent frame: Wan 2.1, both experts of 2.2 A14B, and 2.2 TI2V-5B.

Shapes: B batch, F latent frames (or 1, for one level a clip), S tokens a frame, N = F * S tokens, L text tokens, D
width, H heads, K head width; C latent channels; h, w latent height and width.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanRotaryPosEmbed,
    WanTransformerBlock,
)
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from pusa.backbones.context import ALONE, Context

PART_NUMEL = 1 << 24  # values that are in fp32 at once where no gradient is needed: 64 MiB


class PusaWanTransformer3DModel(WanTransformer3DModel):
    """diffusers' Wan transformer whose `timestep` may be (B,) or, with one per latent frame, (B, F).

    Constructor, configuration, parameter names and files are the base class's. Given the same levels it computes the
    same bits as the base class does with one timestep for each token, in fp32 and in bf16, as far as the matrix product
    that embeds a level does not depend on how many levels are embedded at once.
    """

    @functools.wraps(WanTransformer3DModel.__init__)  # type: ignore[misc]  # diffusers reads the signature to rebuild a saved model
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.config.patch_size[0] != 1:
            raise ValueError(f"patch_size {self.config.patch_size} joins latent frames; allowed is 1 in time")
        if self.config.image_dim is not None or self.config.added_kv_proj_dim is not None:
            raise ValueError("image_dim and added_kv_proj_dim belong to an image-to-video model; allowed is None")
        # The subclasses add no state, so the modules that diffusers has just built can change their class.
        self.patch_embedding.__class__ = _PatchEmbedding
        for block in self.blocks:
            block.__class__ = PusaWanTransformerBlock
            block.attn1.processor = PusaWanAttnProcessor()
        self.context = ALONE
        self.checkpoint_every_nth_block = 1

    def share_frames(self, context: Context) -> None:
        """Compute only this process's latent frames; inputs and outputs stay whole.

        Raises:
            ConditionError: the number of heads is not a multiple of the number of processes.
        """
        context.require_even(self.config.num_attention_heads)
        self.context = context
        for block in self.blocks:
            block.attn1.processor.context = context

    def remake_rope(self) -> None:
        """Compute the tables of the rotary embedding again, in fp32, on the device of the weights.

        No file has them, so a model that was built on the meta device has no values there.
        """
        with torch.device("cpu"):
            fresh = WanRotaryPosEmbed(self.rope.attention_head_dim, self.rope.patch_size, self.rope.max_seq_len)
        for name, table in fresh.named_buffers():
            setattr(self.rope, name, table.to(self.proj_out.weight.device))

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict eps - x0, the negative of Pusa's velocity.

        Args:
            hidden_states: noisy latents (B, C, F, h, w).
            timestep: 1000 * level, (B,) for one level a clip or (B, F) for one level a latent frame.
            encoder_hidden_states: text features (B, L, text width); every row is attended to, zero or not.
            attention_kwargs: as in diffusers; "scale" is the strength of LoRA adapters.
            return_dict: return a `Transformer2DModelOutput`, otherwise a tuple of one tensor.

        Raises:
            ValueError: `timestep` has neither shape (B,) nor (B, F).
        """
        batch, _, frames, height, width = hidden_states.shape
        if timestep.shape not in ((batch,), (batch, frames)):
            raise ValueError(
                f"timestep has shape {tuple(timestep.shape)}; allowed are ({batch},) and ({batch}, {frames})"
            )
        _, down, across = self.config.patch_size
        counts, mine = self.context.counts(frames), self.context.part(frames)
        x_BND = self.patch_embedding(hidden_states[:, :, mine]).flatten(2).transpose(1, 2).contiguous()
        c_BFD, modulation_BF6D, y_BLD = self._embed_conditions(timestep, encoder_hidden_states.to(x_BND.dtype))
        if timestep.ndim == 2:
            c_BFD, modulation_BF6D = c_BFD[:, mine], modulation_BF6D[:, mine]
        # The base class's tables have each angle twice.
        rope = [table[..., ::2].unflatten(1, (frames, -1))[:, mine] for table in self.rope(hidden_states)]
        tokens = [count * rope[0].shape[2] for count in counts]

        for index, block in enumerate(self.blocks):
            if torch.is_grad_enabled() and self.gradient_checkpointing and index % self.checkpoint_every_nth_block == 0:
                x_BND = self._gradient_checkpointing_func(block, x_BND, y_BLD, modulation_BF6D, tokens, rope)
            else:
                x_BND = block(x_BND, y_BLD, modulation_BF6D, tokens, rope)

        shift, scale = (self.scale_shift_table + c_BFD[:, :, None]).chunk(2, dim=2)
        x_BFSD = _modulated(self.norm_out, x_BND.unflatten(1, (c_BFD.shape[1], -1)), shift, scale)
        x = self.proj_out(x_BFSD).view(batch, -1, height // down, width // across, down, across, self._out_channels)
        sample = x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
        sample = self.context.gather(sample, 2, counts)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _embed_conditions(self, timestep: Tensor, text_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the conditioning vectors (B, F, D), their projections (B, F, 6, D), and the text stream.

        F is 1 for one level a clip.
        """
        frames = timestep.shape[1] if timestep.ndim == 2 else None
        c, projected, y_BLD, _ = self.condition_embedder(timestep.flatten(), text_BLD, timestep_seq_len=frames)
        if frames is None:
            c, projected = c[:, None], projected[:, None]
        return c, projected.unflatten(2, (6, -1)), y_BLD

    @property
    def _out_channels(self) -> int:
        return self.config.out_channels or self.config.in_channels


class _PatchEmbedding(nn.Conv3d):
    """The patch embedding, which decides the dtype of the activations: that of its own weights.

    It is cast to here, since sharded weights have their dtype of computation only inside their own module's forward.
    """

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype))


class PusaWanTransformerBlock(WanTransformerBlock):
    """diffusers' block with the video modulated per latent frame."""

    def forward(
        self, x_BND: Tensor, y_BLD: Tensor, modulation_BF6D: Tensor, video_tokens: Sequence[int], rope: Sequence[Tensor]
    ) -> Tensor:
        """Return the video stream, its shape unchanged.

        The modulation is broadcast over the S tokens of a frame where it is used. As in the base class it is fp32.
        """
        modulation = (self.scale_shift_table + modulation_BF6D.float()).chunk(6, dim=2)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        x_BFSD = x_BND.unflatten(1, (modulation_BF6D.shape[1], -1))

        normed_BFSD = _modulated(self.norm1, x_BFSD, shift_msa, scale_msa)
        attended_BND = self.attn1(normed_BFSD.flatten(1, 2), video_tokens=video_tokens, rotary_emb=rope)
        x_BFSD = _add_gated(x_BFSD, attended_BND.view_as(x_BFSD), gate_msa)

        normed_BFSD = _in_parts(lambda x: self.norm2(x.float()), x_BFSD)
        x_BFSD = x_BFSD + self.attn2(normed_BFSD.flatten(1, 2), y_BLD).view_as(x_BFSD)

        normed_BFSD = _modulated(self.norm3, x_BFSD, shift_mlp, scale_mlp)
        return _add_gated(x_BFSD, self.ffn(normed_BFSD), gate_mlp).flatten(1, 2)


class PusaWanAttnProcessor(WanAttnProcessor):
    """Wan's self-attention, with the frames shared by the processes of a context."""

    context = ALONE

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        rotary_emb: Sequence[Tensor] = (),
        *,
        video_tokens: Sequence[int],
    ) -> Tensor:
        """Attend hidden_states (B, N, D) to themselves.

        `rotary_emb` has cos and sin, each (1, F, S, 1, K / 2). `video_tokens` counts the tokens of each process of the
        context; N is this process's count.
        """
        x_BND = hidden_states
        q = _normed_and_rotated(attn.norm_q, attn.to_q(x_BND), attn.heads, *rotary_emb)
        k = _normed_and_rotated(attn.norm_k, attn.to_k(x_BND), attn.heads, *rotary_emb)
        v = attn.to_v(x_BND).unflatten(2, (attn.heads, -1))
        if self.context.size > 1:
            q, k, v = self.context.to_heads(torch.cat([q, k, v], -1), video_tokens).chunk(3, -1)
        x_BNHK = dispatch_attention_fn(q, k, v, backend=self._attention_backend, parallel_config=self._parallel_config)
        if self.context.size > 1:
            x_BNHK = self.context.to_frames(x_BNHK, video_tokens)
        return attn.to_out[1](attn.to_out[0](x_BNHK.flatten(2).type_as(q)))


def _modulated(norm: nn.Module, x_BFSD: Tensor, shift_BF1D: Tensor, scale_BF1D: Tensor) -> Tensor:
    """Return norm(x) * (1 + scale) + shift, computed in fp32."""
    return _in_parts(lambda x, shift, scale: norm(x.float()) * (1 + scale) + shift, x_BFSD, shift_BF1D, scale_BF1D)


def _add_gated(x_BFSD: Tensor, change_BFSD: Tensor, gate_BF1D: Tensor) -> Tensor:
    """Return x + change * gate, computed in fp32, which the gate's dtype promotes to without copies."""
    return _in_parts(lambda x, change, gate: x + change * gate, x_BFSD, change_BFSD, gate_BF1D)


def _normed_and_rotated(norm: nn.Module, x_BND: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """Return queries or keys (B, N, H, K): normed over all heads, then each pair of channels rotated by its angle."""

    def compute(x_BFSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        even, odd = norm(x_BFSD).unflatten(3, (heads, -1, 2)).unbind(-1)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(3)

    x_BFSD = x_BND.unflatten(1, cos.shape[1:3])
    return _in_parts(compute, x_BFSD, cos, sin).flatten(1, 2).unflatten(2, (heads, -1))


def _in_parts(compute: Callable[..., Tensor], x_BF: Tensor, *others: Tensor) -> Tensor:
    """Return `compute(x, *others)` in the dtype of x, whose frames do not depend on each other.

    Where no gradient is needed, a few frames are computed at a time, so that no fp32 copy of all of them exists.

    Args:
        compute: returns a tensor of the shape of x.
        x_BF: (B, F, ...).
        others: each of F frames like x, or of one that stands for all.
    """
    frames, at_once = x_BF.shape[1], max(1, PART_NUMEL * x_BF.shape[1] // x_BF.numel())
    if at_once >= frames or torch.is_grad_enabled() or torch.compiler.is_compiling():  # compilers fuse the copies away
        return compute(x_BF, *others).type_as(x_BF)
    result = torch.empty_like(x_BF)
    for start in range(0, frames, at_once):
        part = slice(start, start + at_once)
        result[:, part] = compute(x_BF[:, part], *(o if o.shape[1] == 1 else o[:, part] for o in others))
    return result
