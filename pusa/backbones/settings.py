"""Read the settings of a model's part from the JSON files of strangers: bounded in size, every value in its range.

A family states the ranges as a `Settings` for each part. Nothing else of such a file is used: not the names of classes
or of code to run (`auto_map`), and no setting that the family does not know.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import ConfigDict, Field, ValidationError, model_validator

from pusa.errors import WeightsError
from pusa.system.files import read_json
from pusa.system.strict import Strict, list_problems

MAX_BYTES = 1 << 20  # of a configuration; the published ones have some kilobytes

Count = Annotated[int, Field(ge=1, le=256)]  # layers, blocks, heads
Width = Annotated[int, Field(ge=1, le=1 << 18)]  # channels, features
Steps = Annotated[int, Field(ge=1, le=1 << 20)]  # tokens, words
Ratio = Annotated[float, Field(ge=0, le=1)]
Statistic = Annotated[float, Field(ge=-1e6, le=1e6)]
Deviation = Annotated[float, Field(ge=1e-6, le=1e6)]


class Settings(Strict):
    """The settings of a part that are used, with their ranges. Unknown keys are ignored."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    def arguments(self) -> dict[str, Any]:
        """Return the settings that were given, as arguments of the part's class."""
        return {name: value for name, value in self.model_dump(exclude_unset=True).items() if name != "kind"}


class T5Settings(Settings):
    """Arguments of transformers' configuration of T5, which those of its kin share."""

    vocab_size: Steps
    d_model: Width
    d_kv: Annotated[int, Field(ge=1, le=1024)]
    d_ff: Width
    num_layers: Count
    num_heads: Count
    relative_attention_num_buckets: Annotated[int, Field(ge=4, le=1024, multiple_of=4)] = 32
    relative_attention_max_distance: Steps = 128
    dropout_rate: Ratio = 0.1
    layer_norm_epsilon: Annotated[float, Field(gt=0, le=1)] = 1e-6
    feed_forward_proj: Literal["relu", "gelu", "gated-relu", "gated-gelu", "gated-silu"] = "relu"
    pad_token_id: Annotated[int, Field(ge=0, le=1 << 20)] | None = 0
    eos_token_id: Annotated[int, Field(ge=0, le=1 << 20)] | None = 1

    @model_validator(mode="after")
    def _check_buckets(self) -> Self:
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 4:
            raise ValueError(
                f"relative_attention_max_distance is {self.relative_attention_max_distance}; expected more than a "
                f"quarter of relative_attention_num_buckets, {self.relative_attention_num_buckets}"
            )
        return self


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
        problems = [line.removeprefix("manifest: ") for line in list_problems(error, kind)]  # of several keys together
        raise WeightsError(f"{place}: {'; '.join(problems)}") from error


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
