"""Make a chunk of jobs in one slot, phase by phase, so that each part of the model is moved once and not for each job.

All prompts are encoded, then all inputs, then all batches are sampled, then all videos are decoded, while ffmpeg ends
the one before in the background. The worker holds the lock of each job, and looks again at what is done.
"""

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Set
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from secrets import token_hex
from time import monotonic
from typing import TypeVar

import torch
from torch import Tensor

from pusa.errors import MediaError, NotFiniteError
from pusa.generate.check import describe_inputs
from pusa.generate.chunks import Batch, Chunk
from pusa.generate.decode import write_job_video
from pusa.generate.drafts import Draft, is_drafted, stop_for_drafts, write_draft_video
from pusa.generate.encodings import Encodings
from pusa.generate.given import GivenFrames
from pusa.generate.ledger import STATE, InputHashes, Keys, Ledger
from pusa.generate.messages import Busy, Ended, Setup, Stepped
from pusa.generate.outputs import PREVIEW, PREVIEWS, VIDEO
from pusa.generate.previews import Previews
from pusa.generate.records import SAMPLED, describe_making, describe_provenance, describe_sampling, describe_seconds
from pusa.generate.sampling import Prepared, prepare, rows_of, sample_together, total_steps
from pusa.generate.saved import Saved
from pusa.generate.timings import seconds_of
from pusa.system.failures import Failure, attempt
from pusa.system.files import digest
from pusa.system.locks import WorkGroup, join_as_worker
from pusa.system.slots import Emit
from pusa.system.threads import DaemonThreadPool
from pusa.tasks.base import Job
from pusa.video.provenance import Provenance
from pusa.weights.model import Model

MOST_ENDING = 2  # videos whose ffmpeg ends in the background
Value = TypeVar("Value")


_kept: dict[str, tuple[Model, Encodings, Previews]] = {}  # of the run that this process works for


def keep(setup: Setup, model: Model) -> None:
    """Keep the model of a run in this process, and let go of that of any other run."""
    _kept.clear()
    encodings = Encodings(model, setup.encodings)
    _kept[setup.run] = model, encodings, Previews(setup.folder, setup.preview_every, model, encodings)


def let_go() -> None:
    """Let go of the model that this process keeps."""
    _kept.clear()


def make_chunk(setup: Setup, chunk: Chunk, emit: Emit) -> None:
    """Make the jobs of a chunk that are left to make and that no other process holds; report each that ends.

    Raises:
        WeightsError: the model cannot be loaded.
        StageError: the run folder was moved or removed meanwhile.
        OSError: nothing more can be written.
    """
    if setup.run not in _kept:
        model = setup.new_model(setup.spec)
        model.expect(setup.known)
        keep(setup, model)
    with join_as_worker(setup.folder) as group, ExitStack() as locks:
        held = [batch for batch in chunk.batches if _lock_all(chunk.todo & {job.id for job in batch}, group, locks)]
        _Chunk(setup, group, emit, *_kept[setup.run]).make(held, chunk.todo)


def _lock_all(ids: Iterable[str], group: WorkGroup, locks: ExitStack) -> bool:
    """Take the locks of all these jobs, or of none if another process has one."""
    with ExitStack() as own:
        if not all(own.enter_context(group.lock(id)) for id in ids):
            return False
        locks.push(own.pop_all())
    return True


