"""Look at the files of a run before anything is made: which jobs are done, which cannot be made, and which to make."""

import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from pusa.generate.check import JobChecks
from pusa.generate.drafts import is_drafted, readers_of_drafts, with_inputs
from pusa.generate.ledger import CRASHED, InputHashes, Keys, Ledger, read_failure
from pusa.generate.outputs import LATENTS
from pusa.generate.sampling import total_steps
from pusa.manifest.models import GenerateManifest
from pusa.system.failures import Failure, attempt
from pusa.system.locks import WorkGroup
from pusa.system.text import join_names
from pusa.tasks.base import Job
from pusa.weights.model import Model

log = logging.getLogger(__name__)


class Jobs:
    """The jobs of a manifest and their files.

    Args:
        manifest: the manifest.
        model: its model.
        group: the commands that work in the folder.
        fingerprints: what the jobs' keys hold of the model.
        drafting: whether jobs wait as drafts, if the manifest says so; otherwise they are made to the end.

    Attributes:
        draft_steps: the steps of drafts; 0: all jobs are made to the end.
    """

    def __init__(
        self, manifest: GenerateManifest, model: Model, group: WorkGroup, fingerprints: Mapping[str, str],
        drafting: bool,
    ) -> None:  # fmt: skip
        self.manifest, self.group, self.folder = manifest, group, group.folder
        self.draft_steps = manifest.drafts.steps if manifest.drafts and drafting else 0
        self.ids = [job.id for job in manifest.jobs]
        self.geometry = model.backbone.geometry
        self.ledger = Ledger(self.folder, self.geometry, fingerprints, InputHashes(), manifest.keep_old)
        self.checks = JobChecks(manifest, self.folder, model.space_name)
        self.reads = {job.id: self.checks.outputs.reads(job) for job in manifest.jobs}
        self.failures = {id: read_failure(self.folder, id) for id in self.ids}  # of earlier runs

    @cached_property
    def needed(self) -> frozenset[str]:
        """The ids of the jobs whose latents another job reads."""
        outputs = self.checks.outputs
        read = {path for job in self.manifest.jobs for path, _ in outputs.inputs_of(job) if path.name.endswith(LATENTS)}
        return frozenset(writer.id for path in read if (writer := outputs.writer_of(path)))

    def in_order(self) -> Sequence[Job]:
        """Return the jobs, each after those whose results it reads."""
        return self.checks.in_order()

    def find(self, job: Job) -> tuple[Keys, bool] | Failure:
        """Return a job's keys, and whether it is made; or why that cannot be known."""
        return attempt(partial(self._find, job), self.folder)

    def _find(self, job: Job) -> tuple[Keys, bool]:
        keys = self.ledger.keys_of(job)
        is_done = self.ledger.is_done(job, keys, job.id in self.needed)
        if is_done and self.failures[job.id]:
            with self.group.lock(job.id) as locked:
                if locked:
                    self.ledger.forget_failure(job.id)
        return keys, is_done

    def is_drafted(self, job: Job, keys: Keys) -> bool:
        """Return whether there is a draft of a job, where drafts are made."""
        if not 0 < self.draft_steps < total_steps(job, self.geometry):
            return False
        return attempt(partial(is_drafted, self.ledger, job, keys, self.draft_steps), self.folder) is True

    def is_given_up(self, job: Job) -> bool:
        """Return whether a job killed its workers, and is still the same."""
        failure: Mapping[str, Any] = self.failures[job.id]
        if failure.get("reason") != CRASHED:
            return False
        keys = attempt(partial(self.ledger.keys_of, job), self.folder)
        return isinstance(keys, Keys) and failure.get("key") == keys.video


@dataclass(frozen=True)
class Survey:
    """What is found. Each job's id is in one of the groups but `keys`; those of `impossible` and `given_up` say why.

    Attributes:
        keys: the keys of the jobs of which they are known: they read nothing that has yet to be made.
        done: made already.
        drafted: there is a draft, and no more is asked for.
        impossible: cannot be made, which is not recorded yet.
        given_up: have killed their workers too often.
        left: not to be tried by this command.
        waiting: read the result of a job of which there is, or will be, only a draft.
        unchosen: not to be finished by this command.
        failed_earlier: the same, and failed when they were last tried.
        todo: to make, each after those that it reads.
        company: the jobs from which batches are chosen, done or not, so that a batch is the same after an interrupt.
    """

    keys: Mapping[str, Keys]
    done: Set[str]
    drafted: Sequence[str]
    impossible: Mapping[str, Failure]
    given_up: Mapping[str, str]
    left: Set[str]
    waiting: Set[str]
    unchosen: Set[str]
    failed_earlier: Set[str]
    todo: Sequence[Job]
    company: Sequence[Job]


def survey(jobs: Jobs, retry_failed: bool, chosen: Set[str] | None) -> Survey:
    """Find out how far jobs are, and which are to be made.

    Args:
        jobs: the jobs of the manifest.
        retry_failed: make only the jobs that failed before.
        chosen: the ids of the jobs that are to be finished, with those that they read; None: all jobs are to be made.
    """
    impossible = jobs.checks.failures()
    keys, done, drafted, given_up = {}, set[str](), list[str](), dict[str, str]()
    for job in jobs.in_order():
        if job.id in impossible:
            continue
        is_done = False
        # What reads a job that has yet to be made shows its key later.
        if done.issuperset(jobs.reads[job.id]) and not isinstance(found := jobs.find(job), Failure):
            keys[job.id], is_done = found
        if is_done:
            done.add(job.id)
        elif not retry_failed and jobs.is_given_up(job):
            given_up[job.id] = str(jobs.failures[job.id].get("error"))
        elif job.id in keys and jobs.is_drafted(job, keys[job.id]):
            drafted.append(job.id)
    open_jobs = [job for job in jobs.in_order() if job.id not in done | impossible.keys() | given_up.keys()]
    ids = {job.id for job in open_jobs}
    left = {id for id in ids.difference(drafted) if not jobs.failures[id]} if retry_failed else set()
    readers, aside = set[str](), set[str]()
    if jobs.draft_steps:
        readers = readers_of_drafts(open_jobs, jobs.reads, jobs.geometry, jobs.draft_steps) - {*drafted} - left
    if chosen is not None:
        if ready := sorted(done & chosen):
            log.info("chosen, but made already: %s", join_names(ready))
        aside = {*jobs.ids} - done - with_inputs(chosen, jobs.reads)
    failed_earlier = {id for id in aside if jobs.failures[id]}
    unchosen = aside - failed_earlier
    waiting = {id for id in unchosen if jobs.manifest.drafts and not unchosen.isdisjoint(jobs.reads[id])}
    settled = left | readers | aside | {*drafted}
    return Survey(
        keys,
        done,
        drafted,
        {id: failure for id, failure in impossible.items() if id not in aside},
        {id: error for id, error in given_up.items() if id not in aside},
        left,
        readers | waiting,
        unchosen - waiting,
        failed_earlier,
        [job for job in open_jobs if job.id not in settled],
        [job for job in jobs.in_order() if job.id not in left | readers and (job.id in done or job.id in ids)],
    )
