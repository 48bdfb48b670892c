"""The manifests: YAML files of one kind each, read whole and checked whole before anything starts. No torch here."""

import functools
import operator
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pusa.backbones import BACKBONES, find_family
from pusa.manifest.expansion import MAX_JOBS
from pusa.manifest.training import Full, LevelsName, Lora, Method, Parallel, Probe
from pusa.registry import find
from pusa.system.strict import InputPath, Strict, resolve_path
from pusa.tasks import TASKS
from pusa.tasks.base import Job, Settings

if TYPE_CHECKING:
    AnyJob = Job
else:  # one model for each entry of the table, told apart by `task`
    AnyJob = Annotated[
        functools.reduce(operator.or_, (find(TASKS, name, "task") for name in TASKS)), Field(discriminator="task")
    ]


def _known(value: str, table: dict[str, str], what: str) -> str:
    if value not in table:
        raise ValueError(f"unknown {what} {value!r}; allowed are {', '.join(table)}")
    return value


def _located(value: str, info: Any) -> str:
    return value if value.startswith(("builtin:", "hf:")) else str(resolve_path(Path(value), info))


def _source(value: str, info: Any) -> str:
    return value if value.startswith("hf:") else str(resolve_path(Path(value), info))


def _text_of(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


WeightsName = Annotated[str, BeforeValidator(_text_of), AfterValidator(_located)]
SourceName = Annotated[str, BeforeValidator(_text_of), AfterValidator(_source)]
LatentSpaceName = Literal["dit", "vae"]


class ModelSpec(Strict):
    """Which network, and where its weights are."""

    backbone: str = Field("mochi", description="a name of `pusa list backbones`")
    weights: WeightsName = Field(description='"builtin:NAME", "hf:ORG/NAME[@revision]", or a folder')
    checkpoint: WeightsName | None = Field(
        None, description='a fine-tuned transformer instead of the weights\' own: a folder, a file, "hf:ORG/NAME:FILE"'
    )
    lora: WeightsName | None = Field(
        None,
        description="what a LoRA adds to the transformer: a checkpoint of `pusa finetune`, a folder, a file, "
        '"hf:ORG/NAME:FILE"',
    )
    text_encoder: WeightsName | None = Field(None, description="a model to take T5 from, where weights has none")
    latent_space: LatentSpaceName | None = Field(
        None, description='what the transformer works in, where it does not record it; the published V0.5: "vae"'
    )
    offload: bool = Field(False, description="keep on the device only the part in use; the others in main memory")

    @field_validator("backbone")
    @classmethod
    def _backbone(cls, value: str) -> str:
        return _known(value, BACKBONES, "backbone")


class Bucket(Strict):
    """A shape of clips."""

    width: int = Field(ge=8, le=8192)
    height: int = Field(ge=8, le=8192)
    num_frames: int = Field(ge=1, le=10_000)


class ClipRule(Strict):
    """How a source becomes clips."""

    num_frames: int = Field(163, ge=1, le=10_000, description="of a clip; for mochi 6k + 1")
    width: int = Field(848, ge=8, le=8192, description="pixels; for mochi a multiple of 16, as the height")
    height: int = Field(480, ge=8, le=8192, description="pixels")
    buckets: tuple[Bucket, ...] = Field(
        (), max_length=100, description="shapes to choose from, instead of the one: that which distorts a source least"
    )
    fps: float | None = Field(24, gt=0, le=240, description="retime to this rate; null keeps the source's")
    windows: Literal["first", "all"] = Field("first", description="the first clip of a source, or all that fit")
    scenes: float | None = Field(
        None,
        gt=0,
        le=100,
        description="no clip goes across a cut: the score at which ffmpeg's scdet sees one; 10 is usual",
    )
    longest_frame: float = Field(
        0.25, gt=0, le=3600, description="seconds; a frame that a source shows for longer ends a clip, as a cut does"
    )
    fit: Literal["crop", "pad", "stretch"] = Field("crop", description="how a frame gets the size")

    @property
    def shapes(self) -> tuple[Bucket, ...]:
        """The shapes that clips may have."""
        return self.buckets or (Bucket(width=self.width, height=self.height, num_frames=self.num_frames),)

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Self:
        own = {name: getattr(self, name) for name in ("num_frames", "width", "height")}
        both = [name for name, value in own.items() if value != type(self).model_fields[name].default]
        if self.buckets and both:
            raise ValueError(f"buckets say the shapes already; take {', '.join(both)} away")
        return self


class Limits(Strict):
    """What is refused, so that one source cannot hold up the rest."""

    source_seconds: float = Field(3600, gt=0, description="longest source")
    source_pixels: int = Field(4096 * 2304, ge=1, description="largest frame of a source, width x height")
    caption_characters: int = Field(10_000, ge=1, le=1_000_000, description="longest caption")
    decoding_seconds: float = Field(300, gt=0, description="time to decode one source; then the decoder is killed")


class IngestManifest(Strict):
    """videos + captions -> a table of verified clips."""

    kind: Literal["ingest"] = "ingest"
    source: SourceName = Field(
        description="a folder with captions beside the videos or a metadata file in it, a metadata.csv / .jsonl / "
        '.parquet, or a data set, "hf:ORG/NAME[@revision]"'
    )
    file_column: str = Field("file_name", min_length=1, description="of a metadata file: the video, relative to it")
    caption_column: str = Field("text", min_length=1, description="of a metadata file: the caption")
    missing_captions: Literal["skip", "empty", "error"] = Field(
        "skip", description="a source without caption is rejected, gets an empty one, or nothing is ingested"
    )
    duplicates: Literal["drop", "keep"] = Field("drop", description="sources with the very bytes of another")
    near_duplicates: Literal["drop", "keep"] = Field("keep", description="sources that look like another")
    backbone: str = Field("mochi", description="that the clips are for: their shapes must suit it")
    clips: ClipRule = Field(ClipRule(), validate_default=True)
    limits: Limits = Limits()
    workers: int | None = Field(None, ge=1, le=256, description="sources decoded side by side; default one per core")

    @field_validator("backbone")
    @classmethod
    def _backbone(cls, value: str) -> str:
        return _known(value, BACKBONES, "backbone")

    @field_validator("clips")
    @classmethod
    def _shapes(cls, value: ClipRule, info: ValidationInfo) -> ClipRule:
        for shape in value.shapes if "backbone" in info.data else ():
            find_family(info.data["backbone"]).geometry.check(shape.width, shape.height, shape.num_frames)
        return value


class PrecomputeManifest(Strict):
    """clips -> latents and text features in Parquet."""

    kind: Literal["precompute"] = "precompute"
    clips: InputPath | None = Field(None, description="the clips table; this run's where none is named")
    model: ModelSpec
    batch_size: int = Field(4, ge=1, le=1024, description="clips encoded at once")
    shard_rows: int = Field(32, ge=1, le=100_000, description="rows a file")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="what latents and text are stored in"
    )
    compression: Literal["zstd", "none"] = Field(
        "zstd", description="small files, or rows that are read without a copy"
    )
    verify: Literal["changed", "all"] = Field(
        "changed", description="which shards are hashed again first: those whose size or time changed, or all"
    )
    unused_days: float = Field(
        30, ge=0, description="for which latents are kept that no clip wants any more: the clip may come back"
    )
    decoding_seconds: float = Field(300, gt=0, description="time to decode one clip; then the decoder is killed")


