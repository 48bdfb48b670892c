"""Say how far the jobs of a run are, for people and for programs: counts, failures, what is made now, the time left."""

import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pusa.generate.ledger import JobState
from pusa.system.text import MAX_LINES, printable

SHOWN_IDS = 3  # of the jobs that a process makes together


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
        run: the folder of the run, as it is named in commands.
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
    run: Path = Path("RUN")

    @property
    def counts(self) -> dict[str, int]:
        """Return the number of jobs in each state."""
        counts = Counter(self.jobs.values())
        return {str(state): counts[state] for state in JobState}

    def shown_counts(self) -> dict[str, int]:
        """Return the number of jobs in each state for people: jobs that a process works on are "at work"."""
        idle = Counter(state for id, state in self.jobs.items() if id not in self.running)
        return {"at work": len(self.running), **{str(state): idle[state] for state in JobState}}

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
        return {
            "states": self.counts,
            "at_work": len(self.running),
            **about,
            "earlier_videos": self.earlier,
            "jobs": jobs,
        }

    def summary(self) -> str:
        """Return the counts and the time left, on one line."""
        parts = [f"{count:,} {name}" for name, count in self.shown_counts().items() if count or name == JobState.DONE]
        left = [] if self.seconds_left is None or self.ended else [f"{describe_seconds(self.seconds_left)} left"]
        left += [f"paused: {self.paused}"] * bool(self.paused and not self.ended)
        return f"{_jobs(len(self.jobs))}: {', '.join(parts + left)}"

    def lines(self) -> list[str]:
        """Return the counts, what is being made, and the first failures with their reasons, as lines."""
        lines = [f"{name:<10}{count:>8,}" for name, count in self.shown_counts().items()]
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
        if drafted := self.shown_counts()[JobState.DRAFTED]:
            wait = "1 draft waits" if drafted == 1 else f"{drafted:,} drafts wait"
            run = shlex.quote(str(self.run))
            lines.append(f"{wait}: `pusa finish {run} ID...` makes the chosen ones to the end")
        if self.waiting:
            lines.append(f"waiting until what they read is finished: {_join_ids([*self.waiting])}")
        if self.earlier:
            videos = "1 more video there is" if self.earlier == 1 else f"{self.earlier:,} more videos there are"
            lines.append(f"{videos} not of these jobs, but of earlier manifests")
        return lines


def describe_seconds(seconds: float) -> str:
    """Return a time for people: "45 s", "12 min", "3 h 05 min", "2 days 4 h"."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 59.5:
        return f"{round(seconds)} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min" if hours < 48 else f"{hours // 24:,} days {hours % 24} h"


def _join_ids(ids: Sequence[str]) -> str:
    """Return the number of jobs and the first ids."""
    shown = ", ".join(ids[:SHOWN_IDS]) + (", ..." if len(ids) > SHOWN_IDS else "")
    return f"{_jobs(len(ids))}, {shown}" if len(ids) > 1 else shown


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count:,} jobs"
