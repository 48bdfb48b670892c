"""Measure the tiny family: what the vectorized fine-tune adds to the base, task by task, over the same unseen clips."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from pusa.evaluate.cases import CASES, Case
from pusa.evaluate.metrics import Result
from pusa.evaluate.report import Report, Results, compare
from pusa.evaluate.unseen import SETTINGS, Returned, Unseen, returned, store, unseen_scenes
from pusa.generate.render import decode_job, sample_job
from pusa.manifest.models import ModelSpec
from pusa.system.progress import track
from pusa.tiny.shapes import NUM_FRAMES, SIZE
from pusa.weights.model import Model

__all__ = ["Report", "measure"]


def measure(
    base: ModelSpec, pusa: ModelSpec, count: int = 24, steps: int = SETTINGS["steps"], cases: Sequence[Case] = CASES
) -> Report:
    """Make every case for `count` unseen clips with both models, and compare what they made."""
    models = [Model(spec) for spec in (base, pusa)]
    with TemporaryDirectory() as scratch:
        clips = [store(scene, Path(scratch) / str(i)) for i, scene in enumerate(unseen_scenes(count))]
        results = [_run(model, clips, cases, steps) for model in models]
    return compare(_about(models, count, steps), cases, *results)


def _run(model: Model, clips: Sequence[Unseen], cases: Sequence[Case], steps: int) -> Results:
    """Every case's results, by its name."""
    name = model.spec.weights
    backs = [returned(clip, model) for clip in track(clips, f"{name} VAE", len(clips))]
    results = {}
    for case in cases:
        pairs = list(zip(clips, backs, strict=True))[: _fewer(len(clips)) if case.slow else None]
        tracked = track(pairs, f"{name} {case.name}", len(pairs))
        results[case.name] = [_result(case, clip, back, model, steps) for clip, back in tracked]
    return results


def _result(case: Case, clip: Unseen, back: Returned, model: Model, steps: int) -> Result:
    if case.job is None:
        return Result(back.frames, clip, back)
    job = case.job(clip).model_copy(update={"steps": steps})
    video = decode_job(job, model, sample_job(job, model))
    return Result(video, clip, back, case.given, case.like(back), job.cyclic)


def _fewer(count: int) -> int:
    """Clips of a slow case."""
    return min(count, max(2, count // 3))


def _about(models: Sequence[Model], count: int, steps: int) -> list[str]:
    """What was measured, and how."""
    settings = f"{SIZE}x{SIZE}, {NUM_FRAMES} frames, {steps} steps, guidance {SETTINGS['guidance']}"
    return [
        f"{count} unseen clips of one shape each ({_fewer(count)} for the long videos); {settings}",
        *(f"{name}: {_told(model)}" for name, model in zip(("base", "pusa"), models, strict=True)),
    ]


def _told(model: Model) -> str:
    return f"{model.spec.weights}, transformer {model.fingerprints('transformer')['transformer'][:12]}"
