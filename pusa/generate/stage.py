"""Stage 4: make a video of each job. Finished videos are found again by their files, so a rerun resumes.

For each job, in `run_dir/videos`: `<id>.latents.safetensors` (written before decoding, so that a failure there costs
little), `<id>.mp4`, and last the record `<id>.json`, which says what the video was made from.
"""

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pusa.errors import MediaError, PartlyFailed
from pusa.generate.check import JobChecks, describe_inputs, require_inputs_made
from pusa.generate.decode import decode_job, describe_fault, measure_seams
from pusa.generate.gallery import write_gallery, write_sheet
from pusa.generate.latents import read_header, read_latents, save_latents
from pusa.generate.outputs import LATENTS, VIDEO
from pusa.generate.records import InputHashes, forget_failure, is_done, job_key, record_failure, record_video
from pusa.generate.sampling import sample_job, total_steps
from pusa.manifest.models import GenerateManifest, ModelSpec
from pusa.system.failures import Failure, attempt
from pusa.system.files import sha256_file
from pusa.system.locks import sole_writer
from pusa.system.progress import Progress
from pusa.system.text import join_names
from pusa.tasks.base import Job
from pusa.video.media import write_video
from pusa.weights.model import Model
from pusa.weights.resolve import require_model

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generated:
    """The outcome. Each job's id is in `made`, in `kept` (made by an earlier run) or in `failed`, with the error."""

    videos: Path
    gallery: Path
    sheet: Path
    made: list[str]
    kept: list[str]
    failed: dict[str, str]
    not_shown: list[str] = field(default_factory=list)  # why the gallery, the sheet or a record could not be written

    def require_all(self) -> None:
        """Raise PartlyFailed if a job failed, or something could not be written. All other videos are on disk."""
        problems = list(self.not_shown)
        if self.failed:
            where = f"each error is in {self.videos}/<id>.json; all other videos are made"
            problems.insert(0, f"{len(self.failed)} jobs failed ({join_names(self.failed)}); {where}")
        if problems:
            raise PartlyFailed("; ".join(problems))


def generate(manifest: GenerateManifest, run_dir: Path, new_model: Callable[[ModelSpec], Model] = Model) -> Generated:
    """Make every job's video that does not exist yet. A job that fails is recorded, and the others are still made.

    Args:
        manifest: the jobs and their model.
        run_dir: the folder of the run; videos are written to `run_dir/videos`.
        new_model: builds the model.

    Raises:
        WeightsError: the model cannot be found or loaded.
        StageError: another process generates in the same folder, or the folder was moved or removed meanwhile.
        OSError: nothing more can be written.
    """
    manifest = manifest.resolve_paths(run_dir)
    require_model(manifest.model)
    model, folder = new_model(manifest.model), run_dir / "videos"
    with sole_writer(folder) as require_in_place:
        run = _Run(manifest, model, folder, require_in_place)
        run.check()
        run.make_all()
        require_in_place()
        ids = [job.id for job in manifest.jobs]
        kept = [id for id in ids if id not in {*run.made, *run.failed}]
        not_shown = run.not_recorded + _show(folder, ids)
        return Generated(folder, folder / "gallery.html", folder / "gallery.jpg", run.made, kept, run.failed, not_shown)


def _show(folder: Path, ids: list[str]) -> list[str]:
    """Write the gallery and the contact sheet; return the problems, of which none costs a video."""
    problems = []
    for name, write in (("the gallery", write_gallery), ("the contact sheet", write_sheet)):
        shown = attempt(partial(write, folder, ids), folder)
        if isinstance(shown, Failure):
            log.error("%s could not be written: %s\n%s", name, shown.message, shown.traceback)
            problems.append(f"{name} could not be written: {shown.message}")
    return problems


