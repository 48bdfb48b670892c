"""The pages of the stages on Prefect's dashboard, in markdown: how far a stage is, what it made, and what failed.

All of it is read off the files of the run and the progress of this process, so a page is right also where other
processes work at the same. Every text that is not ours goes through `markdown`.
"""

import hashlib
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import ClassVar

import numpy as np
from PIL import Image

from flows.handover import ManifestFile
from flows.pictures import NewestVideos, encode, inline, previews_text, table, thumbnail
from pusa.data.reader import Table
from pusa.data.writer import INDEX
from pusa.errors import TableError
from pusa.finetune.curve import loss_curve
from pusa.finetune.measurements import Measurement, comparable, read_measurements
from pusa.finetune.metrics import read_columns
from pusa.finetune.recipe import with_overrides
from pusa.generate.ledger import WORK, JobState
from pusa.generate.listed import JOBS
from pusa.generate.status import StatusReader
from pusa.generate.summary import Made, Status, describe_seconds
from pusa.ingest.stage import summarize
from pusa.inspect.formatting import format_bytes
from pusa.manifest.models import FinetuneManifest
from pusa.system.disk import free_bytes
from pusa.system.files import stamp_of
from pusa.system.progress import Progress
from pusa.system.text import MAX_LINES, join_ranges, markdown

MAX_BYTES = 1_000_000  # of a page; Prefect takes 16 times as much, in seconds
SECTIONS = 10  # rows of the table of a training
COLUMNS = ("step", "loss", "learning_rate", "samples_per_second", "seconds", "waited")
COLOURS = 64  # of the loss curve
STEPS = "denoising steps"  # the label of the progress of generate
RECENT_STEPS = 50  # from which the pace of a training is measured


@dataclass(frozen=True)
class Look:
    """What is seen of a stage. The page is written anew when `facts` are others than before.

    Attributes:
        facts: what the page shows, as values to compare.
        percent: how much is done; None if that is unknown.
        text: returns the page in markdown.
    """

    facts: object
    percent: float | None
    text: Callable[[], str]


