"""Stage 4: make a video of each job. What is done is read off the jobs' files, so a rerun resumes.

This process plans and hands out chunks of jobs (chunks.py); slots make them (worker.py): this process itself, or a
resident process for each GPU. Any number of commands, on any machines that share the run folder, share the jobs. What a
job is and how far it is, ledger.py knows.
"""

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pusa.errors import PartlyFailed, StageError, error_messages
from pusa.generate.check import JobChecks, require_inputs_made
from pusa.generate.chunks import CHUNK_SECONDS, CHUNK_SECONDS_OFFLOADED, MAX_CRASHES, Batch, Chunk, Schedule
from pusa.generate.encodings import Encodings, encodings_folder, prune
from pusa.generate.gallery import write_gallery, write_sheet
from pusa.generate.ledger import (
    CRASHED,
    STATE,
    WORK,
    InputHashes,
    Keys,
    Ledger,
    list_jobs,
    read_failure,
    settings_of,
)
from pusa.generate.outputs import LATENTS, RECORD, VIDEO
from pusa.generate.sampling import batches, total_steps
from pusa.generate.timings import Timings
from pusa.generate.worker import Busy, Ended, Setup, Stepped, keep, let_go, make_chunk
from pusa.manifest.models import GenerateManifest, ModelSpec
from pusa.system.failures import Failure, attempt
from pusa.system.files import digest, read_object, remove, remove_partials, require_own
from pusa.system.locks import WorkGroup, join_work, remove_work_locks
from pusa.system.progress import Progress
from pusa.system.slots import Slot, Step, WorkerDied, call_directly, open_slots, run_in_slots
from pusa.system.text import join_names
from pusa.tasks.base import Job
from pusa.weights.model import Model
from pusa.weights.resolve import require_model

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generated:
    """The outcome. Each job's id is in one of the groups; those of `failed` have the error.

    Attributes:
        made: made by this command.
        kept: made before, or by another command meanwhile.
        failed: could not be made.
        left: not tried, since only failed jobs were to be tried again.
        not_shown: why the gallery, the sheet or a record could not be written.
    """

    videos: Path
    gallery: Path
    sheet: Path
    made: list[str]
    kept: list[str]
    failed: dict[str, str]
    left: list[str] = field(default_factory=list)
    not_shown: list[str] = field(default_factory=list)

    def require_all(self) -> None:
        """Raise PartlyFailed if a job failed, or something could not be written. All other videos are on disk."""
        problems = list(self.not_shown)
        if self.failed:
            where = f"each error is in {self.videos}/<id>.json; all other videos are made"
            jobs = "1 job" if len(self.failed) == 1 else f"{len(self.failed)} jobs"
            problems.insert(0, f"{jobs} failed ({join_names(self.failed)}); {where}")
        if problems:
            raise PartlyFailed("; ".join(problems))


def generate(
    manifest: GenerateManifest,
    run_dir: Path,
    new_model: Callable[[ModelSpec], Model] = Model,
    *,
    retry_failed: bool = False,
    step: Step = call_directly,
) -> Generated:
    """Make every job's video that does not exist yet. A job that fails is recorded, and the others are still made.

    Args:
        manifest: the jobs and their model.
        run_dir: the folder of the run; videos are written to `run_dir/videos`.
        new_model: builds the model; in a process of its own, a function that can be pickled.
        retry_failed: make only the jobs that failed before.
        step: calls a function that makes a chunk of jobs; it gets a name for it, too.

    Raises:
        WeightsError: the model cannot be found or loaded.
        StageError: another command writes there with other weights, workers die before they begin, or the folder was
            moved or removed meanwhile.
        OSError: nothing more can be written.
    """
    manifest = manifest.resolve_paths(run_dir)
    require_model(manifest.model)
    model, folder = new_model(manifest.model), run_dir / "videos"
    require_own(folder)  # before the weights are hashed, which may take minutes
    fingerprints = {**model.fingerprints(), "latent_space": model.space_name}
    with join_work(folder, partial(_clean_up, folder), {"made_from": digest(fingerprints)}) as group:
        run = _Run(manifest, model, new_model, group, fingerprints, step)
        run.survey(retry_failed)
        run.make_all()
        with group.lock("gallery", wait=True):
            group.require_in_place()
            not_shown = run.not_recorded + _show(folder, run.ids)
        elsewhere = run.made.keys() | run.failed.keys() | run.left
        result = Generated(
            folder,
            folder / "gallery.html",
            folder / "gallery.jpg",
            list(run.made),
            [id for id in run.ids if id not in elsewhere],
            {id: run.failed[id] for id in run.ids if id in run.failed},
            [id for id in run.ids if id in run.left],
            not_shown,
        )
        if group.is_alone():
            remove_work_locks(folder)
            for id in (*result.made, *result.kept):  # a kill may have left what the job needs no more
                for end in (STATE, LATENTS):
                    remove(run.ledger.work(f"{id}{end}"))
    return result


