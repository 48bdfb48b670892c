"""Stage 4: jobs -> videos. What is done is read off verified files, so a killed run goes on where it was.

For each job, in `run_dir/videos`: `<id>.latents.safetensors` (before decoding, so that a late failure costs little),
`<id>.mp4`, and last `<id>.json`, which says what the video was made from.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor

from pusa.backbones import BACKBONES
from pusa.backbones.base import Geometry, TextFeatures
from pusa.conditions import choose, give, paste
from pusa.errors import ConditionError, MediaError, PusaError, StageError
from pusa.files import atomic, digest, read_json, sha256_file, sole_writer, write_json
from pusa.gallery import write_gallery, write_sheet
from pusa.manifest import GenerateManifest
from pusa.model import Model
from pusa.noise_schedules import NOISE_SCHEDULES
from pusa.progress import Progress
from pusa.sampler import OnStep, delayed, guided, sample, start_state, windowed
from pusa.tables import find
from pusa.tasks.base import Job, Pass, positions
from pusa.video import write_video
from pusa.weights.resolve import require

log = logging.getLogger(__name__)
VERSION = 2  # of what a job's settings mean: raised when the same settings come to give another video


@dataclass(frozen=True)
class Generated:
    """What a run made: every job is in one of the three."""

    videos: Path
    gallery: Path
    sheet: Path
    made: list[str]
    kept: list[str]
    failed: dict[str, str]

    def require_all(self) -> None:
        """Raise StageError if a job failed; what was made stays."""
        if self.failed:
            ids = ", ".join(self.failed)
            raise StageError(
                f"{len(self.failed)} jobs failed ({ids}); why is in {self.videos}/<id>.json; the rest is made"
            )


def check_jobs(manifest: GenerateManifest, with_inputs: bool = True) -> dict[str, str]:
    """What is wrong with each job that cannot be made: sizes, positions, multipliers, inputs. Loads no weights.

    `with_inputs=False` leaves the files alone, which an earlier stage may have yet to write.
    """
    geometry = geometry_of(manifest)
    wrong = {job.id: "; ".join(_problems(job, geometry, with_inputs)) for job in manifest.jobs}
    return {id: problems for id, problems in wrong.items() if problems}


def geometry_of(manifest: GenerateManifest) -> Geometry:
    """What the manifest's backbone makes of pixels."""
    geometry: Geometry = find(BACKBONES, manifest.model.backbone, "backbone").geometry
    return geometry


def _problems(job: Job, geometry: Geometry, with_inputs: bool) -> Iterator[str]:
    try:
        geometry.check(job.width, job.height, job.num_frames)
    except ConditionError as error:
        yield str(error)
    try:
        passes = job.passes(geometry)
        for run in passes:
            positions([p for c in run.conditions for p in c.place], len(run.course.starts), "position")
    except ConditionError as error:
        yield str(error)
        return
    for condition in (c for run in passes for c in run.conditions) if with_inputs else ():
        try:
            choose(condition, job, geometry)
        except (MediaError, ConditionError) as error:
            yield str(error)


def generate(manifest: GenerateManifest, run_dir: Path) -> Generated:
    """Make every job's video that is not there yet; a job that cannot be made is recorded, and the rest goes on.

    Raises:
        WeightsError: the model cannot be found or loaded.
        StageError: another process is at it.
    """
    manifest = manifest.located(run_dir)
    require(manifest.model)
    model = Model(manifest.model)
    with sole_writer(run_dir / "videos"):
        return _make_all(manifest, run_dir / "videos", model)


def _make_all(manifest: GenerateManifest, folder: Path, model: Model) -> Generated:
    prints = {**model.fingerprints(), "latent_space": model.space_name}
    geometry = model.backbone.geometry
    failed = check_jobs(manifest)
    keys = {job.id: job_key(job, prints) for job in manifest.jobs if job.id not in failed}
    todo = [job for job in manifest.jobs if job.id in keys and not is_done(folder, job.id, keys[job.id])]
    made = []
    with Progress("generate", sum(total_steps(job, geometry) for job in todo)) as progress:
        for job in todo:
            try:
                make(job, keys[job.id], model, folder, progress)
            except (PusaError, torch.OutOfMemoryError) as error:
                failed[job.id] = str(error)
                continue
            _stamp(folder, job, prints, {"status": "done", "key": keys[job.id], "given": told(job, geometry)})
            made.append(job.id)
    for job in manifest.jobs:
        if job.id in failed:
            log.error("job %s failed: %s", job.id, failed[job.id])
            _stamp(folder, job, prints, {"status": "failed", "error": failed[job.id]})
    ids = [job.id for job in manifest.jobs]
    kept = [id for id in ids if id not in made and id not in failed]
    return Generated(folder, write_gallery(folder, ids), write_sheet(folder, ids), made, kept, failed)


