"""What a finetune manifest may say in detail: which weights learn, how levels are drawn, who works. No torch here.

`levels` is a name with, for some, a number: `ptss(0.2)`. What each draws is in `pusa.diffusion.timesteps`.
"""

import re
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, Field

from pusa.system.strict import Strict


class Number(NamedTuple):
    """What a level sampler's number may be, and is where none is said."""

    default: float
    least: float
    most: float
    whole: bool


# The level samplers, and the number of those that take one.
LEVELS: dict[str, Number | None] = {
    "independent": None,
    "ptss": Number(0.2, least=0, most=1, whole=False),
    "shared": None,
    "chunked": Number(4, least=1, most=1000, whole=True),
    "clean_prefix": None,
}


class Full(Strict):
    """Every weight learns."""

    method: Literal["full"] = "full"


class Partial(Strict):
    """The named weights learn, the others stay."""

    method: Literal["partial"]
    names: tuple[str, ...] = Field(
        min_length=1, description='of the weights, * for any text: "transformer_blocks.4[0-7].*", "*.norm1.linear.*"'
    )


class Lora(Strict):
    """Low-rank additions to the named layers learn; all the base's own weights stay."""

    method: Literal["lora"]
    rank: int = Field(64, ge=1, le=4096)
    alpha: float | None = Field(None, gt=0, le=1e6, description="the addition is alpha / rank * B A; default: the rank")
    targets: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0"), min_length=1, description="ends of the layers' names"
    )


Method = Annotated[Full | Partial | Lora, Field(discriminator="method")]


class Parallel(Strict):
    """How the work is shared among processes. The result is the same for any number, but for the order of sums."""

    processes: int = Field(1, ge=1, le=64, description="on this machine; under torchrun it says how many, and where")
    context: int = Field(1, ge=1, le=64, description="processes that share the latent frames of one clip")


class Validation(Strict):
    """What is rendered from each checkpoint: clips of the table, from their text, their first frame, and both ends."""

    clips: int = Field(1, ge=1, le=16, description="of the table, from its first on")
    steps: int = Field(20, ge=1, le=1000)
    guidance: float = Field(4.5, ge=1, le=100)
    device: str | None = Field(None, pattern=r"^(cpu|cuda(:\d+)?)$", description="default: the trainer's, beside it")


def parse_levels(text: str) -> tuple[str, float | None]:
    """A level sampler's name and its number.

    Raises:
        ValueError: it is not known, or its number is not allowed.
    """
    match = re.fullmatch(r"(\w+)(?:\(([0-9.]+)\))?", text.replace(" ", ""))
    if not match or match[1] not in LEVELS:
        raise ValueError(f"unknown level sampler {text!r}; allowed are {', '.join(map(_usage, LEVELS))}")
    name, given = match.groups()
    if (rule := LEVELS[name]) is None:
        if given is not None:
            raise ValueError(f"{text!r}: {name} takes no number")
        return name, None
    try:
        number = rule.default if given is None else float(given)
    except ValueError as error:
        raise ValueError(f"{text!r}: {given!r} is not a number") from error
    if not rule.least <= number <= rule.most or (rule.whole and number != int(number)):
        kind = "whole numbers" if rule.whole else "numbers"
        raise ValueError(f"{text!r}: allowed are {kind} from {rule.least} to {rule.most}")
    return name, number


def _usage(name: str) -> str:
    rule = LEVELS[name]
    return f"{name}({rule.default:g})" if rule else name


def _checked(text: str) -> str:
    parse_levels(text)
    return text.replace(" ", "")


LevelsName = Annotated[str, AfterValidator(_checked)]
