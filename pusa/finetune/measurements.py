"""The losses of held-out clips in RUN/metrics.jsonl: how they changed, which step has the lowest, and for how long.

Only measurements with the same key compare: it stands for clips, levels, patterns and noise. No torch here.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from pusa.finetune.metrics import finite, read_metrics
from pusa.manifest.training import MEAN

Loss = Annotated[float, Field(allow_inf_nan=False)] | None


@dataclass(frozen=True)
class Measurement:
    """The mean losses of the held-out clips at a step: for each pattern one at each level, None where not finite."""

    step: int
    key: str
    levels: Sequence[float]
    losses: Mapping[str, Sequence[float | None]]

    def value(self, name: str) -> float | None:
        """Return the mean over the levels of a pattern, or of all patterns ("mean"); None if any is not known."""
        cells = self.losses.values() if name == MEAN else [self.losses[name]] if name in self.losses else []
        losses = [loss for row in cells for loss in row]
        known = [loss for loss in losses if loss is not None]
        return sum(known) / len(known) if known and len(known) == len(losses) else None

    def values(self) -> dict[str, float | None]:
        """Return the mean over the levels of each pattern, and of all."""
        return {name: self.value(name) for name in (*self.losses, MEAN)}

    def row(self) -> dict[str, Any]:
        """Return what a step's line in the metrics file has of it, beside the step."""
        losses = {pattern: [finite(loss) for loss in row] for pattern, row in self.losses.items()}
        return {"validation": losses, "validation_levels": list(self.levels), "validation_key": self.key}

    def scalars(self) -> dict[str, float]:
        """Return the points on TensorBoard's curves: a curve for each pattern, each of its levels, and the mean."""
        points = {f"validation/{name}": value for name, value in self.values().items()}
        for pattern, row in self.losses.items():
            points |= {f"validation/{pattern}/{level:g}": loss for level, loss in zip(self.levels, row, strict=True)}
        return {name: known for name, value in points.items() if (known := finite(value)) is not None}


class _Row(BaseModel):
    """A line of the metrics file that has a measurement."""

    step: int
    validation: dict[str, list[Loss]] = Field(min_length=1)
    validation_levels: list[float] = Field(min_length=1)
    validation_key: str


def read_measurements(path: Path, last_step: int | None = None) -> list[Measurement]:
    """Return the measurements of a metrics file, in order, up to `last_step`; lines of another shape are left out."""
    return [one for one in _measurements(path) if last_step is None or one.step <= last_step]


def comparable(measurements: Sequence[Measurement], key: str | None = None) -> list[Measurement]:
    """Return the measurements with a key, by default that of the last one."""
    if key is None and measurements:
        key = measurements[-1].key
    return [one for one in measurements if one.key == key]


def find_best(
    measurements: Sequence[Measurement], name: str, steps: Collection[int] | None = None
) -> Measurement | None:
    """Return the measurement with the lowest value, the first of equal ones; None if none has a value.

    Args:
        measurements: comparable ones.
        name: a pattern, or "mean".
        steps: only those of these steps.
    """
    known = [(value, one) for one in measurements if (value := one.value(name)) is not None]
    known = [pair for pair in known if steps is None or pair[1].step in steps]
    return min(known, key=lambda pair: pair[0])[1] if known else None


def count_since_best(measurements: Sequence[Measurement], name: str, changed_at: int = -1) -> int:
    """Return how many comparable measurements were made after the one with the lowest value, and after a step."""
    best = find_best(measurements, name)
    return sum(one.step > max(best.step if best else -1, changed_at) for one in measurements)


def _measurements(path: Path) -> Iterator[Measurement]:
    for line in read_metrics(path, containing=b'"validation"'):
        try:
            row = _Row.model_validate(line)
        except ValidationError:
            continue
        if {len(losses) for losses in row.validation.values()} == {len(row.validation_levels)}:
            yield Measurement(row.step, row.validation_key, row.validation_levels, row.validation)
