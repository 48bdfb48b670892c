"""Make the jobs of one run, as its command sees them: which go to which slot, and what becomes of them."""

import logging
import secrets
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from pusa.errors import error_messages
from pusa.generate.check import require_inputs_made
from pusa.generate.chunks import CHUNK_SECONDS, CHUNK_SECONDS_OFFLOADED, MAX_CRASHES, Batch, Chunk, Deaths, Schedule
from pusa.generate.encodings import encodings_folder, prune
from pusa.generate.ledger import CRASHED, read_failure, settings_in, settings_of
from pusa.generate.listed import NewestList
from pusa.generate.messages import Busy, Ended, Setup, Stepped
from pusa.generate.outputs import RECORD
from pusa.generate.sampling import batches_by_depth, total_steps
from pusa.generate.survey import Jobs, Survey
from pusa.generate.timings import Timings
from pusa.generate.worker import keep, let_go, make_chunk
from pusa.manifest.models import ModelSpec
from pusa.system.disk import Room
from pusa.system.failures import Failure, attempt
from pusa.system.files import read_object
from pusa.system.locks import WaitReports
from pusa.system.progress import Progress, report_busy, report_counts, report_end, report_steps
from pusa.system.slots import Slot, Step, WorkerDied, open_slots, run_in_slots
from pusa.system.text import join_names
from pusa.tasks.base import Job
from pusa.weights.model import Model

log = logging.getLogger(__name__)


