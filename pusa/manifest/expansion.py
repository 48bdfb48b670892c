"""Expand the jobs of a generate manifest: globs, `prompt_file` and `sweep` make many jobs from one. No torch here."""

import itertools
import json
import math
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from pusa.errors import ManifestError
from pusa.manifest.globs import Globs, is_glob, pair_stems
from pusa.registry import find
from pusa.system.files import digest
from pusa.system.names import find_path, nfc
from pusa.system.strict import Context, Place, resolve
from pusa.system.text import describe_unknown_key, preview, read_text
from pusa.tasks import TASKS
from pusa.tasks.base import JOB_PREFIX, MAX_ID, MAX_PROMPT, Job, is_id


def paths_in(annotation: Any, value: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    """Yield each place in `value` where the annotation has a path, in nested models and containers, and its text."""
    origin, items = get_origin(annotation), value if isinstance(value, dict) else {}
    if annotation is Path and isinstance(value, str):
        yield place, value
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            if name in items:
                yield from paths_in(field.annotation, items[name], (*place, name))
    elif isinstance(origin, type) and issubclass(origin, Collection):
        entries = dict(enumerate(value)) if isinstance(value, list) else items
        for (key, item), inner in itertools.product(entries.items(), get_args(annotation)):
            yield from paths_in(inner, item, (*place, key))
    else:
        for inner in get_args(annotation):
            yield from paths_in(inner, value, place)


def with_value_at(value: Any, place: Place, new: str) -> Any:
    """Return a copy of a nested value with `new` at a place."""
    if not place:
        return new
    items: Any = dict(value) if isinstance(value, dict) else list(value)
    items[place[0]] = with_value_at(value[place[0]], place[1:], new)
    return items


MAX_PART = 40  # characters of a value in an id


def id_part(value: Any, text: str | None = None) -> str:
    """Return a value as part of an id: its text, and a digest where the text alone is not unique. Texts count in NFC.

    Args:
        value: a swept value, or the stem of a file.
        text: the text to use; default: as the value is written.

    Raises:
        ManifestError: JSON cannot hold the value.
    """
    value = nfc(value) if isinstance(value, str) else value
    items = value if isinstance(value, list) else []
    plain = not isinstance(value, dict) and all(isinstance(item, int | float) for item in items)
    try:
        text = _as_written(value) if text is None else nfc(text)
        clean = re.sub(r"[^A-Za-z0-9._-]", "_", text)
        exact = clean == text and len(text) <= MAX_PART and plain
        return clean if exact else f"{clean[: MAX_PART - 7]}.{digest(value)[:6]}"
    except (TypeError, ValueError):
        raise ManifestError(f"got {preview(value)}; expected a text, a number, a list or a mapping") from None


def _as_written(value: Any) -> str:
    """Write numbers in their shortest form and lists by their items; a mapping has no short text."""
    if isinstance(value, list):
        return "_".join(map(_as_written, value))
    if isinstance(value, float):
        return repr(value).removesuffix(".0").replace("+", "")
    return "" if isinstance(value, dict) else value if isinstance(value, str) else json.dumps(value)


MAX_JOBS = 100_000  # in a manifest, after expansion
SYNTAX = ("prompt_file", "sweep")  # keys that a job in a file may have beside those of its task
_PROMPT: Place = ("prompt_file",)
FileRow = tuple[str, dict[Place, Path]]  # a stem, "" without a glob; and which file goes to which place of the job
SweptValue = tuple[str, str, Any]  # the value's part of the id, its key, the value


@dataclass
class Expansion:
    """A manifest's mapping with its jobs expanded, where they came from, and the problems of expanding them.

    Attributes:
        data: the mapping.
        written: the jobs as they are in the file.
        origins: for each expanded job, the index of the job in the file.
        partial: the expanded jobs whose ids are incomplete, since the job in the file has problems.
        problems: a line each.
    """

    data: dict[str, Any]
    written: list[Any] = field(default_factory=list)
    origins: list[int] = field(default_factory=list)
    partial: set[int] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def as_written(self, place: Place) -> Place:
        """Return the place in the file of what pydantic reports at `place`."""
        if place[:1] != ("jobs",) or len(place) < 2 or not self.origins:
            return place
        origin, rest = self.origins[int(place[1])], place[2:]
        job = self.written[origin] if len(rest) > 1 else {}
        if isinstance(job.get("sweep"), dict) and rest[1] in job["sweep"] and rest[1] not in job:
            rest = ("sweep", *rest[1:])
        return ("jobs", origin, *rest)


@dataclass
class _Plan:
    """One job of the file, and the files and values it expands over. A problem does not stop the other checks."""

    job: Any
    index: int
    rows: list[FileRow] = field(default_factory=lambda: [("", {})])
    sweep: list[list[SweptValue]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    only_first: bool = False  # since all together would be too many

    @contextmanager
    def collect_problems(self, *place: int | str) -> Iterator[None]:
        """Record an error raised inside as a problem at this place of the job, and continue."""
        try:
            yield
        except ManifestError as error:
            self.problems.append(f"{'.'.join(map(str, ('jobs', self.index, *place)))}: {error}".replace("\n", " "))

    def count(self) -> int:
        return len(self.rows) * math.prod(map(len, self.sweep))


def expand(data: dict[str, Any], context: Context) -> Expansion:
    """Expand globs, `prompt_file` and `sweep` of a generate manifest's mapping. Anything but a list of jobs is kept."""
    if not isinstance(data.get("jobs"), list):
        return Expansion(data)
    globs = Globs(context)
    plans = [_plan(job, index, context, globs) for index, job in enumerate(data["jobs"])]
    jobs: list[Any] = []
    result = Expansion({**data, "jobs": jobs}, data["jobs"], problems=_limit(plans))
    for plan in plans:
        jobs += _expand_plan(plan)
        added = range(len(result.origins), len(jobs))
        result.origins += [plan.index] * len(added)
        result.partial.update(added if plan.only_first or plan.problems else ())
        result.problems += dict.fromkeys(plan.problems)
    return result


def _plan(job: Any, index: int, context: Context, globs: Globs) -> _Plan:
    """Find what a job expands over. A job of an unknown task is left for its model to refuse."""
    plan = _Plan(job, index)
    task = job.get("task") if isinstance(job, dict) else None
    if isinstance(task, str) and task in TASKS:
        model = find(TASKS, task, "task")
        plan.rows = _match_files(plan, model, context, globs)
        with plan.collect_problems("sweep"):
            plan.sweep = _read_sweep(plan, model, context) if "sweep" in job else []
        plan.job = {key: value for key, value in job.items() if key not in SYNTAX}
    return plan


def _limit(plans: list[_Plan]) -> list[str]:
    """Reduce each plan to its first job if there are too many, before any are made, and return the problem's line."""
    total = sum(plan.count() for plan in plans)
    if total <= MAX_JOBS or total == len(plans):  # without expansion, the model refuses too many
        return []
    for plan in plans:
        plan.only_first = plan.count() > 1
        plan.rows, plan.sweep = plan.rows[:1], [values[:1] for values in plan.sweep]
    return [f"jobs: globs and sweeps make {total} jobs; allowed are {MAX_JOBS}"]


def _expand_plan(plan: _Plan) -> list[Any]:
    """Return the jobs of a plan: files outermost, then the swept keys in the order in which they are written."""
    if not isinstance(plan.job, dict):
        return [plan.job]
    jobs = []
    for stem, files in plan.rows:
        job = plan.job
        for place, path in files.items():
            with plan.collect_problems(*place):
                if place == _PROMPT:
                    job = {**job, "prompt": _read_prompt(path)}
                else:
                    job = with_value_at(job, place, str(path))
        for swept in itertools.product(*plan.sweep):
            names = [id_part(stem)] * bool(stem) + [part for part, _, _ in swept]
            expanded = {**job, **{key: value for _, key, value in swept}}
            if names and is_id(job.get("id")):  # anything else is left for the model to refuse
                full = "-".join([job["id"], *names])
                expanded["id"] = full if len(full) <= MAX_ID else f"{full[: MAX_ID - 11]}.{digest(full)[:10]}"
            jobs.append(expanded)
    return jobs


def _match_files(plan: _Plan, model: type[Job], context: Context, globs: Globs) -> list[FileRow]:
    """Return the files of all globs of a job that belong together, and its prompt file."""
    texts = dict(paths_in(model, plan.job))
    if "prompt_file" in plan.job:
        with plan.collect_problems(*_PROMPT):
            if "prompt" in plan.job:
                raise ManifestError("the job also has a `prompt`; set only one of `prompt` and `prompt_file`")
            if not isinstance(plan.job["prompt_file"], str):
                raise ManifestError(f"got {preview(plan.job['prompt_file'])}; expected a path")
            texts[_PROMPT] = plan.job["prompt_file"]
    patterns = {place: text for place, text in texts.items() if is_glob(text, context)}
    shared, matches = dict[Place, Path](), dict[Place, dict[str, Path]]()
    for place in {_PROMPT} & texts.keys() - patterns.keys():
        with plan.collect_problems(*place):
            shared[place] = _resolve_prompt_file(texts[place], context)
    for place, text in patterns.items():
        with plan.collect_problems(*place):
            matches[place] = globs.find(text)
    if patterns and len(matches) == len(patterns):
        with plan.collect_problems():
            stems = pair_stems(matches)
            return [(stem, shared | {place: files[stem] for place, files in matches.items()}) for stem in stems]
    return [("", shared)]


def _resolve_prompt_file(text: str, context: Context) -> Path:
    return resolve(find_path(resolve(Path(text), context)), context)


def _read_prompt(path: Path) -> str:
    if not os.path.isfile(path):  # opening a named pipe would wait for its writer
        raise ManifestError(f"{str(path)!r:.300} is not a file")
    text = read_text(path, 4 * MAX_PROMPT).strip()  # UTF-8 has at most 4 bytes per character
    if not 0 < len(text) <= MAX_PROMPT:
        raise ManifestError(f"{path} has {len(text)} characters; expected 1 to {MAX_PROMPT}")
    return text


def _read_sweep(plan: _Plan, model: type[Job], context: Context) -> list[list[SweptValue]]:
    """Return the usable values of each swept key."""
    sweep = plan.job["sweep"]
    if not isinstance(sweep, dict) or not sweep:
        raise ManifestError(f"got {preview(sweep)}; expected keys with lists of values, like {{seed: [1, 2]}}")
    usable = []
    for key, values in sweep.items():
        parts: dict[str, SweptValue] = {}
        with plan.collect_problems("sweep", key):
            for value in _swept_values(key, values, plan.job, model):
                with plan.collect_problems("sweep", key):
                    _add_value(parts, key, value, dict(paths_in(model.model_fields[key].annotation, value)), context)
        usable += [list(parts.values())] * bool(parts)
    return usable


def _swept_values(key: str, values: Any, job: dict[str, Any], model: type[Job]) -> list[Any]:
    allowed = model.model_fields.keys() - {"id", "task"}
    if key in ("id", "task", *SYNTAX):
        raise ManifestError("this key cannot be swept")
    if key not in allowed:
        raise ManifestError(describe_unknown_key(str(key), allowed))
    if both := [name for name in (key, "prompt_file") if name in job and key in (name, "prompt")]:
        raise ManifestError(f"the job itself has `{both[0]}`; set only one of `{both[0]}` and `sweep.{key}`")
    if not isinstance(values, list) or not values:
        raise ManifestError(f"got {preview(values)}; expected a list of one or more values")
    return values


def _stem(path: str) -> str:
    """Return the part of a swept path that becomes part of an id: a file's stem, or the id of job:ID."""
    return path.removeprefix(JOB_PREFIX) if path.startswith(JOB_PREFIX) else Path(path).stem


def _add_value(parts: dict[str, SweptValue], key: str, value: Any, paths: dict[Place, str], context: Context) -> None:
    """Add a value under its part of the id. Upper and lower case count as equal, as they do for ids."""
    if any(is_glob(text, context) for text in paths.values()):
        raise ManifestError(f"{preview(value)} is a glob, which a sweep does not allow; set it as the job's `{key}`")
    part = key + id_part(value, _stem(value) if () in paths else None)
    if clash := parts.get(part.casefold()):
        raise ManifestError(f"{preview(clash[2])} and {preview(value)} make the same part of an id, {part!r}")
    parts[part.casefold()] = part, key, value
