"""How a generate manifest may be written: globs, `prompt_file` and `sweep` make many jobs of one. No torch here."""

import glob
import itertools
import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from pusa.errors import ManifestError
from pusa.registry import find
from pusa.system.files import digest
from pusa.system.strict import Context, Place, resolve
from pusa.system.text import describe_unknown_key, join_names, preview, read_text
from pusa.tasks import TASKS
from pusa.tasks.base import MAX_ID, MAX_PROMPT, Job, is_id


def is_glob(text: str, context: Context) -> bool:
    """Whether a path is a pattern: it has `*`, `?` or `[`, and there is no file of that very name."""
    return glob.has_magic(text) and "\0" not in text and not os.path.isfile(resolve(Path(text), context))


def matches(text: str, context: Context) -> dict[str, Path]:
    """A glob's files by their stems, sorted.

    Raises:
        ManifestError: there are none, or two of one stem, or one whose name JSON cannot hold.
    """
    escaped = {name: Path(glob.escape(str(folder))) for name, folder in context.items()}
    names = {name for name in glob.iglob(str(resolve(Path(text), escaped)), recursive=True) if os.path.isfile(name)}
    if not names:
        fixed = itertools.takewhile(lambda part: not glob.has_magic(part), Path(text).parts)
        raise ManifestError(f"no file matches {text!r} in {resolve(Path(*fixed), context)}")
    if odd := sorted(name for name in names if name.encode(errors="replace").decode() != name):
        raise ManifestError(f"{text!r} matches names that are not UTF-8: {join_names(odd)}")
    paths = sorted(map(Path, names), key=lambda path: (path.stem, path))
    if twice := {str(path): 0 for pair in itertools.pairwise(paths) if pair[0].stem == pair[1].stem for path in pair}:
        raise ManifestError(f"{text!r} matches files that differ only in their folder or ending: {join_names(twice)}")
    return {path.stem: path for path in paths}


def pair(found: Mapping[Place, Mapping[str, Path]]) -> list[str]:
    """The stems of globs' files, sorted; the globs have the same.

    Raises:
        ManifestError: some have a file that others lack.
    """
    shared = set.intersection(*(set(files) for files in found.values()))
    alone = {place: [path.name for stem, path in files.items() if stem not in shared] for place, files in found.items()}
    if unpaired := [f"{'.'.join(map(str, place))} {join_names(names)}" for place, names in alone.items() if names]:
        raise ManifestError(f"files pair by their names without the ending; unpaired are: {'; '.join(unpaired)}")
    return sorted(shared)


