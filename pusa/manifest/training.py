"""Define parts of the finetune manifest: trainable weights, level samplers, processes, validation. No torch here.

`levels` is the name of a level sampler, for some with a number: `ptss(0.2)`. The samplers are in
`pusa.diffusion.timesteps`.
"""

import re
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, Field

from pusa.backbones import find_family
from pusa.system.strict import Strict


class Number(NamedTuple):
    """The default and the bounds of a level sampler's number."""

    default: float
    minimum: float
    maximum: float
    is_whole: bool


# The level samplers, with the number of those that have one.
LEVELS: dict[str, Number | None] = {
    "independent": None,
    "ptss": Number(0.2, minimum=0, maximum=1, is_whole=False),
    "shared": None,
    "chunked": Number(4, minimum=1, maximum=1000, is_whole=True),
    "clean_prefix": None,
}


class Full(Strict):
    """Train every weight."""

    method: Literal["full"] = "full"


class Partial(Strict):
    """Train the named weights and freeze the others."""

    method: Literal["partial"]
    names: tuple[str, ...] = Field(
        min_length=1, description='of weights; * matches any text: "transformer_blocks.4[0-7].*", "*.norm1.linear.*"'
    )


class Lora(Strict):
    """Train low-rank additions to the named layers and freeze the base's weights."""

    method: Literal["lora"]
    rank: int = Field(64, ge=1, le=4096)
    alpha: float | None = Field(None, gt=0, le=1e6, description="the addition is alpha / rank * B A; default: the rank")
    targets: tuple[str, ...] = Field(
        find_family().recipe.lora_targets, min_length=1, description="ends of layer names; * matches any text"
    )


Method = Annotated[Full | Partial | Lora, Field(discriminator="method")]


class Parallel(Strict):
    """Share the work among processes. The result is the same for any number, up to the order of sums."""

    processes: int = Field(1, ge=1, le=64, description="on this machine; torchrun sets its own number")
    context: int = Field(1, ge=1, le=64, description="processes that share the latent frames of one clip")


class Validation(Strict):
    """Videos rendered from each checkpoint: of clips of the table, from their text, first frame, and both ends."""

    clips: int = Field(1, ge=1, le=16, description="the first ones of the table")
    steps: int = Field(20, ge=1, le=1000)
    guidance: float = Field(find_family().job.guidance, ge=1, le=100)
    embedded_guidance: float | None = Field(
        find_family().job.embedded_guidance,
        ge=1,
        le=100,
        description="the number that a model distilled with guidance is given; default: that of its jobs",
    )
    device: str | None = Field(None, pattern=r"^(cpu|cuda(:\d+)?)$", description="default: the trainer's own")


def parse_levels(text: str) -> tuple[str, float | None]:
    """Return a level sampler's name and its number.

    Raises:
        ValueError: the name is unknown, or its number is not allowed.
    """
    match = re.fullmatch(r"(\w+)(?:\(([0-9.]+)\))?", text.replace(" ", ""))
    if not match or match[1] not in LEVELS:
        usages = (f"{name}({number.default:g})" if number else name for name, number in LEVELS.items())
        raise ValueError(f"unknown level sampler {text!r}; allowed are {', '.join(usages)}")
    name, given = match.groups()
    if (bounds := LEVELS[name]) is None:
        if given is not None:
            raise ValueError(f"{text!r}: {name} has no number")
        return name, None
    try:
        number = bounds.default if given is None else float(given)
    except ValueError as error:
        raise ValueError(f"{text!r}: {given!r} is not a number") from error
    if not bounds.minimum <= number <= bounds.maximum or (bounds.is_whole and number != int(number)):
        kind = "whole numbers" if bounds.is_whole else "numbers"
        raise ValueError(f"{text!r}: allowed are {kind} from {bounds.minimum} to {bounds.maximum}")
    return name, number


def _check_levels(text: str) -> str:
    parse_levels(text)
    return text.replace(" ", "")


LevelsName = Annotated[str, AfterValidator(_check_levels)]
