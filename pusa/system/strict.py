"""Define the base class of every manifest model, and describe what is wrong with a manifest's values.

Models are frozen and refuse unknown keys. Input paths are resolved against the manifest's folder or the run's folder.
"""

import difflib
import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import date
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import CoreSchema

from pusa.errors import ManifestError
from pusa.system.allowed import Allowed
from pusa.system.names import find_path, log_once
from pusa.system.text import describe_unknown_key, join_lines, join_names, preview, printable

log = logging.getLogger(__name__)
RUN_PREFIX = "RUN"
UNKNOWN_NAME = "unknown_name"  # an error whose context has a `name`, and `known`, which returns the known names
MAX_PROBLEMS = 40  # lines; a message has room for some of other checks
LONGEST, LONGEST_KEY = 1000, 140  # characters of a problem, and of a key in its place
Place = tuple[int | str, ...]  # the keys and indices that lead to a value
# What paths are relative to: "folder" (the manifest's) and "run_dir"; and maybe "allowed", where they must lead to.
Context = Mapping[str, Any]


def _make_numbers_strict(schema: Any) -> None:
    """Set `strict` for each number in pydantic's description of a type, however deep."""
    if isinstance(schema, dict):
        if schema.get("type") in ("int", "float"):
            schema["strict"] = True
        schema = schema.values()
    elif not isinstance(schema, list | tuple):
        return
    for inner in schema:
        _make_numbers_strict(inner)


class Strict(BaseModel):
    """A frozen model that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Accept only numbers as numbers; pydantic would also read the texts "010" and "1_000", true, and 7.0 as 7."""
        schema = handler(source)
        _make_numbers_strict(schema)
        return schema

    old_keys: ClassVar[Mapping[str, str]] = {}  # old name -> new name; read with a warning until the next version

    @model_validator(mode="before")
    @classmethod
    def _refuse_booleans(cls, data: Any) -> Any:
        """Refuse booleans for other types: pydantic accepts true as 1, and YAML reads yes, on and true as true."""
        for key, value in data.items() if isinstance(data, dict) else ():
            field = cls.model_fields[key].annotation if key in cls.model_fields else bool
            if isinstance(value, bool) and bool not in (field, *get_args(field)):
                raise ValueError(f"{key} is {str(value).lower()}, which is neither a number nor text")
        return data

    @model_validator(mode="before")  # of several such validators, pydantic runs the last one first
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
        """Return a copy with absolute paths: RUN/x in `run_dir`, others in `folder` (default: the current folder).

        A manifest that was read from a file has absolute paths already, and is returned without another validation;
        unless the worker allows only some folders: links may have changed since.

        Raises:
            ManifestError: the run's folder or a path leads out of the folders that the worker allows.
            ValidationError: a value is not allowed.
        """
        allowed = Allowed.from_environment()
        if _is_resolved(self) and not allowed:
            return self
        allowed.require_tree(run_dir)
        context = {"run_dir": run_dir.absolute(), "folder": (folder or Path.cwd()).absolute(), "allowed": allowed}
        try:
            return type(self).model_validate(
                self.model_dump(exclude_unset=True), context={**context, **self.names_for_paths()}
            )
        except ValidationError as error:
            if not allowed:
                raise
            raise ManifestError(join_lines("the manifest:", list_problems(error, type(self)))) from error

    def names_for_paths(self) -> dict[str, Any]:
        """Return what paths may name beside files, as more context of the validation; by default nothing."""
        return {}


def read_integer_keys(value: Any) -> Any:
    """Return a mapping with its integer keys as numbers; JSON can write them only as text, such as "-1".

    Raises:
        ValueError: two keys are the same number.
    """
    if not isinstance(value, dict):
        return value
    keys = [int(key) if isinstance(key, str) and re.fullmatch(r"0|-?[1-9]\d{0,9}", key, re.A) else key for key in value]
    for key, count in Counter(keys).items():
        if count > 1:
            raise ValueError(f"{key} is a key twice, as a number and as text")
    return dict(zip(keys, value.values(), strict=True))