class Page(ABC):
    """The page of a stage's run.

    Attributes:
        name: "generate tiny/generate.yaml".
        key: the artifact's key, the same for all runs of the manifest in this folder.
        progress: the work of this process, by its label.
    """

    stage: ClassVar[str]

    def __init__(self, file: ManifestFile, run_dir: Path) -> None:
        path, self.run_dir = file.path.absolute(), run_dir.absolute()
        self.name = f"{self.stage} {path.parent.name}/{path.name}"
        self.key = artifact_key(self.stage, path, self.run_dir)
        self.progress: dict[str, Progress] = {}

    @abstractmethod
    def look(self, outcome: str) -> Look:
        """Look at the stage now. `outcome` says how it ended; "": it works."""

    def _heading(self, outcome: str) -> str:
        state, now = outcome or "is running", datetime.now().astimezone()
        return f"**{markdown(self.name)}** {markdown(state)}, {now:%Y-%m-%d %H:%M %Z}, in {markdown(self.run_dir)}"

    def _disk(self) -> str:
        return f"disk: {format_bytes(free_bytes(self.run_dir))} free"

    def _pace(self, label: str) -> tuple[float | None, tuple[object, ...], str]:
        """Return the percent done of a work of this process, what of it is worth a new page, and a line on it."""
        if (progress := self.progress.get(label)) is None:
            return None, (), "being prepared"
        percent = 100.0 * progress.done / max(1, progress.total)
        line = f"{progress.done:,} of {progress.total:,}"
        if progress.done < progress.total:
            line += f", {describe_seconds(progress.seconds_left)} left"
        return percent, (int(percent), int(progress.seconds_left // 60)), line


def artifact_key(stage: str, manifest: Path, run_dir: Path) -> str:
    """Return a key for the artifacts of a manifest that runs in a folder: "generate-tiny-ab12cd"."""
    slug = re.sub(r"[^a-z0-9]+", "-", manifest.parent.name.lower())[:40].strip("-") or "manifest"
    named = b"\0".join(map(os.fsencode, (run_dir, manifest)))
    return f"{stage}-{slug}-{hashlib.sha256(named).hexdigest()[:6]}"


class TablePage(Page):
    """The progress of a stage that writes a table, and what the table holds.

    Attributes:
        folder: of the table, in the run's folder.
        units: what the progress counts.
    """

    folder: ClassVar[str]
    units: ClassVar[str]

    @abstractmethod
    def describe(self, folder: Path) -> str:
        """Return the text on the table in a folder."""

    def look(self, outcome: str) -> Look:
        """Look at the progress and the table."""
        percent, facts, line = self._pace(self.stage)
        folder = self.run_dir / self.folder

        def text() -> str:
            lines = [self._heading(outcome), "", f"{self.units}: {line}; {self._disk()}", ""]
            return "\n".join([*lines, _table_or_why(folder, self.describe)])

        at_end = 100.0 if outcome == "ended" else percent  # whatever was left to do for this process
        return Look((*facts, stamp_of(folder / INDEX)), at_end, text)


def clips_text(folder: Path) -> str:
    """Return the numbers of a clips table in markdown: its clips, its rejects by reason, and the kinds of sources.

    Raises:
        TableError: there is none, or it is damaged.
    """
    opened = Table.open(folder, "clips")
    result = summarize(opened)
    names = ("sources", "clips", "rejects", "failed", "retimed_frames", "duplicates", "near_duplicates", "table")
    parts = [table(names, [[getattr(result, name) for name in names]]), _reasons(opened)]
    if result.kinds:
        parts.append(table(("kind", "sources, and what was done"), list(result.kinds.items())))
    return "\n\n".join(part for part in parts if part)


def latents_text(folder: Path) -> str:
    """Return the numbers of a latents table in markdown: its rows, and its rejects by reason.

    Raises:
        TableError: there is none, or it is damaged.
    """
    opened = Table.open(folder, "rows")
    row = (opened.fact("clips"), opened.rows("rows"), opened.rows("rejects"), folder)
    parts = [table(("clips", "rows", "rejects", "table"), [row]), _reasons(opened)]
    return "\n\n".join(part for part in parts if part)


def _reasons(opened: Table) -> str:
    """Return the number of rejects of each reason, the most frequent first; "" if there are none."""
    reasons = opened.fact("rejects_by_reason")
    if not isinstance(reasons, dict) or not all(type(count) is int for count in reasons.values()):
        raise TableError(f"{opened.folder / INDEX} has a fact rejects_by_reason without counts; run its stage again")
    rows = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:MAX_LINES]
    return table(("rejected for", "number"), [(reason, f"{count:,}") for reason, count in rows]) if rows else ""


def _table_or_why(folder: Path, describe: Callable[[Path], str]) -> str:
    """Return the text on a table, and when it was written; or why there is none."""
    try:
        written = datetime.fromtimestamp((folder / INDEX).stat().st_mtime).astimezone()
        return f"the table of {written:%Y-%m-%d %H:%M}:\n\n{describe(folder)}"
    except FileNotFoundError:
        return "no table yet"
    except (OSError, TableError) as error:
        return f"no table: {markdown(error)}"


class IngestPage(TablePage):
    """Sources that were judged, and the clips table: clips, and rejects by reason."""

    stage, folder, units = "ingest", "clips", "new sources"

    def describe(self, folder: Path) -> str:
        """Return the numbers of the clips table."""
        return clips_text(folder)


class PrecomputePage(TablePage):
    """Clips that were encoded, and the latents table: rows, and rejects by reason."""

    stage, folder, units = "precompute", "latents", "latents and captions"

    def describe(self, folder: Path) -> str:
        """Return the numbers of the latents table."""
        return latents_text(folder)


class FinetunePage(Page):
    """The progress of a training, its loss, that of held-out clips, and its latest validation sheet."""

    stage = "finetune"

    def __init__(
        self, file: ManifestFile, run_dir: Path, manifest: FinetuneManifest, overrides: Mapping[str, str]
    ) -> None:
        super().__init__(file, run_dir)
        self._manifest, self._overrides = manifest, overrides

    def look(self, outcome: str) -> Look:
        """Look at the metrics and the validation sheets."""
        steps = with_overrides(self._manifest, self._overrides).steps
        columns = read_columns(self.run_dir / "metrics.jsonl", COLUMNS)
        made = int(columns["step"][-1]) if len(columns["step"]) else 0
        paces = columns["seconds"][-RECENT_STEPS:]
        pace = median(finite) if (finite := paces[np.isfinite(paces)].tolist()) else None
        left = None if pace is None else pace * max(0, steps - made)
        percent = 100.0 * min(made, steps) / steps
        sheet = latest_sheet(self.run_dir)
        measured = comparable(read_measurements(self.run_dir / "metrics.jsonl"))

        def text() -> str:
            time = f", {describe_seconds(left)} left" if left and not outcome else ""
            progress = f"step {made:,} of {steps:,}{time}; {self._disk()}"
            parts = [self._heading(outcome), progress, training_text(columns)]
            parts += [held_out_text(measured)] if measured else []
            return "\n\n".join(parts if sheet is None else [*parts, validation_text(sheet)])

        minutes = None if left is None else int(left // 60)
        return Look((int(percent), minutes, made == steps, len(measured), sheet), percent, text)


def training_text(columns: Mapping[str, np.ndarray]) -> str:
    """Return the loss as a picture and, for each of `SECTIONS` sections of the run, a row of means, as markdown.

    Args:
        columns: the `COLUMNS` of the metrics, each (N,).
    """
    steps = columns["step"]
    if not len(steps):
        return "no step yet"
    # Median cut would give the inks of line and letters one colour between them.
    picture = loss_curve(steps, columns["loss"]).quantize(COLOURS, Image.Quantize.MAXCOVERAGE)
    length = -(-len(steps) // SECTIONS)
    names = ("up to step", "loss", "learning rate", "clips a second", "waiting for data", "skipped")
    rows = []
    for start in range(0, len(steps), length):
        section = {name: column[start : start + length] for name, column in columns.items()}
        waited, seconds = _mean(section["waited"]), _mean(section["seconds"])
        row = [
            f"{section['step'][-1]:.0f}",
            _number(_mean(section["loss"]), ".4f"),
            _number(section["learning_rate"][-1], ".3g"),
            _number(_mean(section["samples_per_second"]), ".3g"),
            _number(waited / seconds if seconds else math.nan, ".0%"),
            str(np.isnan(section["loss"]).sum()),
        ]
        rows.append(row)
    return f"{inline('loss', 'png', encode(picture, 'PNG'))}\n\n{table(names, rows)}"


def held_out_text(measured: Sequence[Measurement]) -> str:
    """Return a table of the losses of held-out clips, as markdown: the last ones, the first ones, and the change.

    Args:
        measured: comparable measurements, at least one.
    """
    first, last = measured[0], measured[-1]
    rows = []
    for name in last.values():
        now, before = (math.nan if (value := one.value(name)) is None else value for one in (last, first))
        change = now / before - 1 if before else math.nan
        rows.append((name, _number(now, ".4f"), _number(before, ".4f"), _number(change, "+.1%")))
    names = ("loss of held-out clips", f"step {last.step:,}", f"step {first.step:,}", "change")
    levels = ", ".join(f"{level:g}" for level in last.levels)
    return f"{table(names, rows)}\n\nEach is the mean over the levels {levels}, on the frames that are made."


def latest_sheet(run_dir: Path) -> Path | None:
    """Return the contact sheet of the latest validation; None if there is none."""
    return max(run_dir.glob("validation/" + "[0-9]" * 8 + ".jpg"), default=None)


def validation_text(sheet: Path) -> str:
    """Return a contact sheet, made smaller, as markdown."""
    return f"Validation at step {int(sheet.stem)}: {markdown(sheet)}\n\n{thumbnail('validation', sheet)}"


def _mean(values: np.ndarray) -> float:
    """Return the mean of the finite values; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _number(value: float, form: str) -> str:
    """Return a number as text, and "-" for one that was not recorded."""
    return "-" if math.isnan(value) else format(value, form)


class GeneratePage(Page):
    """The jobs by state, who makes and made them, the failures, what jobs at work become, and the newest videos."""

    stage = "generate"

    def __init__(self, file: ManifestFile, run_dir: Path, ids: Sequence[str]) -> None:
        """Describe a run.

        Args:
            file: the manifest's file.
            run_dir: the folder of the run.
            ids: the ids of its jobs, in order.
        """
        super().__init__(file, run_dir)
        self._positions = {id: number for number, id in enumerate(ids, 1)}
        self._folder = self.run_dir / "videos"
        self._list_file = self._folder / WORK / JOBS
        self._listed_before = stamp_of(self._list_file)  # by an earlier run, perhaps of another manifest
        # The stage itself checks the bytes of videos, and reading all of them again would slow it down.
        self._reader, self._newest = StatusReader(self._folder, hashing=False), NewestVideos(self._folder)
        self._left_at_start: int | None = None  # the jobs that are neither made nor failed

    def look(self, outcome: str) -> Look:
        """Look at the files of the jobs."""
        if stamp_of(self._list_file) == self._listed_before:
            nothing = "nothing is known of the jobs: they were not listed"
            line = nothing if outcome else "the weights are hashed, and the jobs that are made already are checked"
            return Look((), None, lambda: f"{self._heading(outcome)}\n\n{line}; {self._disk()}")
        status = self._reader.read()
        percent = self._percent(status)
        minutes = None if status.seconds_left is None else int(status.seconds_left // 60)
        facts = (status.jobs, status.failed, status.running, status.paused, int(percent), minutes)
        return Look(facts, percent, lambda: self._text(status, outcome))

    def _percent(self, status: Status) -> float:
        """Return how much is done: the jobs, and of those that are left the steps of this process."""
        settled, total = status.counts[JobState.DONE] + status.counts[JobState.FAILED], max(1, len(status.jobs))
        settled += status.counts[JobState.DRAFTED] if status.drafting else 0
        share = settled / total
        if (steps := self.progress.get(STEPS)) and steps.total:
            if self._left_at_start is None:
                self._left_at_start = len(status.jobs) - settled
            share = max(share, 1 - self._left_at_start / total * (1 - min(1.0, steps.done / steps.total)))
        return 100.0 * share

    def _text(self, status: Status, outcome: str) -> str:
        parts = [self._heading(outcome), f"{markdown(status.summary())}; {self._disk()}"]
        if STEPS in self.progress and not outcome:
            parts.append(f"denoising steps of this run: {self._pace(STEPS)[2]}")
        parts += [part for part in (self._running(status), made_by_text(status.made), failures_text(status)) if part]
        _, begun, _ = stamp_of(self._list_file)  # in nanoseconds
        parts += [previews] if (previews := previews_text(self._folder, status.running, begun / 1e9)) else []
        text = "\n\n".join(parts)
        pictures = self._newest.text(status.made, MAX_BYTES - len(text.encode()) - 2)
        return f"{text}\n\n{pictures}" if pictures else text

    def _running(self, status: Status) -> str:
        by_text: dict[str, list[int]] = {}
        for id, text in status.running.items():
            by_text.setdefault(text, []).append(self._positions.get(id, 0))
        rows = [(text, join_ranges(numbers)) for text, numbers in [*by_text.items()][:MAX_LINES]]
        return table(("at work", "jobs"), rows) if rows else ""


def made_by_text(made: Mapping[str, Made]) -> str:
    """Return a table of the hosts and slots with the videos that each made, in markdown; "" without videos."""
    by: dict[str, list[float | None]] = {}
    for one in made.values():
        by.setdefault(one.by or "not recorded", []).append(one.seconds)
    rows = []
    for name, seconds in sorted(by.items())[:MAX_LINES]:
        known = [value for value in seconds if value is not None]
        rows.append((name, f"{len(seconds):,}", describe_seconds(sum(known)) if known else "-"))
    return table(("made by", "videos", "work of the model"), rows) if rows else ""


def failures_text(status: Status) -> str:
    """Return a table of the first failed jobs with their reasons, in markdown; "" if there are none."""
    failed = [*status.failed.items()]
    if not failed:
        return ""
    text = table(("failed job", "reason"), failed[:MAX_LINES])
    more = len(failed) - MAX_LINES
    return f"{text}\n\nand {more:,} more, each with its reason in its JSON file beside the videos" if more > 0 else text