class Run:
    """The jobs of one run. The threads of all slots share it.

    Args:
        jobs: the jobs.
        found: how far they are.
        model: the model of the jobs.
        new_model: builds it; in a process of its own, a function that can be pickled.
        step: calls a function that makes a chunk of jobs; it gets a name for it, too.
        slots: where chunks are made; none: the slots of the manifest's place.
        newest: the list of jobs that a manifest which is started later changes; None: nothing is left to one.
        seconds_left: returns the seconds in which work may still be started.

    Attributes:
        made: the ids of the jobs that this command made, in order.
        failed: by id, why jobs failed.
        drafted: the ids of the jobs of which there is a draft, made now or before.
        left: the ids of the jobs that were not to be tried again, or are left to a manifest that was started later.
        not_begun: the ids of the jobs for which there was no time.
        not_recorded: why failures could not be recorded.
    """

    schedule: Schedule  # while jobs are made
    progress: Progress
    deaths: Deaths  # of workers

    def __init__(
        self,
        jobs: Jobs,
        found: Survey,
        model: Model,
        new_model: Callable[[ModelSpec], Model],
        step: Step,
        slots: Sequence[Slot],
        newest: NewestList | None,
        seconds_left: Callable[[], float],
    ) -> None:
        self.jobs, self.found, self.model, self.new_model, self.step = jobs, found, model, new_model, step
        self.slots, self.newest, self.seconds_left = slots, newest, seconds_left
        self.manifest, self.group, self.folder, self.ledger = jobs.manifest, jobs.group, jobs.folder, jobs.ledger
        self.positions = {id: number for number, id in enumerate(jobs.ids, 1)}
        self.todo = found.todo
        self.made: dict[str, None] = {}
        self.failed: dict[str, str] = {}
        self.drafted: dict[str, None] = dict.fromkeys(found.drafted)
        self.left = {*found.left}
        self.not_begun: list[str] = []
        self.not_recorded: list[str] = []
        self._done = {*found.done}  # and what is made, by this command or another
        self._held, self._reports = "", WaitReports(self.group)  # a job that another command holds

        steps = {job.id: total_steps(job, jobs.geometry) for job in self.todo}
        self.steps = {id: min(total, jobs.draft_steps or total) for id, total in steps.items()}
        records = () if jobs.draft_steps else found.done  # a draft takes a part of the time
        self.timings = Timings.of_records(read_object(self.ledger.path(id, RECORD)) for id in records)

    def begin(self) -> None:
        """Record the jobs that cannot be made, and report how far all of them are."""
        for job in self.manifest.jobs:
            if failure := self.found.impossible.get(job.id):
                self._fail(job, failure)
        self.failed |= self.found.given_up
        self._report_counts()
        parts = [f"{len(self._done):,} made already"]
        parts += [f"{len(self.drafted):,} drafted already"] * bool(self.drafted)
        parts += [f"{len(self.todo):,} to make"]
        parts += [f"{len(self.failed):,} failed"] * bool(self.failed)
        parts += [f"{count:,} {name}" for name, count in self._aside().items() if count]
        log.info("%s jobs: %s, in %s", f"{len(self.jobs.ids):,}", ", ".join(parts), self.folder)

    def make_all(self) -> None:
        """Hand out the jobs that are left, and return when each is made or has failed, or the time is over."""
        if not self.todo:
            return
        left_before, setup = frozenset(self.left), self._setup()
        room = Room(self.folder, self.manifest.min_free_gib)
        keep(setup, self.model)  # for a slot in this process
        try:
            with (
                self._open_slots() as slots,
                Progress("denoising steps", sum(self.steps.values())) as self.progress,
            ):
                log.info("slots: %s", ", ".join(slot.name for slot in slots))
                for slot in slots:
                    report_busy(slot.name)
                self.schedule, self.deaths = self._schedule(len(slots)), Deaths(len(slots))
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
            needed=self.jobs.needed,
            encodings=encodings_folder(),
            slot="",
            preview_every=self.manifest.preview_every,
            draft_steps=self.jobs.draft_steps,
        )

    def _schedule(self, slots: int) -> Schedule:
        todo, tokens = {job.id for job in self.todo}, self.manifest.batch_tokens
        found = batches_by_depth(self.found.company, self.jobs.reads, self.model.backbone.family, tokens)
        return Schedule(
            [batch for batch in found if any(job.id in todo for job in batch)],
            todo,
            self.jobs.reads,
            slots,
            self.timings,
            CHUNK_SECONDS_OFFLOADED if self.manifest.model.offload else CHUNK_SECONDS,
            self._look,
            self._report_wait,
            self.seconds_left,
        )

    def _look(self, batch: Batch) -> bool:
        """Settle the jobs of a batch that need no work; return whether no other process holds one of the others."""
        open_jobs = [job for job in batch if self.schedule.is_left(job.id)]
        for job in open_jobs:
            if problem := error_messages(partial(require_inputs_made, job, self.jobs.checks.outputs, self.failed)):
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
        if not isinstance(found := self.jobs.find(job), Failure):
            keys, is_done = found
            if is_done:
                self._done.add(job.id)
            elif self.newest and self.newest.changes(job, keys):
                self.left.add(job.id)
            elif self.jobs.is_drafted(job, keys):
                self.drafted[job.id] = None
        failure = read_failure(self.folder, job.id)
        is_new = failure.get("attempt") != self.jobs.failures[job.id].get("attempt")
        ended = job.id in self._done or job.id in self.left or job.id in self.drafted
        if not ended and failure and is_new and settings_in(failure) == settings_of(job):
            self.failed[job.id] = str(failure.get("error"))
        if ended or job.id in self.failed:
            self.schedule.settle(job.id)

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
                kind = ("draft" if self.jobs.draft_steps else "video") + "s" * (len(self.todo) != 1)
                made = f"{ended:,} of {len(self.todo):,} {kind}"
                doing = event.id if self.progress.done + event.steps < self.progress.total else "decoding"
                self.progress.advance(event.steps, note=f"({made}; {doing})", earlier=event.earlier)
                report_steps(slot.name, event.id, event.steps)
            elif isinstance(event, Ended):
                self._note(event, chunk)

        report_busy(slot.name, doing="starting")
        try:
            call = partial(slot.run, make_chunk, replace(setup, slot=slot.name), chunk, on_event=on_event)
            self.step(name, call)
        except WorkerDied as error:
            log.warning("%s died (%s) at %s", slot.name, error.how, join_names(at_work) or name)
            self._blame(chunk, at_work, error.how)
            is_stuck = not (self.made or self.drafted) and any(self.schedule.is_left(job.id) for job in self.todo)
            self.deaths.add(error, at_work, is_stuck)
        finally:
            report_busy(slot.name)
            self.schedule.give_back(chunk)

    def _blame(self, chunk: Chunk, at_work: Iterable[str], how: str) -> None:
        """Give up the jobs that have killed too many workers. A worker that had not begun one blames none."""
        for job in self.schedule.crashed(chunk, at_work) if at_work else ():
            message = f"its worker died {MAX_CRASHES} times while it made this job ({how})"
            self._fail(job, Failure(f"{message}; --retry-failed tries it again"), CRASHED)
            self.schedule.settle(job.id)

    def _note(self, ended: Ended, chunk: Chunk) -> None:
        """Take note of how a job ended."""
        self.deaths.job_ended()
        if ended.failure:
            log.error("job %s failed: %s", ended.id, ended.failure.message)
            self.failed[ended.id] = ended.failure.message
            report_end(ended.id, error=ended.failure.message)
            if ended.unrecorded:
                self._not_recorded(ended.id, ended.unrecorded)
        elif ended.drafted:
            self.drafted[ended.id] = None
            report_end(ended.id, ended.seconds)
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
        mine = {job.id for job in self.todo} - self.left | self.failed.keys()
        drafted = self.drafted.keys() - self._done
        states = {"done": mine & self._done, "drafted": mine & drafted, "failed": self.failed}
        before = {"made already": len(self.found.done), "drafted already": len(self.found.drafted)}
        counts = {name: len(ids) for name, ids in states.items()}
        report_counts({"jobs": len(mine)} | counts | self._aside() | before)

    def _aside(self) -> dict[str, int]:
        """Return how many jobs this command leaves alone, by the reason."""
        found = self.found
        aside = {"not chosen": found.unchosen, "failed earlier": found.failed_earlier}
        aside |= {"waiting for drafts": found.waiting, "not tried": self.left}
        return {name: len(ids) for name, ids in aside.items()}

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
