"""What the tasks share that make more than the network can see at once."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeGuard

from PIL import ImageColor
from pydantic import AfterValidator, BeforeValidator, Field

from pusa.diffusion.noise_schedules import NOISE_SCHEDULES
from pusa.diffusion.windows import Course, pieces, whole
from pusa.errors import ConditionError
from pusa.system.strict import Strict

if TYPE_CHECKING:
    from pusa.backbones.family import Geometry

ID = r"[A-Za-z0-9][A-Za-z0-9._-]*"
MAX_ID, MAX_PROMPT = 120, 10_000  # characters
MAX_FRAMES = 100_000

Multiplier = Annotated[float, Field(ge=0, le=1)]
Preset = Literal["mochi", "wan", "exact"]


def _ramp(text: str) -> tuple[float, float]:
    """The ends of "0.1..0.4"."""
    first, _, last = text.partition("..")
    return float(first), float(last)


def _multipliers(value: Any) -> Any:
    """A number, a list of them or a ramp, in one sentence where it is none of these."""
    try:
        numbers = _ramp(value) if isinstance(value, str) else value if isinstance(value, list | tuple) else (value,)
        usable = bool(numbers) and all(0 <= n <= 1 and not isinstance(n, bool) for n in numbers)
    except (TypeError, ValueError):
        usable = False
    if not usable:
        raise ValueError(f"{value!r:.80} is no multiplier in 0..1, no list of such, and no ramp as 0.1..0.4")
    return value


def _colour(text: str) -> str:
    try:
        ImageColor.getrgb(text)
    except ValueError as error:
        raise ValueError(f"unknown colour {text!r}; write a name of CSS, as white, or #rrggbb") from error
    return text


Multipliers = Annotated[float | tuple[float, ...] | str, BeforeValidator(_multipliers)]
ClipFrame = Annotated[int, Field(ge=0)]  # a latent frame of a clip, from its first frame read


def _schedule(name: str) -> str:
    if name not in NOISE_SCHEDULES:
        raise ValueError(f"unknown noise schedule {name!r}; allowed are {', '.join(NOISE_SCHEDULES)}")
    return name


def is_id(text: Any) -> TypeGuard[str]:
    """Whether it can name a job and its files."""
    return isinstance(text, str) and len(text) <= MAX_ID and bool(re.fullmatch(ID, text))


def _job_id(text: str) -> str:
    if not is_id(text):
        raise ValueError(
            f"{text!r:.140} is no id; letters, digits, '.', '_' and '-' make one, the first a letter or digit, "
            f"{MAX_ID} at most: it names files"
        )
    return text


class Settings(Strict):
    """What a job may set for itself, and `defaults` for all jobs."""

    prompt: str = Field("", max_length=MAX_PROMPT, description="what the video shows; empty is the null prompt")
    negative_prompt: str = Field("", max_length=MAX_PROMPT, description="what guidance leads away from")
    width: int = Field(848, ge=1, le=8192, description="pixels")
    height: int = Field(480, ge=1, le=8192, description="pixels")
    num_frames: int = Field(163, ge=1, le=MAX_FRAMES, description="frames; temporal * k + 1 of the backbone")
    fps: float = Field(24, ge=1, le=240, description="frames a second, of the written video and read from clips")
    steps: int = Field(64, ge=1, le=10_000, description="denoising steps")
    guidance: float = Field(4.5, ge=1, le=100, description="classifier-free guidance; 1 means no null pass")
    seed: int = Field(0, ge=0, lt=2**63, description="seeds the noise of this job alone")
    noise_schedule: Annotated[str, AfterValidator(_schedule)] = Field(
        "linear_quadratic", description="a name of `pusa list noise-schedules`"
    )
    fit: Literal["crop", "pad", "stretch"] = Field("crop", description="how given pictures and clips get the size")
    background: Annotated[str, AfterValidator(_colour)] = Field(
        "black", description="what is behind transparent pictures and in the bars of `fit: pad`"
    )
    exact: bool = Field(False, description="put the given pixels back over frames of multiplier 0, after decoding")


@dataclass(frozen=True)
class Condition:
    """Latent frames that are given.

    `take` are indices into the latents of `source`, `place` indices into the result's; negative ones count from the
    end. A still picture has the one latent frame 0. A clip is read from `first_frame` (negative: from the end), at most
    as long as the result; with `from_end` its last so many frames. With `joined`, half of the frames are that clip's,
    and both are encoded as one. Without a source, the latents are those of the pass before.
    """

    source: Path | None
    take: tuple[int, ...]
    place: tuple[int, ...]
    multipliers: tuple[float, ...]
    still: bool = False
    first_frame: int = 0
    from_end: bool = False
    joined: Path | None = None

    def told(self) -> str:
        """For people: "latent frames 0, 1 at 4, 5, multipliers 0, 0.2"."""
        at = "" if self.take == self.place else f" at {_listed(self.place)}"
        several = "s" if len(self.take) > 1 else ""
        return f"latent frame{several} {_listed(self.take)}{at}, multiplier{several} {_listed(self.multipliers)}"


@dataclass(frozen=True)
class Pass:
    """One run of the sampler: what is given, and in which course the latent frames are made."""

    conditions: Sequence[Condition]
    course: Course


class Job(Settings):
    """One video to make."""

    id: Annotated[str, AfterValidator(_job_id)] = Field(description="names the output files; unique")
    task: str

    cyclic: ClassVar[bool] = False  # the latents are a ring: no first, and the last is followed by it

    def refuse(self, keys: Sequence[str], why: str) -> None:
        """Refuse keys that are set to something and would have no effect.

        Raises:
            ValueError: one is.
        """
        fields = type(self).model_fields
        if idle := [key for key in keys if getattr(self, key) != fields[key].default]:
            raise ValueError(f"{' and '.join(idle)} would have no effect: {why}")

    def conditions(self) -> list[Condition]:
        """The given latent frames; none by default.

        Raises:
            ConditionError: lengths that do not fit together.
        """
        return []

    def passes(self, geometry: "Geometry") -> list[Pass]:
        """How the video is made; the last pass gives its latents. By default all of it at once.

        Raises:
            ConditionError: as `conditions`, or a course that cannot be.
        """
        return [Pass(self.conditions(), whole(geometry.latent_frames(self.num_frames)))]


def shown_as(latent_frame: int, latent_frames: int, job: Job, geometry: "Geometry") -> list[int]:
    """The frames of a job's video that one of its latent frames becomes."""
    if job.cyclic:
        return geometry.frames_of_ring(latent_frame, latent_frames)
    return geometry.frames_of(latent_frame)


