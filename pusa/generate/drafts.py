"""Drafts: what jobs seem to become after some steps, decoded so that a person may choose which of them to finish.

`drafts/<id>.mp4` is published like a video: first the file, last its record `<id>.json`, which has the job's key. The
state of the sampling, from which the chosen ones are continued, stays in `.work/` (`Saved` in saved.py). It holds
the estimates that drafts are decoded from, so a kill between sampling and decoding costs nothing.
"""

import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pusa.backbones.family import Geometry
from pusa.generate.decode import aborting, write_chunks, write_poster
from pusa.generate.ledger import CRASHED, DRAFT, DRAFTS, STATE, Keys, Ledger, read_failure, read_good_record
from pusa.generate.outputs import LATENTS, RECORD, VIDEO
from pusa.generate.records import describe_briefly
from pusa.generate.sampling import pass_after, total_steps
from pusa.generate.saved import State, read_progress
from pusa.system.failures import Failure, attempt
from pusa.system.files import remove, sha256_file
from pusa.system.text import join_names
from pusa.tasks.base import Job
from pusa.video.media import VideoWriter
from pusa.weights.model import Model

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Draft:
    """An estimate of a job's clean latents x0_CFhw after `steps` of `total` steps.

    `shown` are the latent frames whose sampling has begun, of `frames` in the pass that is under way. This pass is
    `number` of `passes`. `is_ring` says that it makes the ring of a loop.
    """

    x0_CFhw: Tensor
    steps: int
    total: int
    shown: range
    frames: int
    is_ring: bool
    number: int
    passes: int

    @classmethod
    def of(cls, job: Job, geometry: Geometry, x0_CFhw: Tensor, steps: int) -> "Draft":
        """Return the draft of a job after `steps` steps, 1 or more, of all passes."""
        passes = job.passes(geometry)
        index, made = pass_after(passes, job.steps, steps)
        starts, is_ring = passes[index].timeline.starts, job.cyclic and index == len(passes) - 1
        begun = [frame for frame, start in enumerate(starts) if start < made]  # one after the other, or all at once
        shown = range(begun[0], begun[-1] + 1)
        return cls(x0_CFhw, steps, total_steps(job, geometry), shown, len(starts), is_ring, index + 1, len(passes))

    def facts(self) -> dict[str, Any]:
        """Return what the record of a draft says about it."""
        shows: dict[str, Any] = {"latent_frames": [self.shown[0], self.shown[-1]], "of": self.frames}
        shows |= {"pass": self.number, "passes": self.passes} if self.passes > 1 else {}
        return {"steps": self.steps, "total_steps": self.total, "shows": shows}


def stop_for_drafts(job: Job, geometry: Geometry, steps: int, saved: State | None) -> int | None:
    """Return the step at which the sampling of a job's batch stops for its drafts; None if it is made to the end.

    Args:
        job: any job of the batch.
        geometry: of the model.
        steps: the steps of a draft; 0: no drafts are wanted.
        saved: what is sampled already. Where this lacks the estimates of drafts, one more step gives them.
    """
    total = total_steps(job, geometry)
    if not 0 < steps < total:
        return None
    if saved is None:
        return steps
    if saved.x0_BCFhw is not None:
        return max(steps, saved.done)
    stop = max(steps, saved.done + 1)
    return stop if stop < total else None


def is_drafted(ledger: Ledger, job: Job, keys: Keys, steps: int) -> bool:
    """Return whether an intact draft of a job's key after at least `steps` steps is there, and nothing that is newer.

    A job whose latents are sampled to the end only has to be decoded.

    Raises:
        MediaError: a file cannot be read.
    """
    record = read_good_record(ledger.folder / DRAFTS, job.id, DRAFT)
    made = record.get("steps")
    if record.get("key") != keys.video or not isinstance(made, int) or made < steps:
        return False
    return ledger.sampled(job, keys) is None


def readers_of_drafts(
    jobs: Iterable[Job], reads: Mapping[str, Sequence[str]], geometry: Geometry, steps: int
) -> set[str]:
    """Return the ids of the jobs that have to wait, since they read the result of a job that is made as a draft.

    Args:
        jobs: those that are neither made nor failed, each after those that it reads. Why they wait is logged.
        reads: for each job the ids of those whose results it reads.
        geometry: of the model.
        steps: the steps of a draft. A job with no more steps is made to the end.
    """
    drafts: set[str] = set()
    waits: dict[str, str] = {}
    for job in jobs:
        if read := next((id for id in reads[job.id] if id in drafts), None):
            waits[job.id] = read
        if read or total_steps(job, geometry) > steps:
            drafts.add(job.id)
    if waits:
        log.info("%s", describe_waits(waits))
    return {*waits}