class _Chunk:
    """One chunk in the making."""

    def __init__(
        self, setup: Setup, group: WorkGroup, emit: Emit, model: Model, encodings: Encodings, previews: Previews
    ) -> None:
        self.setup, self.group, self.emit = setup, group, emit
        self.model, self.encodings, self.previews = model, encodings, previews
        geometry = model.backbone.geometry
        self.ledger = Ledger(setup.folder, geometry, setup.fingerprints, InputHashes(), setup.keep_old)
        self.keys: dict[str, Keys] = {}
        self.given: dict[str, list[str]] = {}  # of each job, a description of its inputs
        self.encoded_in: dict[str, float] = {}  # of each job's inputs, seconds
        self.sampled_in: dict[str, float] = {}  # of each job, seconds
        self.given_frames = GivenFrames(model, encodings, self.ledger.hashes)
        self.drafts: dict[str, Draft] = {}  # that are sampled, and have yet to be decoded
        self.at_work = Busy(())
        model.loading = self._loading
        self.ended: set[str] = set()  # of which nothing is to be reported any more

    def make(self, batches: list[Batch], ids: Set[str]) -> None:
        """Make the jobs of the batches that have these ids, as far as they are left to make."""
        self.ended |= {job.id for batch in batches for job in batch} - ids
        todo, to_sample = [], []
        for batch in batches:
            left = [job for job in batch if job.id not in self.ended and self._is_left(job)]
            missing = {job.id for job in left if self.ledger.sampled(job, self.keys[job.id]) is None}
            todo += left
            if missing:
                to_sample.append((batch, missing))
        # What shares a batch changes the last bits of a result. So jobs that are made already are sampled again beside
        # the others of their batch: a run that was interrupted gives the same bytes as one that was not.
        prepared = self._prepare([job for batch, _ in to_sample for job in batch])
        if prepared:
            self._begin(())  # no job is to blame for what the previews need
            self.previews.fit()
        for batch, missing in to_sample:
            company = [prepared.pop(job.id) for job in batch if job.id in prepared]
            if any(one.job.id in missing for one in company):
                self._sample(company, missing)
        self._decode([job for job in todo if job.id not in self.ended])

    def _begin(self, jobs: Iterable[Job], doing: str = "") -> None:
        """Report the jobs that are worked on from now on, and how."""
        self.at_work = Busy(tuple(job.id for job in jobs), doing)
        self.emit(self.at_work)

    @contextmanager
    def _loading(self, part: str) -> Iterator[None]:
        """Report that no job is worked on while a part is loaded, which may take more memory than there is."""
        self.emit(Busy((), f"loading {part}"))
        yield
        self.emit(self.at_work)

    def _is_left(self, job: Job) -> bool:
        """Return whether a job is to be made; report it if it is made already, or cannot be made."""
        if self._attempt(job, partial(self._is_done, job)) is True:
            self.ledger.forget_failure(job.id)
            self._end(Ended(job.id))
        elif job.id not in self.ended and self._attempt(job, partial(self._is_drafted, job)) is True:
            self._end(Ended(job.id, drafted=True))
        return job.id not in self.ended

    def _is_done(self, job: Job) -> bool:
        self.keys[job.id] = self.ledger.keys_of(job)
        return self.ledger.is_done(job, self.keys[job.id], job.id in self.setup.needed)

    def _is_drafted(self, job: Job) -> bool:
        steps = self.setup.draft_steps
        return steps > 0 and is_drafted(self.ledger, job, self.keys[job.id], steps)

    def _is_waiting(self, job: Job) -> bool:
        """Return whether a job that only shares a batch may be continued later, from the state of the batch."""
        keys = self.keys[job.id]
        done = attempt(partial(self.ledger.is_done, job, keys), self.setup.folder)
        return done is not True and self.ledger.sampled(job, keys) is None

    def _prepare(self, jobs: list[Job]) -> dict[str, Prepared]:
        """Encode all prompts, then all inputs, and return what each job is sampled from."""
        prompts: dict[str, list[Job]] = {}
        for job in jobs:
            for prompt in dict.fromkeys((job.prompt, job.negative_prompt) if job.guidance != 1 else (job.prompt,)):
                prompts.setdefault(prompt, []).append(job)
        lost: set[str] = set()
        for prompt, its_jobs in prompts.items():
            self._begin(its_jobs, "reading prompts")
            encoded = attempt(partial(self.encodings.text, prompt), self.setup.folder)
            if isinstance(encoded, Failure):
                lost |= {job.id for job in its_jobs}
                for job in its_jobs:
                    self._fail(job, encoded)
        prepared = {}
        for job in jobs:
            if job.id not in lost:
                self._begin([job], "encoding inputs")
                found = self._attempt(job, partial(self._prepare_one, job))
                if not isinstance(found, Failure):
                    prepared[job.id] = found
        return prepared

    def _prepare_one(self, job: Job) -> Prepared:
        started = monotonic()
        self.given[job.id] = describe_inputs(job, self.model.backbone.geometry)
        keys = self.ledger.keys_of(job)  # an input may have been replaced since the chunk began
        prepared = prepare(job, self.model, self.encodings, self.ledger.hashes)
        self.ledger.hashes.require_unchanged(job)
        self.keys[job.id] = keys
        self.encoded_in[job.id] = monotonic() - started
        return prepared

    def _sample(self, company: list[Prepared], missing: set[str]) -> None:
        """Sample a batch, and keep the latents of the jobs that have none; if that fails, sample each job alone.

        Of drafts, the estimates of the clean latents are kept in memory, and the state of the batch in its file.
        """
        jobs, ledger = [prepared.job for prepared in company], self.ledger
        self._begin(jobs, "denoising")
        keys = [self.keys[job.id].latents for job in jobs]
        saved = Saved(ledger.work(f"{jobs[0].id}{STATE}"), digest(keys), self.setup.save_every, keys)
        started, done = monotonic(), saved.state.done if saved.state else 0

        def after_step(step: int, x0_BCFhw: Tensor) -> None:
            nonlocal done
            done += 1
            for job in jobs:
                if job.id in missing:
                    self.emit(Stepped(job.id, 1))
            self.previews.show(company, missing, done, x0_BCFhw)

        geometry = self.model.backbone.geometry
        stop = stop_for_drafts(jobs[0], geometry, self.setup.draft_steps, saved.state)
        stays = stop is not None or any(job.id not in missing and self._is_waiting(job) for job in jobs)
        if saved.state:  # what an earlier run has made of it
            for job in jobs:
                if job.id in missing:
                    self.emit(Stepped(job.id, saved.state.done, earlier=True))
        until = stop or (total_steps(jobs[0], geometry) if stays else None)
        sampled = attempt(
            lambda: self._drafts_in(saved, stop) or sample_together(company, self.model, after_step, saved, until),
            self.setup.folder,
        )
        if isinstance(sampled, Failure) and len(company) > 1:
            for one in company:
                if one.job.id in missing:
                    self._sample([one], missing)
            return
        described = describe_sampling(company, self.model)
        for i, job in enumerate(jobs):
            z_CFhw = sampled if isinstance(sampled, Failure) else sampled[i]
            if job.id not in missing:
                continue
            if isinstance(z_CFhw, Tensor):
                if stop is not None:
                    self.drafts[job.id] = Draft.of(job, geometry, z_CFhw, stop)
                else:
                    self._attempt(job, partial(self._save, job, z_CFhw, described[i]))
                self.sampled_in[job.id] = (monotonic() - started) / len(jobs)
            else:
                self._fail(job, z_CFhw if isinstance(z_CFhw, Failure) else Failure(str(z_CFhw)))
        if not stays:
            saved.remove()

    def _drafts_in(self, saved: Saved, stop: int | None) -> list[Tensor | NotFiniteError]:
        """Return the drafts that a saved state holds; none if it has to be sampled first."""
        state = saved.state
        if stop is None or state is None or state.done != stop or state.x0_BCFhw is None:
            return []
        return rows_of(state.x0_BCFhw, state.failed or {})

    def _save(self, job: Job, z_CFhw: Tensor, described: str) -> None:
        self.group.require_in_place()
        facts = {"latent_space": self.model.space_name, "cyclic": str(job.cyclic).lower(), SAMPLED: described}
        self.ledger.save_sampled(job, self.keys[job.id], z_CFhw, facts)

    def _decode(self, jobs: list[Job]) -> None:
        """Decode the jobs' videos; while one is decoded, ffmpeg ends those before, which are then published."""
        ending: deque[tuple[Job, Future[Ended | Failure]]] = deque()
        with closing(DaemonThreadPool(MOST_ENDING)) as background:
            try:
                for job in jobs:
                    self._begin([job], "decoding")
                    start = self._start_draft if job.id in self.drafts else self._start_video
                    finish = self._attempt(job, partial(start, job))
                    if not isinstance(finish, Failure):
                        ending.append((job, background.submit(attempt, finish, self.setup.folder)))
                    while len(ending) > MOST_ENDING or (ending and ending[0][1].done()):
                        self._end_video(*ending.popleft())
                while ending:
                    self._end_video(*ending.popleft())
            finally:
                for _, ended in ending:  # a job's lock is held until nobody writes its files any more
                    ended.exception()

    def _start_video(self, job: Job) -> Callable[[], Ended]:
        """Decode a job's latents; return a function that waits for ffmpeg, then publishes the video."""
        z_CFhw = self.ledger.sampled(job, self.keys[job.id])
        if z_CFhw is None:
            raise MediaError(f"the latents of job {job.id} were removed before they were decoded; run again")
        started = monotonic()
        # The ffmpeg of a killed worker may still write: it must not have the file that becomes the video.
        video = self.ledger.work(f"{job.id}.{token_hex(4)}{VIDEO}")
        compared = self.given_frames.read(job, self.keys[job.id].inputs)
        close = write_job_video(job, self.model, z_CFhw, video, job.formats, self._provenance(job), compared)
        if job.exact:  # it reads the inputs again
            self.ledger.hashes.require_unchanged(job)
        given = self.given.get(job.id) or describe_inputs(job, self.model.backbone.geometry)

        def finish() -> Ended:
            facts = close()
            self.group.require_in_place()
            times = {"sample": self.sampled_in.get(job.id), "decode": monotonic() - started}
            seconds = describe_seconds(encode=self.encoded_in.get(job.id), **times)
            making = describe_making(job, self.model, self.setup.slot)
            about = {"given": given, **facts, "seconds": seconds, **making}
            self.ledger.publish(job, self.keys[job.id], video, about)
            return Ended(job.id, True, seconds=seconds_of(about), warning=facts.get("warning", ""))

        return finish

    def _provenance(self, job: Job) -> Provenance:
        keys = self.keys[job.id]
        sampled = self.ledger.facts_of_latents(job, keys).get(SAMPLED, "")

        def hash_of(path: Path) -> str:
            return keys.inputs.get(str(path)) or self.ledger.hashes.hash_of(path)

        return describe_provenance(job, keys.video, self.model, self.setup.fingerprints, hash_of, sampled)

    def _start_draft(self, job: Job) -> Callable[[], Ended]:
        """Decode a job's draft; return a function that waits for ffmpeg, then publishes it."""
        draft, started, folder = self.drafts.pop(job.id), monotonic(), self.setup.folder
        video = self.ledger.work(f"{job.id}.{token_hex(4)}{VIDEO}")
        poster = folder / PREVIEWS / f"{job.id}{PREVIEW}"
        close = write_draft_video(job, self.model, draft, video, poster)

        def finish() -> Ended:
            facts = close()
            self.group.require_in_place()
            seconds = {"sample": self.sampled_in[job.id], "decode": monotonic() - started}
            known = {name: round(value, 3) for name, value in seconds.items()}
            making = describe_making(job, self.model, self.setup.slot)
            about = {"given": self.given.get(job.id, []), **facts, "seconds": known, **making}
            self.ledger.publish_draft(job, self.keys[job.id], video, about)
            return Ended(job.id, drafted=True, seconds=sum(known.values()))

        return finish

    def _end_video(self, job: Job, ending: "Future[Ended | Failure]") -> None:
        ended = ending.result()
        if isinstance(ended, Failure):
            self._fail(job, ended)
        else:
            self._end(ended)

    def _attempt(self, job: Job, make: Callable[[], Value]) -> Value | Failure:
        """Return the result of `make`; record why it failed if it does."""
        made = attempt(make, self.setup.folder)
        if isinstance(made, Failure):
            self._fail(job, made)
        return made

    def _fail(self, job: Job, failure: Failure) -> None:
        """Record a failure; it is none of a job that only shares a batch, whose lock this process does not hold."""
        if job.id in self.ended:
            return
        recorded = attempt(partial(self.ledger.record_failure, job, failure), self.setup.folder)
        unrecorded = recorded.message if isinstance(recorded, Failure) else ""
        self._end(Ended(job.id, failure=failure, unrecorded=unrecorded))
        if failure.traceback:  # it may have been for memory: give back all of it, which the next job may need
            gc.collect()
            torch.cuda.empty_cache()

    def _end(self, ended: Ended) -> None:
        self.ended.add(ended.id)
        self.emit(ended)
