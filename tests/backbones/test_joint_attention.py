"""Joint attention without a mask, against one masked call of torch's attention."""

import pytest
import torch
import torch.nn.functional as F

from pusa.backbones.context import ALONE
from pusa.backbones.joint_attention import attend_jointly, count_valid, pad, rotate, runs_of, valid_first

HEADS, WIDTH = 2, 4


def attend(q, k, v, mask=None):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("lengths", [(3, 3, 1, 0), (0, 0), (5,)])
def test_it_is_attention_with_a_mask_of_the_texts_padding(lengths):
    generator = torch.Generator().manual_seed(0)
    shapes = ((len(lengths), tokens, HEADS, WIDTH) for tokens in (6, 5))
    video, text = ([torch.randn(shape, generator=generator) for _ in range(3)] for shape in shapes)
    calls = []

    def counted(*streams):
        calls.append(streams[0].shape[:2])
        return attend(*streams)

    x, y = attend_jointly(counted, tuple(video), tuple(text), lengths, [6], ALONE)
    assert calls == [(rows.stop - rows.start, 6 + valid) for rows, valid in runs_of(lengths)]
    valid_BL = torch.arange(5) < torch.tensor(lengths)[:, None]
    mask = F.pad(valid_BL, (6, 0), value=True)[:, None, None]
    whole = attend(*(torch.cat(streams, 1) for streams in zip(video, text, strict=True)), mask)
    torch.testing.assert_close(x, whole[:, :6].flatten(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(y, (whole[:, 6:] * valid_BL[..., None, None]).flatten(2), atol=1e-6, rtol=0)


def test_runs_are_neighbours_of_equal_length():
    assert list(runs_of((5, 5, 0, 5))) == [(slice(0, 2), 5), (slice(2, 3), 0), (slice(3, 4), 5)]
    assert list(runs_of(())) == []


def test_valid_tokens_come_first_in_their_order():
    mask = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0]], dtype=torch.bool)
    text, moved = valid_first(torch.arange(8.0).view(2, 4, 1), mask, 2)
    assert text[0].flatten().tolist() == [1, 3] and text[1, 0] == 4
    assert moved.tolist() == [[True, True], [True, False]]
    assert count_valid(mask) == (2, 1) and count_valid(mask.to("meta")) == (4, 4)
    assert torch.equal(pad(text[..., None], 3)[:, :2, :, 0], text) and not pad(text, 3)[:, 2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_of_channels_turn_by_their_angles(dtype):
    x = torch.randn(1, 3, HEADS, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    angles = torch.linspace(0, 3, 6).view(3, 1, 2)
    turned = rotate(x, torch.stack([angles.cos(), angles.sin()], -1))
    even, odd = x.float()[..., ::2], x.float()[..., 1::2]
    expected = torch.stack([even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()], -1)
    assert turned.dtype == dtype and torch.equal(turned[:, 0, :, 0], x[:, 0, :, 0])
    torch.testing.assert_close(turned, expected.flatten(-2).to(dtype))