def _clean_up(folder: Path) -> None:
    """Remove what killed commands left. Call it only while alone."""
    remove_work_locks(folder)
    work = folder / WORK
    if work.is_symlink():
        raise StageError(f"{work} is a link; expected a folder for unfinished work: remove it")
    work.mkdir(exist_ok=True)
    remove_partials(work)
    for video in work.glob(f"*{VIDEO}"):
        remove(video)


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
    """The jobs of one run: which were made, which failed and why, and which are left."""

    schedule: Schedule  # while jobs are made
    progress: Progress

    def __init__(
        self,
        manifest: GenerateManifest,
        model: Model,
        new_model: Callable[[ModelSpec], Model],
        group: WorkGroup,
        fingerprints: dict[str, str],
        step: Step,
    ) -> None:
        self.manifest, self.model, self.new_model, self.step = manifest, model, new_model, step
        self.group, self.folder = group, group.folder
        self.ids = [job.id for job in manifest.jobs]
        self.geometry = model.backbone.geometry
        self.ledger = Ledger(self.folder, self.geometry, fingerprints, InputHashes(), manifest.keep_old)
        self.checks = JobChecks(manifest, self.folder, model.space_name)
        outputs = self.checks.outputs
        self.reads = {job.id: outputs.reads(job) for job in manifest.jobs}
        read_later = {path for job in manifest.jobs for path, _ in outputs.inputs_of(job)}
        writers = [(path, outputs.writer_of(path)) for path in read_later]
        self.needed = frozenset(writer.id for path, writer in writers if writer and path.suffix != VIDEO)
        self.made: dict[str, None] = {}  # in the order in which they were made
        self.failed: dict[str, str] = {}
        self.left: set[str] = set()
        self.not_recorded: list[str] = []
        self._failures = {id: read_failure(self.folder, id) for id in self.ids}  # of earlier runs
        self.todo: list[Job] = []
        self._deaths = 0  # of workers

    def survey(self, retry_failed: bool) -> None:
        """Record the jobs that cannot be made, find those that are made already, and list all of them."""
        done: set[str] = set()
        impossible = self.checks.failures()
        keys = {}
        for job in self.checks.in_order():
            if job.id in impossible:
                continue
            if not self.reads[job.id]:  # what is read from another job may be made anew, so its key shows later
                found = attempt(partial(self._find, job), self.folder)
                if not isinstance(found, Failure):
                    keys[job.id], is_done = found
                    done |= {job.id} if is_done else set()
            if self._is_given_up(job) and not retry_failed and job.id not in done:
                self.failed[job.id] = self._failures[job.id]["error"]
        for job in self.manifest.jobs:
            if job.id in impossible:
                self._fail(job, impossible[job.id])
        settled = done | self.failed.keys()
        if retry_failed:
            self.left = {id for id in self.ids if id not in settled and not self._failures[id]}
            settled |= self.left
        self.todo = [job for job in self.checks.in_order() if job.id not in settled]
        self.timings = Timings.of_records(read_object(self.ledger.path(id, RECORD)) for id in done)
        list_jobs(self.ledger, keys, self.manifest.jobs)

    def _find(self, job: Job) -> tuple[Keys, bool]:
        """Return a job's keys, and whether it is made."""
        keys = self.ledger.keys_of(job)
        is_done = self.ledger.is_done(job, keys, job.id in self.needed)
        if is_done:
            self.ledger.forget_failure(job.id)
        return keys, is_done

    def _is_given_up(self, job: Job) -> bool:
        """Return whether a job killed its workers, and is still the same."""
        failure = self._failures[job.id]
        if failure.get("reason") != CRASHED:
            return False
        keys = attempt(partial(self.ledger.keys_of, job), self.folder)
        return isinstance(keys, Keys) and failure.get("key") == keys.video

    def make_all(self) -> None:
        """Hand out the jobs that are left, and return when each is made or has failed."""
        if not self.todo:
            return
        spec, run = self.manifest.model, secrets.token_hex(8)
        place = self.manifest.model_dump(mode="json")["place"]
        setup = Setup(
            run,
            self.folder,
            spec,
            self.new_model,
            self.model.known(),
            self.ledger.fingerprints,
            self.manifest.keep_old,
            self.manifest.save_every,
            self.needed,
            encodings_folder(),
        )
        keep(run, self.model, Encodings(self.model, setup.encodings))
        try:
            with (
                open_slots(place) as slots,
                Progress("generate", sum(total_steps(job, self.geometry) for job in self.todo)) as progress,
            ):
                seconds = CHUNK_SECONDS_OFFLOADED if spec.offload else CHUNK_SECONDS
                self.progress = progress
                self.schedule = Schedule(
                    self._batches(),
                    {job.id for job in self.todo},
                    self.reads,
                    len(slots),
                    self.timings,
                    seconds,
                    self._look,
                )
                run_in_slots(slots, self.schedule.take, partial(self._make_in, setup))
        finally:
            let_go()
            prune(setup.encodings)

    def _batches(self) -> list[Batch]:
        """Return the batches with a job to make. Those of equal depth may share one: none reads the other's result.

        Jobs that are made already count as well: a batch is the same after an interrupt.
        """
        order = [job for job in self.checks.in_order() if job.id not in self.failed and job.id not in self.left]
        depth: dict[str, int] = {}
        levels: dict[int, list[Job]] = {}
        for job in order:
            depth[job.id] = 1 + max((depth.get(id, 0) for id in self.reads[job.id]), default=0)
            levels.setdefault(depth[job.id], []).append(job)
        position = {job.id: i for i, job in enumerate(order)}
        found = [
            batch for jobs in levels.values() for batch in batches(jobs, self.geometry, self.manifest.batch_tokens)
        ]
        todo = {job.id for job in self.todo}
        return sorted(
            (batch for batch in found if any(job.id in todo for job in batch)), key=lambda batch: position[batch[0].id]
        )

    def _look(self, batch: Batch) -> bool:
        """Settle the jobs of a batch that need no work; return whether no other process holds one of the others."""
        open_jobs = [job for job in batch if self.schedule.is_left(job.id)]
        for job in open_jobs:
            if problem := error_messages(partial(require_inputs_made, job, self.checks.outputs, self.failed)):
                self._fail(job, Failure(problem[0]))
                self.schedule.settle(job.id)
        if any(self.group.is_held(job.id) for job in open_jobs):
            return False
        for job in open_jobs:
            if job.id not in self.failed:
                self._settle_if_ended(job)
        return True

    def _settle_if_ended(self, job: Job) -> None:
        """Settle a job that is made, or that another command has tried in vain meanwhile."""
        found = attempt(partial(self._find, job), self.folder)
        if not isinstance(found, Failure) and found[1]:
            self.schedule.settle(job.id)
        failure = read_failure(self.folder, job.id)
        is_new = failure.get("attempt") != self._failures[job.id].get("attempt")
        if failure and is_new and failure.get("job") == settings_of(job):
            self.failed[job.id] = str(failure.get("error"))
            self.schedule.settle(job.id)

    def _make_in(self, setup: Setup, slot: Slot, chunk: Chunk) -> None:
        """Have a slot make a chunk; if that kills its worker, find out which job does it."""
        at_work: list[str] = []

        def on_event(event: Any) -> None:
            if isinstance(event, Busy):
                at_work[:] = event.ids
            elif isinstance(event, Stepped):
                self.progress.advance(event.steps, note=event.id)
            elif isinstance(event, Ended):
                self._note(event, chunk)

        try:
            self.step(chunk.name, partial(slot.run, make_chunk, setup, chunk, on_event=on_event))
        except WorkerDied as error:
            log.warning("%s died (%s) at %s", slot.name, error.how, join_names(at_work) or chunk.name)
            self._blame(chunk, at_work, error)
        finally:
            self.schedule.give_back(chunk)

    def _blame(self, chunk: Chunk, at_work: list[str], error: WorkerDied) -> None:
        """Give up the jobs that have killed too many workers.

        Raises:
            StageError: workers die whatever they do.
        """
        self._deaths += 1
        if not self.made and self._deaths >= 2 * MAX_CRASHES:
            raise StageError(
                f"workers died {self._deaths} times, and no job was made ({error.how}); see the log"
            ) from error
        for job in self.schedule.crashed(chunk, at_work):
            message = f"its worker died {MAX_CRASHES} times while it made this job ({error.how})"
            self._fail(job, Failure(f"{message}; --retry-failed tries it again"), CRASHED)
            self.schedule.settle(job.id)

    def _note(self, ended: Ended, chunk: Chunk) -> None:
        """Take note of how a job ended."""
        if ended.failure:
            log.error("job %s failed: %s", ended.id, ended.failure.message)
            self.failed[ended.id] = ended.failure.message
            if ended.unrecorded:
                self._not_recorded(ended.id, ended.unrecorded)
        elif ended.made:
            self.made[ended.id] = None
            if ended.warning:
                log.warning("job %s: %s", ended.id, ended.warning)
            if ended.seconds is not None:
                self.timings.add(next(job for job in chunk.jobs if job.id == ended.id), ended.seconds)
        self.schedule.settle(ended.id)

    def _fail(self, job: Job, failure: Failure, reason: str | None = None) -> None:
        """Record a failure that shows here, unless another command makes the job at the moment."""
        log.error("job %s failed: %s", job.id, failure.message)
        self.failed[job.id] = failure.message
        with self.group.lock(job.id) as locked:
            if locked:
                record = partial(self.ledger.record_failure, job, failure, reason)
                if isinstance(recorded := attempt(record, self.folder), Failure):
                    self._not_recorded(job.id, recorded.message)

    def _not_recorded(self, id: str, why: str) -> None:
        self.not_recorded.append(f"the failure of job {id} could not be recorded: {why}")
        log.error(self.not_recorded[-1])
