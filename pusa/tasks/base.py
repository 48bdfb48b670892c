"""Define what every video task is: a job, and the latent frames that are given.

No torch here, so that manifests are checked without it. `pusa.generate.conditions` turns conditions into latents, and
`pusa.generate.sampling` makes the video.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeGuard

from PIL import ImageColor
from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from pusa.backbones import all_families, find_family
from pusa.backbones.family import Geometry, Preset
from pusa.diffusion.courses import (
    FILE,
    SCHEDULE,
    STAIRCASE,
    Levels,
    is_matrix,
    name_levels,
    parse_course,
    read_levels,
    read_matrix,
    require_fit,
    starts_of,
    steps_of,
)
from pusa.diffusion.noise_schedules import check_noise_schedule
from pusa.diffusion.windows import Timeline, whole
from pusa.errors import ConditionError, PusaError
from pusa.system.strict import UNKNOWN_NAME, Strict, resolve_path

ID = r"[A-Za-z0-9][A-Za-z0-9._-]*"
MAX_ID, MAX_PROMPT = 120, 10_000  # characters
MAX_FRAMES = 100_000
JOB_PREFIX = "job:"  # before a job's id: the video that the job makes
VIDEOS, VIDEO_SUFFIX = "videos", ".mp4"  # the folder of a run's videos, and what follows a job's id in their names

# Jobs that are built without a manifest get the defaults of the first family; a manifest applies those of its own.
FAMILY = find_family()
PRESETS = {"exact": Preset(0.0, (0.0, 0.0), (0.0, 0.0), (0.0,))} | {
    name: preset for family in all_families() for name, preset in family.presets.items()
}

Multiplier = Annotated[float, Field(ge=0, le=1)]
if TYPE_CHECKING:
    PresetName = str
else:
    PresetName = Literal[tuple(PRESETS)]
DEFAULT_PRESET = FAMILY.preset


def _ramp(text: str) -> tuple[float, float]:
    """Parse the two ends of a ramp such as "0.1..0.4"."""
    match = re.fullmatch(r"\s*([0-9.eE+-]+?)\s*\.\.\s*([0-9.eE+-]+)\s*", text)  # `float` would also read 1_0
    if not match:
        raise ValueError(f"{text!r} is not a ramp")
    return float(match[1]), float(match[2])


def check_multipliers(value: Any) -> Any:
    """Check that a value is a number, a list of numbers or a ramp, with one sentence for all errors."""
    try:
        numbers = _ramp(value) if isinstance(value, str) else value if isinstance(value, list | tuple) else (value,)
        usable = bool(numbers) and all(0 <= n <= 1 and not isinstance(n, bool) for n in numbers)
    except (TypeError, ValueError):
        usable = False
    if not usable:
        raise ValueError(f"got {value!r:.80}; expected a number in [0, 1], a list of them, or a ramp like 0.1..0.4")
    return value


def _colour(text: str) -> str:
    try:
        ImageColor.getrgb(text)
    except ValueError as error:
        raise ValueError(f"unknown colour {text!r}; expected a CSS name like white, or #rrggbb") from error
    return text


Colour = Annotated[str, AfterValidator(_colour)]
Multipliers = Annotated[float | tuple[float, ...] | str, BeforeValidator(check_multipliers)]
AnyFrame = Annotated[int, Field(ge=-MAX_FRAMES, lt=MAX_FRAMES)]  # a latent frame; negative counts from the end
FirstFrame = Annotated[int, Field(ge=-(10**9), lt=10**9)]  # a frame of a file; negative counts from the end
Format = Literal["webm", "gif", "png", "lossless"]  # of the files that are made beside a video's mp4
Formats = Annotated[tuple[Format, ...], AfterValidator(lambda names: tuple(dict.fromkeys(names)))]
TOGETHER = (
    "that needs a video whose latent frames are all denoised together, and this one is made in parts: expected no "
    "segments, no `stagger` and no loop"
)
GIF_FPS = 50  # the most that a gif shows: players slow down frames of less than 1/50 s
ClipFrame = Annotated[int, Field(ge=0, lt=MAX_FRAMES)]  # a latent frame of a clip, counted from the first frame read


def is_id(text: Any) -> TypeGuard[str]:
    """Return whether a value can name a job and its files."""
    return isinstance(text, str) and len(text) <= MAX_ID and bool(re.fullmatch(ID, text))


def _job_id(text: str) -> str:
    if not is_id(text):
        raise ValueError(
            f"{text!r:.140} is not an id; expected a letter or digit, then letters, digits, '.', '_' and '-', "
            f"{MAX_ID} characters at most, since it names files"
        )
    return text


def _resolve_clip(path: Path, info: ValidationInfo) -> Path:
    """Resolve job:ID to the video that the job of this id makes, and another path as `resolve_path` does."""
    if not str(path).startswith(JOB_PREFIX):
        return resolve_path(path, info)
    id, context = _job_id(str(path).removeprefix(JOB_PREFIX)), info.context or {}
    known = context.get("ids")  # of all jobs of the manifest; None if they are not known
    if known is not None and id not in known:
        facts = {"name": id, "known": lambda: known}  # a value would be written out for each error
        raise PydanticCustomError(UNKNOWN_NAME, "no job of this manifest has the id {name}", facts)
    return Path(context["run_dir"], VIDEOS, id + VIDEO_SUFFIX) if "run_dir" in context else path


def _resolve_picture(path: Path, info: ValidationInfo) -> Path:
    if str(path).startswith(JOB_PREFIX):
        raise ValueError(f"{str(path)!r:.140} is a video; expected a picture: PNG, JPEG or WebP")
    return resolve_path(path, info)


def _read_levels(value: Any, info: ValidationInfo) -> Levels:
    """Read a course or a matrix. A file is read here, so that a job keeps its levels whatever becomes of the file."""
    if isinstance(value, str | Path) and str(value).endswith(FILE):
        return read_matrix(resolve_path(Path(value), info))
    return read_levels(value)


Level = Annotated[float, Field(ge=0, le=1)]
JobLevels = Annotated[str | tuple[tuple[Level, ...], ...], BeforeValidator(_read_levels)]
ClipPath = Annotated[Path, AfterValidator(_resolve_clip)]  # a clip, latents of an earlier run, or job:ID
PicturePath = Annotated[Path, AfterValidator(_resolve_picture)]


class Settings(Strict):
    """The keys that a job may set for itself, and `defaults` for all jobs."""

    prompt: str = Field("", max_length=MAX_PROMPT, description="what the video shows; empty is the null prompt")
    negative_prompt: str = Field("", max_length=MAX_PROMPT, description="the prompt that guidance moves away from")
    width: int = Field(FAMILY.job.width, ge=1, le=8192, description="pixels")
    height: int = Field(FAMILY.job.height, ge=1, le=8192, description="pixels")
    num_frames: int = Field(
        FAMILY.job.num_frames, ge=1, le=MAX_FRAMES, description="frames; the backbone's temporal step * k + 1"
    )
    fps: float = Field(
        FAMILY.job.fps, ge=1, le=240, description="frames per second, of the video written and of clips read"
    )
    steps: int = Field(FAMILY.job.steps, ge=1, le=10_000, description="denoising steps")
    guidance: float = Field(
        FAMILY.job.guidance, ge=1, le=100, description="classifier-free guidance; 1 means no null pass"
    )
    embedded_guidance: float | None = Field(
        FAMILY.job.embedded_guidance,
        ge=1,
        le=100,
        description="the number that a model distilled with guidance is given; no other model takes one",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seeds the noise of this job alone")
    noise_schedule: Annotated[str, AfterValidator(check_noise_schedule)] = Field(
        FAMILY.job.noise_schedule, description="a name of `pusa list noise-schedules`"
    )
    levels: JobLevels = Field(
        SCHEDULE,
        description="how the level of each latent frame falls: a course of `pusa list courses`, such as staircase(2), "
        'or "release(0.4, 0.5)", or a matrix (steps + 1, latent frames), as a list of rows or a .npy file',
    )
    fit: Literal["crop", "pad", "stretch"] = Field("crop", description="how given media are fitted to the size")
    background: Colour = Field(
        "black", description="colour behind transparent pictures and clips, and in the bars of `fit: pad`"
    )
    exact: bool = Field(False, description="put the given pixels back over frames of multiplier 0, after decoding")
    formats: Formats = Field(
        (), max_length=16, description="more files beside the mp4: webm, gif, png (each frame), lossless (FFV1)"
    )
    embed: Literal["all", "none"] = Field(
        "all", description="what the mp4 says of itself: all that `pusa replay` needs; none: no prompt and no settings"
    )
    priority: int = Field(0, ge=-(10**6), le=10**6, description="jobs of a higher priority are made first")


@dataclass(frozen=True)
class Condition:
    """Latent frames that are given.

    Attributes:
        source: a picture, a clip or saved latents; None stands for the latents of the pass before.
        take: latent frames of the source; negative indices count from the end. A picture has latent frame 0 only.
        place: the latent frames of the result that they become, with negative indices as in `take`.
        multipliers: one for each.
        still: whether the source is a picture.
        first_frame: frame of the clip at which reading starts; negative counts from the end.
        from_end: read the last frames of the clip, as many as the result has.
        joined: a second clip, which gives the second half of the frames; both are encoded as one clip.
    """

    source: Path | None
    take: tuple[int, ...]
    place: tuple[int, ...]
    multipliers: tuple[float, ...]
    still: bool = False
    first_frame: int = 0
    from_end: bool = False
    joined: Path | None = None

    def describe(self) -> str:
        """Describe the condition in words: "latent frames 0, 1 at 4, 5, multipliers 0, 0.2"."""
        take, place, multipliers = (
            ", ".join(f"{number:g}" for number in numbers) for numbers in (self.take, self.place, self.multipliers)
        )
        at = "" if self.take == self.place else f" at {place}"
        plural = "s" if len(self.take) > 1 else ""
        return f"latent frame{plural} {take}{at}, multiplier{plural} {multipliers}"


@dataclass(frozen=True)
class Pass:
    """One run of the sampler: the given latent frames, when each latent frame is denoised, and how its level falls."""

    conditions: Sequence[Condition]
    timeline: Timeline
    levels: Levels = SCHEDULE

    def multipliers(self) -> list[float]:
        """Return the multiplier of each latent frame: 1 for those that are free.

        Raises:
            ConditionError: a place is outside.
        """
        multipliers = [1.0] * len(self.timeline.starts)
        for condition in self.conditions:
            places = resolve_positions(condition.place, len(multipliers), "position")
            for place, multiplier in zip(places, condition.multipliers, strict=True):
                multipliers[place] = multiplier
        return multipliers

    def with_levels(self, levels: Levels, multipliers: Sequence[float]) -> Self:
        """Return the same run with a course or a matrix of levels, for frames of these multipliers.

        Raises:
            ConditionError: not all frames are denoised together; or as `require_fit`.
        """
        if levels == SCHEDULE:
            return self
        if self.timeline != whole(len(multipliers)):
            raise ConditionError(f"levels is {name_levels(levels)}; {TOGETHER}")
        require_fit(levels, multipliers)
        if not isinstance(levels, str) or parse_course(levels)[0] != STAIRCASE:
            return replace(self, levels=levels)
        return replace(self, timeline=replace(self.timeline, starts=starts_of(levels, multipliers)))


class Job(Settings):
    """One video to make."""

    id: Annotated[str, AfterValidator(_job_id)] = Field(description="names the output files; unique")
    task: str

    cyclic: ClassVar[bool] = False  # whether the last latent frame is followed by the first

    @model_validator(mode="before")
    @classmethod
    def _take_steps(cls, data: Any, info: ValidationInfo) -> Any:
        """Give a job with a matrix and without `steps` the steps of the matrix."""
        if isinstance(data, dict) and "steps" not in data and is_matrix(data.get("levels")):
            with suppress(ValueError, PusaError):  # the field's own check reports it
                return {**data, "steps": steps_of(_read_levels(data["levels"], info))}
        return data

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        own = steps_of(self.levels)
        if own is not None and own != self.steps:
            raise ValueError(
                f"steps is {self.steps}, and levels has {own + 1} rows, one more than its steps; leave out `steps`, or "
                f"set it to {own}"
            )
        return self

    @model_validator(mode="after")
    def _check_pace(self) -> Self:
        if "gif" in self.formats and self.fps > GIF_FPS:
            raise ValueError(f"fps is {self.fps:g} and formats has gif, which shows at most {GIF_FPS} frames a second")
        return self

    def refuse_unused(self, keys: Sequence[str], why: str) -> None:
        """Check that keys without effect in this job are not set.

        Raises:
            ValueError: a key is set to another value than its default.
        """
        fields = type(self).model_fields
        if unused := [key for key in keys if getattr(self, key) != fields[key].default]:
            raise ValueError(f"{' and '.join(unused)} would have no effect: {why}")

    def conditions(self) -> list[Condition]:
        """Return the given latent frames; by default none.

        Raises:
            ConditionError: lengths do not fit together.
        """
        return []

    def passes(self, geometry: Geometry) -> list[Pass]:
        """Return the runs of the sampler that make the video, with their levels; the last gives its latents.

        Raises:
            ConditionError: as `runs`, or the job has `levels` that do not fit.
        """
        runs = self.runs(geometry)
        if self.levels == SCHEDULE:
            return runs
        if len(runs) > 1:
            raise ConditionError(f"levels is {name_levels(self.levels)}; {TOGETHER}")
        return [runs[0].with_levels(self.levels, runs[0].multipliers())]

    def runs(self, geometry: Geometry) -> list[Pass]:
        """Return the task's runs of the sampler, as the noise schedule makes them. By default one run for all frames.

        Raises:
            ConditionError: as `conditions`, or the settings allow no timeline.
        """
        return [Pass(self.conditions(), whole(geometry.latent_frames(self.num_frames)))]


def video_frames_of(latent_frame: int, latent_frames: int, job: Job, geometry: Geometry) -> list[int]:
    """Return the frames of a job's video that one of its `latent_frames` decodes to."""
    if job.cyclic:
        return geometry.frames_of_ring(latent_frame, latent_frames)
    return geometry.frames_of(latent_frame)


