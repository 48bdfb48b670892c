"""Stage 4: make a video of each job. Finished videos are found again by their files, so a rerun resumes.

For each job, in `run_dir/videos`: `<id>.latents.safetensors` (written before decoding, so that a failure there costs
little), `<id>.mp4`, and last the sidecar `<id>.json`, which records what the video was made from.
"""

import logging
from collections.abc import Callable, Set
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pusa.errors import PartlyFailed, PusaError
from pusa.generate.check import check_jobs, describe_inputs
from pusa.generate.gallery import write_gallery, write_sheet
from pusa.generate.render import decode_job, measure_seams, sample_job, total_steps
from pusa.manifest.models import GenerateManifest, ModelSpec
from pusa.system.files import digest, read_json, sha256_file, write_json
from pusa.system.locks import sole_writer
from pusa.system.progress import Progress
from pusa.tasks.base import Job
from pusa.video.media import write_video
from pusa.weights.model import Model
from pusa.weights.resolve import require_model
from pusa.weights.write import save_tensors

log = logging.getLogger(__name__)
VERSION = 2  # part of each job's key; raise it when the same settings come to make another video


@dataclass(frozen=True)
class Generated:
    """The outcome. Each job's id is in `made`, in `kept` (made by an earlier run) or in `failed`, with the error."""

    videos: Path
    gallery: Path
    sheet: Path
    made: list[str]
    kept: list[str]
    failed: dict[str, str]

    def require_all(self) -> None:
        """Raise PartlyFailed if a job failed. The videos of the other jobs are on disk."""
        if self.failed:
            raise PartlyFailed(
                f"{len(self.failed)} jobs failed ({', '.join(self.failed)}); each error is in {self.videos}/<id>.json; "
                f"all other videos are made"
            )


def generate(manifest: GenerateManifest, run_dir: Path, new_model: Callable[[ModelSpec], Model] = Model) -> Generated:
    """Make every job's video that does not exist yet. A job that fails is recorded, and the others are still made.

    Args:
        manifest: the jobs and their model.
        run_dir: the folder of the run; videos are written to `run_dir/videos`.
        new_model: builds the model.

    Raises:
        WeightsError: the model cannot be found or loaded.
        StageError: another process generates in the same folder.
    """
    manifest = manifest.resolve_paths(run_dir)
    require_model(manifest.model)
    model, folder = new_model(manifest.model), run_dir / "videos"
    with sole_writer(folder):
        fingerprints = {**model.fingerprints(), "latent_space": model.space_name}
        failed = check_jobs(manifest)
        keys = {job.id: job_key(job, fingerprints) for job in manifest.jobs if job.id not in failed}
        pending = [job for job in manifest.jobs if job.id in keys and not is_done(folder, job.id, keys[job.id])]
        made = []
        with Progress("generate", sum(total_steps(job, model.backbone.geometry) for job in pending)) as progress:
            for job in pending:
                try:
                    facts = _make_video(job, model, folder, fingerprints, progress)
                except (PusaError, torch.OutOfMemoryError) as error:
                    failed[job.id] = str(error)
                    continue
                _write_sidecar(folder, job, fingerprints, {"status": "done", "key": keys[job.id], **facts})
                made.append(job.id)
        for job in manifest.jobs:
            if job.id in failed:
                log.error("job %s failed: %s", job.id, failed[job.id])
                _write_sidecar(folder, job, fingerprints, {"status": "failed", "error": failed[job.id]})
        ids = [job.id for job in manifest.jobs]
        kept = [id for id in ids if id not in {*made, *failed}]
        return Generated(folder, write_gallery(folder, ids), write_sheet(folder, ids), made, kept, failed)


def _make_video(
    job: Job, model: Model, folder: Path, fingerprints: dict[str, str], progress: Progress
) -> dict[str, Any]:
    """Sample, decode and write one job's video; return the sidecar's facts `given`, `seams` and `video_sha256`.

    Saved latents that were made with the same settings are only decoded. `exact` acts after decoding, so it is not
    part of the latents' key.

    Raises:
        MediaError: an input cannot be read.
        ConditionError: the conditions do not fit the job.
    """
    geometry = model.backbone.geometry
    given = describe_inputs(job, geometry)
    latents, key = folder / f"{job.id}.latents.safetensors", job_key(job, fingerprints, without={"exact"})
    z_CFhw = _read_latents(latents, key)
    if z_CFhw is None:
        z_CFhw = sample_job(job, model, lambda step, x0: progress.advance(note=job.id))
        facts = {"key": key, "latent_space": model.space_name, "cyclic": str(job.cyclic).lower()}
        save_tensors(latents, {"latents": z_CFhw}, facts)
    else:
        progress.advance(total_steps(job, geometry), note=job.id)
    frames = decode_job(job, model, z_CFhw)
    video = folder / f"{job.id}.mp4"
    write_video(video, frames, job.fps)
    return {"given": given, "seams": measure_seams(frames, job, geometry), "video_sha256": sha256_file(video)}


def job_key(job: Job, fingerprints: dict[str, str], without: Set[str] = frozenset()) -> str:
    """Return a hash of everything that a video depends on: settings, weights, and the bytes of inputs, not their names.

    `without` names settings that are left out.
    """
    version = VERSION + (job.seed >= 2**32)  # in earlier versions, two of these seeds could give the same noise
    return digest([version, _hash_paths(job.model_dump(exclude={"id", *without})), fingerprints])[:32]


def is_done(folder: Path, id: str, key: str) -> bool:
    """Return whether a job's video exists, was made with this key, and has the bytes that were written."""
    facts = read_json(folder / f"{id}.json") or {}
    video = folder / f"{id}.mp4"
    return facts.get("key") == key and video.is_file() and facts.get("video_sha256") == sha256_file(video)


def _hash_paths(value: Any) -> Any:
    """Return settings with every path replaced by the hash of the file's content."""
    if isinstance(value, dict):
        return {key: _hash_paths(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_hash_paths(inner) for inner in value]
    if isinstance(value, Path):
        stat = value.stat()
        return _hash_file(value, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return value


@lru_cache(maxsize=4096)
def _hash_file(path: Path, *state: int) -> str:
    """Hash a file once for the many jobs of a sweep that use it; `state` changes when the file changes."""
    return sha256_file(path)


def _read_latents(path: Path, key: str) -> Tensor | None:
    """Return saved latents, or None if there are none with this key."""
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("latents") if (file.metadata() or {}).get("key") == key else None
    except (FileNotFoundError, SafetensorError):
        return None


def _write_sidecar(folder: Path, job: Job, fingerprints: dict[str, str], outcome: dict[str, Any]) -> None:
    """Write `<id>.json`: the outcome of a job, its settings, and the weights and packages it used."""
    packages = {name: version(name) for name in ("torch", "diffusers")}
    facts = {"id": job.id, **outcome, "job": job.model_dump(mode="json"), "weights": fingerprints, "packages": packages}
    write_json(folder / f"{job.id}.json", facts)
