"""Attend video and text tokens to each other without a mask: what transformers with joint attention share.

A mask would rule out the flash kernels, and a loop over the samples makes one call for each. Here neighbouring samples
whose texts have equal length share a call. In guided sampling the prompts and the null prompts are two runs, whatever
the number of jobs in the batch.

Shapes: B batch, N video tokens, L text tokens, H heads, K head width, D width.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from pusa.backbones.context import ALONE, Context

Streams = tuple[Tensor, Tensor, Tensor]  # queries, keys and values
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # of (B, N + L, H, K) each -> the same shape


class JointAttnProcessor:
    """Joint attention over [video; text] without a mask, as a processor of diffusers' attention modules."""

    _attention_backend = None  # both set by diffusers: `set_attention_backend`, `enable_parallelism`
    _parallel_config = None
    context = ALONE

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        *,
        text_lengths: Sequence[int],
        video_tokens: Sequence[int],
        image_rotary_emb: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Attend hidden_states (B, N, D) and encoder_hidden_states (B, L, D') to each other, with B text lengths <= L.

        `video_tokens` counts the tokens of each process of the context; N is this process's count. A module without
        projections for the text uses those of the video for both. What it has no output projection for is returned
        as it is.
        """
        own = (attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        is_double = attn.add_q_proj is not None
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k)

        def project(x: Tensor, to_q: Any, to_k: Any, to_v: Any, norm_q: Any, norm_k: Any) -> Streams:
            q, k, v = (to(x).unflatten(2, (attn.heads, -1)) for to in (to_q, to_k, to_v))
            return norm_q(q), norm_k(k), v

        q, k, v = project(hidden_states, *own)
        video = rotate(q, image_rotary_emb), rotate(k, image_rotary_emb), v
        text = project(encoder_hidden_states, *(added if is_double else own))
        attend = partial(dispatch_attention_fn, backend=self._attention_backend, parallel_config=self._parallel_config)
        x_BND, y_BLD = attend_jointly(attend, video, text, text_lengths, video_tokens, self.context)
        if (to_out := getattr(attn, "to_out", None)) is not None:
            x_BND = to_out[1](to_out[0](x_BND))
        if (to_add_out := getattr(attn, "to_add_out", None)) is not None:
            y_BLD = to_add_out(y_BLD)
        return x_BND, y_BLD


def attend_jointly(
    attend: Attend,
    video_BNHK: Streams,
    text_BLHK: Streams,
    text_lengths: Sequence[int],
    video_tokens: Sequence[int],
    context: Context,
) -> tuple[Tensor, Tensor]:
    """Return what video and text tokens attend to in [video; text], as (B, N, H * K) and (B, L, H * K).

    Args:
        attend: the attention.
        video_BNHK: queries, keys and values of this process's video tokens.
        text_BLHK: those of all text tokens.
        text_lengths: B lengths <= L; tokens beyond them are not attended to, and come out as zeros.
        video_tokens: how many tokens each process of the context has.
        context: the processes that share the frames.
    """
    length = text_BLHK[0].shape[1]
    if context.size > 1:
        q, k, v = context.to_heads(torch.cat(video_BNHK, -1), video_tokens).chunk(3, -1)
        video_BNHK = q, k, v
        text_q, text_k, text_v = map(context.own_heads, text_BLHK)
        text_BLHK = text_q, text_k, text_v
    runs = [
        attend(*(torch.cat([x[rows], y[rows, :valid]], 1) for x, y in zip(video_BNHK, text_BLHK, strict=True)))
        for rows, valid in runs_of(text_lengths)
    ]
    tokens = video_BNHK[0].shape[1]
    x_BNHK = torch.cat([out[:, :tokens] for out in runs])
    y_BLHK = torch.cat([pad(out[:, tokens:], length) for out in runs])
    if context.size > 1:
        x_BNHK = context.to_frames(x_BNHK, video_tokens)
        y_BLHK = context.gather(y_BLHK, 2, [y_BLHK.shape[2]] * context.size)
    return x_BNHK.flatten(2), y_BLHK.flatten(2)


def count_valid(mask_BL: Tensor) -> tuple[int, ...]:
    """Return the number of valid tokens of each text; on the meta device, which has no values, all of them."""
    if mask_BL.is_meta:
        return (mask_BL.shape[1],) * len(mask_BL)
    return tuple(mask_BL.sum(1).tolist())


def runs_of(lengths: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """Yield the runs of neighbouring samples with texts of equal length, and that length."""
    start = 0
    for length, run in itertools.groupby(lengths):
        stop = start + len(list(run))
        yield slice(start, stop), length
        start = stop


def pad(text: Tensor, length: int) -> Tensor:
    """Return a text (B, l, ...) with zeros after it, (B, length, ...)."""
    return F.pad(text, (0, 0) * (text.ndim - 2) + (0, length - text.shape[1]))


def rotate(x_BNHK: Tensor, rope_NHK2: Tensor) -> Tensor:
    """Rotate each pair of channels by its angle, given as cosine and sine; one head's angles may stand for all."""
    pairs = x_BNHK.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # compilers fuse real arithmetic and do not support complex numbers
        (even, odd), (cos, sin) = pairs.unbind(-1), rope_NHK2.unbind(-1)
        rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    else:  # one pass over memory instead of eight with real arithmetic
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope_NHK2))
    return rotated.flatten(-2).to(x_BNHK.dtype)


def valid_first(text_BLD: Tensor, mask_BL: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Move the valid tokens of each text to its start and cut to `length` tokens; return text and mask.

    For transformers that do not encode the positions of text tokens, so that their order does not matter.
    """
    order_BL = mask_BL.int().argsort(dim=1, descending=True, stable=True)[:, :length]
    return text_BLD.take_along_dim(order_BL[..., None], 1), mask_BL.take_along_dim(order_BL, 1)
