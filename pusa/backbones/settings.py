"""Read the settings of a model's part from the JSON files of strangers: bounded in size, every value in its range.

A family states the ranges as a `Settings` for each part. Nothing else of such a file is used: not the names of classes
or of code to run (`auto_map`), and no setting that the family does not know.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, ValidationError

from pusa.errors import WeightsError
from pusa.system.files import read_json
from pusa.system.strict import Strict, list_problems

MAX_BYTES = 1 << 20  # of a configuration; the published ones have some kilobytes

Count = Annotated[int, Field(ge=1, le=256)]  # layers, blocks, heads
Width = Annotated[int, Field(ge=1, le=1 << 18)]  # channels, features
Steps = Annotated[int, Field(ge=1, le=1 << 20)]  # tokens, words


class Settings(Strict):
    """The settings of a part that are used, with their ranges. Unknown keys are ignored."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    def arguments(self) -> dict[str, Any]:
        """Return the settings that were given, as arguments of the part's class."""
        return {name: value for name, value in self.model_dump(exclude_unset=True).items() if name != "kind"}


Kind = TypeVar("Kind", bound=Settings)


def check_settings(kind: type[Kind], values: Mapping[str, Any], place: str) -> Kind:
    """Return a part's settings.

    Args:
        kind: the ranges of the part's settings.
        values: the settings as they were read.
        place: where they come from, for the message.

    Raises:
        WeightsError: one is missing or out of its range, or two do not fit each other.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise WeightsError(f"{place}: {'; '.join(list_problems(error, kind))}") from error


def read_small(path: Path, longest: int = MAX_BYTES) -> dict[str, Any]:
    """Return the JSON object in a file of at most `longest` bytes.

    Raises:
        WeightsError: the file is missing, not a regular file, or too large; or it holds something else.
    """
    require_small(path, longest)
    try:
        values = read_json(path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path} is not a JSON object, is incomplete, or is nested too deep")
    return values


def require_small(path: Path, longest: int) -> None:
    """Check that a path is a regular file of at most `longest` bytes.

    Raises:
        WeightsError: it is not.
    """
    if not path.is_file():
        raise WeightsError(f"{path.parent} has no {path.name}, or it is not a regular file")
    if (size := path.stat().st_size) > longest:
        raise WeightsError(f"{path} has {size:,} bytes; at most {longest:,} are allowed")
