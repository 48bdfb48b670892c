"""Measure the cost of one noise level per frame in Wan: ours, diffusers' own path per token, and one level a clip.

    python -m tests.benchmarks.wan_block                                                  # the width of 1.3B
    python -m tests.benchmarks.wan_block --model 14B --latent 21 60 104 --device cuda     # 32,760 tokens, on a GPU

All forms share one set of weights and take turns within each round; a ratio is the median over the rounds. Memory is
counted on the meta device, and measured: on a GPU by its allocator, on a CPU by what autograd keeps.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from pusa.backbones.dry_run import GIB, FusedAttention, PeakMemory
from pusa.backbones.wan.transformer import PusaWanTransformer3DModel
from pusa.weights.load import cast
from tests.benchmarks.mochi_block import forward, race, ratio, saved_mib, size_options, train

MODELS = {
    "1.3B": {"num_attention_heads": 12, "ffn_dim": 8960},
    "14B": {},
    "5B": {"num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48},
}
Forms = dict[str, tuple[nn.Module, dict[str, Tensor]]]


def build(options: argparse.Namespace, device: str) -> Forms:
    """Return each form's model and inputs; the two models share their weights."""
    torch.manual_seed(0)
    config = {**MODELS[options.model], "num_layers": options.blocks, "text_dim": options.text_width}
    dtype, (frames, height, width) = getattr(torch, options.dtype), options.latent
    with torch.device(device):
        base, ours = WanTransformer3DModel(**config), PusaWanTransformer3DModel(**config)
        cast(base, dtype)
        ours.load_state_dict(base.state_dict(), assign=True)
        ours.requires_grad_(True)
        z = torch.randn(1, config.get("in_channels", 16), frames, height, width, dtype=dtype)
        text, level = torch.randn(1, 512, options.text_width, dtype=dtype), torch.full((1,), 500.0)
    given = {"hidden_states": z, "encoder_hidden_states": text}
    tokens = frames * (height // 2) * (width // 2)
    return {
        "ours": (ours, {**given, "timestep": level[:, None].repeat(1, frames)}),
        "per token": (base, {**given, "timestep": level[:, None].repeat(1, tokens)}),
        "scalar": (base, {**given, "timestep": level}),
    }


def counted(model: nn.Module, given: dict[str, Tensor]) -> tuple[float, float]:
    """Return GiB on the meta device: the peak without gradient, and what is kept for backward."""
    with FusedAttention(), PeakMemory() as memory:
        forward(model, given)
    with FusedAttention(), PeakMemory() as training:
        out = model(**given, return_dict=False)[0]
        kept = training.now
    del out
    return memory.peak / GIB, kept / GIB


def allocated(model: nn.Module, given: dict[str, Tensor]) -> float:
    """Return the GiB that a forward pass without gradient allocates on a GPU at most, beside weights and inputs."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward(model, given)
    return (torch.cuda.max_memory_allocated() - before) / GIB


def report(options: argparse.Namespace) -> None:
    """Measure all forms and print the results."""
    for name, form in build(options, "meta").items():
        print(
            f"{name}: counted {counted(*form)[0]:.2f} GiB without gradient, {counted(*form)[1]:.2f} kept for backward"
        )
    forms = build(options, options.device)
    results = {name: forward(*form) for name, form in forms.items()}
    expected = results["per token"]
    print(f"largest difference from per token: {(results['ours'] - expected).abs().max():.1e} (outputs have a deviation of "
          f"{expected.std():.2f})")  # fmt: skip
    steps: list[tuple[str, Callable[..., Any]]] = [("forward", forward), ("forward + backward", train)]
    for what, step in steps:
        times = race({name: (lambda form=form: step(*form)) for name, form in forms.items()}, options)
        print(f"{what}: per token / ours {ratio(times, 'per token', 'ours')}; ours / scalar "
              f"{ratio(times, 'ours', 'scalar')}")  # fmt: skip
    for name, form in forms.items():
        peak = f"{allocated(*form):.2f} GiB without gradient, " if options.device == "cuda" else ""
        print(f"{name}: measured {peak}{saved_mib(*form):.0f} MiB kept for backward")


def main() -> None:
    """Read the options and measure."""
    parser = size_options(__doc__)
    parser.add_argument("--model", choices=MODELS, default="1.3B", help="whose width")
    options = parser.parse_args()
    frames, height, width = options.latent
    print(f"{options.blocks} blocks as wide as {options.model}'s, {frames * height * width // 4:,} tokens in {frames} "
          f"frames, {options.dtype} on {options.device}, {torch.get_num_threads()} threads")  # fmt: skip
    report(options)


if __name__ == "__main__":
    main()
