"""Read how far the jobs of a run are, off its files alone: no server and no process is asked.

A video counts as done if its record has the job's key and the video the recorded hash. Its latents, which it no longer
needs, are not read here; the next run checks them.
"""

import os
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from pusa.errors import MediaError
from pusa.generate.latents import read_header, read_latents
from pusa.generate.ledger import DRAFT, DRAFTS, STATE, WORK, JobState, embeds_as, read_record, settings_in
from pusa.generate.listed import JOBS, ListedJob, listed_jobs
from pusa.generate.outputs import LATENTS, RECORD, VIDEO
from pusa.generate.saved import read_progress
from pusa.generate.summary import Made, Status
from pusa.generate.time_left import SavedSteps, Seen, seconds_left
from pusa.generate.timings import seconds_of
from pusa.system.disk import shortage
from pusa.system.files import State, read_object, sha256_file, state_of
from pusa.system.locks import LOCKS_FOLDER, holder_now
from pusa.video.formats import beside, hash_output

MTIME_NS = 3  # its place in a file's state


class StatusReader:
    """Read the status of a run again and again; files that did not change since are read once.

    Args:
        folder: the folder of the run's videos.
        now: returns the time, in seconds since the epoch.
        hashing: whether a video must have the recorded hash; without, it must only be there, which is quickly seen.
    """

    def __init__(self, folder: Path, now: Callable[[], float] = time.time, hashing: bool = True) -> None:
        self._folder, self._now, self._hashing = folder, now, hashing
        self._known: dict[tuple[Callable[[Path], Any], Path], tuple[State, Any]] = {}

    def read(self) -> Status:
        """Return the status now.

        Raises:
            MediaError: the folder has no list of jobs, or a damaged one.
        """
        list_file = self._folder / WORK / JOBS
        paused = shortage(self._folder, self._once(_read_min_free, list_file) or 0.0)
        listed: list[ListedJob] = self._once(_read_list, list_file) or _read_list(list_file)
        draft_steps: int = self._once(_read_draft_steps, list_file) or 0
        names = {folder: _names_in(self._folder / folder) for folder in ("", WORK, LOCKS_FOLDER, DRAFTS)}
        steps = self._steps_made(names[WORK])
        seen = {job.id: self._look_at(job, names, steps.get(job.latents_key), draft_steps) for job in listed}
        videos = {name.removesuffix(VIDEO) for name in names[""] if name.endswith(VIDEO) and not name.startswith(".")}
        # What reads a job that is not made has no key. It waits for `pusa finish`, once the others are drafted.
        waiting = [
            id
            for id, one in seen.items()
            if draft_steps and one.job.key is None and one.state == JobState.PENDING and not one.holder
        ]
        known = [one for id, one in seen.items() if id not in waiting]
        return Status(
            {id: one.state for id, one in seen.items()},
            {id: _failure_of(one.job, one.record) for id, one in seen.items() if one.state == JobState.FAILED},
            {id: _describe_work(one) for id, one in seen.items() if one.holder},
            len(videos - seen.keys()),
            seconds_left(known, draft_steps, self._time_of(_read_list, list_file), self._now()),
            {id: _made(one) for id, one in seen.items() if one.state == JobState.DONE},
            paused,
            waiting,
            draft_steps > 0,
            self._folder.parent,
        )

    def _look_at(
        self, job: ListedJob, names: Mapping[str, Collection[str]], saved: SavedSteps | None, draft_steps: int
    ) -> Seen:
        """Return how far a job is.

        Args:
            job: the job.
            names: the names in each folder.
            saved: its saved sampling.
            draft_steps: the steps of drafts; 0 if none are made.
        """
        lock, folder = f"{job.id}.lock", self._folder
        record: Mapping[str, Any] = self._once(read_record, folder / f"{job.id}{RECORD}") or {}
        if self._is_done(job, record, names[""]):
            at = self._time_of(read_record, folder / f"{job.id}{RECORD}")
            return Seen(job, JobState.DONE, at, record, {}, saved, "")
        holder = (holder_now(folder / LOCKS_FOLDER / lock) or "") if lock in names[LOCKS_FOLDER] else ""
        draft = self._draft(job, names[DRAFTS], draft_steps)
        state, at = JobState.SAMPLING if saved else JobState.PENDING, 0.0
        if not holder and _failure_of(job, record):
            state = JobState.FAILED
        elif job.latents_key and job.latents_key in self._latents_keys(job, names):
            state, at = JobState.SAMPLED, self._time_of(_latents_key, folder / WORK / f"{job.id}{LATENTS}")
        elif draft:
            state, at = JobState.DRAFTED, self._time_of(read_record, folder / DRAFTS / f"{job.id}{RECORD}")
        return Seen(job, state, at, record, draft, saved, holder)

    def _is_done(self, job: ListedJob, record: Mapping[str, Any], names: Collection[str]) -> bool:
        """Return whether a job's video is the one that its record describes."""
        if record.get("status") != "done" or not _is_of(job, record):
            return False
        if not embeds_as(job.settings.get("embed", "all"), record):
            return False
        video, hashes = self._folder / f"{job.id}{VIDEO}", record.get("hashes")
        known = hashes if isinstance(hashes, dict) else {}
        for path, sha256 in (
            (video, record.get("video_sha256")),
            *((beside(video, name), known.get(name)) for name in job.settings.get("formats", ())),
        ):
            if sha256 is None or not (self._once(hash_output, path) == sha256 if self._hashing else path.name in names):
                return False
        return True

    def _draft(self, job: ListedJob, names: Collection[str], steps: int) -> Mapping[str, Any]:
        """Return the record of a job's draft after at least `steps` steps; empty if there is none."""
        record_file, video = f"{job.id}{RECORD}", f"{job.id}{VIDEO}"
        if not {record_file, video} <= set(names):
            return {}
        record = self._once(read_record, self._folder / DRAFTS / record_file) or {}
        made = record.get("steps")
        if record.get("status") != DRAFT or not _is_of(job, record) or not isinstance(made, int) or made < steps:
            return {}
        if self._hashing and self._once(sha256_file, self._folder / DRAFTS / video) != record.get("video_sha256"):
            return {}
        return record

    def _steps_made(self, names: Collection[str]) -> dict[str | None, SavedSteps]:
        """Return how far saved samplings are, by the key of a job's latents."""
        steps: dict[str | None, SavedSteps] = {}
        for name in names:
            path = self._folder / WORK / name
            if name.endswith(STATE) and (found := self._once(read_progress, path)):
                keys, done, total = found
                steps |= dict.fromkeys(keys, SavedSteps(done, total, self._time_of(read_progress, path)))
        return steps

    def _latents_keys(self, job: ListedJob, names: Mapping[str, Collection[str]]) -> list[str | None]:
        """Return the keys of a job's intact latents, in either place where they may be."""
        file = f"{job.id}{LATENTS}"
        return [
            self._once(_latents_key, self._folder / folder / file) for folder in (WORK, "") if file in names[folder]
        ]

    def _time_of(self, read: Callable[[Path], Any], path: Path) -> float:
        """Return when a file that was read was written, in seconds since the epoch; 0 if it was not read."""
        known = self._known.get((read, path))
        return known[0][MTIME_NS] / 1e9 if known else 0.0

    def _once(self, read: Callable[[Path], Any], path: Path) -> Any:
        """Return what `read` returns for a file in its present state; None if it cannot be read."""
        try:
            state = state_of(path)
            known = self._known.get((read, path))
            if known is None or known[0] != state:
                self._known[read, path] = known = state, read(path)
            return known[1]
        except OSError:
            return None


