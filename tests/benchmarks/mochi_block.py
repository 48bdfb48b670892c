"""Measure the cost of one noise level per frame at Mochi's width: per-frame projection, expand-first, the base model.

    python tests/benchmarks/mochi_block.py                                        # 2 blocks, 2,730 tokens
    python tests/benchmarks/mochi_block.py --latent 28 60 106 --dtype bfloat16    # 44,520 tokens, on a GPU

All forms share one set of weights and take turns within each round; a ratio is the median over the rounds. Expand-first
is the published code: it repeats the conditioning vectors over a frame's tokens and projects them there.
On a CPU, glibc returns blocks above 32 MiB to the kernel whenever they are freed. Allocating them again slows down the
forms with larger tensors, such as a batch of two. MALLOC_MMAP_THRESHOLD_=8589934592 and
MALLOC_TRIM_THRESHOLD_=17179869184 in the environment make glibc keep them.
"""

import argparse
import gc
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch
from diffusers import MochiTransformer3DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pusa.backbones.mochi.transformer import PusaMochiTransformer3DModel


class ExpandFirst(PusaMochiTransformer3DModel):
    """Compute the same function, with each frame's vector repeated for its tokens *before* every projection.

    The blocks then treat every token as a frame: a (B, N, 4D) tensor in each, and (B, N, 2D) at the end.
    """

    def _embed_conditions(self, timestep: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        c_BFD, y_BLD = super()._embed_conditions(timestep, *given)
        return c_BFD.repeat_interleave(self.tokens_each, 1), y_BLD

    def forward(self, hidden_states: Tensor, *given: Any, **named: Any) -> Any:
        self.tokens_each = hidden_states[0, 0, 0].numel() // self.config.patch_size**2
        return super().forward(hidden_states, *given, **named)


def build(options: argparse.Namespace) -> dict[str, nn.Module]:
    """Return the three forms over one set of weights, which `assign=True` shares."""
    torch.manual_seed(0)
    config = {"num_layers": options.blocks, "text_embed_dim": options.text_width}
    with torch.device(options.device):
        base = nn.Module.to(MochiTransformer3DModel(**config), getattr(torch, options.dtype))
    with torch.device("meta"):
        ours, expand = PusaMochiTransformer3DModel(**config), ExpandFirst(**config)
    for name, weight in base.named_parameters():
        if name != "pos_frequencies" and weight.ndim > 1:
            nn.init.normal_(weight, std=0.02)
    for model in (ours, expand):
        model.load_state_dict(base.state_dict(), assign=True)
        model.requires_grad_(True)
    return {"base": base, "ours": ours, "expand": expand}


def inputs(options: argparse.Namespace, batch: int = 1) -> dict[str, Tensor]:
    """Return latents, levels, and text with 77 valid tokens (in a second sample none: a null prompt)."""
    generator = torch.Generator().manual_seed(1)
    frames, height, width = options.latent
    dtype = getattr(torch, options.dtype)
    mask = torch.arange(256)[None] < torch.tensor([77, 0])[:batch, None]
    given = {
        "hidden_states": torch.randn(batch, 12, frames, height, width, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, 256, options.text_width, generator=generator).to(dtype),
        "timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": mask,
    }
    return {name: value.to(options.device) for name, value in given.items()}


def per_frame(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs with one level for each frame, all equal, so that every form computes the same function."""
    frames = given["hidden_states"].shape[2]
    return {**given, "timestep": given["timestep"][:, None].repeat(1, frames)}


def forward(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """Run the model without gradients."""
    with torch.no_grad():
        return model(**given, return_dict=False)[0]


def train(model: nn.Module, given: dict[str, Tensor]) -> None:
    """Run the model forward and backward."""
    model(**given, return_dict=False)[0].float().square().mean().backward()
    model.zero_grad(set_to_none=True)


def saved_mib(model: nn.Module, given: dict[str, Tensor]) -> float:
    """Return the memory that autograd keeps for the backward pass: each storage once, without the weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}  # the tensors are kept, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**given, return_dict=False)[0].float().square().mean()
    del loss
    return sum(size for size, _ in kept.values()) / 2**20


def seconds(run: Callable[[], Any], device: str) -> float:
    """Time one call, with the device's queue empty before and after it."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    wait()
    began = perf_counter()
    run()
    wait()
    return perf_counter() - began


def race(runs: dict[str, Callable[[], Any]], options: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of each run in each round, taking turns; the first round only warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(options.rounds + 1):
        for name, run in runs.items():
            gc.collect()
            taken = seconds(run, options.device)
            if turn:
                times[name].append(taken)
    return times


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> str:
    """Return how many times longer `slow` takes: the median over the rounds, and the range."""
    ratios = [a / b for a, b in zip(times[slow], times[fast], strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def matmul_rate(options: argparse.Namespace) -> float:
    """Return the FLOP/s of a large matmul in the same dtype, the best of four."""
    size = 4096 if options.device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=options.device, dtype=getattr(torch, options.dtype)) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: a @ b, options.device) for _ in range(4))


def report(models: dict[str, nn.Module], options: argparse.Namespace) -> None:
    """Measure all forms and print the results."""
    given = inputs(options)
    forms = {
        name: (model, given if name == "base" else per_frame(given))
        for name, model in models.items()
    }  # fmt: skip
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        expected = forward(*forms["base"])
    difference = max((forward(*forms[name]) - expected).abs().max().item() for name in ("ours", "expand"))
    print(f"largest difference from the base: {difference:.1e} (outputs have a deviation of {expected.std():.2f})")

    rate = matmul_rate(options)
    steps: list[tuple[str, Callable[..., Any], int]] = [("forward", forward, 1), ("forward + backward", train, 3)]
    for what, step, passes in steps:
        times = race({name: (lambda form=form: step(*form)) for name, form in forms.items()}, options)
        share = passes * counter.get_total_flops() / median(times["ours"]) / rate
        print(f"{what}: {median(times['ours']):.2f} s; expand-first / ours {ratio(times, 'expand', 'ours')}; "
              f"ours / base {ratio(times, 'ours', 'base')}; {share:.0%} of the large-matmul rate "
              f"({rate / 1e12:.2f} TFLOP/s)")  # fmt: skip
    kept = {name: saved_mib(*form) for name, form in forms.items()}
    print(f"kept for the backward pass: {kept['ours']:.0f} MiB; expand-first {kept['expand']:.0f}, "
          f"base {kept['base']:.0f}")  # fmt: skip

    pair = per_frame(inputs(options, 2))
    alone = [{name: value[i : i + 1] for name, value in pair.items()} for i in (0, 1)]
    scalar = inputs(options, 2)
    times = race(
        {
            "pair": lambda: forward(models["ours"], pair),
            "two calls": lambda: [forward(models["ours"], one) for one in alone],
            "base pair": lambda: forward(models["base"], scalar),
        },
        options,
    )
    print(f"text and null prompt in one call: {median(times['pair']):.2f} s; two calls / one "
          f"{ratio(times, 'two calls', 'pair')}; base in one call / ours {ratio(times, 'base pair', 'pair')}")  # fmt: skip


def size_options(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options for size, dtype, device and rounds."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--latent", type=int, nargs=3, default=[7, 30, 52], metavar=("F", "H", "W"))
    parser.add_argument("--text-width", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    return parser


def main() -> None:
    """Read the options, build the forms, measure."""
    parser = size_options(__doc__)
    parser.add_argument("--compile", action="store_true", help="compile the blocks of every form")
    options = parser.parse_args()
    frames, height, width = options.latent
    print(f"{options.blocks} blocks, {frames * height * width // 4:,} tokens in {frames} frames, {options.dtype} on "
          f"{options.device}, {torch.get_num_threads()} threads")  # fmt: skip
    models = build(options)
    if options.compile:
        for model in models.values():
            for block in model.transformer_blocks:
                block.compile()
    report(models, options)


if __name__ == "__main__":
    main()
