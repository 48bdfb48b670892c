"""Stage 4: jobs -> videos. What is done is read off verified files, so a killed run goes on where it was.

For each job, in `run_dir/videos`: `<id>.latents.safetensors` (before decoding, so that a late failure costs little),
`<id>.mp4`, and last `<id>.json`, which says what the video was made from.
"""

import logging
from collections.abc import Set
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pusa.errors import PusaError, StageError
from pusa.generate.check import check_jobs, told
from pusa.generate.gallery import write_gallery, write_sheet
from pusa.generate.render import decode_job, sample_job, seams_of, total_steps
from pusa.manifest.models import GenerateManifest
from pusa.system.files import atomic, digest, read_json, sha256_file, write_json
from pusa.system.locks import sole_writer
from pusa.system.progress import Progress
from pusa.tasks.base import Job
from pusa.video.media import write_video
from pusa.weights.model import Model
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


def generate(manifest: GenerateManifest, run_dir: Path) -> Generated:
    """Make every job's video that is not there yet; a job that cannot be made is recorded, and the rest goes on.

    Raises:
        WeightsError: the model cannot be found or loaded.
        StageError: another process is at it.
    """
    manifest = manifest.resolve_paths(run_dir)
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
                given = told(job, geometry)
                seams = make(job, job_key(job, prints, without={"exact"}), model, folder, progress)
            except (PusaError, torch.OutOfMemoryError) as error:
                failed[job.id] = str(error)
                continue
            _stamp(folder, job, prints, {"status": "done", "key": keys[job.id], "given": given, "seams": seams})
            made.append(job.id)
    for job in manifest.jobs:
        if job.id in failed:
            log.error("job %s failed: %s", job.id, failed[job.id])
            _stamp(folder, job, prints, {"status": "failed", "error": failed[job.id]})
    ids = [job.id for job in manifest.jobs]
    kept = [id for id in ids if id not in made and id not in failed]
    return Generated(folder, write_gallery(folder, ids), write_sheet(folder, ids), made, kept, failed)


def make(job: Job, key: str, model: Model, folder: Path, progress: Progress) -> dict[str, float]:
    """Sample and decode one job; latents of the same key that are there already are only decoded. Gives the seams.

    Raises:
        MediaError: an input cannot be read.
        ConditionError: the conditions do not fit the job.
    """
    path = folder / f"{job.id}.latents.safetensors"
    z_CFhw = _saved_latents(path, key)
    if z_CFhw is None:
        z_CFhw = sample_job(job, model, lambda step, x0: progress.advance(note=job.id))
        with atomic(path) as partial:
            facts = {"key": key, "latent_space": model.space_name, "cyclic": str(job.cyclic).lower()}
            save_file({"latents": z_CFhw.contiguous()}, partial, metadata=facts)
    else:
        progress.advance(total_steps(job, model.backbone.geometry), note=job.id)
    video = decode_job(job, model, z_CFhw)
    write_video(folder / f"{job.id}.mp4", video, job.fps)
    return seams_of(video, job, model.backbone.geometry)


def job_key(job: Job, prints: dict[str, str], without: Set[str] = frozenset()) -> str:
    """The hash of all that the video depends on: settings, weights, its inputs' bytes; not what anything is called.

    `without` are settings that what is keyed does not depend on.
    """
    return digest([VERSION, _by_content(job.model_dump(exclude={"id", *without})), prints])[:32]


def _by_content(value: Any) -> Any:
    """The same settings with every path replaced by the hash of the file there."""
    if isinstance(value, dict):
        return {key: _by_content(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_by_content(inner) for inner in value]
    return _hash(value, *_state(value)) if isinstance(value, Path) else value


def _state(path: Path) -> tuple[int, ...]:
    """Changes when the file does."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


@lru_cache(maxsize=4096)
def _hash(path: Path, *state: int) -> str:
    """Many jobs of a sweep have the same input."""
    return sha256_file(path)


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
