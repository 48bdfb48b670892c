"""Define the four kinds of manifests. A manifest is checked as a whole before anything starts. No torch here."""

import functools
import operator
import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from pusa.backbones import BACKBONES, DEFAULT_BACKBONE, find_family
from pusa.backbones.family import DensityName, Family
from pusa.diffusion.courses import is_matrix
from pusa.manifest.clips import MAX_SECONDS, ClipSettings, Limits
from pusa.manifest.clips import Bucket as Bucket
from pusa.manifest.common import Operation
from pusa.manifest.expansion import MAX_JOBS
from pusa.manifest.network import BackboneName, ExpertName
from pusa.manifest.network import ModelSpec as ModelSpec
from pusa.manifest.place import PLACE, Place
from pusa.manifest.training import Full, LevelsName, Lora, Method, Parallel, Validation
from pusa.registry import find
from pusa.system.strict import InputPath, SourceName, Strict
from pusa.system.text import join_names, preview
from pusa.tasks import TASKS
from pusa.tasks.base import Job, Level, Settings

_DEFAULT = find_family()  # its values are the defaults of the classes; other families' are applied where they are named

MAX_STEPS = 10**9  # far more than anyone waits for; beyond, numbers have no meaning

if TYPE_CHECKING:
    AnyJob = Job
else:  # one model for each entry of the table, told apart by `task`
    AnyJob = Annotated[
        functools.reduce(operator.or_, (find(TASKS, name, "task") for name in TASKS)), Field(discriminator="task")
    ]


def _family_of(data: Any) -> Family:
    """Return the family that raw manifest data names; the default one where it names none, or none that is known."""
    name = data.get("backbone") if isinstance(data, dict) else getattr(data, "backbone", None)
    return find_family(name if isinstance(name, str) and name in BACKBONES else DEFAULT_BACKBONE)


def _fill_in(settings: dict[str, Any], embedded_guidance: float | None) -> None:
    """Give settings without an embedded guidance, or with null, that of the family, if it has one."""
    if embedded_guidance is not None and settings.get("embedded_guidance") is None:
        settings["embedded_guidance"] = embedded_guidance


def _check_embedded_guidance(family: Family, value: float | None, place: str = "") -> None:
    """Check that a family that was not distilled with guidance is given none.

    Raises:
        ValueError: it is.
    """
    if value is not None and family.job.embedded_guidance is None:
        raise ValueError(
            f"{place}embedded_guidance is {value:g}, which would have no effect: backbone {family.name} was not "
            "distilled with guidance; remove it"
        )


class IngestManifest(Operation):
    """Videos and captions -> a table of verified clips."""

    kind: Literal["ingest"] = "ingest"
    source: SourceName = Field(
        description="a folder with captions beside the videos or a metadata file in it, a metadata.csv / .jsonl / "
        '.parquet, or a data set, "hf:ORG/NAME[@revision]"'
    )
    file_column: str = Field(
        "file_name", min_length=1, description="metadata column with the video's path, relative to the file"
    )
    caption_column: str = Field("text", min_length=1, description="metadata column with the caption")
    missing_captions: Literal["skip", "empty", "error"] = Field(
        "skip", description="reject a source without caption, give it an empty one, or ingest nothing"
    )
    duplicates: Literal["drop", "keep"] = Field("drop", description="sources with the same bytes as another")
    near_duplicates: Literal["drop", "keep"] = Field("keep", description="sources that look like another")
    backbone: BackboneName = Field(DEFAULT_BACKBONE, description="the model that the clips are for")
    clips: ClipSettings = Field(ClipSettings(), validate_default=True)
    limits: Limits = Limits()
    workers: int | None = Field(None, ge=1, le=256, description="sources decoded at a time; default one per core")

    @model_validator(mode="before")
    @classmethod
    def _apply_family_defaults(cls, data: Any) -> Any:
        family = _family_of(data)
        clips = data.get("clips", {}) if isinstance(data, dict) else None
        if family.name == DEFAULT_BACKBONE or not isinstance(clips, dict):
            return data
        keys = ("fps",) if "buckets" in clips else ("width", "height", "num_frames", "fps")
        return {**data, "clips": {**{key: getattr(family.job, key) for key in keys}, **clips}}

    @field_validator("clips")
    @classmethod
    def _check_shapes(cls, value: ClipSettings, info: ValidationInfo) -> ClipSettings:
        for shape in value.shapes if "backbone" in info.data else ():
            find_family(info.data["backbone"]).geometry.check(shape.width, shape.height, shape.num_frames)
        return value


