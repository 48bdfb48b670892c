"""Read how far the jobs of a run are, off its files alone: no server and no process is asked.

A video counts as done if its record has the job's key and the video the recorded hash. Its latents, which it no longer
needs, are not read here; the next run checks them.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from pusa.errors import MediaError
from pusa.generate.latents import read_header, read_latents
from pusa.generate.ledger import DRAFT, DRAFTS, JOBS, STATE, WORK, JobState, ListedJob, listed_jobs, read_record
from pusa.generate.outputs import LATENTS, RECORD, VIDEO
from pusa.generate.saved import read_progress
from pusa.generate.timings import Timings, seconds_of
from pusa.system.disk import shortage
from pusa.system.files import State, read_object, sha256_file, state_of
from pusa.system.locks import LOCKS_FOLDER, holder_now
from pusa.system.text import MAX_LINES, printable
from pusa.video.formats import beside, hash_output

HOUR = 3600.0  # seconds
SHOWN_IDS = 3  # of the jobs that a process makes together
MTIME_NS = 3  # its place in a file's state


class _Saved(NamedTuple):
    """The steps of a saved sampling, of how many, and when they were saved (seconds since the epoch)."""

    done: int
    total: int
    at: float


class Made(NamedTuple):
    """A video that is done: when (seconds since the epoch), by which host and slot, and after how many seconds of work.

    Videos of earlier versions lack `by`, and the seconds are None where its latents were sampled by an earlier run.
    """

    at: float
    by: str
    seconds: float | None


@dataclass(frozen=True)
class Status:
    """How far the jobs of the manifest that was run last are.

    Attributes:
        jobs: the state of each job.
        failed: why jobs failed.
        running: who works on jobs now; with the steps made, where these were saved.
        earlier: the number of videos in the folder that are not of these jobs.
        seconds_left: how long it takes until the last job is made; None if that is unknown, or nothing is being made.
        made: who made the videos that are done, and when.
        paused: how little space is free, where a run pauses because of it; else "".
        waiting: the ids of jobs that can be made once others, of which there are drafts, are finished.
        drafting: whether the manifest asks for drafts, and so a job with one is as far as it should be.
    """

    jobs: Mapping[str, JobState]
    failed: Mapping[str, str]
    running: Mapping[str, str]
    earlier: int
    seconds_left: float | None
    made: Mapping[str, Made] = field(default_factory=dict)
    paused: str = ""
    waiting: Collection[str] = ()
    drafting: bool = False

    @property
    def counts(self) -> dict[str, int]:
        """Return the number of jobs in each state."""
        counts = Counter(self.jobs.values())
        return {str(state): counts[state] for state in JobState}

    @property
    def ended(self) -> bool:
        """Return whether every job is done, or failed and not being tried again, or drafted where drafts are made."""
        settled = {JobState.DONE, JobState.FAILED} | ({JobState.DRAFTED} if self.drafting else set())
        return not self.running and all(state in settled or id in self.waiting for id, state in self.jobs.items())

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        jobs = {id: str(state) for id, state in self.jobs.items()}
        about: dict[str, Any] = {"eta_seconds": self.seconds_left, "paused": self.paused or None}
        about |= {"failed": dict(self.failed), "running": dict(self.running)}
        return {"states": self.counts, **about, "earlier_videos": self.earlier, "jobs": jobs}

    def summary(self) -> str:
        """Return the counts and the time left, on one line."""
        parts = [f"{count:,} {name}" for name, count in self.counts.items() if count or name == JobState.DONE]
        left = [] if self.seconds_left is None or self.ended else [f"{describe_seconds(self.seconds_left)} left"]
        left += [f"paused: {self.paused}"] * bool(self.paused and not self.ended)
        return f"{len(self.jobs):,} jobs: {', '.join(parts + left)}"

    def lines(self) -> list[str]:
        """Return the counts, what is being made, and the first failures with their reasons, as lines."""
        lines = [f"{name:<10}{count:>8,}" for name, count in self.counts.items()]
        lines.append(f"{'jobs':<10}{len(self.jobs):>8,}")
        if self.seconds_left is not None and not self.ended:
            pause = "" if self.running else ", once a run continues"
            lines.append(f"time left: {describe_seconds(self.seconds_left)}{pause}")
        lines += [f"paused: {self.paused}"] * bool(self.paused and not self.ended)
        by_text: dict[str, list[str]] = {}
        for id, text in self.running.items():
            by_text.setdefault(text, []).append(id)
        running = [f"{printable(text)}: {_join_ids(ids)}" for text, ids in by_text.items()]
        failed = [f"{id}: {printable(text)}" for id, text in self.failed.items()]
        for title, entries in (("running", running), ("failed", failed)):
            if entries:
                lines += [f"{title}:", *(f"  {entry}" for entry in entries[:MAX_LINES])]
            if (more := len(entries) - MAX_LINES) > 0:
                lines.append(f"  and {more:,} more")
        if drafted := self.counts[JobState.DRAFTED]:
            lines.append(f"{drafted:,} drafts wait: `pusa finish RUN ID...` makes the chosen ones to the end")
        if self.waiting:
            lines.append(f"waiting until what they read is finished: {_join_ids([*self.waiting])}")
        if self.earlier:
            videos = "1 more video there is" if self.earlier == 1 else f"{self.earlier:,} more videos there are"
            lines.append(f"{videos} not of these jobs, but of earlier manifests")
        return lines


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
        names = {folder: _names_in(self._folder / folder) for folder in ("", WORK, LOCKS_FOLDER, DRAFTS)}
        records = {job.id: self._once(read_record, self._folder / f"{job.id}{RECORD}") or {} for job in listed}
        steps, draft_steps = self._steps_made(names[WORK]), self._once(_read_draft_steps, list_file) or 0
        drafts = {job.id: self._draft(job, names[DRAFTS], draft_steps) for job in listed}
        jobs: dict[str, JobState] = {}
        failed: dict[str, str] = {}
        running: dict[str, str] = {}
        workers: set[str] = set()
        made: dict[str, Made] = {}
        for job in listed:
            if self._is_done(job, records[job.id], names[""]):
                jobs[job.id] = JobState.DONE
                made[job.id] = self._made(job.id, records[job.id])
                continue
            lock = f"{job.id}.lock"
            holder = holder_now(self._folder / LOCKS_FOLDER / lock) if lock in names[LOCKS_FOLDER] else None
            if holder:
                workers.add(holder)
                begun = steps.get(job.latents_key)
                saved = f"{begun.done:,} of {begun.total:,} steps saved, " if begun else ""
                running[job.id] = saved + holder.removeprefix("another ")
            elif reason := _failure_of(job, records[job.id]):
                jobs[job.id], failed[job.id] = JobState.FAILED, reason
                continue
            if job.latents_key and job.latents_key in self._latents_keys(job, names):
                jobs[job.id] = JobState.SAMPLED
            elif drafts[job.id]:
                jobs[job.id] = JobState.DRAFTED
            else:
                jobs[job.id] = JobState.SAMPLING if job.latents_key in steps else JobState.PENDING
        videos = {name.removesuffix(VIDEO) for name in names[""] if name.endswith(VIDEO) and not name.startswith(".")}
        # What reads a job that is not made has no key. It waits for `pusa finish`, once the others are drafted.
        unknown = {job.id for job in listed if draft_steps and job.key is None}
        waiting = [id for id in jobs if id in unknown and jobs[id] == JobState.PENDING and id not in running]
        known = [job for job in listed if job.id not in waiting]
        left = self._seconds_left(known, jobs, records, drafts, steps, draft_steps, len(workers))
        earlier = len(videos - jobs.keys())
        return Status(jobs, failed, running, earlier, left, made, paused, waiting, draft_steps > 0)

    def _made(self, id: str, record: Mapping[str, Any]) -> Made:
        by = record.get("made_by")
        at = self._time_of(read_record, self._folder / f"{id}{RECORD}")
        return Made(at, by if isinstance(by, str) else "", seconds_of(record))

    def _is_done(self, job: ListedJob, record: Mapping[str, Any], names: Collection[str]) -> bool:
        """Return whether a job's video is the one that its record describes."""
        if record.get("status") != "done" or not _is_of(job, record):
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

    def _steps_made(self, names: Collection[str]) -> dict[str | None, _Saved]:
        """Return how far saved samplings are, by the key of a job's latents."""
        steps: dict[str | None, _Saved] = {}
        for name in names:
            path = self._folder / WORK / name
            if name.endswith(STATE) and (found := self._once(read_progress, path)):
                keys, done, total = found
                steps |= dict.fromkeys(keys, _Saved(done, total, self._time_of(read_progress, path)))
        return steps

    def _latents_keys(self, job: ListedJob, names: Mapping[str, Collection[str]]) -> list[str | None]:
        """Return the keys of a job's intact latents, in either place where they may be."""
        file = f"{job.id}{LATENTS}"
        return [
            self._once(_latents_key, self._folder / folder / file) for folder in (WORK, "") if file in names[folder]
        ]

    def _seconds_left(
        self,
        listed: Sequence[ListedJob],
        jobs: Mapping[str, JobState],
        records: Mapping[str, Mapping[str, Any]],
        drafts: Mapping[str, Mapping[str, Any]],
        steps: Mapping[str | None, _Saved],
        draft_steps: int,
        workers: int,
    ) -> float | None:
        """Return the seconds of work that is left, divided by the seconds of work that are made in a second.

        Work are the times of single jobs, added up. Of a job that is under way, what was saved counts as made. Where
        drafts are made, the work of a job ends with its draft.
        """
        done = [records[id] for id, state in jobs.items() if state == JobState.DONE]
        whole = [*done, *map(_as_if_whole, filter(None, drafts.values()))]
        timings, decoding = Timings.of_records(whole), decoding_share(done)
        left = 0.0
        made: list[tuple[float, float]] = []  # times of files, and the seconds of work that each of them took
        for job in listed:
            if jobs[job.id] == JobState.DONE:
                record = self._folder / f"{job.id}{RECORD}"
                made.append((self._time_of(read_record, record), seconds_of(records[job.id]) or 0.0))
                continue
            if jobs[job.id] == JobState.FAILED:
                continue
            if (estimate := timings.seconds(job.settings)) is None:
                return None
            part, share, saved_at = _share_of_draft(job, draft_steps), 1.0, 0.0
            estimate *= part
            if jobs[job.id] == JobState.SAMPLED:
                share, saved_at = decoding, self._time_of(_latents_key, self._folder / WORK / f"{job.id}{LATENTS}")
            elif draft_steps and jobs[job.id] == JobState.DRAFTED:
                share, saved_at = 0.0, self._time_of(read_record, self._folder / DRAFTS / f"{job.id}{RECORD}")
            elif saved := steps.get(job.latents_key):
                share, saved_at = 1 - min(1, saved.done / max(1, saved.total) / part), saved.at
            left += estimate * share
            made.append((saved_at, estimate * (1 - share)))
        pace = self._pace(made, workers) or workers
        return left / pace if pace else None

    def _pace(self, made: Sequence[tuple[float, float]], workers: int) -> float | None:
        """Return the seconds of work that were made in a second, from work that was saved at these times.

        It is the pace of the last hour, or since the last command began; if nobody works now, up to the last work.
        None if no work was saved in that time.
        """
        until = self._now() if workers else max((at for at, _ in made), default=0.0)
        begun = max(until - HOUR, self._time_of(_read_list, self._folder / WORK / JOBS))
        seconds = sum(seconds for at, seconds in made if begun < at <= until)
        return seconds / (until - begun) if seconds else None

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


