"""Describe the keys of a task's job or of a kind of manifest: what each means, its values and its default."""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pusa.backbones import DEFAULT_BACKBONE, all_families, find_family
from pusa.errors import ManifestError
from pusa.manifest.models import KINDS
from pusa.registry import find
from pusa.system.strict import models_in, tag_of
from pusa.tasks import TASKS
from pusa.tasks.base import Settings

WIDTH = 110  # characters of a line
BOUNDS = {"ge": "{} or more", "gt": "above {}", "le": "{} or less", "lt": "below {}"}  # lower bounds first
SYNTAX = {
    "prompt_file": FieldInfo(
        default=None, description="a text file with the prompt; with *, paired with the other files by stem"
    ),
    "sweep": FieldInfo(default=None, description="key: [values, ...]; makes one job for each combination"),
}


def describe(name: str) -> str:
    """Return the description of a task, with its own keys and those of every task, or of a kind of manifest.

    Raises:
        ManifestError: no task and no kind of manifest has this name.
    """
    if name in KINDS:
        kind = KINDS[name]
        fields = {key: field for key, field in kind.model_fields.items() if key not in ("kind", "jobs")}
        lines = [f"{name}: {_first_line(kind)}", "", *_rows(fields)]
        if name == "generate":
            lines += [
                "",
                *_other_defaults(),
                "",
                "  jobs                a list; `pusa describe TASK` describes the keys of a job",
            ]
    elif name in TASKS:
        task = find(TASKS, name, "task")
        fields = {key: field for key, field in task.model_fields.items() if key != "task"}
        shared = {key: field for key, field in fields.items() if key in Settings.model_fields}
        own = {key: field for key, field in fields.items() if key not in shared}
        lines = [f"{name}: {_first_line(task)}", "", *_rows(own), "", "for every task:", *_rows(shared)]
        lines += ["", *_other_defaults(), "", "in a file, to make many jobs from one:", *_rows(SYNTAX)]
    else:
        raise ManifestError(f"unknown name {name!r}; allowed are {', '.join((*KINDS, *TASKS))}")
    return "\n".join(lines)


def _other_defaults() -> Iterator[str]:
    """Describe the defaults of each family of base models that differ from the first one's, which all rows show."""
    yield f"defaults of other backbones than {DEFAULT_BACKBONE}:"
    first = asdict(find_family().job)
    for family in all_families()[1:]:
        own = {key: value for key, value in asdict(family.job).items() if value != first[key]}
        text = ", ".join("its own negative_prompt" if key == "negative_prompt" else f"{key} {own[key]}" for key in own)
        yield from textwrap.wrap(text, WIDTH, initial_indent=f"  {family.name:<19} ", subsequent_indent=" " * 22)


def _rows(fields: dict[str, FieldInfo]) -> Iterator[str]:
    """Describe each key: its meaning, values, bounds and default; below it, indented, the keys of a mapping."""
    for key, field in fields.items():
        choices = " | ".join(value for value in get_args(field.annotation) if isinstance(value, str))
        default = "required" if field.is_required() else _default(field.default)
        text = "; ".join(filter(None, [field.description, choices, _bounds(field), default]))
        lines = textwrap.wrap(text, WIDTH, initial_indent=f"  {key:<19} ", subsequent_indent=" " * 22)
        yield from lines or [f"  {key}"]
        for model in models_in(field.annotation):
            tag_key, tag = tag_of(model)  # for one model of several: the key that selects it, and its value
            indent = "  "
            if tag_key:
                yield f"    {f'{tag_key}: {tag}':<19} {_first_line(model)}"
                indent = "    "
            inner = {name: field for name, field in model.model_fields.items() if name != tag_key}
            yield from (indent + line for line in _rows(inner))


def _first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").splitlines()[0]


def _default(value: Any) -> str:
    """Return a default as a manifest would have it; nothing for None, () and models."""
    if value is None or value == () or isinstance(value, BaseModel):
        return ""
    if isinstance(value, tuple):
        return f"default [{', '.join(map(str, value))}]"
    if isinstance(value, bool):
        return f"default {str(value).lower()}"
    return "default " + repr(value).replace("'", '"')


def _bounds(field: FieldInfo) -> str:
    """Return the bounds of a number, or of each number of several: "1 to 4096", "1 or more", "above 0"."""
    marks = _constraints(field)
    limits = {name: getattr(mark, name) for mark in marks for name in BOUNDS if hasattr(mark, name)}
    sides = [form.format(str(limits[name]).removesuffix(".0")) for name, form in BOUNDS.items() if name in limits]
    return sides[0] if len(sides) == 1 else " to ".join(re.sub(" or (more|less)", "", side) for side in sides)


def _constraints(part: Any) -> list[Any]:
    """Return the constraints of a field and of every part of its annotation."""
    if isinstance(part, FieldInfo):
        return [*part.metadata, *_constraints(part.annotation)]
    return [mark for inner in get_args(part) for mark in _constraints(inner)]
