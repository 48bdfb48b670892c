"""Stage 4: make a video of each job. What is done is read off the jobs' files, so a rerun resumes.

This process plans and hands out chunks of jobs (run.py, chunks.py); slots make them (worker.py): this process itself,
or a resident process for each GPU. Any number of commands, on any machines that share the run folder, share the jobs.
What a job is and how far it is, ledger.py knows.
"""

import logging
import shlex
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from math import inf
from pathlib import Path
from typing import ClassVar

from pusa.errors import PartlyFailed
from pusa.generate.chunks import next_time
from pusa.generate.drafts import remove_drafts, remove_leftovers
from pusa.generate.gallery import LiveGallery, write_gallery, write_sheet
from pusa.generate.ledger import DRAFTS, WORK
from pusa.generate.listed import NewestList, list_jobs
from pusa.generate.outputs import PREVIEW, PREVIEWS, VIDEO
from pusa.generate.run import Run
from pusa.generate.survey import Jobs, survey
from pusa.manifest.models import GenerateManifest, ModelSpec
from pusa.system.failures import Failure, attempt
from pusa.system.files import digest, make_own_folder, remove, remove_partials, require_own
from pusa.system.locks import join_work, remove_work_locks
from pusa.system.slots import Slot, Step, call_directly
from pusa.system.text import join_names, shown_path
from pusa.video.formats import UNFINISHED
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
        left: not tried, since only failed jobs were to be tried again, or a manifest that was started later changes
            them.
        drafted: not made, but with a draft, made by this command or before.
        not_begun: there was no time for them (`until`).
        unchosen: others were chosen to be finished.
        waiting: they read the result of a job of which there is only a draft.
        failed_earlier: failed before, and others were chosen to be finished.
        not_shown: why the gallery, the sheet or a record could not be written.
    """

    TITLES: ClassVar[Mapping[str, str]] = {  # in the words that people read, where the name is not enough
        "kept": "made already",
        "left": "not tried",
        "unchosen": "not chosen",
        "waiting": "waiting for drafts",
    }

    videos: Path
    gallery: Path
    sheet: Path
    made: list[str]
    kept: list[str]
    failed: dict[str, str]
    left: list[str] = field(default_factory=list)
    drafted: list[str] = field(default_factory=list)
    not_begun: list[str] = field(default_factory=list)
    unchosen: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    failed_earlier: list[str] = field(default_factory=list)
    not_shown: list[str] = field(default_factory=list)

    @property
    def next_step(self) -> str:
        """Return what a person does next; "" if nothing is left to do."""
        if not self.drafted:
            return ""
        run = shlex.quote(shown_path(self.videos.parent))
        return f"next: choose in the gallery, then `pusa finish {run} --list chosen.txt`"

    def require_all(self) -> None:
        """Raise PartlyFailed if a job failed, or something could not be written. What is `made` is on disk."""
        problems = list(self.not_shown)
        if self.failed:
            others = (self.left, self.drafted, self.not_begun, self.unchosen, self.waiting, self.failed_earlier)
            rest = "" if any(others) else "; all other videos are made"
            where = f"each error is in {self.videos}/<id>.json{rest}"
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
    slots: Sequence[Slot] = (),
    shown: bool = True,
    chosen: Set[str] | None = None,
    stop_at: float | None = None,
    clock: Callable[[], float] = time.time,
) -> Generated:
    """Make each video that is missing, or with `drafts` each draft. A job that fails is recorded, others are made.

    Args:
        manifest: the jobs and their model.
        run_dir: the folder of the run; videos are written to `run_dir/videos`.
        new_model: builds the model; in a process of its own, a function that can be pickled.
        retry_failed: make only the jobs that failed before.
        step: calls a function that makes a chunk of jobs; it gets a name for it, too.
        slots: where chunks are made; default: the slots of the manifest's `place`.
        shown: whether the list of jobs, which other commands read, the gallery and the sheet become this manifest's.
        chosen: the ids of jobs that are to be made to the end, with those that they read; no others are touched.
        stop_at: when no more work is started, in seconds since the epoch; default: the manifest's `until`.
        clock: returns the time, in seconds since the epoch.

    Raises:
        WeightsError: the model cannot be found or loaded.
        StageError: another command writes there with other weights, workers die before they begin, or the folder was
            moved or removed meanwhile.
        OSError: nothing more can be written.
    """
    manifest = manifest.resolve_paths(run_dir)
    require_model(manifest.model)
    seconds_left = _clock_of(manifest, stop_at, clock)
    model, folder = new_model(manifest.model), run_dir / "videos"
    require_own(folder)  # before the weights are hashed, which may take minutes
    fingerprints = fingerprints_of(model)
    with join_work(folder, partial(_clean_up, folder), {"made_from": digest(fingerprints)}) as group:
        live = LiveGallery(folder, [job.id for job in manifest.jobs])
        step = live.after(step) if shown else step
        jobs = Jobs(manifest, model, group, fingerprints, drafting=chosen is None)
        found, newest = survey(jobs, retry_failed, chosen), NewestList(folder) if shown else None
        run = Run(jobs, found, model, new_model, step, slots, newest, seconds_left)
        run.begin()
        if shown:
            list_jobs(jobs.ledger, found.keys, manifest, again=chosen is not None)
            live.write()
        run.make_all()
        result = _outcome(run)
        done = {*result.made, *result.kept}
        with group.lock(".gallery", wait=True):
            group.require_in_place()
            remove_drafts(folder, done)
            result.not_shown.extend(run.not_recorded + (_show(folder, jobs.ids) if shown else []))
        if group.is_alone():
            remove_work_locks(folder)
            remove_leftovers(jobs.ledger, manifest.jobs, done)
    return result


def _clock_of(manifest: GenerateManifest, stop_at: float | None, clock: Callable[[], float]) -> Callable[[], float]:
    """Return what tells the seconds in which work may still be started."""
    if stop_at is None and manifest.until:
        stop_at = next_time(manifest.until, clock())
    return (lambda: inf) if stop_at is None else (lambda: stop_at - clock())


def _outcome(run: Run) -> Generated:
    ids, found = run.jobs.ids, run.found
    drafted = run.drafted.keys() - run.failed.keys()
    aside = run.left | found.unchosen | found.waiting | found.failed_earlier | {*run.not_begun}
    kept = {*ids} - run.made.keys() - run.failed.keys() - drafted - aside
    return Generated(
        videos=run.folder,
        gallery=run.folder / "gallery.html",
        sheet=run.folder / "gallery.jpg",
        made=list(run.made),
        kept=[id for id in ids if id in kept],
        failed={id: run.failed[id] for id in ids if id in run.failed},
        left=[id for id in ids if id in run.left],
        drafted=[id for id in ids if id in drafted],
        not_begun=run.not_begun,
        unchosen=[id for id in ids if id in found.unchosen],
        waiting=[id for id in ids if id in found.waiting],
        failed_earlier=[id for id in ids if id in found.failed_earlier],
    )


def fingerprints_of(model: Model) -> dict[str, str]:
    """Return what the jobs' keys hold of a model: the hashes of its weights, and how it uses them.

    Raises:
        WeightsError: a part is missing, is not of the family, or was changed since it was first read.
    """
    fingerprints = {**model.fingerprints(), "latent_space": model.space_name}
    if model.boundary is not None:  # between two transformers
        fingerprints["boundary"] = str(model.boundary)
    if model.spec.vae_dtype:
        fingerprints["vae_dtype"] = model.spec.vae_dtype
    return fingerprints


def _clean_up(folder: Path) -> None:
    """Remove what killed commands left. Call it only while alone."""
    remove_work_locks(folder)
    work = folder / WORK
    make_own_folder(work, "unfinished work")
    remove_partials(work)
    remove_partials(folder / DRAFTS)
    remove_partials(folder / PREVIEWS)
    for path in work.iterdir():
        if path.name.endswith((VIDEO, PREVIEW, *UNFINISHED)):
            remove(path)


def _show(folder: Path, ids: list[str]) -> list[str]:
    """Write the gallery and the contact sheet; return the problems, of which none costs a video."""
    problems = []
    for name, write in (("the gallery", write_gallery), ("the contact sheet", write_sheet)):
        shown = attempt(partial(write, folder, ids), folder)
        if isinstance(shown, Failure):
            log.error("%s could not be written: %s\n%s", name, shown.message, shown.traceback)
            problems.append(f"{name} could not be written: {shown.message}")
    return problems
