"""The jobs of one run, as its command sees them: which are made, which go to which slot, and what became of them."""

import logging
import secrets
from collections.abc import Callable, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from math import inf
from threading import Lock
from typing import Any

from pusa.errors import MediaError, StageError, error_messages
from pusa.generate.canonical import NOT_OF_THE_VIDEO
from pusa.generate.check import JobChecks, require_inputs_made
from pusa.generate.chunks import CHUNK_SECONDS, CHUNK_SECONDS_OFFLOADED, MAX_CRASHES, Batch, Chunk, Schedule
from pusa.generate.drafts import is_drafted, readers_of_drafts, with_inputs
from pusa.generate.encodings import encodings_folder, prune
from pusa.generate.ledger import (
    CRASHED,
    JOBS,
    InputHashes,
    Keys,
    Ledger,
    ListedJob,
    list_jobs,
    listed_jobs,
    read_failure,
    settings_of,
)
from pusa.generate.outputs import LATENTS, RECORD, paths_in
from pusa.generate.sampling import batches_by_depth, total_steps
from pusa.generate.timings import Timings
from pusa.generate.worker import Busy, Ended, Setup, Stepped, keep, let_go, make_chunk
from pusa.manifest.models import GenerateManifest, ModelSpec
from pusa.system.disk import Room
from pusa.system.failures import Failure, attempt
from pusa.system.files import GONE, read_object, stamp_of
from pusa.system.locks import WaitReports, WorkGroup
from pusa.system.progress import Progress, report_busy, report_counts, report_end, report_steps
from pusa.system.slots import Slot, Step, WorkerDied, open_slots, run_in_slots
from pusa.system.text import join_names
from pusa.tasks.base import Job
from pusa.weights.model import Model

log = logging.getLogger(__name__)