def _made(seen: Seen) -> Made:
    by = seen.record.get("made_by")
    return Made(seen.at, by if isinstance(by, str) else "", seconds_of(seen.record))


def _describe_work(seen: Seen) -> str:
    saved = f"{seen.saved.done:,} of {seen.saved.total:,} steps saved, " if seen.saved else ""
    return saved + seen.holder.removeprefix("another ")


def _read_min_free(path: Path) -> float:
    """Return the free space that the run needs, in GiB; 0 in the list of an earlier version."""
    value = read_object(path).get("min_free_gib")
    return value if isinstance(value, float) else 0.0


def _read_draft_steps(path: Path) -> int:
    """Return the steps of the drafts that a manifest asks for; 0 if it asks for none."""
    manifest = read_object(path).get("manifest")
    drafts = manifest.get("drafts") if isinstance(manifest, dict) else None
    steps = drafts.get("steps") if isinstance(drafts, dict) else None
    return steps if isinstance(steps, int) else 0


def _read_list(path: Path) -> list[ListedJob]:
    return listed_jobs(path.parent.parent)[0]


def _latents_key(path: Path) -> str | None:
    """Return the key of the latents in a file; None if they are damaged."""
    try:
        read_latents(path)
        return read_header(path).facts.get("key")
    except MediaError:
        return None


def _is_of(job: ListedJob, record: Mapping[str, Any]) -> bool:
    """Return whether a record is of a job; where the job's key is not known yet, whether it has the job's settings."""
    return record.get("key") == job.key if job.key else settings_in(record) == job.settings


def _failure_of(job: ListedJob, record: Mapping[str, Any]) -> str:
    """Return why a job failed when it was tried last; "" if it did not, or was changed since."""
    failure = record if record.get("status") == "failed" else record.get("failure")
    if not isinstance(failure, dict) or settings_in(failure) != job.settings:
        return ""
    return str(failure.get("error", "unknown"))


def _names_in(folder: Path) -> set[str]:
    """Return the names in a folder; none if it cannot be listed."""
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()