def resolve_path(path: Path, info: ValidationInfo) -> Path:
    """Resolve the path of a model's field, as `resolve` does, to the form in which its name is on the disk.

    Raises:
        ManifestError: it is missing, and the names of several files differ from it only by their Unicode normal form.
    """
    path = resolve(path, info.context)
    found = find_path(path) if path.is_absolute() else path
    if found != path:
        resolve(found, info.context)
        log_once(f"{str(path)!a} is missing; {str(found)!a} is used, which differs only by its Unicode normal form")
    return found


def resolve(path: Path, context: Context | None) -> Path:
    """Return RUN/x in the run's folder, and any other path relative to the manifest; unchanged without a context.

    Raises:
        ManifestError: it leads out of the folders that the worker allows.
    """
    if not context:
        return path
    if not path.is_absolute():
        is_of_run = path.parts[:1] == (RUN_PREFIX,)
        path = Path(context["run_dir"], *path.parts[1:]) if is_of_run else Path(context["folder"], path)
    if allowed := context.get("allowed"):
        allowed.require(path)
    return path


def resolve_tree(path: Path, info: ValidationInfo) -> Path:
    """Resolve a path as `resolve_path` does. If it is a folder, no link in it may lead out of the allowed ones."""
    path = resolve_path(path, info)
    if allowed := (info.context or {}).get("allowed"):
        allowed.require_tree(path)
    return path


InputPath = Annotated[Path, AfterValidator(resolve_tree)]


class PathName:
    """Mark in an annotation that a text may be a path, or else a name that begins with one of `PREFIXES`."""

    PREFIXES = ("builtin:", "hf:")


def _path_to_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _resolve_name(name: str, info: ValidationInfo) -> str:
    """Resolve a path against the manifest; names of built-in models and of a hub are not paths."""
    return name if name.startswith(PathName.PREFIXES) else str(resolve_tree(Path(name), info))


def _resolve_source(name: str, info: ValidationInfo) -> str:
    """Resolve a name as `_resolve_name` does, but not the links in a folder: each is a source, and maybe a reject."""
    return name if name.startswith(PathName.PREFIXES) else str(resolve_path(Path(name), info))


ResolvedName = Annotated[str, BeforeValidator(_path_to_text), AfterValidator(_resolve_name), PathName()]
SourceName = Annotated[str, BeforeValidator(_path_to_text), AfterValidator(_resolve_source), PathName()]


def _is_resolved(value: Any) -> bool:
    """Return whether a value that may hold paths has only absolute ones."""
    if isinstance(value, Strict):
        return all(_is_resolved(getattr(value, name)) for name in _fields_with_paths(type(value)))
    if isinstance(value, Path):
        return value.is_absolute()
    if isinstance(value, str):
        return value.startswith((*PathName.PREFIXES, "/"))
    if isinstance(value, Mapping | tuple | list):
        return all(map(_is_resolved, value.values() if isinstance(value, Mapping) else value))
    return True


@cache
def _fields_with_paths(model: type[BaseModel]) -> tuple[str, ...]:
    """Return the fields of a model that may hold paths, also in models inside them."""

    def mentions_path(part: Any) -> bool:
        if isinstance(part, type) and issubclass(part, Strict):
            return bool(_fields_with_paths(part))
        if part is Path or isinstance(part, PathName):
            return True
        return any(map(mentions_path, (*get_args(part), *getattr(part, "__metadata__", ()))))

    fields = model.model_fields.items()
    return tuple(name for name, field in fields if any(map(mentions_path, (field.annotation, *field.metadata))))


def list_problems(
    error: ValidationError,
    model: type[BaseModel],
    as_written: Callable[[Place], Place] = tuple,
    syntax: Mapping[type[BaseModel], Collection[str]] | None = None,
) -> list[str]:
    """Return one line for each problem: the place, the value, and what is allowed; and how many more there are.

    A manifest may have a wrong key on each of its lines, and pydantic reports each type of a union: the lines are
    `MAX_PROBLEMS` at most, of `LONGEST` characters at most.

    Args:
        error: pydantic's error.
        model: the model that was validated.
        as_written: converts a place in the validated data to the place in the file.
        syntax: for each model, keys that are allowed in the file although they are not fields.
    """
    lines: dict[str, None] = {}
    items = [item for item in error.errors(include_url=False) if not _is_echo(item)]
    for number, item in enumerate(items):
        if len(lines) == MAX_PROBLEMS:
            return [*lines, f"and {len(items) - number:,} more problems"]
        _, place = _follow(model, as_written(item["loc"]))
        lines[f"{format_place(place)}: {printable(_describe(item, model, syntax or {}), LONGEST)}"] = None
    return list(lines)


