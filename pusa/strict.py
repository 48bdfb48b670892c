"""The base of every manifest model: frozen, unknown keys refused, input paths resolved against the manifest.

And what is said of a manifest's values: where they are, and what is wrong with them.
"""

import difflib
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo, model_validator

from pusa.errors import ManifestError

RUN_PREFIX = "RUN"
MAX_LISTED = 20  # names in one message
Place = tuple[int | str, ...]  # keys and indices that lead to a value
Context = Mapping[str, Path]  # where paths are looked for: "folder", that of the manifest, and "run_dir"


class Strict(BaseModel):
    """A frozen model that knows every one of its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, data: Any) -> Any:
        """pydantic takes true for 1, and YAML takes yes, on and true for true."""
        for key, value in data.items() if isinstance(data, dict) else ():
            field = cls.model_fields[key].annotation if key in cls.model_fields else bool
            if isinstance(value, bool) and bool not in (field, *get_args(field)):
                raise ValueError(f"{key} is {str(value).lower()}, which is neither a number nor a text")
        return data

    def located(self, run_dir: Path, folder: Path | None = None) -> Self:
        """The same with every path absolute: RUN/x in `run_dir`, others in `folder` (default: the current one)."""
        context = {"run_dir": run_dir.absolute(), "folder": (folder or Path.cwd()).absolute()}
        return type(self).model_validate(self.model_dump(exclude_unset=True), context=context)


def resolve_path(path: Path, info: ValidationInfo) -> Path:
    """As `resolve`, for a field of a model."""
    return resolve(path, info.context)


def resolve(path: Path, context: Mapping[str, Any] | None) -> Path:
    """RUN/x lies in the run's folder; anything else is relative to the manifest. Without a context: as it is."""
    if not context or path.is_absolute():
        return path
    if path.parts[:1] == (RUN_PREFIX,):
        return Path(context["run_dir"], *path.parts[1:])
    return Path(context["folder"], path)


InputPath = Annotated[Path, AfterValidator(resolve_path)]


def read_text(path: Path, max_bytes: int) -> str:
    """A text file, not one byte more of it than allowed.

    Raises:
        ManifestError: it is too large or no UTF-8, or the system refuses it.
    """
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise ManifestError(f"{path} is too large; allowed are {max_bytes} bytes")
        return data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path} cannot be read: {error}") from error


def listed(names: Collection[str]) -> str:
    """Names for a message, the first few of them."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(map(repr, itertools.islice(names, MAX_LISTED))) + more


def problems(
    error: ValidationError,
    model: type[BaseModel],
    as_written: Callable[[Place], Place] = tuple,
    syntax: Mapping[type[BaseModel], Collection[str]] | None = None,
) -> list[str]:
    """One readable line for each thing that is wrong: where, what was given, what is allowed.

    Args:
        error: what pydantic found.
        model: what it checked.
        as_written: from pydantic's place to that in the file.
        syntax: keys that a model's mapping may have in the file, beside the model's own.
    """
    lines = []
    for item in error.errors(include_url=False):
        if not _is_echo(item):
            lines.append(f"{dotted(as_written(item['loc']))}: {_problem(item, model, syntax or {})}")
    return list(dict.fromkeys(lines))


def dotted(place: Place) -> str:
    """A place as text, without the names that pydantic gives to validators and unions."""
    kept = [str(part) for part in place if isinstance(part, int) or not re.search(r"[\[-]", part)]
    return ".".join(kept) or "manifest"


def unknown(key: str, known: Iterable[str]) -> str:
    """What to say of a key that is not among those known."""
    near = difflib.get_close_matches(key, known := sorted(known), 1)
    return f"unknown key; did you mean {near[0]!r}?" if near else f"unknown key; known keys are {', '.join(known)}"


def shown(value: Any) -> str:
    """The beginning of a value, for a message."""
    try:
        return f"{value!r:.80}"
    except ValueError:  # Python refuses to write out thousands of digits
        return "a number of thousands of digits"


def _is_echo(item: Any) -> bool:
    """pydantic also calls a list too short whose every item was wrong."""
    return item["type"] == "too_short" and len(item["input"]) >= item["ctx"]["min_length"]


def _problem(item: Any, model: type[BaseModel], syntax: Mapping[type[BaseModel], Collection[str]]) -> str:
    path = item["loc"]
    if item["type"] == "extra_forbidden":
        return unknown(str(path[-1]), _known_keys(model, path[:-1], syntax))
    if item["type"] == "union_tag_not_found":
        return "has no `task`; `pusa list tasks` names them"
    choices = re.findall(r"'([^']*)'", str(item.get("ctx", {}).get("expected_tags", "")))
    if choices:
        tag = item["ctx"]["tag"]
        near = difflib.get_close_matches(tag, choices, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"unknown task {tag!r}; {hint}allowed are {', '.join(choices)}"
    message = (
        item["msg"].removeprefix("Value error, ").replace("valid tuple", "list").replace("Dictionary", "a mapping")
    )
    given = item["input"]
    told = item["type"] in ("missing", "value_error") or isinstance(given, dict)
    return message if told else f"{message} (given: {shown(given)})"


def _known_keys(model: type[BaseModel], path: Place, syntax: Mapping[type[BaseModel], Collection[str]]) -> set[str]:
    """The keys of every model that `path` can lead to, through lists, mappings and tagged unions."""
    found = {model}
    for part in path:
        fields = [m.model_fields[part].annotation for m in found if part in m.model_fields]
        if fields:
            found = {inner for field in fields for inner in models_in(field)}
        else:  # an index, a mapping's key, or the tag of a union
            found = {m for m in found if part in (field.default for field in m.model_fields.values())} or found
    more = {name for m in found for base, names in syntax.items() if issubclass(m, base) for name in names}
    return more | {name for m in found for name in m.model_fields}


def models_in(annotation: Any) -> set[type[BaseModel]]:
    """The models that a field's annotation is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return {model for inner in get_args(annotation) for model in models_in(inner)}
