"""Read what the gallery shows of a job off its files. Others may have changed them: other shapes are left out."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any, TypeGuard
from urllib.parse import quote

from pusa.backbones import BACKBONES, DEFAULT_BACKBONE, find_family
from pusa.errors import MediaError
from pusa.generate.ledger import DRAFT, DRAFTS, WORK
from pusa.generate.listed import read_list
from pusa.generate.numbers import NUMBERS, STRETCHES
from pusa.generate.outputs import LATENTS, PREVIEW, PREVIEWS, RECORD, VIDEO
from pusa.generate.timings import seconds_of
from pusa.manifest.models import job_defaults
from pusa.registry import find
from pusa.system.files import read_object
from pusa.system.text import join_ranges, preview, printable, printable_lines
from pusa.tasks import TASKS
from pusa.tasks.base import is_id
from pusa.video.formats import FORMATS

LONGEST = 2000  # characters of a prompt, of an error, and of a setting
LONGEST_TRACEBACK = 4000
DEEPEST = 8  # levels of nested settings
LARGE_SEAM = 2.0  # times the usual change from a frame to the next
MOST_LATENT_FRAMES = 400  # cells of a level strip
MOST_MULTIPLIERS = 2  # that are listed one by one
MOST_SETTINGS, MOST_SEAMS = 200, 20  # of a job; tasks have far fewer settings
MOST_PIXELS = 100_000  # of a side
STATES = ("done", DRAFT, "failed", "waiting")
FIRST_FRAME = "00000.png"  # in a job's folder of frames


@dataclass
class Card:
    """A job as the page shows it. All texts are safe to print, and cut; the template escapes them.

    Attributes:
        id: the job's id.
        base: what the ids of its sweep begin with; "" outside a sweep.
        label: its values of what its sweep varies.
        state: one of `STATES`.
        badge: the state as its picture shows it; "" for a video that is made.
        note: what else there is to say about the state, "" for nothing.
        settings: key, value and whether the value differs from the default; those that differ come first.
        shared: those of the prompt, the task and the seed that all jobs of its sweep have.
        chips: the settings that differ from the usual ones of the page, or else from the defaults.
        strip: for each latent frame the CSS class of its cell and its title; empty if no frame was given.
        facts: what else its record says.
        files: the names and addresses of its files.
        settings_by_key: the job's settings as values.
    """

    id: str
    state: str
    base: str = ""
    label: str = ""
    badge: str = ""
    note: str = ""
    task: str = ""
    prompt: str = ""
    shared: frozenset[str] = frozenset()
    seed: str = ""
    video: str = ""
    picture: str = ""
    width: int = 0
    height: int = 0
    settings: list[tuple[str, str, bool]] = field(default_factory=list)
    chips: list[tuple[str, str]] = field(default_factory=list)
    strip: list[tuple[str, str]] = field(default_factory=list)
    given: str = ""
    seams: list[str] = field(default_factory=list)
    largest_seam: float = 0.0
    warning: str = ""
    error: str = ""
    traceback: str = ""
    time: str = ""
    made_at: float = 0.0
    facts: list[tuple[str, str]] = field(default_factory=list)
    files: list[tuple[str, str]] = field(default_factory=list)
    settings_by_key: Mapping[str, Any] = field(default_factory=dict)


def read_facts(record: Path) -> dict[str, Any]:
    """Return a job's record; of one that cannot be read, why."""
    try:
        return read_object(record)
    except OSError as error:
        return {"status": "failed", "error": f"{record} cannot be read: {error.strerror}"}


