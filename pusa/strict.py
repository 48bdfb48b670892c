"""The base of every manifest model: frozen, unknown keys refused, input paths resolved against the manifest."""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo

RUN_PREFIX = "RUN"


class Strict(BaseModel):
    """A frozen model that knows every one of its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def located(self, run_dir: Path, folder: Path | None = None) -> Self:
        """The same with every path absolute: RUN/x in `run_dir`, others in `folder` (default: the current one)."""
        context = {"run_dir": run_dir.absolute(), "folder": (folder or Path.cwd()).absolute()}
        return type(self).model_validate(self.model_dump(), context=context)


def resolve_path(path: Path, info: ValidationInfo) -> Path:
    """RUN/x lies in the run's folder; anything else is relative to the manifest. Without a context: as it is."""
    if not info.context or path.is_absolute():
        return path
    if path.parts[:1] == (RUN_PREFIX,):
        return Path(info.context["run_dir"], *path.parts[1:])
    return Path(info.context["folder"], path)


InputPath = Annotated[Path, AfterValidator(resolve_path)]


def problems(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One readable line for each thing that is wrong: where, what was given, what is allowed."""
    return [_problem(item, model) for item in error.errors(include_url=False) if not _is_echo(item)]


def _is_echo(item: Any) -> bool:
    """pydantic also calls a list too short whose every item was wrong."""
    return item["type"] == "too_short" and len(item["input"]) >= item["ctx"]["min_length"]


def _problem(item: Any, model: type[BaseModel]) -> str:
    path = item["loc"]
    where = ".".join(str(part) for part in path if not re.search(r"[\[-]", str(part))) or "manifest"
    if item["type"] == "extra_forbidden":
        known = _known_keys(model, path[:-1])
        near = difflib.get_close_matches(str(path[-1]), known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(sorted(known))}"
        return f"{where}: unknown key; {hint}"
    choices = re.findall(r"'([^']*)'", str(item.get("ctx", {}).get("expected_tags", "")))
    if choices:
        tag = item["ctx"]["tag"]
        near = difflib.get_close_matches(tag, choices, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{where}: unknown task {tag!r}; {hint}allowed are {', '.join(choices)}"
    message = item["msg"].removeprefix("Value error, ")
    given = item["input"]
    told = item["type"] in ("missing", "value_error") or isinstance(given, dict)
    return f"{where}: {message}" if told else f"{where}: {message} (given: {given!r:.80})"


def _known_keys(model: type[BaseModel], path: tuple[int | str, ...]) -> set[str]:
    """The keys of every model that `path` can lead to, through lists, mappings and tagged unions."""
    found = {model}
    for part in path:
        fields = [m.model_fields[part].annotation for m in found if part in m.model_fields]
        if fields:
            found = {inner for field in fields for inner in _models_in(field)}
        else:  # an index, a mapping's key, or the tag of a union
            found = {m for m in found if part in (field.default for field in m.model_fields.values())} or found
    return {name for m in found for name in m.model_fields}


def _models_in(annotation: Any) -> set[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return {model for inner in get_args(annotation) for model in _models_in(inner)}