class FinetuneManifest(Strict):
    """latents -> a transformer that takes one noise level per latent frame."""

    kind: Literal["finetune"] = "finetune"
    latents: InputPath | None = Field(None, description="the latents table; this run's where none is named")
    base: ModelSpec
    train: Method = Field(Full(), description="full, partial or lora")
    levels: LevelsName = Field(
        "independent", description="how the frames of a clip share levels: independent, ptss(0.2), shared, chunked(4), "
        "clean_prefix",
    )  # fmt: skip
    density: Literal["linear_quadratic", "shifted", "uniform", "logit_normal"] = Field(
        "linear_quadratic", description="where levels are drawn; V0.5's recipe is linear_quadratic, V1.0's shifted"
    )
    weighting: Literal["none", "gaussian", "gaussian_of_mean"] = Field(
        "none", description="of the loss by level; gaussian is V1.0's, frame by frame; gaussian_of_mean as published"
    )
    steps: int = Field(500, ge=1)
    batch_size: int = Field(32, ge=1, description="clips a step, over all processes together")
    micro_batch_size: int | None = Field(
        None, ge=1, description="clips a process takes at once, the rest of its share after them; default all"
    )
    learning_rate: float = Field(1e-5, gt=0, le=1)
    warmup_steps: int = Field(0, ge=0, description="in which the learning rate rises to its value")
    decay: Literal["constant", "cosine"] = Field("constant", description="of the learning rate, to 0 at the last step")
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0, description="largest gradient norm")
    caption_dropout: float = Field(0.1, ge=0, le=1, description="share of samples without a caption")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="moving average that checkpoints hold; 0 is none")
    precision: Literal["bfloat16", "float32"] | None = Field(
        None, description="of the arithmetic; weights and moments are float32. Default: bfloat16 on a GPU, else float32"
    )
    recompute: int = Field(
        0, ge=0, description="activation checkpointing: every n-th block forgets what it will compute again; 1 is all"
    )
    compile: bool = Field(False, description="the blocks, by torch.compile")
    parallel: Parallel = Parallel()
    non_finite_limit: int = Field(10, ge=0, description="steps of a run that may be skipped for an infinite loss")
    checkpoint_every: int = Field(100, ge=1)
    keep_checkpoints: int = Field(3, ge=1, description="the last so many stay")
    probe: Probe | None = Field(None, description="what is rendered from each checkpoint; default nothing")
    loader_workers: int = Field(0, ge=0, le=64, description="processes that read batches ahead; 0 reads in the trainer")
    seed: int = Field(0, ge=0, lt=2**31)

    @field_validator("train")
    @classmethod
    def _one_lora(cls, value: Method, info: ValidationInfo) -> Method:
        base: ModelSpec | None = info.data.get("base")
        if base and base.lora and isinstance(value, Lora):
            onto = base.checkpoint or base.weights
            merge = f"pusa weights export {base.lora} FOLDER --to diffusers --base {onto}"
            raise ValueError(
                f"base has lora {base.lora!r}, and none is learnt on top of another; merge it first: {merge}"
            )
        return value