def require_leading(given: Sequence[int], first: int) -> None:
    """Check that the given latent frames leave none out, since a video continues from all of them.

    Raises:
        ValueError: they are not `first`, `first` + 1, ...
    """
    if list(given) != list(range(first, first + len(given))):
        raise ValueError(
            f"given is {list(given)}; expected {first}, {first + 1}, ...; to keep other frames use completion"
        )


def per_frame(multipliers: float | Sequence[float] | str, frames: Sequence[int], name: str) -> tuple[float, ...]:
    """Return one multiplier for each given frame; one number applies to all, "a..b" rises from a to b.

    Raises:
        ConditionError: the number of multipliers differs from the number of frames.
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


def resolve_positions(indices: Sequence[int], count: int, what: str) -> tuple[int, ...]:
    """Return indices into `count` latent frames with negative ones counted from the end.

    Raises:
        ConditionError: an index lies outside, or two mean the same frame.
    """
    for index in indices:
        if not -count <= index < count:
            raise ConditionError(
                f"{what} {index} is outside the {count} latent frames; allowed are {-count}..{count - 1}"
            )
    resolved = tuple(index % count for index in indices)
    if len(set(resolved)) != len(resolved):
        raise ConditionError(f"{what}: {list(indices)} names a latent frame twice")
    return resolved