class _Run:
    """The jobs of one run: which were made, and which failed and why."""

    def __init__(
        self, manifest: GenerateManifest, model: Model, folder: Path, require_in_place: Callable[[], None]
    ) -> None:
        self.jobs, self.model, self.folder, self.require_in_place = manifest.jobs, model, folder, require_in_place
        self.fingerprints = {**model.fingerprints(), "latent_space": model.space_name}
        self.checks = JobChecks(manifest, folder, model.space_name)
        self.hashes = InputHashes()
        self.made: list[str] = []
        self.failed: dict[str, str] = {}
        self.not_recorded: list[str] = []

    def check(self) -> None:
        """Record the jobs that cannot be made, before the first is made."""
        failures = self.checks.failures()
        for job in self.jobs:
            if job.id in failures:
                self._fail(job, failures[job.id])

    def make_all(self) -> None:
        """Make the videos that do not exist, each after those that it reads."""
        outputs, geometry = self.checks.outputs, self.model.backbone.geometry
        read_later = {path for job in self.jobs for path, _ in outputs.inputs_of(job)}
        needed = {writer.id for path in read_later if (writer := outputs.writer_of(path)) and path.suffix != VIDEO}
        pending = []
        for job in self.checks.in_order():
            keep = partial(self._keep, job, job.id in needed)
            # What is read from another job may be made anew in this run, so whether this one is done shows later.
            if job.id not in self.failed and (outputs.inputs_of(job) or attempt(keep, self.folder) is not True):
                pending.append(job)
        with Progress("generate", sum(total_steps(job, geometry) for job in pending)) as progress:
            for job in pending:
                outcome = attempt(partial(self._make, job, job.id in needed, progress), self.folder)
                if isinstance(outcome, Failure):
                    self._fail(job, outcome)

    def _keep(self, job: Job, with_latents: bool) -> bool:
        """Return whether a job's video is there, with its latents if another job reads them."""
        key = job_key(job, self.fingerprints, self.hashes)
        if not is_done(self.folder, job.id, key) or (with_latents and self._read_latents(job) is None):
            return False
        forget_failure(self.folder, job.id)
        return True

    def _make(self, job: Job, with_latents: bool, progress: Progress) -> None:
        """Make one job's video and record it, unless it is there."""
        require_inputs_made(job, self.checks.outputs, self.failed)
        if self._keep(job, with_latents):
            progress.advance(total_steps(job, self.model.backbone.geometry), note=job.id)
            return
        key = job_key(job, self.fingerprints, self.hashes)
        facts = self._make_video(job, progress)
        if "warning" in facts:
            log.warning("job %s: %s", job.id, facts["warning"])
        record_video(self.folder, job, self.fingerprints, {"key": key, **facts})
        self.made.append(job.id)

    def _make_video(self, job: Job, progress: Progress) -> dict[str, Any]:
        """Sample, decode and write one job's video; return the record's facts about it.

        Saved latents that were made with the same settings are only decoded.

        Raises:
            MediaError: an input cannot be read, or was changed since it was hashed for the key.
            ConditionError: the conditions do not fit the job.
            NotFiniteError: the model computes values that are not finite.
            StageError: the folder was moved or removed.
        """
        geometry = self.model.backbone.geometry
        given = describe_inputs(job, geometry)
        z_CFhw = self._read_latents(job)
        if z_CFhw is None:
            after_reading = partial(self.hashes.require_unchanged, job)
            z_CFhw = sample_job(job, self.model, lambda step, x0: progress.advance(note=job.id), after_reading)
            self.require_in_place()
            facts = {"latent_space": self.model.space_name, "cyclic": str(job.cyclic).lower()}
            save_latents(self._latents_path(job), z_CFhw, {"key": self._latents_key(job), **facts})
        else:
            progress.advance(total_steps(job, geometry), note=job.id)
        frames = decode_job(job, self.model, z_CFhw)
        self.hashes.require_unchanged(job)  # `exact` reads them again
        video = self.folder / f"{job.id}{VIDEO}"
        self.require_in_place()
        write_video(video, frames, job.fps)
        made = {"given": given, "seams": measure_seams(frames, job, geometry), "video_sha256": sha256_file(video)}
        return made | ({"warning": fault} if (fault := describe_fault(frames)) else {})

    def _latents_path(self, job: Job) -> Path:
        return self.folder / f"{job.id}{LATENTS}"

    def _latents_key(self, job: Job) -> str:
        """Return the key of a job's latents, without `exact`, which acts after decoding."""
        return job_key(job, self.fingerprints, self.hashes, without={"exact"})

    def _read_latents(self, job: Job) -> Tensor | None:
        """Return a job's saved latents; None if there are none, of other settings, or damaged."""
        path = self._latents_path(job)
        if not path.exists():
            return None
        try:
            return read_latents(path) if read_header(path).facts.get("key") == self._latents_key(job) else None
        except MediaError as error:
            log.warning("job %s is sampled again: %s", job.id, error)
            return None

    def _fail(self, job: Job, failure: Failure) -> None:
        log.error("job %s failed: %s", job.id, failure.message)
        self.failed[job.id] = failure.message
        recorded = attempt(partial(record_failure, self.folder, job, self.fingerprints, failure), self.folder)
        if isinstance(recorded, Failure):
            self.not_recorded.append(f"the failure of job {job.id} could not be recorded: {recorded.message}")
            log.error(self.not_recorded[-1])
        if failure.traceback:  # it may have been for memory: give back all of it, which the next job may need
            gc.collect()
            torch.cuda.empty_cache()