class Defaults(Settings):
    """What every job gets that does not say otherwise."""


def clash_of(ids: list[str]) -> str:
    """What is wrong with ids of which some are the same; a file system may not tell Ball.mp4 from ball.mp4."""
    counts = Counter(map(str.casefold, ids))
    twice = dict.fromkeys(id for id in ids if counts[id.casefold()] > 1)
    return f"several jobs have the id {', '.join(map(repr, twice))}" if twice else ""


class GenerateManifest(Strict):
    """jobs -> videos. In a file they may be written with globs, `prompt_file` and `sweep`; here they are expanded."""

    kind: Literal["generate"] = "generate"
    model: ModelSpec
    defaults: Defaults = Defaults()
    jobs: tuple[AnyJob, ...] = Field(min_length=1, max_length=MAX_JOBS)

    @model_validator(mode="before")
    @classmethod
    def _apply_defaults(cls, data: Any) -> Any:
        jobs, defaults = (data.get("jobs"), data.get("defaults")) if isinstance(data, dict) else (None, None)
        if not isinstance(jobs, list) or not isinstance(defaults, dict):
            return data
        known = {key: value for key, value in defaults.items() if key in Settings.model_fields}
        return {**data, "jobs": [{**known, **job} if isinstance(job, dict) else job for job in jobs]}

    @field_validator("jobs")
    @classmethod
    def _distinct(cls, jobs: tuple[Any, ...], info: ValidationInfo) -> tuple[Any, ...]:
        partial = (info.context or {}).get("partial", ())  # their ids lack the parts that tell them from others
        if clash := clash_of([job.id for index, job in enumerate(jobs) if index not in partial]):
            raise ValueError(clash)
        return jobs

    @field_validator("jobs", mode="before")
    @classmethod
    def _some(cls, jobs: Any) -> Any:
        if isinstance(jobs, list | tuple) and not jobs:
            raise ValueError("there are none; a generate manifest has at least one job")
        return jobs


Manifest = IngestManifest | PrecomputeManifest | FinetuneManifest | GenerateManifest
KINDS: dict[str, type[Manifest]] = {
    "ingest": IngestManifest,
    "precompute": PrecomputeManifest,
    "finetune": FinetuneManifest,
    "generate": GenerateManifest,
}