def describe_waits(waits: Mapping[str, str]) -> str:
    """Return a sentence about jobs that wait for others, of which there are only drafts."""
    if len(waits) == 1:
        ((id, read),) = waits.items()
        return f"{id} waits for {read}, which is a draft; `pusa finish` makes both"
    which = join_names([f"{id} (for {read})" for id, read in waits.items()])
    return f"{len(waits):,} jobs wait for others, which are drafts; `pusa finish` makes both: {which}"


def with_inputs(ids: Iterable[str], reads: Mapping[str, Sequence[str]]) -> set[str]:
    """Return the ids of jobs, and of all jobs whose results these read."""
    found, todo = set(ids), [*ids]
    while todo:
        new = set(reads[todo.pop()]) - found
        found |= new
        todo += new
    return found


def write_draft_video(job: Job, model: Model, draft: Draft, path: Path, poster: Path) -> Callable[[], dict[str, Any]]:
    """Decode a draft and hand the frames to ffmpeg, which writes them to `path`; write its middle frame to `poster`.

    Returns:
        A function that waits for ffmpeg and returns the facts for the record, as that of `write_job_video`.

    Raises:
        NotFiniteError, NoMemoryError: as `Model.decode_chunks`.
        OSError: ffmpeg ended, or (of the function that is returned) its file is incomplete.
    """
    x0_CFhw = draft.x0_CFhw[:, draft.shown.start : draft.shown.stop]
    geometry = model.backbone.geometry
    count = geometry.temporal * len(draft.shown) if draft.is_ring else geometry.num_frames(len(draft.shown))
    writer = VideoWriter(path, job.fps, provenance=describe_briefly(job))
    chunks = model.decode_ring_chunks(x0_CFhw) if draft.is_ring else model.decode_chunks(x0_CFhw)
    with aborting(writer):
        if (middle_HWC := write_chunks(writer, chunks, count)) is not None:
            _write_poster(poster, middle_HWC)

    def finish() -> dict[str, Any]:
        with aborting(writer):
            writer.finish()
            return {**draft.facts(), "video_sha256": sha256_file(path)}

    return finish


def _write_poster(path: Path, frame_HWC: np.ndarray) -> None:
    """Write the picture of a draft. It is worth no draft: a problem is only logged, but for that of a full disk."""
    written = attempt(partial(write_poster, path, frame_HWC), None)
    if isinstance(written, Failure):
        log.warning("%s could not be written: %s", path, written.message)


def remove_drafts(folder: Path, ids: Collection[str]) -> None:
    """Remove the drafts of jobs that are made. The record goes first: a draft without one counts as none."""
    with suppress(FileNotFoundError):
        for end in (RECORD, VIDEO):
            for name in os.listdir(folder / DRAFTS):
                if name.endswith(end) and name.removesuffix(end) in ids:
                    remove(folder / DRAFTS / name)


def remove_leftovers(ledger: Ledger, jobs: Sequence[Job], done: Collection[str]) -> None:
    """Remove what jobs need no more and a kill has left. Call it only while alone.

    The state of a batch stays while a job of it can be continued: one that is neither made, nor was changed, nor has
    failed since. Jobs that were given up may get more memory; and what is of other manifests stays as well.

    Args:
        ledger: of the jobs' files.
        jobs: all jobs of the manifest.
        done: the ids of those that are made.
    """
    for id in done:
        remove(ledger.work(f"{id}{LATENTS}"))
    states = [path for job in jobs if (path := ledger.work(f"{job.id}{STATE}")).exists()]
    if not states:  # the keys of thousands of jobs take seconds
        return
    keys = {job.id: attempt(partial(ledger.keys_of, job), None) for job in jobs if job.id not in done}
    by_key = {key.latents: id for id, key in keys.items() if isinstance(key, Keys)}
    for path in states:
        ids = [by_key[key] for key in (read_progress(path) or ((),))[0] if key in by_key]
        if not any(_may_continue(ledger, id, path) for id in ids):
            remove(path)


def _may_continue(ledger: Ledger, id: str, state: Path) -> bool:
    """Return whether a job did not fail since a state of its batch was saved, or was given up."""
    failure = read_failure(ledger.folder, id)
    if not failure or failure.get("reason") == CRASHED:
        return True
    return ledger.path(id, RECORD).stat().st_mtime_ns < state.stat().st_mtime_ns