class Files:
    """The names in a run's folder of videos, each folder listed once, and the jobs that its manifest listed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = {inner: _names_in(folder / inner) for inner in ("", PREVIEWS, DRAFTS, WORK)}
        self.unfinished = self.names[WORK]
        try:
            listed = read_list(folder)
        except MediaError:  # an older version, or damaged; then only what has a record is known
            listed = {}
        rows = listed["jobs"] if isinstance(listed.get("jobs"), list) else []
        self.listed = {row["id"]: row for row in rows if isinstance(row, dict) and is_id(row.get("id"))}
        self.backbone = _backbone(listed.get("manifest"))

    def key_of(self, id: str) -> str | None:
        """Return the key of the video that the manifest makes of a job, if it is known."""
        return self.listed.get(id, {}).get("key")

    def has(self, name: str, inner: str = "") -> bool:
        """Return whether there is a file of a name."""
        return name in self.names[inner]


def _names_in(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


# The card of a job.


def card_of(id: str, files: Files) -> Card:
    """Return a job as its files show it."""
    record = read_facts(files.folder / f"{id}{RECORD}")
    draft = read_facts(files.folder / DRAFTS / f"{id}{RECORD}") if files.has(f"{id}{RECORD}", DRAFTS) else {}
    card = Card(printable(id), "waiting")
    status, failure = record.get("status"), record.get("failure")
    if status == "done":
        card.state = "done"
        card.video = _address(f"{id}{VIDEO}")
        if isinstance(failure, dict):
            card.state, card.traceback = "failed", _traceback(failure)
            card.error = f"of an earlier run; the last one failed: {as_text(failure.get('error'))}"
        elif not files.has(f"{id}{VIDEO}"):
            card.state, card.video, card.note = "waiting", "", "its video is gone; the next run makes it again"
        elif (key := files.key_of(id)) and key != record.get("key"):
            card.state, card.note = "waiting", "this video is of earlier settings; the next run makes it again"
    elif status == "failed" or record.get("error"):
        card.state, card.traceback = "failed", _traceback(record)
        card.error = as_text(record.get("error") or "not made")
    shown = record
    if draft.get("status") == DRAFT and files.has(f"{id}{VIDEO}", DRAFTS) and not card.video:
        shown, card.video = draft, _address(f"{DRAFTS}/{id}{VIDEO}")
        steps, total = (_count(draft.get(key)) for key in ("steps", "total_steps"))
        card.badge = f"draft, step {steps} of {total}{_pass_of(draft)}" if steps and total else DRAFT
        if (key := files.key_of(id)) and key != draft.get("key"):
            card.note = "this draft is of earlier settings; the next run makes it again"
        elif card.state == "waiting":
            card.state = DRAFT
    if card.state == "waiting" and not card.note:
        card.note = _progress(id, files)
    card.badge = card.badge or (card.state if card.state != "done" else "")
    if files.has(f"{id}{PREVIEW}", PREVIEWS):
        card.picture = _address(f"{PREVIEWS}/{id}{PREVIEW}")
    _add_settings(card, shown, files.backbone, files.listed.get(id, {}).get("settings"))
    _add_facts(card, shown)
    card.files = list(_links(id, card, files))
    if shown:
        card.made_at = _made_at(shown, files.folder / (DRAFTS if shown is draft else "") / f"{id}{RECORD}")
    return card


def _pass_of(draft: Mapping[str, Any]) -> str:
    """Return which pass a draft shows where its job has several, since its steps count those of all of them."""
    shows = draft["shows"] if isinstance(draft.get("shows"), dict) else {}
    number, passes = (_count(shows.get(key)) for key in ("pass", "passes"))
    return f" (pass {number} of {passes})" if number and passes > 1 else ""


def _progress(id: str, files: Files) -> str:
    """Return how far a job without a video is."""
    if f"{id}{LATENTS}" in files.unfinished:
        return "sampled, to be decoded"
    return "being sampled" if files.has(f"{id}{PREVIEW}", PREVIEWS) else "not made"


def _add_settings(card: Card, record: Mapping[str, Any], backbone: str | None, listed: Any) -> None:
    """Add a job's settings, from its record, or else from the list of the manifest's jobs."""
    job = record["job"] if isinstance(record.get("job"), dict) else listed
    items = islice(job.items(), MOST_SETTINGS) if isinstance(job, Mapping) else ()
    job = {str(key): _pruned(value) for key, value in items}
    card.settings_by_key = job
    card.task, card.prompt = as_text(job.get("task") or ""), as_text(job.get("prompt") or "")
    card.seed = as_text(job["seed"]) if "seed" in job else ""
    card.width, card.height = (_count(job.get(key)) for key in ("width", "height"))
    defaults = _defaults(job.get("task"), _backbone(record) or backbone or DEFAULT_BACKBONE)
    rows = [
        (as_text(key), _setting(key, value), key not in defaults or value != defaults[key])
        for key, value in job.items()
        if key not in ("id", "task", "seed") and value not in ("", None)
    ]
    card.settings = sorted(rows, key=lambda row: not row[2])


def _add_facts(card: Card, record: Mapping[str, Any]) -> None:
    """Add what a record says beside the settings; what has another type than we write is left out."""
    _add_levels(card, record)
    seams = record.get("seams")
    numbers = {frame: seam for frame, seam in seams.items() if is_number(seam)} if isinstance(seams, dict) else {}
    card.largest_seam = max(numbers.values(), default=0.0)
    card.seams = [f"{seam:.1f} after frame {as_text(frame)}" for frame, seam in numbers.items() if seam > LARGE_SEAM][
        :MOST_SEAMS
    ]
    card.warning = as_text(record.get("warning") or "")
    if (seconds := seconds_of(record)) is not None:
        card.time = f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    keys = ("model", "made_by", "device", "shows", "weights", "lineage", "packages", "versions")
    card.facts = [(key.replace("_", " "), as_text(record[key])) for key in keys if record.get(key)]
    card.facts = [*_measured(record), *card.facts]


def _measured(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the numbers of a video with their units, and its black and frozen stretches."""
    numbers = record["numbers"] if isinstance(record.get("numbers"), dict) else {}
    for name, number in NUMBERS.items():
        if is_number(value := numbers.get(name)):
            yield name.replace("_", " "), f"{value:.4g} {number.unit}".rstrip()
    for name in STRETCHES:
        if isinstance(stretches := numbers.get(name), list) and stretches:
            yield f"{name} stretches", as_text(stretches)