class PrecomputeManifest(Operation):
    """Clips -> latents and text features in Parquet."""

    kind: Literal["precompute"] = "precompute"
    clips: InputPath | None = Field(None, description="the clips table; default: this run's")
    model: ModelSpec
    batch_size: int = Field(4, ge=1, le=1024, description="clips encoded at the same time")
    shard_rows: int = Field(32, ge=1, le=100_000, description="rows per file")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="dtype of stored latents and text features"
    )
    compression: Literal["zstd", "none"] = Field(
        "zstd", description="zstd: small files; none: rows are read without a copy"
    )
    verify: Literal["changed", "all"] = Field(
        "changed", description="shards that are hashed again first: those whose size or time changed, or all"
    )
    unused_days: float = Field(
        30, ge=0, le=36_500, description="days for which latents without a clip are kept, in case the clip comes back"
    )
    decoding_seconds: float = Field(
        300, gt=0, le=MAX_SECONDS, description="time to decode one clip, after which the decoder is killed"
    )
    place: Place = Field("local", description=PLACE)


class FinetuneManifest(Operation):
    """Latents -> a transformer that takes one noise level per latent frame."""

    old_keys: ClassVar[Mapping[str, str]] = {
        "decay": "lr_schedule",
        "clip_norm": "max_grad_norm",
        "recompute": "activation_checkpointing",
        "probe": "validation",
    }

    kind: Literal["finetune"] = "finetune"
    latents: InputPath | None = Field(None, description="the latents table; default: this run's")
    base: ModelSpec
    expert: ExpertName | None = Field(
        None, description="the transformer to train, of a family that has two: high or low"
    )
    train: Method = Field(Full(), description="full, partial or lora")
    levels: LevelsName = Field(
        "independent", description="how the levels of a clip's frames are drawn: independent, ptss(0.2), shared, "
        "chunked(4), clean_prefix",
    )  # fmt: skip
    density: DensityName = Field(
        _DEFAULT.recipe.density, description="density of the levels; V0.5's recipe has linear_quadratic, V1.0's shifted"
    )
    level_range: tuple[Level, Level] = Field(
        (0.0, 1.0), description="levels outside it are drawn again; [0.875, 1] is that of the high expert in use"
    )
    weighting: Literal["none", "gaussian", "gaussian_of_mean"] = Field(
        "none", description="of the loss by level; gaussian is V1.0's, frame by frame; gaussian_of_mean as published"
    )
    steps: int = Field(500, ge=1, le=MAX_STEPS, description="the length of the whole run")
    batch_size: int = Field(32, ge=1, le=1_000_000, description="clips per step, over all processes")
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="clips that a process computes at a time; default: its whole share of the batch",
    )
    learning_rate: float = Field(1e-5, gt=0, le=1, description="of AdamW, after the warm-up")
    warmup_steps: int = Field(0, ge=0, le=MAX_STEPS, description="steps in which the learning rate rises to its value")
    lr_schedule: Literal["constant", "cosine"] = Field(
        "constant", description="of the learning rate after the warm-up; cosine falls to 0 at the last step"
    )
    weight_decay: float = Field(0.01, ge=0, le=1000, description="of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, le=1e9, description="larger gradients are scaled down to this norm")
    caption_dropout: float = Field(0.1, ge=0, le=1, description="share of samples without a caption")
    embedded_guidance: float | None = Field(
        _DEFAULT.recipe.embedded_guidance,
        ge=1,
        le=100,
        description="the number that a model distilled with guidance is given in training; no other model takes one",
    )
    ema_decay: float = Field(0.0, ge=0, lt=1, description="of the moving average that checkpoints hold; 0: no average")
    precision: Literal["bfloat16", "float32"] | None = Field(
        None, description="of the arithmetic; weights and moments are float32. Default: bfloat16 on a GPU, else float32"
    )
    activation_checkpointing: int = Field(
        0,
        ge=0,
        le=10_000,
        description="recompute the activations of every n-th block to save memory; 1: every block; 0: none",
    )
    compile: bool = Field(False, description="compile the blocks with torch.compile")
    parallel: Parallel = Parallel()
    non_finite_limit: int = Field(
        10, ge=0, le=MAX_STEPS, description="steps that a run may skip because of an infinite loss"
    )
    checkpoint_every: int = Field(100, ge=1, le=MAX_STEPS, description="steps from one checkpoint to the next")
    keep_checkpoints: int = Field(3, ge=1, le=MAX_STEPS, description="the number of last checkpoints that are kept")
    validation: Validation | None = Field(
        None, description="videos from each checkpoint, and the losses of held-out clips; default: none"
    )
    loader_workers: int = Field(0, ge=0, le=64, description="processes that read batches ahead; 0: read in the trainer")
    seed: int = Field(0, ge=0, lt=2**31)

    @model_validator(mode="before")
    @classmethod
    def _apply_family_defaults(cls, data: Any) -> Any:
        family = _family_of(data.get("base")) if isinstance(data, dict) else _DEFAULT
        if family.name == DEFAULT_BACKBONE:
            return data
        train, validation = data.get("train"), data.get("validation")
        own: dict[str, Any] = {"density": family.recipe.density, **data}
        _fill_in(own, family.recipe.embedded_guidance)
        if isinstance(train, dict) and train.get("method") == "lora":
            own["train"] = {"targets": list(family.recipe.lora_targets), **train}
        if isinstance(validation, dict):
            own["validation"] = {"guidance": family.job.guidance, **validation}
            _fill_in(own["validation"], family.job.embedded_guidance)
        return own

    @property
    def part(self) -> str:
        """Return the transformer that is trained, as diffusers names its folder."""
        family = find_family(self.base.backbone)
        return family.experts[self.expert] if self.expert else family.transformers[0]

    @field_validator("level_range")
    @classmethod
    def _check_level_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] >= value[1]:
            raise ValueError(f"the first level is {value[0]:g} and the second {value[1]:g}; the first must be lower")
        return value

    @model_validator(mode="after")
    def _check_expert(self) -> Self:
        experts = find_family(self.base.backbone).experts
        if bool(self.expert) != bool(experts):
            allowed = f"one of {', '.join(experts)}" if experts else "none, since this model has one transformer"
            raise ValueError(f"expert is {self.expert!r}; for {self.base.backbone} it must be {allowed}")
        return self

    @model_validator(mode="after")
    def _check_validation(self) -> Self:
        family = find_family(self.base.backbone)
        _check_embedded_guidance(family, self.embedded_guidance)
        if self.validation is not None:
            _check_embedded_guidance(family, self.validation.embedded_guidance, "validation.")
            self.validation.require_fitting(self.level_range, self.steps, self.checkpoint_every)
        return self

    @model_validator(mode="after")
    def _check_lora(self) -> Self:
        loras = [lora for lora in self.base.adapters if lora.expert == self.expert]
        if loras and isinstance(self.train, Lora):
            onto = self.base.checkpoint_of(self.part) or self.base.weights
            words = [f"pusa weights export {loras[0].weights} FOLDER --to diffusers --base {onto}"]
            words += [f"--strength {loras[0].strength:g}"] if loras[0].strength != 1 else []
            words += ["and so on for the others, each onto the last FOLDER"] if len(loras) > 1 else []
            raise ValueError(
                f"base has lora {loras[0].weights!r}, and a LoRA cannot be trained on top of another; merge it first: "
                f"{' '.join(words)}"
            )
        return self


