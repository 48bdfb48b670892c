"""`pusa describe NAME`: the keys of a task's job or of a kind of manifest: values, default, and a sentence each."""

import textwrap
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pusa.errors import ManifestError
from pusa.manifest import KINDS
from pusa.strict import models_in
from pusa.tables import find
from pusa.tasks import TASKS
from pusa.tasks.base import Settings

WIDTH = 110
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
        for inner in sorted(models_in(field.annotation), key=lambda model: model.__name__):  # of each picture, say
            lines += [f"  {line}" for line in _inner(inner)]
    return lines


def _inner(model: type[BaseModel]) -> list[str]:
    """A mapping's keys; of one kind among several, under the key that says which."""
    rest = dict(model.model_fields)
    kinds = [key for key, field in rest.items() if get_origin(field.annotation) is Literal and _is_one(field)]
    lines = []
    for key in kinds:
        (value,) = _choices(rest.pop(key).annotation)
        lines.append(f"  {f'{key}: {value}':<19} {(model.__doc__ or '').splitlines()[0]}")
    return lines + [f"{'  ' * len(kinds)}{line}" for line in _table(rest)]


def _is_one(field: FieldInfo) -> bool:
    return len(_choices(field.annotation)) == 1


def _row(key: str, field: FieldInfo) -> list[str]:
    default = "required" if field.is_required() else _default(field.default)
    choices = " | ".join(map(str, _choices(field.annotation)))
    told = "; ".join(filter(None, [field.description, choices, default]))
    return textwrap.wrap(told, WIDTH, initial_indent=f"  {key:<19} ", subsequent_indent=" " * 22) or [f"  {key}"]


def _default(value: Any) -> str:
    return "" if value is None or value == () or isinstance(value, BaseModel) else f"default {_plain(value)}"


def _choices(annotation: Any) -> list[Any]:
    return [value for value in get_args(annotation) if isinstance(value, str)]


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value).replace("'", '"')