class Run:
    """The jobs of one run. The threads of all slots share it.

    Attributes:
        made: the ids of the jobs that this command made, in order.
        failed: by id, why jobs failed.
        drafted: the ids of the jobs of which there is a draft, made now or before.
        left: the ids of the jobs that were not to be tried.
        unchosen: the ids of the jobs that are not to be finished. They still share their batches.
        not_begun: the ids of the jobs for which there was no time.
        not_recorded: why failures could not be recorded.
    """

    schedule: Schedule  # while jobs are made
    progress: Progress
    steps: dict[str, int]  # of each job to make, the denoising steps

    def __init__(
        self,
        manifest: GenerateManifest,
        model: Model,
        new_model: Callable[[ModelSpec], Model],
        group: WorkGroup,
        fingerprints: dict[str, str],
        step: Step,
        slots: Sequence[Slot] = (),
        chosen: Set[str] | None = None,
        seconds_left: Callable[[], float] = lambda: inf,
        is_listed: bool = True,
    ) -> None:
        self.manifest, self.model, self.new_model, self.step = manifest, model, new_model, step
        self.slots = slots  # none: those of the manifest's place
        self.chosen, self.seconds_left, self.is_listed = chosen, seconds_left, is_listed
        self.draft_steps = manifest.drafts.steps if manifest.drafts and chosen is None else 0
        self.group, self.folder = group, group.folder
        self.ids = [job.id for job in manifest.jobs]
        self.positions = {id: number for number, id in enumerate(self.ids, 1)}
        self.geometry = model.backbone.geometry
        self.ledger = Ledger(self.folder, self.geometry, fingerprints, InputHashes(), manifest.keep_old)
        self.checks = JobChecks(manifest, self.folder, model.space_name)
        outputs = self.checks.outputs
        self.reads = {job.id: outputs.reads(job) for job in manifest.jobs}
        read_later = {path for job in manifest.jobs for path, _ in outputs.inputs_of(job)}
        writers = [(path, outputs.writer_of(path)) for path in read_later]
        self.needed = frozenset(writer.id for path, writer in writers if writer and path.name.endswith(LATENTS))
        self.made: dict[str, None] = {}
        self._done: set[str] = set()  # those, and the jobs that were made already
        self.failed: dict[str, str] = {}
        self.drafted: dict[str, None] = {}
        self.left: set[str] = set()
        self.unchosen: set[str] = set()
        self.not_begun: list[str] = []
        self.not_recorded: list[str] = []
        self._failures = {id: read_failure(self.folder, id) for id in self.ids}  # of earlier runs
        self.todo: list[Job] = []
        self._deaths, self._idle_deaths, self._counting = 0, 0, Lock()  # of workers; idle since a job ended
        self._held, self._reports = "", WaitReports(group)  # a job that another command holds
        self._listed_at, self._listed = GONE, dict[str, ListedJob]()  # jobs.json, as some command wrote it last

    def survey(self, retry_failed: bool) -> None:
        """Record the jobs that cannot be made, find those that are made already, and list them in `jobs.json`."""
        done: set[str] = set()
        impossible = self.checks.failures()
        keys = {}
        for job in self.checks.in_order():
            if job.id in impossible:
                continue
            if done.issuperset(self.reads[job.id]):  # what else it reads has yet to be made, so its key shows later
                found = attempt(partial(self._find, job), self.folder)
                if not isinstance(found, Failure):
                    keys[job.id], is_done = found
                    done |= {job.id} if is_done else set()
                    if not is_done and self._is_drafted(job, keys[job.id]):
                        self.drafted[job.id] = None
            if self._is_given_up(job) and not retry_failed and job.id not in done:
                self.failed[job.id] = str(self._failures[job.id].get("error"))
        for job in self.manifest.jobs:
            if job.id in impossible:
                self._fail(job, impossible[job.id])
        settled = done | self.failed.keys() | self.drafted.keys()
        if self.chosen is not None:
            if ready := sorted(done & self.chosen):
                log.info("made already, and kept: %s", join_names(ready))
            self.unchosen = set(self.ids) - settled - with_inputs(self.chosen, self.reads)
            settled |= self.unchosen
        if retry_failed:
            self.left = {id for id in self.ids if id not in settled and not self._failures[id]}
            settled |= self.left
        if self.draft_steps:
            rest = [job for job in self.checks.in_order() if job.id not in done and job.id not in self.failed]
            self.left |= readers_of_drafts(rest, self.reads, self.geometry, self.draft_steps) - settled
            settled |= self.left
        self.todo = [job for job in self.checks.in_order() if job.id not in settled]
        self._done = set(done)
        self._report_counts()
        records = () if self.draft_steps else done  # a draft takes a part of the time
        self.timings = Timings.of_records(read_object(self.ledger.path(id, RECORD)) for id in records)
        if self.is_listed:
            list_jobs(self.ledger, keys, self.manifest)
        drafts = f", {len(self.drafted):,} drafted already" if self.drafted else ""
        jobs = f"{len(self.ids):,} jobs: {len(done):,} made already{drafts}, {len(self.todo):,} to make"
        log.info("%s%s, in %s", jobs, f", {len(self.failed):,} failed" if self.failed else "", self.folder)

    def _is_drafted(self, job: Job, keys: Keys) -> bool:
        if not 0 < self.draft_steps < total_steps(job, self.geometry):
            return False
        return attempt(partial(is_drafted, self.ledger, job, keys, self.draft_steps), self.folder) is True

    def _find(self, job: Job) -> tuple[Keys, bool]:
        """Return a job's keys, and whether it is made."""
        keys = self.ledger.keys_of(job)
        is_done = self.ledger.is_done(job, keys, job.id in self.needed)
        if is_done and self._failures[job.id]:
            with self.group.lock(job.id) as locked:
                if locked:
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
        left_before, setup = frozenset(self.left), self._setup()
        totals = {job.id: total_steps(job, self.geometry) for job in self.todo}
        self.steps = {id: min(total, self.draft_steps or total) for id, total in totals.items()}
        room = Room(self.folder, self.manifest.min_free_gib)
        seconds = CHUNK_SECONDS_OFFLOADED if self.manifest.model.offload else CHUNK_SECONDS
        keep(setup, self.model)  # for a slot in this process
        try:
            with (
                self._open_slots() as slots,
                Progress("denoising steps", sum(self.steps.values())) as progress,
            ):
                log.info("slots: %s", ", ".join(slot.name for slot in slots))
                for slot in slots:
                    report_busy(slot.name)
                self.progress = progress
                self.schedule = Schedule(
                    self._batches(),
                    {job.id for job in self.todo},
                    self.reads,
                    len(slots),
                    self.timings,
                    seconds,
                    self._look,
                    self._report_wait,
                    self.seconds_left,
                )
                self._most_deaths = 2 * MAX_CRASHES * len(slots)
                try:
                    run_in_slots(slots, room.before(self.schedule.take), partial(self._make_in, setup))
                    self.not_begun = [job.id for job in self.todo if self.schedule.is_left(job.id)]
                finally:
                    self.schedule.end()
            if late := self.not_begun:
                log.info("the time is over (until): %d jobs were not begun: %s", len(late), join_names(late))
            if changed := self.left - left_before:
                log.warning("left to a manifest started later, which changes them: %s", join_names(sorted(changed)))
        finally:
            let_go()
            prune(setup.encodings)

    def _open_slots(self) -> AbstractContextManager[Sequence[Slot]]:
        place = self.manifest.model_dump(mode="json")["place"]
        return nullcontext(self.slots) if self.slots else open_slots(place, self.folder)

    def _setup(self) -> Setup:
        return Setup(
            run=secrets.token_hex(8),
            folder=self.folder,
            spec=self.manifest.model,
            new_model=self.new_model,
            known=self.model.known(),
            fingerprints=self.ledger.fingerprints,
            keep_old=self.manifest.keep_old,
            save_every=self.manifest.save_every,
            needed=self.needed,
            encodings=encodings_folder(),
            slot="",
            preview_every=self.manifest.preview_every,
            draft_steps=self.draft_steps,
        )

    def _batches(self) -> list[Batch]:
        """Return the batches with a job to make. Others count as well: a batch is the same after an interrupt."""
        order = [job for job in self.checks.in_order() if job.id not in self.failed and job.id not in self.left]
        found = batches_by_depth(order, self.reads, self.model.backbone.family, self.manifest.batch_tokens)
        todo = {job.id for job in self.todo}
        return [batch for batch in found if any(job.id in todo for job in batch)]

    def _look(self, batch: Batch) -> bool:
        """Settle the jobs of a batch that need no work; return whether no other process holds one of the others."""
        open_jobs = [job for job in batch if self.schedule.is_left(job.id)]
        for job in open_jobs:
            if problem := error_messages(partial(require_inputs_made, job, self.checks.outputs, self.failed)):
                self._fail(job, Failure(problem[0]))
                self.schedule.settle(job.id)
        if held := next((job.id for job in open_jobs if self.group.is_held(job.id)), None):
            self._held = held
            return False
        for job in open_jobs:
            if job.id not in self.failed:
                self._settle_if_ended(job)
        return True

    def _report_wait(self) -> None:
        """Log whom this command waits for, if it is another one."""
        if self._held and self.group.is_held(self._held):
            self._reports.add(self._held)

    def _settle_if_ended(self, job: Job) -> None:
        """Settle a job that is made, or that another command has tried in vain or changed meanwhile."""
        found = attempt(partial(self._find, job), self.folder)
        if not isinstance(found, Failure):
            keys, is_done = found
            if not is_done and self._is_changed_since(job, keys):
                self.left.add(job.id)
            if not is_done and self._is_drafted(job, keys):
                self.drafted[job.id] = None
            if is_done or job.id in self.left or job.id in self.drafted:
                self._done |= {job.id} if is_done else set()
                self.schedule.settle(job.id)
                return
        failure = read_failure(self.folder, job.id)
        is_new = failure.get("attempt") != self._failures[job.id].get("attempt")
        if failure and is_new and failure.get("job") == settings_of(job):
            self.failed[job.id] = str(failure.get("error"))
            self.schedule.settle(job.id)

    def _is_changed_since(self, job: Job, keys: Keys) -> bool:
        """Return whether the manifest that was started last makes another video of a job: it would be replaced."""
        path = self.ledger.work(JOBS)
        if self.is_listed and (stamp := stamp_of(path)) != self._listed_at:
            try:
                self._listed = {listed.id: listed for listed in listed_jobs(self.folder)[0]}
            except MediaError:  # it is damaged
                self._listed = {}
            self._listed_at = stamp
        listed = self._listed.get(job.id)
        if listed is None:
            return False
        if listed.key:
            return listed.key != keys.video
        # A file may have another path on another machine.
        fixed = {key for key, value in job.model_dump().items() if not any(paths_in(value))} - NOT_OF_THE_VIDEO
        return any(listed.settings.get(key) != value for key, value in settings_of(job).items() if key in fixed)

    def _make_in(self, setup: Setup, slot: Slot, chunk: Chunk) -> None:
        """Have a slot make a chunk; if that kills its worker, find out which job does it."""
        if self.seconds_left() <= 0:  # it waited for free space
            self.schedule.give_back(chunk)
            return
        at_work: list[str] = []
        name = f"{chunk.describe(self.positions)} on {slot.name}"

        def on_event(event: Any) -> None:
            if isinstance(event, Busy):
                at_work[:] = event.ids
                steps = max((self.steps.get(id, 0) for id in event.ids), default=0)
                report_busy(slot.name, event.ids, event.doing, steps)
            elif isinstance(event, Stepped):
                ended = len(self.made) + len(self.drafted.keys() & self.steps.keys())
                made = f"{ended:,} of {len(self.todo):,} {'drafts' if self.draft_steps else 'videos'}"
                self.progress.advance(event.steps, note=f"({made}; {event.id})")
                report_steps(slot.name, event.id, event.steps)
            elif isinstance(event, Ended):
                self._note(event, chunk)

        try:
            call = partial(slot.run, make_chunk, replace(setup, slot=slot.name), chunk, on_event=on_event)
            self.step(name, call)
        except WorkerDied as error:
            log.warning("%s died (%s) at %s", slot.name, error.how, join_names(at_work) or name)
            self._blame(chunk, at_work, error)
        finally:
            report_busy(slot.name)
            self.schedule.give_back(chunk)

    def _blame(self, chunk: Chunk, at_work: list[str], error: WorkerDied) -> None:
        """Give up the jobs that have killed too many workers. A worker that had not begun one blames none.

        Raises:
            StageError: workers die whatever they do.
        """
        with self._counting:
            self._deaths += 1
            self._idle_deaths += not at_work
            deaths, idle = self._deaths, self._idle_deaths
        for job in self.schedule.crashed(chunk, at_work) if at_work else ():
            message = f"its worker died {MAX_CRASHES} times while it made this job ({error.how})"
            self._fail(job, Failure(f"{message}; --retry-failed tries it again"), CRASHED)
            self.schedule.settle(job.id)
        if idle >= self._most_deaths:
            raise StageError(
                f"workers died {idle} times before they began a job ({error.how}): out of memory?"
            ) from error
        if (
            not (self.made or self.drafted)
            and deaths >= self._most_deaths
            and any(self.schedule.is_left(job.id) for job in self.todo)
        ):
            raise StageError(f"workers died {deaths} times, and no job was made ({error.how}); see the log") from error

    def _note(self, ended: Ended, chunk: Chunk) -> None:
        """Take note of how a job ended."""
        self._idle_deaths = 0
        if ended.failure:
            log.error("job %s failed: %s", ended.id, ended.failure.message)
            self.failed[ended.id] = ended.failure.message
            report_end(ended.id, error=ended.failure.message)
            if ended.unrecorded:
                self._not_recorded(ended.id, ended.unrecorded)
        elif ended.drafted:
            self.drafted[ended.id] = None
        elif ended.made:
            self.made[ended.id] = None
            report_end(ended.id, ended.seconds)
            if ended.warning:
                log.warning("job %s: %s", ended.id, ended.warning)
        if ended.seconds is not None:
            self.schedule.add_time(next(job for job in chunk.jobs if job.id == ended.id), ended.seconds)
        self._done |= set() if ended.failure or ended.drafted else {ended.id}
        self._report_counts()
        self.schedule.settle(ended.id)

    def _report_counts(self) -> None:
        states = {"done": self._done, "drafted": self.drafted.keys() - self._done, "failed": self.failed}
        report_counts({"jobs": len(self.ids)} | {name: len(ids) for name, ids in states.items()})

    def _fail(self, job: Job, failure: Failure, reason: str | None = None) -> None:
        """Record a failure that shows here, unless another command makes the job at the moment."""
        log.error("job %s failed: %s", job.id, failure.message)
        self.failed[job.id] = failure.message
        report_end(job.id, error=failure.message)
        self._report_counts()
        with self.group.lock(job.id) as locked:
            if locked:
                record = partial(self.ledger.record_failure, job, failure, reason)
                if isinstance(recorded := attempt(record, self.folder), Failure):
                    self._not_recorded(job.id, recorded.message)

    def _not_recorded(self, id: str, why: str) -> None:
        self.not_recorded.append(f"the failure of job {id} could not be recorded: {why}")
        log.error(self.not_recorded[-1])