def describe_seconds(seconds: float) -> str:
    """Return a time for people: "45 s", "12 min", "3 h 05 min", "2 days 4 h"."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 59.5:
        return f"{round(seconds)} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min" if hours < 48 else f"{hours // 24:,} days {hours % 24} h"


def decoding_share(records: Iterable[Mapping[str, Any]]) -> float:
    """Return the share of decoding in the time of videos; 1 if none was timed."""
    timed = [record["seconds"]["decode"] / seconds for record in records if (seconds := seconds_of(record))]
    return median(timed) if timed else 1.0


def _join_ids(ids: Sequence[str]) -> str:
    """Return the number of jobs and the first ids."""
    shown = ", ".join(ids[:SHOWN_IDS]) + (", ..." if len(ids) > SHOWN_IDS else "")
    return f"{len(ids):,} jobs, {shown}" if len(ids) > 1 else shown


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


def _share_of_draft(job: ListedJob, draft_steps: int) -> float:
    """Return the share of a job's steps, more than 0, after which it waits; 1 if it is made to the end."""
    steps = job.settings.get("steps")
    return min(1.0, draft_steps / steps) if draft_steps and isinstance(steps, int) and steps > 0 else 1.0


def _as_if_whole(draft: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a draft with the seconds that all of its steps would have taken."""
    parts, made, total = draft.get("seconds"), draft.get("steps"), draft.get("total_steps")
    try:
        seconds = {"sample": parts["sample"] * total / made, "decode": parts["decode"]}  # type: ignore[index, operator]
    except (TypeError, KeyError, ZeroDivisionError):
        return {}
    return {**draft, "seconds": seconds}


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
    return record.get("key") == job.key if job.key else record.get("job") == job.settings


def _failure_of(job: ListedJob, record: Mapping[str, Any]) -> str:
    """Return why a job failed when it was tried last; "" if it did not, or was changed since."""
    failure = record if record.get("status") == "failed" else record.get("failure")
    if not isinstance(failure, dict) or failure.get("job") != job.settings:
        return ""
    return str(failure.get("error", "unknown"))


def _names_in(folder: Path) -> set[str]:
    """Return the names in a folder; none if it cannot be listed."""
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()