class Defaults(Settings):
    """Values for all jobs that do not set their own."""


class Drafts(Strict):
    """Sample every job so far only, and show what it seems to become; `pusa finish` makes the chosen ones."""

    steps: int = Field(ge=1, le=MAX_STEPS, description="the denoising steps, over all passes, after which a job waits")


def _read_time_of_day(value: Any) -> Any:
    """Return a time of day as text; YAML reads some as other types."""
    if isinstance(value, str) and re.fullmatch(r"([01][0-9]|2[0-3]):[0-5][0-9]", value):
        return value
    raise ValueError(f'{preview(value)} is not a time of day; expected hours and minutes, from "00:00" to "23:59"')


TimeOfDay = Annotated[str, BeforeValidator(_read_time_of_day)]


def job_defaults(job: dict[str, Any], family: Family) -> dict[str, Any]:
    """Return the family's values for the keys of a job whose class defaults are the default family's."""
    if family.name == DEFAULT_BACKBONE or job.get("task") not in TASKS:
        return {}
    fields = find(TASKS, job["task"], "task").model_fields
    default = _DEFAULT.job.by_key(_DEFAULT.preset)
    values = {
        key: value
        for key, value in family.job.by_key(family.preset).items()
        if key in fields and fields[key].default == default[key]
    }
    if job.keys() & {"multiplier", "multipliers"}:  # they exclude a preset
        values.pop("preset", None)
    if is_matrix(job.get("levels")):  # which has its own number of steps
        values.pop("steps", None)
    return values


