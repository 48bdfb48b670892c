"""What a fine-tune changes: the weights that learn, their moving average, Adam's moments, and how far it has come."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pusa.manifest.models import FinetuneManifest
from pusa.manifest.training import Lora

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Training:
    """After `step` steps, of which `skipped` changed nothing. All tensors are shared out over the processes."""

    manifest: FinetuneManifest
    transformer: Any
    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizer: torch.optim.AdamW
    step: int = 0
    skipped: int = 0

    @classmethod
    def start(cls, transformer: Any, manifest: FinetuneManifest) -> "Training":
        """At step 0."""
        weights = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(
            weights.values(), betas=(0.9, 0.999), weight_decay=manifest.weight_decay, fused=True
        )
        for weight in weights.values():  # made by its first step, or else it would have nothing to restore into
            step = torch.zeros((), dtype=torch.float32, device=weight.device)
            moments = {name: torch.zeros_like(weight) for name in MOMENTS}
            optimizer.state[weight] = {"step": step, **moments}
        average = {name: w.detach().clone() for name, w in weights.items()} if manifest.ema_decay else {}
        return cls(manifest, transformer, weights, average, optimizer)

    @property
    def learning_rate(self) -> float:
        """Of the next step: a linear warm-up, then constant, or half a cosine down to 0 after the last step."""
        recipe, rate = self.manifest, self.manifest.learning_rate
        if self.step < recipe.warmup_steps:
            return rate * (self.step + 1) / (recipe.warmup_steps + 1)
        if recipe.lr_schedule == "constant":
            return rate
        done = (self.step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
        return rate * 0.5 * (1 + math.cos(math.pi * done))

    @property
    def result(self) -> dict[str, Tensor]:
        """What a checkpoint offers for use: all weights, or what a LoRA adds; the moving average where there is one."""
        added_alone = isinstance(self.manifest.train, Lora)
        offered = self.weights if added_alone else dict(self.transformer.named_parameters())
        return {name: self.average.get(name, weight.detach()) for name, weight in offered.items()}

    @torch.no_grad()
    def apply(self) -> None:
        """Take an optimizer step with the gradients that are there."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        self.step += 1
        # Early on the average follows quickly, or the base's weights would weigh in it for ever.
        decay = min(self.manifest.ema_decay, self.step / (self.step + 9))
        for name, slow in self.average.items():
            slow.lerp_(self.weights[name].detach(), 1 - decay)
        self.optimizer.zero_grad(set_to_none=True)

    def skip(self) -> None:
        """Let a step go by: the data moves on, the weights stay."""
        self.step += 1
        self.skipped += 1
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, as a checkpoint stores it; what is loaded into these tensors is restored."""
        return dict(self._tensors())

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self.weights.items():
            yield f"weight.{name}", weight.detach()
            for moment in ("step", *MOMENTS):
                yield f"{moment}.{name}", self.optimizer.state[weight][moment]
        for name, slow in self.average.items():
            yield f"average.{name}", slow
