"""Hold the state of a fine-tune: trainable weights, their moving average, Adam's moments, and the step."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pusa.manifest.models import FinetuneManifest
from pusa.manifest.training import Lora

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Training:
    """The state after `step` steps, of which `skipped` changed nothing. All tensors are sharded over the processes."""

    manifest: FinetuneManifest
    transformer: Any
    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizer: torch.optim.AdamW
    step: int = 0
    skipped: int = 0

    @classmethod
    def start(cls, transformer: Any, manifest: FinetuneManifest) -> "Training":
        """Return the state at step 0."""
        weights = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(
            weights.values(), betas=(0.9, 0.999), weight_decay=manifest.weight_decay, fused=True
        )
        for weight in weights.values():  # AdamW makes these at its first step; a checkpoint is restored before that
            step = torch.zeros((), dtype=torch.float32, device=weight.device)
            moments = {name: torch.zeros_like(weight) for name in MOMENTS}
            optimizer.state[weight] = {"step": step, **moments}
        average = {name: w.detach().clone() for name, w in weights.items()} if manifest.ema_decay else {}
        return cls(manifest, transformer, weights, average, optimizer)

    @property
    def learning_rate(self) -> float:
        """Return that of the next step: linear warm-up, then constant or half a cosine to 0 after the last step."""
        recipe, rate = self.manifest, self.manifest.learning_rate
        if self.step < recipe.warmup_steps:
            return rate * (self.step + 1) / (recipe.warmup_steps + 1)
        if recipe.lr_schedule == "constant":
            return rate
        done = (self.step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
        return rate * 0.5 * (1 + math.cos(math.pi * done))

    @property
    def result(self) -> dict[str, Tensor]:
        """Return the weights that a checkpoint offers for use: all, or the LoRA's, as moving averages where kept."""
        is_lora = isinstance(self.manifest.train, Lora)
        offered = self.weights if is_lora else dict(self.transformer.named_parameters())
        return {name: self.average.get(name, weight.detach()) for name, weight in offered.items()}

    @torch.no_grad()
    def apply(self) -> None:
        """Make an optimizer step with the current gradients, and clear them."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        self.step += 1
        # A smaller decay in the first steps, or the base's weights would dominate the average for a long time.
        decay = min(self.manifest.ema_decay, self.step / (self.step + 9))
        for name, average in self.average.items():
            average.lerp_(self.weights[name].detach(), 1 - decay)
        self.optimizer.zero_grad(set_to_none=True)

    def skip(self) -> None:
        """Count a step without changing the weights: the next step takes the next batch."""
        self.step += 1
        self.skipped += 1
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Exchange weights and moving averages for the length of the block; afterwards both have the same bits."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, average in self.average.items():  # one at a time: a second copy of all may not fit
            weight = self.weights[name].detach()
            before = weight.clone()
            weight.copy_(average)
            average.copy_(before)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by the names they have in a checkpoint. Loading into these tensors restores the state."""
        tensors: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            tensors[f"weight.{name}"] = weight.detach()
            for moment in ("step", *MOMENTS):
                tensors[f"{moment}.{name}"] = self.optimizer.state[weight][moment]
        tensors |= {f"average.{name}": average for name, average in self.average.items()}
        return tensors
