"""Define parts of the finetune manifest: trainable weights, level samplers, processes, validation. No torch here.

`levels` is the name of a level sampler, for some with a number: `ptss(0.2)`. The samplers are in
`pusa.diffusion.timesteps`.
"""

import math
import re
from typing import Annotated, Literal, NamedTuple, Self, get_args

from pydantic import AfterValidator, Field, model_validator

from pusa.backbones import find_family
from pusa.system.strict import InputPath, Strict


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


# What is given in each row of the validation matrix: `pusa.finetune.matrix`.
Pattern = Literal["text_to_video", "image_to_video", "keyframes", "extension", "independent"]
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)
MEAN = "mean"  # over all patterns
DEFAULT_LEVELS = tuple(tenth / 10 for tenth in range(1, 10))


class Validation(Strict):
    """Show what a training has learnt: videos from each checkpoint, and the losses of clips that it never sees.

    The videos are of clips of the table, from their text, first frame, and both ends. The losses are a matrix: what is
    given (`patterns`) by noise level (`levels`).
    """

    clips: int = Field(1, ge=1, le=16, description="clips of which videos are made: the first held-out ones, or of all")
    steps: int = Field(20, ge=1, le=1000)
    guidance: float = Field(find_family().job.guidance, ge=1, le=100)
    embedded_guidance: float | None = Field(
        find_family().job.embedded_guidance,
        ge=1,
        le=100,
        description="the number that a model distilled with guidance is given; default: that of its jobs",
    )
    device: str | None = Field(
        None, pattern=r"^(cpu|cuda(:\d+)?)$", description="of the videos; default: the trainer's own"
    )
    held_out: float = Field(
        0.0, ge=0, le=0.5, description="share of the clips that never train, chosen by a hash of their ids; 0: none"
    )
    latents: InputPath | None = Field(None, description="another latents table, whose clips are the held-out ones")
    every: int | None = Field(
        None, ge=1, le=10**9, description="steps from one measurement of the held-out loss to the next; default: none"
    )
    levels: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = Field(
        None, min_length=1, max_length=100, description="of the measurement; default: 0.1 to 0.9, within level_range"
    )
    patterns: tuple[Pattern, ...] = Field(
        PATTERNS, min_length=1, description="what is given in the measurement: the abilities that it tells apart"
    )
    matrix_clips: int = Field(8, ge=1, le=100_000, description="held-out clips that are measured, at most")
    keep_best: Literal[Pattern, "mean"] | None = Field(
        None, description="keep the checkpoint with the lowest loss of this pattern, or of their mean, as `best`"
    )
    patience: int | None = Field(
        None, ge=1, le=10**6, description="end once keep_best's loss was not improved by this many measurements"
    )

    @model_validator(mode="after")
    def _check_measurement(self) -> Self:
        if self.held_out and self.latents is not None:
            raise ValueError(
                f"held_out is {self.held_out:g} and latents is {self.latents}; give one of them: a share of the "
                "table, or another table"
            )
        if self.every and not self.held_out and self.latents is None:
            raise ValueError(
                f"every is {self.every}, and no clips are held out to be measured; set held_out to their share, such "
                "as 0.1, or latents to another table"
            )
        if self.keep_best and not self.every:
            raise ValueError(f"keep_best is {self.keep_best}, and nothing is measured; set every to a number of steps")
        if self.patience and not self.keep_best:
            raise ValueError(f"patience is {self.patience}; set keep_best to the loss that has to improve")
        if self.keep_best not in (None, MEAN, *self.patterns):
            raise ValueError(f"keep_best is {self.keep_best}; patterns has only {', '.join(self.patterns)}")
        for name, values in (("levels", self.levels or ()), ("patterns", self.patterns)):
            if len({*values}) != len(values):
                raise ValueError(f"{name} is {list(values)}; each may be there only once")
        return self

    def require_fitting(self, level_range: tuple[float, float], steps: int, checkpoint_every: int) -> None:
        """Check that a training measures levels that it trains, and, with `keep_best`, some of its checkpoints.

        Raises:
            ValueError: it does not.
        """
        if not self.every:
            return
        self.levels_within(*level_range)
        both = math.lcm(self.every, checkpoint_every)
        if self.keep_best and both > steps:
            raise ValueError(
                f"validation.keep_best compares checkpoints that are measured: with checkpoint_every "
                f"{checkpoint_every} and validation.every {self.every} the first is that of step {both}, and steps is "
                f"{steps}; make one of the two a multiple of the other"
            )

    def levels_within(self, low: float, high: float) -> tuple[float, ...]:
        """Return the levels to measure, in ascending order, of a training with levels in [low, high].

        Raises:
            ValueError: a level is outside, or all of the default ones are.
        """
        levels = tuple(sorted(self.levels or DEFAULT_LEVELS))
        inside = tuple(level for level in levels if low <= level <= high)
        if not inside or (self.levels and inside != levels):
            outside = ", ".join(f"{level:g}" for level in levels if level not in inside)
            raise ValueError(f"validation.levels {outside} lie outside of level_range, [{low:g}, {high:g}]")
        return inside


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