def _add_levels(card: Card, record: Mapping[str, Any]) -> None:
    """Add the level strip: which latent frames were given, and how noisy; of an older record only its words."""
    levels = record["levels"] if isinstance(record.get("levels"), dict) else {}
    given, starts, before = (levels.get(key) for key in ("given", "starts", "from_pass_before"))
    if not isinstance(given, dict) or not isinstance(starts, list):
        words = record.get("given")
        card.given = as_text("; ".join(map(str, words))) if isinstance(words, list) and words else ""
        return
    if isinstance(before, list):
        made_before = {frame for frame in before if isinstance(frame, int)}
    else:  # an earlier record: a job without inputs was given nothing else
        made_before = set(range(len(starts))) if record.get("inputs") == {} else set()
    frames = [frame for frame in range(len(starts)) if frame not in made_before]
    known = {frame: m for frame in frames if is_number(m := given.get(str(frame))) and 0 <= m <= 1}
    if known and len(starts) <= MOST_LATENT_FRAMES:
        card.strip = [_cell(frame, known.get(frame)) for frame in range(len(starts))]
    card.given = as_text(f"given: {'; '.join(_ranges(known))}") if known else ""


def _ranges(given: Mapping[int, float]) -> Iterator[str]:
    """Yield the given latent frames in words, by their multipliers; of many multipliers the least and the largest."""
    by_multiplier: dict[float, list[int]] = {}
    for frame, multiplier in given.items():
        by_multiplier.setdefault(multiplier, []).append(frame)
    if exact := by_multiplier.pop(0, None):
        yield f"{join_ranges(exact)} exact"
    if len(by_multiplier) > MOST_MULTIPLIERS:
        noisy = [frame for frame, multiplier in given.items() if multiplier]
        yield f"{join_ranges(noisy)}, multipliers {min(by_multiplier):g} to {max(by_multiplier):g}"
    else:
        for multiplier, frames in sorted(by_multiplier.items()):
            yield f"{join_ranges(frames)}, multiplier {multiplier:g}"