def paths_in(annotation: Any, value: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    """Where in `value` the annotation has a path, through models, mappings, lists and unions; and the text there."""
    origin, items = get_origin(annotation), value if isinstance(value, dict) else {}
    if annotation is Path and isinstance(value, str):
        yield place, value
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            if name in items:
                yield from paths_in(field.annotation, items[name], (*place, name))
    elif isinstance(origin, type) and issubclass(origin, Collection):
        held = dict(enumerate(value)) if isinstance(value, list) else items
        for (key, item), inner in itertools.product(held.items(), get_args(annotation)):
            yield from paths_in(inner, item, (*place, key))
    else:
        for inner in get_args(annotation):
            yield from paths_in(inner, value, place)


def put(value: Any, place: Place, new: str) -> Any:
    """A copy of a nested value that has `new` at that place."""
    if not place:
        return new
    items: Any = dict(value) if isinstance(value, dict) else list(value)
    items[place[0]] = put(value[place[0]], place[1:], new)
    return items


MAX_PART = 40  # characters


def id_part(value: Any, text: str | None = None) -> str:
    """A value as a part of an id: its text, by default as it is written; a digest tells apart what that leaves out.

    Raises:
        ManifestError: JSON cannot hold it.
    """
    items = value if isinstance(value, list) else []
    plain = not isinstance(value, dict) and all(isinstance(item, int | float) for item in items)
    try:
        text = _written(value) if text is None else text
        clean = re.sub(r"[^A-Za-z0-9._-]", "_", text)
        exact = clean == text and len(text) <= MAX_PART and plain
        return clean if exact else f"{clean[: MAX_PART - 7]}.{digest(value)[:6]}"
    except (TypeError, ValueError):
        raise ManifestError(f"{preview(value)} is no text, number, list or mapping") from None


def _written(value: Any) -> str:
    """Numbers at their shortest, lists by their items; a mapping has no short text."""
    if isinstance(value, list):
        return "_".join(map(_written, value))
    if isinstance(value, float):
        return repr(value).removesuffix(".0").replace("+", "")
    return "" if isinstance(value, dict) else value if isinstance(value, str) else json.dumps(value)


MAX_JOBS = 100_000  # of a manifest, expanded
SYNTAX = ("prompt_file", "sweep")  # what a job in a file may have beside the keys of its task
_PROMPT: Place = ("prompt_file",)
Row = tuple[str, dict[Place, Path]]  # a stem, "" where there is no glob; the files that go with it, and where
Swept = tuple[str, str, Any]  # its part of the id, the key, the value


@dataclass
class Expansion:
    """A manifest's mapping with its jobs expanded, and how that went."""

    data: dict[str, Any]
    written: list[Any] = field(default_factory=list)  # the jobs as they are in the file
    origins: list[int] = field(default_factory=list)  # for each expanded job, the index of the written one
    partial: set[int] = field(default_factory=set)  # expanded jobs whose ids lack parts, as the written has problems
    problems: list[str] = field(default_factory=list)

    def as_written(self, place: Place) -> Place:
        """Where in the file it is what pydantic finds at `place`."""
        if place[:1] != ("jobs",) or len(place) < 2 or not self.origins:
            return place
        origin, rest = self.origins[int(place[1])], place[2:]
        job = self.written[origin] if len(rest) > 1 else {}
        if isinstance(job.get("sweep"), dict) and rest[1] in job["sweep"] and rest[1] not in job:
            rest = ("sweep", *rest[1:])
        return ("jobs", origin, *rest)


@dataclass
class _Plan:
    """One job of the file, and what it can be expanded over; where it cannot, its other keys are still checked."""

    job: Any
    index: int
    rows: list[Row] = field(default_factory=lambda: [("", {})])
    sweep: list[list[Swept]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    cut: bool = False  # to its first expanded job

    @contextmanager
    def at(self, *place: int | str) -> Iterator[None]:
        """Note what is refused inside, and go on."""
        try:
            yield
        except ManifestError as error:
            self.problems.append(f"{'.'.join(map(str, ('jobs', self.index, *place)))}: {error}".replace("\n", " "))

    def count(self) -> int:
        return len(self.rows) * math.prod(map(len, self.sweep))


def expand(data: dict[str, Any], context: Context) -> Expansion:
    """A generate manifest's mapping without globs, `prompt_file` and `sweep`. What is no list of jobs stays so."""
    if not isinstance(data.get("jobs"), list):
        return Expansion(data)
    plans = [_plan(job, index, context) for index, job in enumerate(data["jobs"])]
    jobs: list[Any] = []
    result = Expansion({**data, "jobs": jobs}, data["jobs"], problems=_bound(plans))
    for plan in plans:
        jobs += _made(plan)
        added = range(len(result.origins), len(jobs))
        result.origins += [plan.index] * len(added)
        result.partial.update(added if plan.cut or plan.problems else ())
        result.problems += dict.fromkeys(plan.problems)
    return result


def _plan(job: Any, index: int, context: Context) -> _Plan:
    """What a job is expanded over. One of no known task is left to the model to refuse."""
    plan = _Plan(job, index)
    task = job.get("task") if isinstance(job, dict) else None
    if isinstance(task, str) and task in TASKS:
        model = find(TASKS, task, "task")
        plan.rows = _rows(plan, model, context)
        with plan.at("sweep"):
            plan.sweep = _sweep(plan, model, context) if "sweep" in job else []
        plan.job = {key: value for key, value in job.items() if key not in SYNTAX}
    return plan


def _bound(plans: list[_Plan]) -> list[str]:
    """A line if there are too many jobs; then only the first of each plan stay, before any are made."""
    total = sum(plan.count() for plan in plans)
    if total <= MAX_JOBS or total == len(plans):  # as many before any expansion are the model's to refuse
        return []
    for plan in plans:
        plan.cut, plan.rows, plan.sweep = plan.count() > 1, plan.rows[:1], [values[:1] for values in plan.sweep]
    return [f"jobs: with globs and sweeps there are {total}; allowed are {MAX_JOBS}"]


def _made(plan: _Plan) -> list[Any]:
    """The jobs of a plan: files outermost, then the swept keys in the order in which they are written."""
    if not isinstance(plan.job, dict):
        return [plan.job]
    jobs = []
    for stem, files in plan.rows:
        job = plan.job
        for place, path in files.items():
            with plan.at(*place):
                job = {**job, "prompt": _prompt(path)} if place == _PROMPT else put(job, place, str(path))
        for swept in itertools.product(*plan.sweep):
            names = [id_part(stem)] * bool(stem) + [part for part, _, _ in swept]
            named = {"id": _id(job["id"], names)} if names and "id" in job else {}
            jobs.append({**job, **{key: value for _, key, value in swept}, **named})
    return jobs


def _rows(plan: _Plan, model: type[Job], context: Context) -> list[Row]:
    """The files of all globs of a job that go together, and its prompt file."""
    texts = dict(paths_in(model, plan.job))
    if "prompt_file" in plan.job:
        with plan.at(*_PROMPT):
            texts[_PROMPT] = _prompt_file(plan.job)
    globs = {place: text for place, text in texts.items() if is_glob(text, context)}
    same = {place: resolve(Path(texts[place]), context) for place in texts if place == _PROMPT and place not in globs}
    found: dict[Place, dict[str, Path]] = {}
    for place, text in globs.items():
        with plan.at(*place):
            found[place] = matches(text, context)
    if globs and len(found) == len(globs):
        with plan.at():
            return [(stem, same | {place: files[stem] for place, files in found.items()}) for stem in pair(found)]
    return [("", same)]


def _prompt_file(job: dict[str, Any]) -> str:
    if "prompt" in job:
        raise ManifestError("the job has a `prompt` too; only one of `prompt` and `prompt_file` can be given")
    if not isinstance(job["prompt_file"], str):
        raise ManifestError(f"{preview(job['prompt_file'])} is given; a path is wanted")
    return job["prompt_file"]


def _prompt(path: Path) -> str:
    if not os.path.isfile(path):  # to open a pipe would be to wait for its writer
        raise ManifestError(f"{str(path)!r} is no file")
    text = read_text(path, 4 * MAX_PROMPT).strip()  # UTF-8 has at most 4 bytes a character
    if not 0 < len(text) <= MAX_PROMPT:
        raise ManifestError(f"{path} has {len(text)} characters; a prompt file has 1 to {MAX_PROMPT}")
    return text


def _sweep(plan: _Plan, model: type[Job], context: Context) -> list[list[Swept]]:
    """Of each swept key the values that can be used."""
    sweep = plan.job["sweep"]
    if not isinstance(sweep, dict) or not sweep:
        raise ManifestError(f"{preview(sweep)} is given; wanted are keys with lists of values, as {{seed: [1, 2]}}")
    usable = []
    for key, values in sweep.items():
        parts: dict[str, Swept] = {}
        with plan.at("sweep", key):
            for value in _values(key, values, plan.job, model):
                with plan.at("sweep", key):
                    _add(parts, key, value, dict(paths_in(model.model_fields[key].annotation, value)), context)
        usable += [list(parts.values())] * bool(parts)
    return usable


def _values(key: str, values: Any, job: dict[str, Any], model: type[Job]) -> list[Any]:
    free = model.model_fields.keys() - {"id", "task"}
    if key not in free:
        raise ManifestError(
            "it cannot be swept" if key in ("id", "task", *SYNTAX) else describe_unknown_key(str(key), free)
        )
    if both := [name for name in (key, "prompt_file") if name in job and key in (name, "prompt")]:
        raise ManifestError(f"the job itself has `{both[0]}`; only one of `{both[0]}` and `sweep.{key}` can be given")
    if not isinstance(values, list) or not values:
        raise ManifestError(f"{preview(values)} is given; a list of one or more values is wanted")
    return values


def _add(parts: dict[str, Swept], key: str, value: Any, paths: dict[Place, str], context: Context) -> None:
    """Add a value under its part of the id, where capitals do not count, as they do not for ids."""
    if any(is_glob(text, context) for text in paths.values()):
        raise ManifestError(
            f"{preview(value)} is a glob, and a sweep takes none; write it as `{key}` of the job itself"
        )
    part = key + id_part(value, Path(value).stem if () in paths else None)
    if clash := parts.get(part.casefold()):
        raise ManifestError(f"{preview(clash[2])} and {preview(value)} make the same part of an id, {part!r}")
    parts[part.casefold()] = part, key, value


def _id(base: Any, names: list[str]) -> Any:
    """The id with its parts. What is no id stays as it is, for the model to refuse."""
    if not is_id(base):
        return base
    full = "-".join([base, *names])
    return full if len(full) <= MAX_ID else f"{full[: MAX_ID - 11]}.{digest(full)[:10]}"
