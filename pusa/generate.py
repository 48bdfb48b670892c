"""Stage 4: jobs -> videos. What is done is read off verified files, so a killed run goes on where it was.

For each job, in `run_dir/videos`: `<id>.latents.safetensors` (before decoding, so that a late failure costs little),
`<id>.mp4`, and last `<id>.json`, which says what the video was made from.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor

from pusa.backbones import BACKBONES
from pusa.backbones.base import Geometry
from pusa.errors import ConditionError, PusaError, StageError
from pusa.files import atomic, digest, read_json, sha256_file, sole_writer, write_json
from pusa.gallery import write_gallery, write_sheet
from pusa.manifest import GenerateManifest
from pusa.model import Model
from pusa.noise_schedules import NOISE_SCHEDULES
from pusa.progress import Progress
from pusa.sampler import Given, OnStep, guided, sample, start_state
from pusa.tables import find
from pusa.tasks.base import Condition, Job, positions
from pusa.video import fit, probe, read_frames, read_image, write_video
from pusa.weights.resolve import require

log = logging.getLogger(__name__)
VERSION = 1  # of what a job's settings mean: raised when the same settings come to give another video


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
    geometry = find(BACKBONES, manifest.model.backbone, "backbone").geometry
    wrong = {job.id: "; ".join(_problems(job, geometry, with_inputs)) for job in manifest.jobs}
    return {id: problems for id, problems in wrong.items() if problems}


def _problems(job: Job, geometry: Geometry, with_inputs: bool) -> Iterator[str]:
    checks: list[Callable[[], Any]] = [
        lambda: geometry.check(job.width, job.height, job.num_frames),
        lambda: _check_places(job, geometry),
    ]
    if with_inputs:
        checks += [functools.partial(_source_frames, c, job, geometry) for c in _conditions_or_none(job)]
    for check in checks:
        try:
            check()
        except PusaError as error:
            yield str(error)


def _conditions_or_none(job: Job) -> list[Condition]:
    """Of a job whose conditions do not even fit together, `_check_places` speaks."""
    try:
        return job.conditions()
    except ConditionError:
        return []


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
    failed = check_jobs(manifest)
    keys = {job.id: job_key(job, prints) for job in manifest.jobs if job.id not in failed}
    todo = [job for job in manifest.jobs if job.id in keys and not is_done(folder, job.id, keys[job.id])]
    made = []
    with Progress("generate", sum(job.steps for job in todo)) as progress:
        for job in todo:
            try:
                make(job, keys[job.id], model, folder, progress)
            except (PusaError, torch.OutOfMemoryError) as error:
                failed[job.id] = str(error)
                continue
            _stamp(folder, job, prints, {"status": "done", "key": keys[job.id]})
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
        progress.advance(job.steps, note=job.id)
    write_video(folder / f"{job.id}.mp4", model.decode(z_CFhw), job.fps)


def sample_job(job: Job, model: Model, on_step: OnStep = lambda step, x0: None) -> Tensor:
    """The latents (C, F, h, w) of one job, in the transformer's space."""
    geometry = model.backbone.geometry
    given = [_give(condition, job, model) for condition in job.conditions()]
    noise = torch.randn(
        geometry.latent_shape(job.width, job.height, job.num_frames), generator=Generator().manual_seed(job.seed)
    )
    start_CFhw, multipliers_F = start_state(given, noise)
    levels_NF = find(NOISE_SCHEDULES, job.noise_schedule, "noise schedule")(job.steps, multipliers_F)
    text = model.encode_text([job.prompt])
    null = model.encode_text([job.negative_prompt])
    velocity = guided(model.backbone, model.transformer, text, null, job.guidance)
    return sample(velocity, start_CFhw[None].to(model.device), levels_NF, on_step)[0].cpu()


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


def _give(condition: Condition, job: Job, model: Model) -> Given:
    geometry = model.backbone.geometry
    if condition.still:
        frames = read_image(condition.source)
    else:
        frames = read_frames(condition.source, _source_frames(condition, job, geometry))
    latents_CFhw = model.encode(fit(frames, job.width, job.height))
    take = positions(condition.take, latents_CFhw.shape[1], f"{condition.source.name}: latent frame")
    place = positions(condition.place, geometry.latent_frames(job.num_frames), "position")
    return Given(latents_CFhw[:, list(take)], place, condition.multipliers)


def _source_frames(condition: Condition, job: Job, geometry: Geometry) -> range:
    """Which frames of the source are encoded: as many as fit the result, a whole number of latent frames.

    Raises:
        MediaError: the source cannot be opened.
        ConditionError: it has too few frames for the latent frames that are taken from it.
    """
    if condition.still:
        read_image(condition.source)
        return range(1)
    total = probe(condition.source).num_frames
    latent_frames = geometry.latent_frames(min(total, job.num_frames))
    positions(condition.take, latent_frames, f"{condition.source.name} ({total} frames): latent frame")
    count = geometry.num_frames(latent_frames)
    return range(total - count, total) if condition.from_end else range(count)


def _check_places(job: Job, geometry: Geometry) -> None:
    places = [place for condition in job.conditions() for place in condition.place]
    positions(places, geometry.latent_frames(job.num_frames), "position")


def _saved_latents(path: Path, key: str) -> Tensor | None:
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("latents") if (file.metadata() or {}).get("key") == key else None
    except (FileNotFoundError, SafetensorError):
        return None


def _stamp(folder: Path, job: Job, prints: dict[str, str], outcome: dict[str, str]) -> None:
    """The sidecar, written last: what was made from what, or why it was not."""
    if outcome["status"] == "done":
        outcome = {**outcome, "video_sha256": sha256_file(folder / f"{job.id}.mp4")}
    packages = {name: version(name) for name in ("torch", "diffusers")}
    facts = {"id": job.id, **outcome, "job": job.model_dump(mode="json"), "weights": prints, "packages": packages}
    write_json(folder / f"{job.id}.json", facts)
