"""Measure what the fine-tune of a tiny model adds to its base: both make every case for the same unseen clips."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from pusa.backbones.family import Geometry
from pusa.errors import ManifestError
from pusa.evaluate.cases import Case, quality_cases
from pusa.evaluate.metrics import Result
from pusa.evaluate.report import Report, Results, compare_results
from pusa.evaluate.unseen import (
    GUIDANCE,
    STEPS,
    RoundTrip,
    UnseenClip,
    round_trip,
    unseen_scenes,
    write_unseen_clip,
)
from pusa.generate.decode import decode_job
from pusa.generate.sampling import sample_job
from pusa.manifest.models import ModelSpec
from pusa.system.failures import Failure, attempt
from pusa.system.progress import track
from pusa.tasks.base import Job, resolve_positions, video_frames_of
from pusa.tiny.shapes import SIZE, clip_length
from pusa.weights.model import Model


def measure(
    base: ModelSpec, pusa: ModelSpec, count: int = 24, steps: int = STEPS, cases: Sequence[Case] | None = None
) -> Report:
    """Make every case with both models, and compare the videos.

    Args:
        base: the base model.
        pusa: its fine-tune.
        count: the number of unseen clips.
        steps: denoising steps of each video.
        cases: the cases; default all of them.

    Raises:
        ManifestError: the models have different backbones.
        WeightsError: a model cannot be loaded.
    """
    if base.backbone != pusa.backbone:
        raise ManifestError(f"base has backbone {base.backbone}, pusa has {pusa.backbone}; expected the same")
    models = [Model(spec) for spec in (base, pusa)]
    family = models[0].backbone.family
    if cases is None:
        cases = quality_cases(family)
    num_frames, slow_count = clip_length(family.geometry), min(count, max(2, count // 3))
    with TemporaryDirectory() as scratch:
        stems = [Path(scratch) / str(i) for i in range(count)]
        scenes = zip(unseen_scenes(count), stems, strict=True)
        clips = [write_unseen_clip(scene, stem, num_frames) for scene, stem in scenes]
        results = [_make_cases(model, clips, cases, steps, slow_count, Path(scratch)) for model in models]
    about = [
        f"{count} unseen clips of one shape each ({slow_count} for the long videos); {SIZE}x{SIZE}, {num_frames} "
        f"frames, {steps} steps, guidance {GUIDANCE}"
    ]
    for name, model in zip(("base", "pusa"), models, strict=True):
        fingerprint = model.fingerprints("transformer")["transformer"]
        about.append(f"{name}: {model.spec.weights}, transformer {fingerprint[:12]}")
    return compare_results(about, cases, *results)


def _make_cases(
    model: Model, clips: Sequence[UnseenClip], cases: Sequence[Case], steps: int, slow_count: int, folder: Path
) -> Results:
    """Make and measure every case with one model; return the results by the case's name.

    A video that cannot be made or measured costs only its own numbers.
    """
    name, geometry = model.spec.weights, model.backbone.geometry

    def make(case: Case, clip: UnseenClip, returned: RoundTrip) -> Result:
        if case.job is None:
            result = Result(returned.frames, clip, returned, geometry)
        else:
            job = case.job(clip).model_copy(update={"steps": steps})
            video = decode_job(job, model, sample_job(job, model))
            given, expected = match_given_frames(job, clip, returned, geometry)
            result = Result(video, clip, returned, geometry, given, expected, job.cyclic)
        result.values.update((metric.name, metric.measure(result)) for metric in case.metrics)
        return result

    round_trips = [
        attempt(partial(round_trip, clip, model), folder) for clip in track(clips, f"{name} VAE", len(clips))
    ]
    results: Results = {}
    for case in cases:
        pairs = list(zip(clips, round_trips, strict=True))[: slow_count if case.slow else None]
        results[case.name] = []
        for clip, returned in track(pairs, f"{name} {case.name}", len(pairs)):
            made = returned if isinstance(returned, Failure) else attempt(partial(make, case, clip, returned), folder)
            results[case.name].append(made)
    return results


def match_given_frames(
    job: Job, clip: UnseenClip, returned: RoundTrip, geometry: Geometry
) -> tuple[tuple[int, ...], np.ndarray]:
    """Return the frames of a job's video that show given latent frames, and how they look after the VAE.

    Two clips that are encoded as one have no expected look.
    """
    frames_of_file = {
        clip.video: returned.frames,
        clip.other: returned.other,
        clip.first: returned.first,
        clip.last: returned.last,
    }
    run = job.passes(geometry)[-1]
    latent_frames = len(run.timeline.starts)
    given: list[int] = []
    expected = [returned.frames[:0]]
    for condition in run.conditions:
        if condition.source is None:
            continue
        source = frames_of_file[condition.source]
        source_latents = geometry.latent_frames(clip_length(geometry) if condition.joined else len(source))
        take = resolve_positions(condition.take, source_latents, "latent frame")
        place = resolve_positions(condition.place, latent_frames, "position")
        for taken, placed in zip(take, place, strict=True):
            target = video_frames_of(placed, latent_frames, job, geometry)
            given += target
            if not condition.joined:
                frames = source[geometry.frames_of(taken)]
                expected.append(np.repeat(frames, len(target), 0) if condition.still else frames)
    return tuple(given), np.concatenate(expected)