def format_place(place: Place) -> str:
    """Return a place as text, joined by dots, without the names that pydantic gives to validators and unions."""
    kept = [printable(part, LONGEST_KEY) for part in place if isinstance(part, int) or not re.search(r"[\[-]", part)]
    return ".".join(kept) or "manifest"


def _is_echo(item: Any) -> bool:
    """Return whether an error only repeats others: pydantic reports a list as too short if all its items are wrong."""
    return item["type"] == "too_short" and len(item["input"]) >= item["ctx"]["min_length"]


def _describe(item: Any, model: type[BaseModel], syntax: Mapping[type[BaseModel], Collection[str]]) -> str:
    kind, given, path = item["type"], item["input"], item["loc"]
    if kind == "extra_forbidden":
        return describe_unknown_key(str(path[-1]), _known_keys(_follow(model, path[:-1])[0], syntax))
    if kind in ("model_type", "model_attributes_type"):
        return f"expected a mapping with {_describe_keys(_follow(model, path)[0])} (given: {preview(given)})"
    if kind == "union_tag_not_found":
        key = item["ctx"]["discriminator"].strip("'")
        return f"has no `{key}`; expected a mapping with {_describe_keys(_follow(model, path)[0])}"
    if kind == UNKNOWN_NAME:
        near = difflib.get_close_matches(item["ctx"]["name"], known := item["ctx"]["known"](), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed are {join_names(known)}"
        return f"{item['msg']}; {hint}"
    if kind == "union_tag_invalid":
        key, tag = item["ctx"]["discriminator"].strip("'"), item["ctx"]["tag"]
        choices = re.findall(r"'([^']*)'", item["ctx"]["expected_tags"])
        near = difflib.get_close_matches(tag[:LONGEST_KEY], choices, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"unknown {key} {preview(tag)}; {hint}allowed are {', '.join(choices)}"
    message = (
        item["msg"].removeprefix("Value error, ").replace("valid tuple", "list").replace("Dictionary", "a mapping")
    )
    if kind in ("missing", "value_error") or isinstance(given, dict):  # these messages hold the value already
        return message
    return f"{message} (given: {preview(given)}{_hint(kind, given)})"


def _hint(kind: str, given: Any) -> str:
    """Return how to write what YAML read as another type."""
    if kind in ("string_type", "path_type") and isinstance(given, int | float | date):
        return "; put it in quotes to make it text, as it is written"
    if kind in ("int_type", "float_type") and isinstance(given, str):
        return ", which is text; numbers are decimal and without quotes"
    return ""


def _describe_keys(models: Sequence[type[BaseModel]]) -> str:
    """Return the keys of a model; of a union of models, the key that selects one, and its allowed values."""
    if len(models) == 1:
        return ", ".join(models[0].model_fields)
    (key, *_), tags = zip(*map(tag_of, models), strict=True)
    return f"`{key}`: {', '.join(tags[:-1])} or {tags[-1]}"


def _known_keys(models: Iterable[type[BaseModel]], syntax: Mapping[type[BaseModel], Collection[str]]) -> set[str]:
    more = {name for m in models for base, names in syntax.items() if issubclass(m, base) for name in names}
    return more | {name for m in models for name in m.model_fields}


def _follow(model: type[BaseModel], place: Place) -> tuple[list[type[BaseModel]], Place]:
    """Return the models that may be at a place, and the place without the tags that pydantic adds for unions."""
    models, kept = [model], []
    for part in place:
        tagged = [m for m in models if len(models) > 1 and part == tag_of(m)[1]]
        fields = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        kept += [] if tagged else [part]
        models = tagged or list(dict.fromkeys(m for field in fields for m in models_in(field))) or models
    return models, tuple(kept)


def tag_of(model: type[BaseModel]) -> tuple[str, str]:
    """Return the key that selects a model in a union, and its value; both are empty if there is none."""
    for key, field in model.model_fields.items():
        if get_origin(field.annotation) is Literal and len(values := get_args(field.annotation)) == 1:
            return key, values[0]
    return "", ""


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the models in a field's annotation, in their order."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return list(dict.fromkeys(model for inner in get_args(annotation) for model in models_in(inner)))