def require_leading(given: Sequence[int], first: int) -> None:
    """Refuse given latent frames that leave something out: what goes on from a clip goes on from all of it.

    Raises:
        ValueError: they are not `first`, `first` + 1, ...
    """
    if list(given) != list(range(first, first + len(given))):
        raise ValueError(f"given {list(given)} is not {first}, {first + 1}, ...; to keep other frames use completion")


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def spread(multipliers: float | Sequence[float] | str, frames: Sequence[int], name: str) -> tuple[float, ...]:
    """One multiplier per given frame; a single number stands for all, "a..b" rises from a to b.

    Raises:
        ConditionError: there are more or fewer multipliers than frames.
    """
    if isinstance(multipliers, str):
        first, last = _ramp(multipliers)
        span = max(1, len(frames) - 1)
        return tuple(round(first + (last - first) * i / span, 6) for i in range(len(frames)))
    if isinstance(multipliers, int | float):
        return (float(multipliers),) * len(frames)
    if len(multipliers) != len(frames):
        raise ConditionError(f"{name}: {len(multipliers)} multipliers for {len(frames)} frames {list(frames)}")
    return tuple(float(m) for m in multipliers)


def positions(indices: Sequence[int], count: int, what: str) -> tuple[int, ...]:
    """Indices with negative ones counted from the end.

    Raises:
        ConditionError: one lies outside, or two are the same.
    """
    for index in indices:
        if not -count <= index < count:
            raise ConditionError(
                f"{what} {index} is outside the {count} latent frames; allowed are {-count}..{count - 1}"
            )
    found = tuple(index % count for index in indices)
    if len(set(found)) != len(found):
        raise ConditionError(f"{what}: {list(indices)} names a latent frame twice")
    return found


class Segmented(Job):
    """A video of any length: segments that overlap in latent frames, which are carried on as they are."""

    window: int = Field(
        163,
        ge=1,
        le=MAX_FRAMES,
        description="frames that the network sees at once: 163 for Mochi, 31 for the tiny ones",
    )
    overlap: int = Field(3, ge=1, description="latent frames that each segment is given of the one before")
    stagger: int | None = Field(
        None, ge=1, description="instead of segments: each latent frame starts so many steps after the one before"
    )

    def course(self, geometry: "Geometry", backwards: bool = False) -> Course:
        """The order in which the latent frames are made.

        Raises:
            ConditionError: window, overlap and stagger do not fit together.
        """
        latent_frames = geometry.latent_frames(self.num_frames)
        if self.stagger is None and self.num_frames <= self.window:
            return whole(latent_frames)
        seen = latent_window(self.window, geometry)
        if seen < self.overlap + 2:
            least = geometry.num_frames(self.overlap + 2)
            raise ConditionError(
                f"window {self.window} is too small for overlap {self.overlap}; it wants {least} or more"
            )
        return pieces(latent_frames, self.steps, seen, self.overlap, self.stagger, backwards)


def latent_window(window: int, geometry: "Geometry") -> int:
    """A window's latent frames.

    Raises:
        ConditionError: no clip has so many frames.
    """
    geometry.check_length("window", window)
    return geometry.latent_frames(window)
