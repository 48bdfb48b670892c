"""The options that several commands share, and how the text of an option becomes its value."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, Token

from pusa.system.text import preview

MOST = 1e9  # of what an option counts or measures


def as_written(kind: type, tokens: Sequence[Token]) -> object:
    """Return the text as a str or a Path. Without this, cyclopts reads the word "none" as None.

    An empty text is refused: as a path, it would be the current folder.
    """
    return kind(_require_text(tokens[0].value))


def _require_text(text: str) -> str:
    if not text.strip():
        raise ValueError(f"{text!r} is empty; is a variable of the shell not set?")
    return text


def to_positive(kind: type, tokens: Sequence[Token]) -> float:
    """Return a number above 0 and up to `MOST`."""
    text = tokens[0].value
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number <= MOST:
        raise ValueError(f"{text:.80} is not a number above 0 and up to {MOST:g}")
    return number


def to_count(kind: type, tokens: Sequence[Token]) -> int:
    """Return a whole number above 0 and up to `MOST`."""
    text = tokens[0].value
    if not text.isdecimal() or len(text) > 20 or not 0 < int(text) <= MOST:
        raise ValueError(f"{text:.80} is not a whole number above 0 and up to {MOST:g}")
    return int(text)


def to_run_dir(kind: type, tokens: Sequence[Token]) -> Path:
    """Return a path, but not that of the root of the file system: a run would spread its folders there."""
    path = Path(_require_text(tokens[0].value))
    if os.path.realpath(path) == os.sep:
        raise ValueError(f"{path} is the root of the file system; name a folder")
    return path


def to_place(kind: type, tokens: Sequence[Token]) -> object:
    """Return a manifest's `place` of local, gpus=N,N, processes=N or ray=ADDRESS,slots=N."""
    from pydantic import TypeAdapter, ValidationError

    from pusa.manifest.place import Place

    text = tokens[0].value
    name, _, numbers = text.partition("=")
    digits = numbers.split(",")
    counts = [int(number) for number in digits if number.isdecimal() and len(number) < 10]
    value: object = text
    if name == "gpus" and len(counts) == len(digits):
        value = {"gpus": counts}
    elif name == "processes" and len(counts) == len(digits) == 1:
        value = {"processes": counts[0]}
    elif on_ray := re.fullmatch(r"ray=([^,]+),slots=([0-9]{1,9})", text):
        value = {"ray": on_ray[1], "slots": int(on_ray[2])}
    try:
        return TypeAdapter(Place).validate_python(value)
    except ValidationError as error:
        raise ValueError(
            f"{preview(text)} is not a place; expected local, gpus=0,2 with different numbers, processes=2, or "
            "ray=auto,slots=16 (or ray=local, or ray=HOST:PORT)"
        ) from error


def to_time(kind: type, tokens: Sequence[Token]) -> str:
    """Return a time of day as a manifest's `until` takes it."""
    from pydantic import TypeAdapter, ValidationError

    from pusa.manifest.models import TimeOfDay

    text = tokens[0].value
    try:
        return TypeAdapter(TimeOfDay).validate_python(text)
    except ValidationError as error:
        raise ValueError(f"{preview(text)} is not a time of day; expected HH:MM, from 00:00 to 23:59") from error


def to_overrides(kind: type, tokens: Sequence[Token]) -> dict[str, str]:
    """Return the keys and values of KEY=VALUE texts. A relative path of `latents` becomes absolute."""
    from pusa.system.strict import RUN_PREFIX

    overrides = {}
    for token in tokens:
        key, equals, value = token.value.partition("=")
        if not (key and equals):
            raise ValueError(f"{token.value!r} is not KEY=VALUE")
        if key == "latents" and not value.startswith(f"{RUN_PREFIX}/"):
            value = str(Path(value).absolute())  # the trainer may start in another folder
        overrides[key] = value
    return overrides


Text = Annotated[str, Parameter(converter=as_written)]
File = Annotated[Path, Parameter(converter=as_written)]
Positive = Annotated[float, Parameter(converter=to_positive)]
Count = Annotated[int, Parameter(converter=to_count)]
RunDir = Annotated[
    Path | None,
    Parameter(
        name="--run-dir",
        converter=to_run_dir,
        help="The folder for everything that a run writes; default runs/NAME, with the name of the manifest's folder.",
    ),
]
Place = Annotated[
    object,
    Parameter(
        name="--place",
        converter=to_place,
        metavar="PLACE",
        help="Where the work is done, in place of the manifest's: local, gpus=0,2, processes=2 or ray=auto,slots=16.",
    ),
]
Until = Annotated[
    str | None,
    Parameter(
        name="--until",
        converter=to_time,
        metavar="HH:MM",
        help="Start no more work after this local time, the next one from now, in place of the manifest's.",
    ),
]
Overrides = Annotated[
    Mapping[str, str] | None,
    Parameter(converter=to_overrides, accepts_keys=False, n_tokens=-1, json_dict=False, metavar="KEY=VALUE"),
]
NoPrefect = Annotated[
    bool, Parameter(name="--no-prefect", help="Call the stage directly: no server, starts in seconds.")
]