def describe_repeated_ids(ids: list[str]) -> str:
    """Describe ids that several jobs have, or return ""; a file system may not distinguish Ball.mp4 from ball.mp4."""
    counts = Counter(map(str.casefold, ids))
    repeated = dict.fromkeys(id for id in ids if counts[id.casefold()] > 1)
    return f"several jobs have the id {join_names(repeated)}" if repeated else ""


class GenerateManifest(Operation):
    """Jobs -> videos. In a file, globs, `prompt_file` and `sweep` make many jobs from one; here they are expanded."""

    kind: Literal["generate"] = "generate"
    model: ModelSpec
    defaults: Defaults = Defaults()
    place: Place = Field("local", description=PLACE)
    batch_tokens: int = Field(
        2048, ge=0, le=2**31, description="jobs of equal shape and steps are sampled together up to this many tokens"
    )
    save_every: float = Field(
        120, gt=0, le=MAX_SECONDS, description="seconds after which the state of a long sampling is saved again"
    )
    keep_old: bool = Field(True, description="move the video of a job that was changed to .old/; false: replace it")
    preview_every: int = Field(
        0, ge=0, le=10**6, description="denoising steps after which a job's picture in previews/ is made anew; 0: none"
    )
    drafts: Drafts | None = Field(
        None, description="make drafts: {steps: 8} samples so far, shows drafts/<id>.mp4, and waits for `pusa finish`"
    )
    until: TimeOfDay | None = Field(
        None, description='start no more work after this local time, "HH:MM", the next one after the command starts'
    )
    jobs: tuple[AnyJob, ...] = Field(min_length=1, max_length=MAX_JOBS)

    def names_for_paths(self) -> dict[str, Any]:
        """Return the ids of the jobs, which a path may name as job:ID."""
        return {"ids": dict.fromkeys(job.id for job in self.jobs)}

    @model_validator(mode="before")
    @classmethod
    def _apply_defaults(cls, data: Any) -> Any:
        """Give each job the family's defaults, overridden by the manifest's, overridden by its own keys."""
        jobs, defaults = (data.get("jobs"), data.get("defaults", {})) if isinstance(data, dict) else (None, None)
        if not isinstance(jobs, list) or not isinstance(defaults, dict):
            return data
        family = _family_of(data.get("model"))
        shared = {key: value for key, value in defaults.items() if key in Settings.model_fields}
        given = [{**shared, **job} if isinstance(job, dict) else job for job in jobs]
        complete = [{**job_defaults(job, family), **job} if isinstance(job, dict) else job for job in given]
        for job in filter(lambda job: isinstance(job, dict), complete):
            _fill_in(job, family.job.embedded_guidance)
        return {**data, "jobs": complete}

    @field_validator("jobs")
    @classmethod
    def _check_guidance(cls, jobs: tuple[Any, ...], info: ValidationInfo) -> tuple[Any, ...]:
        for job in jobs if "model" in info.data else ():
            family = find_family(info.data["model"].backbone)
            _check_embedded_guidance(family, job.embedded_guidance, f"job {job.id}: ")
        return jobs

    @field_validator("jobs")
    @classmethod
    def _distinct(cls, jobs: tuple[Any, ...], info: ValidationInfo) -> tuple[Any, ...]:
        partial = (info.context or {}).get("partial", ())  # their ids are incomplete, since their expansion failed
        if clash := describe_repeated_ids([job.id for index, job in enumerate(jobs) if index not in partial]):
            raise ValueError(clash)
        return jobs

    @field_validator("jobs", mode="before")
    @classmethod
    def _at_least_one(cls, jobs: Any) -> Any:
        if isinstance(jobs, list | tuple) and not jobs:
            raise ValueError("the list is empty; expected at least one job")
        return jobs


Manifest = IngestManifest | PrecomputeManifest | FinetuneManifest | GenerateManifest
KINDS: dict[str, type[Manifest]] = {
    "ingest": IngestManifest,
    "precompute": PrecomputeManifest,
    "finetune": FinetuneManifest,
    "generate": GenerateManifest,
}