def make(job: Job, key: str, model: Model, folder: Path, progress: Progress) -> None:
    """Sample and decode one job; latents of the same key that are there already are only decoded.

    Raises:
        MediaError: an input cannot be read.
        ConditionError: the conditions do not fit the job.
    """
    path = folder / f"{job.id}.latents.safetensors"
    z_CFhw = _saved_latents(path, key)
    if z_CFhw is None:
        z_CFhw = sample_job(job, model, lambda step, x0: progress.advance(note=job.id))
        with atomic(path) as partial:
            facts = {"key": key, "latent_space": model.space_name}
            save_file({"latents": z_CFhw.contiguous()}, partial, metadata=facts)
    else:
        progress.advance(total_steps(job, model.backbone.geometry), note=job.id)
    write_video(folder / f"{job.id}.mp4", decode_job(job, model, z_CFhw), job.fps)


def told(job: Job, geometry: Geometry) -> list[str]:
    """For people: which frames of which file are given, as which latent frames, with which multipliers.

    Raises:
        MediaError: a source cannot be opened.
        ConditionError: it does not fit the job.
    """
    return [
        f"{' + '.join(map(str, choose(condition, job, geometry)))}: {condition.told()}"
        for run in job.passes(geometry)
        for condition in run.conditions
        if condition.source is not None
    ]


def total_steps(job: Job, geometry: Geometry) -> int:
    """Calls of the network that a job takes."""
    return sum(job.steps + run.course.delay for run in job.passes(geometry))


def sample_job(job: Job, model: Model, on_step: OnStep = lambda step, x0: None) -> Tensor:
    """The latents (C, F, h, w) of one job, in the transformer's space."""
    text = model.encode_text([job.prompt])
    null = model.encode_text([job.negative_prompt])
    generator = Generator().manual_seed(job.seed)
    z_CFhw = None
    for run in job.passes(model.backbone.geometry):
        z_CFhw = _sample_pass(run, z_CFhw, job, model, (text, null), generator, on_step)
    assert z_CFhw is not None
    return z_CFhw


def _sample_pass(
    run: Pass,
    before_CFhw: Tensor | None,
    job: Job,
    model: Model,
    text: tuple[TextFeatures, TextFeatures],
    generator: Generator,
    on_step: OnStep,
) -> Tensor:
    channels, _, height, width = model.backbone.geometry.latent_shape(job.width, job.height, job.num_frames)
    frames = len(run.course.starts)
    given = [give(condition, job, model, frames, before_CFhw) for condition in run.conditions]
    noise_CFhw = torch.randn(channels, frames, height, width, generator=generator)
    unknown_C1hw = torch.randn(channels, 1, height, width, generator=generator)
    start_CFhw, multipliers_F = start_state(given, noise_CFhw)
    levels_NF = find(NOISE_SCHEDULES, job.noise_schedule, "noise schedule")(job.steps, multipliers_F)
    velocity = guided(model.backbone, model.transformer, *text, job.guidance)
    velocity = windowed(velocity, map(run.course.windows, count()), unknown_C1hw)
    return sample(velocity, start_CFhw[None].to(model.device), delayed(levels_NF, run.course.starts), on_step)[0].cpu()


def decode_job(job: Job, model: Model, z_CFhw: Tensor) -> np.ndarray:
    """The frames (T, H, W, 3) uint8 of a job's latents.

    Raises:
        ConditionError: `exact` wants pixels that there are not.
    """
    video = model.decode_ring(z_CFhw) if job.cyclic else model.decode(z_CFhw)
    if not job.exact:
        return video
    geometry = model.backbone.geometry
    return paste(video, job.passes(geometry)[-1].conditions, job, geometry)


def job_key(job: Job, prints: dict[str, str]) -> str:
    """The hash of all that the video depends on: settings, weights, its inputs' bytes; not what anything is called."""
    return digest([VERSION, _by_content(job.model_dump(exclude={"id"})), prints])[:32]


def _by_content(value: Any) -> Any:
    """The same settings with every path replaced by the hash of the file there."""
    if isinstance(value, dict):
        return {key: _by_content(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_by_content(inner) for inner in value]
    return sha256_file(value) if isinstance(value, Path) else value


def is_done(folder: Path, id: str, key: str) -> bool:
    """Whether the video is there, was made from just this, and has the bytes it was written with."""
    facts = read_json(folder / f"{id}.json") or {}
    video = folder / f"{id}.mp4"
    return facts.get("key") == key and video.is_file() and facts.get("video_sha256") == sha256_file(video)


def _saved_latents(path: Path, key: str) -> Tensor | None:
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("latents") if (file.metadata() or {}).get("key") == key else None
    except (FileNotFoundError, SafetensorError):
        return None


def _stamp(folder: Path, job: Job, prints: dict[str, str], outcome: dict[str, Any]) -> None:
    """The sidecar, written last: what was made from what, or why it was not."""
    if outcome["status"] == "done":
        outcome = {**outcome, "video_sha256": sha256_file(folder / f"{job.id}.mp4")}
    packages = {name: version(name) for name in ("torch", "diffusers")}
    facts = {"id": job.id, **outcome, "job": job.model_dump(mode="json"), "weights": prints, "packages": packages}
    write_json(folder / f"{job.id}.json", facts)