def _cell(frame: int, multiplier: float | None) -> tuple[str, str]:
    """Return the class of a latent frame's cell, whose height in tenths shows how noisy it was given, and its title."""
    if multiplier is None:
        return "made", f"latent frame {frame}: made"
    if multiplier == 0:
        return "exact", f"latent frame {frame}: given, exact"
    return f"noisy n{max(1, round(multiplier * 10))}", f"latent frame {frame}: given, multiplier {multiplier:g}"


def _links(id: str, card: Card, files: Files) -> Iterator[tuple[str, str]]:
    """Yield the names and addresses of a job's files that are there."""
    inner = f"{DRAFTS}/" if card.video.startswith(f"{DRAFTS}/") else ""
    if card.video:
        yield "mp4", card.video
    if files.has(f"{id}{RECORD}", inner.rstrip("/")):
        yield "json", _address(f"{inner}{id}{RECORD}")
    if files.has(f"{id}{LATENTS}") and not inner:
        yield "latents", _address(f"{id}{LATENTS}")
    for name, known in FORMATS.items():
        if files.has(f"{id}{known.end}") and not inner:
            yield name, _address(f"{id}{known.end}" + f"/{FIRST_FRAME}" * (name == "png"))


def _backbone(holder: Any) -> str | None:
    """Return the family that the model of a record or a manifest names; None if it names none that is known."""
    model = holder.get("model") if isinstance(holder, dict) else None
    name = model.get("backbone") if isinstance(model, dict) else None
    return name if isinstance(name, str) and name in BACKBONES else None


def _defaults(task: Any, backbone: str) -> Mapping[str, Any]:
    """Return the values, as JSON has them, of a task's keys that neither a job nor its manifest sets."""
    return _family_defaults(task, backbone) if isinstance(task, str) and task in TASKS else {}


@cache
def _family_defaults(task: str, backbone: str) -> Mapping[str, Any]:
    fields = find(TASKS, task, "task").model_fields
    own = {key: info.default for key, info in fields.items() if not info.is_required()}
    values = own | job_defaults({"task": task}, find_family(backbone))
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


# Values as texts.


def as_text(value: Any, longest: int = LONGEST) -> str:
    """Return a value as text on one line that is safe to print, cut at `longest` characters."""
    return printable(value if isinstance(value, str) else _brief(value), longest)


def _setting(key: str, value: Any) -> str:
    """Return a setting as text; of a path, its last part."""
    return as_text(value) if key in ("prompt", "negative_prompt") else as_text(_brief(value))


def _brief(value: Any) -> str:
    """Return a value of JSON as short text."""
    if isinstance(value, dict):
        known = {key: inner for key, inner in _pruned(value).items() if inner is not None}
        return ", ".join(f"{key}: {_brief(inner)}" for key, inner in known.items())
    if isinstance(value, list):
        return f"[{', '.join(_brief(inner) for inner in _pruned(value))}]"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return Path(value).name if value.startswith("/") else value
    return f"{value:g}" if isinstance(value, float) else preview(value)


def _pruned(value: Any, depth: int = DEEPEST) -> Any:
    """Return a value of JSON without what is nested deeper than `depth`."""
    if isinstance(value, dict):
        return {key: _pruned(inner, depth - 1) for key, inner in value.items()} if depth else "..."
    if isinstance(value, list):
        return [_pruned(inner, depth - 1) for inner in value] if depth else "..."
    return value


def _traceback(failure: Mapping[str, Any]) -> str:
    traceback = failure.get("traceback")
    return printable_lines(traceback, LONGEST_TRACEBACK) if isinstance(traceback, str) else ""


def _address(path: str) -> str:
    return quote(path, errors="replace")


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value of JSON is a number: not one that is infinite, none, or absurdly large."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12 and isfinite(value)


def _count(value: Any) -> int:
    """Return a number of pixels or steps; 0 for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST_PIXELS else 0


def _made_at(record: Mapping[str, Any], path: Path) -> float:
    """Return when a video was made, in seconds since the epoch; of an older record, when its file was written."""
    try:
        return datetime.fromisoformat(str(record.get("made_at"))).timestamp()
    except (ValueError, OverflowError, OSError):
        return path.stat().st_mtime if path.exists() else 0.0
