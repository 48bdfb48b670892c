"""What a finetune manifest may say in detail: which weights learn, how levels are drawn, who works. No torch here.

`levels` is a name with, for some, a number: `ptss(0.2)`. What each draws is in `pusa.timesteps`.
"""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from pusa.strict import Strict

# The level samplers: for those that take a number, what it is where none is said, the least, and the most.
LEVELS: dict[str, tuple[float, float, float] | None] = {
    "independent": None,
    "ptss": (0.2, 0, 1),
    "shared": None,
    "chunked": (4, 1, 1000),
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
    alpha: float | None = Field(None, gt=0, description="the addition is alpha / rank * B A; default: the rank")
    targets: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0"), min_length=1, description="ends of the layers' names"
    )


Method = Annotated[Full | Partial | Lora, Field(discriminator="method")]


class Parallel(Strict):
    """How the work is shared among processes. The result is the same for any number, but for the order of sums."""

    processes: int = Field(1, ge=1, le=64, description="on this machine; under torchrun it says how many, and where")
    context: int = Field(1, ge=1, le=64, description="processes that share the latent frames of one clip")


class Probe(Strict):
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
    default, least, most = rule
    try:
        number = default if given is None else float(given)
    except ValueError as error:
        raise ValueError(f"{text!r}: {given!r} is not a number") from error
    whole = isinstance(least, int) and least >= 1
    if not least <= number <= most or (whole and number != int(number)):
        raise ValueError(f"{text!r}: allowed are {'whole numbers' if whole else 'numbers'} from {least} to {most}")
    return name, number


def _usage(name: str) -> str:
    rule = LEVELS[name]
    return f"{name}({rule[0]:g})" if rule else name


def _checked(text: str) -> str:
    parse_levels(text)
    return text.replace(" ", "")


LevelsName = Annotated[str, AfterValidator(_checked)]
