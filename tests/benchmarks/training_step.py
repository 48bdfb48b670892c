"""Time a whole training step at Mochi's width: per-frame projection, expand-first, and the unmodified base.

    python -m tests.benchmarks.training_step                                        # 2 blocks, 2,730 tokens
    python -m tests.benchmarks.training_step --latent 28 60 106 --dtype bfloat16    # 44,520 tokens, on a GPU

A step is noise, forward, loss, backward, clipping and AdamW. The variants are those of mochi_block.py; they share their
weights and take turns within each round. Peak memory counts every tensor that a step makes, on top of weights and
moments; on a GPU it is the allocator's own peak. On a CPU the environment variables of mochi_block.py help here too.
"""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pusa.backbones.dry_run import PeakMemory
from pusa.diffusion.timesteps import add_noise, target
from tests.benchmarks.mochi_block import build, inputs, race, ratio, size_options


def step_of(model: nn.Module, given: dict[str, Tensor], per_frame: bool) -> Callable[[], None]:
    """Return a function that makes one step, without the moving average: its cost is the same for all variants."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)
    x0 = given["hidden_states"].float()
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2)).to(x0.device)
    levels = torch.full((1, x0.shape[2]), 0.5, device=x0.device)
    named = {**given, "timestep": 1000 * (1 - (levels if per_frame else levels[:, 0]))}

    def step() -> None:
        noisy = {**named, "hidden_states": add_noise(x0, noise, levels).to(given["hidden_states"].dtype)}
        velocity = model(**noisy, return_dict=False)[0].float()
        F.mse_loss(velocity, target(x0, noise)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peak_gib(step: Callable[[], Any], device: str) -> float:
    """Return the peak memory of a step in GiB, on top of what was allocated before."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    with PeakMemory() as memory:
        step()
    return memory.peak / 2**30


def main() -> None:
    """Measure and print the three variants."""
    options = size_options(__doc__).parse_args()
    frames, height, width = options.latent
    tokens = frames * height * width // 4
    print(f"{options.blocks} blocks, {tokens:,} tokens, {options.dtype} on {options.device}, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    steps = {name: step_of(model, inputs(options), name != "base") for name, model in build(options).items()}
    times = race(steps, options)
    peaks = {name: peak_gib(step, options.device) for name, step in steps.items()}
    for name in steps:
        print(
            f"{name:<8}{tokens / median(times[name]):8.0f} tokens/s, peak {peaks[name]:.2f} GiB beside weights and moments"
        )
    print(f"time: expand-first / ours {ratio(times, 'expand', 'ours')}; ours / base {ratio(times, 'ours', 'base')}")
    print(f"peak memory: expand-first / ours {peaks['expand'] / peaks['ours']:.2f}; "
          f"ours / base {peaks['ours'] / peaks['base']:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
