"""Estimate how long the jobs of a run take yet: from the times of those that are made, and the pace of the last hour.

Work is measured in the seconds that single jobs took, added up. Of a job that is under way, what was saved counts as
made. Where drafts are made, the work of a job ends with its draft.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from pusa.generate.ledger import JobState
from pusa.generate.listed import ListedJob
from pusa.generate.timings import Timings, seconds_of

HOUR = 3600.0  # seconds


class SavedSteps(NamedTuple):
    """The steps of a saved sampling, of how many, and when they were saved (seconds since the epoch)."""

    done: int
    total: int
    at: float


@dataclass(frozen=True)
class Seen:
    """How far a job is, as its files show it.

    Attributes:
        job: the job.
        state: how far it is.
        at: when the file was written that shows this state, in seconds since the epoch; 0 if there is none.
        record: the record of its video or its failure; empty if there is none.
        draft: the record of its draft; empty if there is none.
        saved: its saved sampling.
        holder: who works on it now; "" if nobody does.
    """

    job: ListedJob
    state: JobState
    at: float
    record: Mapping[str, Any]
    draft: Mapping[str, Any]
    saved: SavedSteps | None
    holder: str


def seconds_left(jobs: Sequence[Seen], draft_steps: int, begun: float, now: float) -> float | None:
    """Return the seconds of work that is left, divided by the seconds of work that are made in a second.

    Args:
        jobs: the jobs that are to be made.
        draft_steps: the steps of drafts; 0 if none are made.
        begun: when the last command began, in seconds since the epoch.
        now: the time.

    Returns:
        The seconds; None if no job was timed, or nobody works and nothing was saved.
    """
    done = [seen.record for seen in jobs if seen.state == JobState.DONE]
    timings = Timings.of_records([*done, *(_as_if_whole(seen.draft) for seen in jobs if seen.draft)])
    decoding = decoding_share(done)
    left = 0.0
    made: list[tuple[float, float]] = []  # times of files, and the seconds of work that each of them took
    for seen in jobs:
        if seen.state == JobState.DONE:
            made.append((seen.at, seconds_of(seen.record) or 0.0))
        elif seen.state != JobState.FAILED:
            if (whole := timings.seconds(seen.job.settings)) is None:
                return None
            part = _share_of_draft(seen.job, draft_steps)
            open_share, at = _open_share(seen, draft_steps, part, decoding)
            left += whole * part * open_share
            made.append((at, whole * part * (1 - open_share)))
    workers = len({seen.holder for seen in jobs if seen.holder})
    until = now if workers else max((at for at, _ in made), default=0.0)
    pace = _pace(made, begun, until) or workers
    return left / pace if pace else None


def _open_share(seen: Seen, draft_steps: int, part: float, decoding: float) -> tuple[float, float]:
    """Return the share of a job's work that is still to be done, and when the rest was saved.

    Args:
        seen: the job.
        draft_steps: the steps of drafts.
        part: the share of its steps that are to be made.
        decoding: the share of decoding in the time of a video.
    """
    if seen.state == JobState.SAMPLED:
        return decoding, seen.at
    if draft_steps and seen.state == JobState.DRAFTED:
        return 0.0, seen.at
    if seen.saved:
        return 1 - min(1.0, seen.saved.done / max(1, seen.saved.total) / part), seen.saved.at
    return 1.0, 0.0


def _pace(made: Iterable[tuple[float, float]], begun: float, until: float) -> float | None:
    """Return the seconds of work that were made in a second, up to `until`, from work that was saved at these times.

    It is the pace of the last hour, or since the last command began. None if no work was saved in that time.
    """
    begun = max(until - HOUR, begun)
    seconds = sum(seconds for at, seconds in made if begun < at <= until)
    return seconds / (until - begun) if seconds else None


def decoding_share(records: Iterable[Mapping[str, Any]]) -> float:
    """Return the share of decoding in the time of videos; 1 if none was timed."""
    timed = [record["seconds"]["decode"] / seconds for record in records if (seconds := seconds_of(record))]
    return median(timed) if timed else 1.0


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
