"""The state of a fine-tune, and its checkpoints: `<step>/` folders, each whole or not there, and `last`."""

import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pusa.errors import TrainingError
from pusa.files import atomic, point, read_json, write_json
from pusa.manifest import FinetuneManifest


@dataclass
class Training:
    """The weights in training, their moving average, the optimizer, and how many steps were taken."""

    manifest: FinetuneManifest
    transformer: Any
    average: nn.Module | None
    optimizer: torch.optim.AdamW
    step: int = 0

    @classmethod
    def start(cls, transformer: Any, manifest: FinetuneManifest) -> "Training":
        """At step 0."""
        optimizer = torch.optim.AdamW(
            transformer.parameters(), betas=(0.9, 0.999), weight_decay=manifest.weight_decay, fused=True
        )
        average = deepcopy(transformer).requires_grad_(False) if manifest.ema_decay else None
        return cls(manifest, transformer, average, optimizer)

    @property
    def learning_rate(self) -> float:
        """Of the next step: a linear warm-up, then constant."""
        return self.manifest.learning_rate * min(1.0, (self.step + 1) / (self.manifest.warmup_steps + 1))

    @property
    def result(self) -> Any:
        """The weights a checkpoint offers for use: the moving average where there is one."""
        return self.transformer if self.average is None else self.average

    @torch.no_grad()
    def apply(self) -> None:
        """Take an optimizer step with the gradients that are there."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.average is not None:
            # Early on the average follows quickly, or the base's weights would weigh in it for ever.
            decay = min(self.manifest.ema_decay, self.step / (self.step + 9))
            for slow, fast in zip(self.average.parameters(), self.transformer.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that a checkpoint keeps beside the result: Adam's moments, and the raw weights if `result` differs."""
        for name, weight in self.transformer.named_parameters():
            if self.average is not None:
                yield f"weight.{name}", weight.detach()
            for moment, value in self.optimizer.state[weight].items():
                yield f"{moment}.{name}", value

    def load(self, tensors: dict[str, Tensor], result: dict[str, Tensor], step: int) -> None:
        """The inverse of saving `tensors` and `result` at `step`."""
        self.result.load_state_dict(result)
        parameters = dict(self.transformer.named_parameters())
        with torch.no_grad():
            for key, value in tensors.items():
                kind, _, name = key.partition(".")
                if kind == "weight":
                    parameters[name].copy_(value)
                else:
                    self.optimizer.state[parameters[name]][kind] = value.to(parameters[name].device)
        self.step = step


class Checkpoints:
    """A folder of checkpoints of one recipe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def last(self, recipe: dict[str, Any]) -> Path | None:
        """The newest checkpoint, if there is one; `last` is mended where a kill kept it from following.

        Raises:
            TrainingError: it was made by another recipe; every difference is named.
        """
        if not self.folder.is_dir():
            return None
        whole = [path for path in self.folder.iterdir() if re.fullmatch(r"\d{8}", path.name)]
        if not whole:
            return None
        newest = max(whole)
        theirs = (read_json(newest / "checkpoint.json") or {}).get("recipe", {})
        changed = [f"{k}: {theirs.get(k)!r} there, {v!r} here" for k, v in recipe.items() if theirs.get(k) != v]
        if changed:
            raise TrainingError(f"{newest} is of another recipe ({'; '.join(changed)}); use another --run-dir")
        point(self.folder / "last", newest.name)
        return newest

    def at(self, step: int) -> Path:
        """The checkpoint of a step that lies behind.

        Raises:
            TrainingError: none was kept there.
        """
        path = self.folder / f"{step:08d}"
        if not path.is_dir():
            there = ", ".join(str(int(p.name)) for p in sorted(self.folder.glob("[0-9]" * 8)))
            raise TrainingError(f"{self.folder} is past step {step} and kept none there; it has {there}")
        return path

    @staticmethod
    def step(checkpoint: Path) -> int:
        """The step that a checkpoint was made after."""
        return int(checkpoint.name)

    def save(self, training: Training, recipe: dict[str, Any]) -> Path:
        """Write `<step>/` whole, then point `last` at it."""
        path = self.folder / f"{training.step:08d}"
        with atomic(path) as partial:
            training.result.save_pretrained(partial / "transformer")
            save_file({name: t.contiguous() for name, t in training.tensors()}, partial / "training.safetensors")
            write_json(partial / "checkpoint.json", {"step": training.step, "recipe": recipe})
        point(self.folder / "last", path.name)
        return path

    def restore(self, checkpoint: Path, training: Training) -> None:
        """Bring `training` to where it was saved."""
        result: dict[str, Tensor] = {}
        for file in sorted((checkpoint / "transformer").glob("*.safetensors")):
            result |= load_file(file)
        training.load(load_file(checkpoint / "training.safetensors"), result, self.step(checkpoint))
