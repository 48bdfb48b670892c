"""The base of every manifest model: frozen, unknown keys refused, input paths resolved against the manifest.

And what is said of a manifest's values: where they are, and what is wrong with them.
"""

import difflib
import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo, model_validator

from pusa.system.text import describe_unknown_key, preview

log = logging.getLogger(__name__)
RUN_PREFIX = "RUN"
Place = tuple[int | str, ...]  # keys and indices that lead to a value
Context = Mapping[str, Path]  # where paths are looked for: "folder", that of the manifest, and "run_dir"


class Strict(BaseModel):
    """A frozen model that knows every one of its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    old_keys: ClassVar[Mapping[str, str]] = {}  # old name -> new name; read with a warning until the next version

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, data: Any) -> Any:
        """pydantic takes true for 1, and YAML takes yes, on and true for true."""
        for key, value in data.items() if isinstance(data, dict) else ():
            field = cls.model_fields[key].annotation if key in cls.model_fields else bool
            if isinstance(value, bool) and bool not in (field, *get_args(field)):
                raise ValueError(f"{key} is {str(value).lower()}, which is neither a number nor a text")
        return data

    @model_validator(mode="before")  # of several, pydantic runs the last one first
    @classmethod
    def _read_old_keys(cls, data: Any) -> Any:
        return cls.rename_old_keys(data) if isinstance(data, dict) else data

    @classmethod
    def rename_old_keys(cls, data: Mapping[str, Any], warn: bool = True) -> dict[str, Any]:
        """Return the mapping with each key of `old_keys` under its new name, in the same order.

        Raises:
            ValueError: a key is given under both names.
        """
        for old, new in cls.old_keys.items():
            if old in data and new in data:
                raise ValueError(f"{old} and {new} are both given; {old} is the old name of {new}, give {new} only")
            if old in data and warn:
                log.warning("the key %s is now called %s; the next version will refuse %s", old, new, old)
        return {cls.old_keys.get(key, key): value for key, value in data.items()}

    def resolve_paths(self, run_dir: Path, folder: Path | None = None) -> Self:
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


def list_problems(
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
            _, place = _followed(model, as_written(item["loc"]))
            lines.append(f"{dotted(place)}: {_problem(item, model, syntax or {})}")
    return list(dict.fromkeys(lines))


def dotted(place: Place) -> str:
    """A place as text, without the names that pydantic gives to validators and unions."""
    kept = [str(part) for part in place if isinstance(part, int) or not re.search(r"[\[-]", part)]
    return ".".join(kept) or "manifest"


def _is_echo(item: Any) -> bool:
    """pydantic also calls a list too short whose every item was wrong."""
    return item["type"] == "too_short" and len(item["input"]) >= item["ctx"]["min_length"]


def _problem(item: Any, model: type[BaseModel], syntax: Mapping[type[BaseModel], Collection[str]]) -> str:
    kind, given, path = item["type"], item["input"], item["loc"]
    if kind == "extra_forbidden":
        return describe_unknown_key(str(path[-1]), _known_keys(_followed(model, path[:-1])[0], syntax))
    if kind in ("model_type", "model_attributes_type"):
        return f"is a mapping with {_wanted(_followed(model, path)[0])} (given: {preview(given)})"
    if kind == "union_tag_not_found":
        key = item["ctx"]["discriminator"].strip("'")
        return f"has no `{key}`; it is a mapping with {_wanted(_followed(model, path)[0])}"
    if kind == "union_tag_invalid":
        return _unknown_tag(item["ctx"])
    message = (
        item["msg"].removeprefix("Value error, ").replace("valid tuple", "list").replace("Dictionary", "a mapping")
    )
    told = kind in ("missing", "value_error") or isinstance(given, dict)
    return message if told else f"{message} (given: {preview(given)})"


def _unknown_tag(context: Any) -> str:
    key, tag = context["discriminator"].strip("'"), context["tag"]
    choices = re.findall(r"'([^']*)'", context["expected_tags"])
    near = difflib.get_close_matches(tag, choices, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {key} {tag!r}; {hint}allowed are {', '.join(choices)}"


def _wanted(models: Sequence[type[BaseModel]]) -> str:
    """The keys of a mapping that is one of these: of several, the one that says which, and what it may be."""
    if len(models) == 1:
        return ", ".join(models[0].model_fields)
    (key, *_), tags = zip(*map(tag_of, models), strict=True)
    return f"`{key}`: {', '.join(tags[:-1])} or {tags[-1]}"


def _known_keys(models: Iterable[type[BaseModel]], syntax: Mapping[type[BaseModel], Collection[str]]) -> set[str]:
    more = {name for m in models for base, names in syntax.items() if issubclass(m, base) for name in names}
    return more | {name for m in models for name in m.model_fields}


def _followed(model: type[BaseModel], place: Place) -> tuple[list[type[BaseModel]], Place]:
    """The models that a place can lead to, through lists, mappings and unions; and the place without unions' tags."""
    found, kept = [model], []
    for part in place:
        tagged = [m for m in found if len(found) > 1 and part == tag_of(m)[1]]
        fields = [m.model_fields[part].annotation for m in found if part in m.model_fields]
        kept += [] if tagged else [part]
        found = tagged or list(dict.fromkeys(m for field in fields for m in models_in(field))) or found
    return found, tuple(kept)


def tag_of(model: type[BaseModel]) -> tuple[str, str]:
    """The key that tells a model from the others of a union, and its value; both empty where there is none."""
    for key, field in model.model_fields.items():
        if get_origin(field.annotation) is Literal and len(values := get_args(field.annotation)) == 1:
            return key, values[0]
    return "", ""


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field's annotation is made of, in its order."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return list(dict.fromkeys(model for inner in get_args(annotation) for model in models_in(inner)))
