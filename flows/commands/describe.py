"""`pusa describe NAME`: the keys of a task's job or of a kind of manifest: values, default, and a sentence each."""

import re
import textwrap
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pusa.errors import ManifestError
from pusa.manifest.models import KINDS
from pusa.registry import find
from pusa.system.strict import models_in, tag_of
from pusa.tasks import TASKS
from pusa.tasks.base import Settings

WIDTH = 110
BOUNDS = {"ge": "{} or more", "gt": "above {}", "le": "{} or less", "lt": "below {}"}  # lower ones first
SYNTAX = {
    "prompt_file": FieldInfo(
        default=None, description="a text file with the prompt; with *, paired with others by stem"
    ),
    "sweep": FieldInfo(default=None, description="key: [values, ...]; every combination is a job of its own"),
}


def describe(name: str) -> str:
    """For people: what the task is, its own keys, and those of every task; or the keys of a kind of manifest.

    Raises:
        ManifestError: there is neither a task nor a kind of manifest of that name.
    """
    if name in KINDS:
        return _manifest(name)
    if name not in TASKS:
        raise ManifestError(f"unknown name {name!r}; allowed are {', '.join((*KINDS, *TASKS))}")
    model = find(TASKS, name, "task")
    shared = set(Settings.model_fields)
    own = {key: field for key, field in model.model_fields.items() if key not in shared | {"task"}}
    common = {key: field for key, field in model.model_fields.items() if key in shared}
    lines = [f"{name}: {model.__doc__.splitlines()[0]}", "", *_table(own), "", "as every task:", *_table(common)]
    lines += ["", "and in a file, to make many jobs of one:", *_table(SYNTAX)]
    return "\n".join(lines)


def _manifest(kind: str) -> str:
    model = KINDS[kind]
    fields = {key: field for key, field in model.model_fields.items() if key not in ("kind", "jobs")}
    jobs = (
        ["", "  jobs                a list; `pusa describe TASK` says what each may set"] if kind == "generate" else []
    )
    return "\n".join([f"{kind}: {(model.__doc__ or '').splitlines()[0]}", "", *_table(fields), *jobs])


def _table(fields: dict[str, FieldInfo]) -> list[str]:
    lines = []
    for key, field in fields.items():
        lines += _row(key, field)
        for inner in models_in(field.annotation):  # of each picture, say
            lines += [f"  {line}" for line in _inner(inner)]
    return lines


def _inner(model: type[BaseModel]) -> list[str]:
    """A mapping's keys; of one kind among several, under the key that says which."""
    key, tag = tag_of(model)
    rest = _table({name: field for name, field in model.model_fields.items() if name != key})
    if not key:
        return rest
    return [f"  {f'{key}: {tag}':<19} {(model.__doc__ or '').splitlines()[0]}", *(f"  {line}" for line in rest)]


def _row(key: str, field: FieldInfo) -> list[str]:
    default = "required" if field.is_required() else _default(field.default)
    choices = " | ".join(map(str, _choices(field.annotation)))
    told = "; ".join(filter(None, [field.description, choices, _bounds(field), default]))
    return textwrap.wrap(told, WIDTH, initial_indent=f"  {key:<19} ", subsequent_indent=" " * 22) or [f"  {key}"]


def _default(value: Any) -> str:
    return "" if value is None or value == () or isinstance(value, BaseModel) else f"default {_plain(value)}"


def _choices(annotation: Any) -> list[Any]:
    return [value for value in get_args(annotation) if isinstance(value, str)]


def _bounds(field: FieldInfo) -> str:
    """What a number may be, or each of several: "1 to 4096", "1 or more", "above 0"."""
    found = {name: getattr(mark, name) for mark in _marks(field) for name in BOUNDS if hasattr(mark, name)}
    sides = [form.format(str(found[name]).removesuffix(".0")) for name, form in BOUNDS.items() if name in found]
    return sides[0] if len(sides) == 1 else " to ".join(re.sub(" or (more|less)", "", side) for side in sides)


def _marks(part: Any) -> list[Any]:
    """The constraints of a field and of what its annotation is made of."""
    if isinstance(part, FieldInfo):
        return [*part.metadata, *_marks(part.annotation)]
    return [mark for inner in get_args(part) for mark in _marks(inner)]


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value).replace("'", '"')
