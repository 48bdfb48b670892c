"""The manifests: YAML files of one kind each, read whole and checked whole before anything starts. No torch here."""

import functools
import operator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pusa.backbones import BACKBONES
from pusa.errors import ManifestError, PusaError
from pusa.expand import MAX_JOBS, SYNTAX, Expansion, expand
from pusa.noise_schedules import NOISE_SCHEDULES
from pusa.strict import InputPath, Strict, problems, read_text, resolve_path
from pusa.tables import find
from pusa.tasks import TASKS
from pusa.tasks.base import Job, Settings

MAX_BYTES = 4 * 1024 * 1024
MAX_DEPTH = 20
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where there is one

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


def _text_of(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


WeightsName = Annotated[str, BeforeValidator(_text_of), AfterValidator(_located)]
LatentSpaceName = Literal["dit", "vae"]


class ModelSpec(Strict):
    """Which network, and where its weights are."""

    backbone: str = Field("mochi", description="a name of `pusa list backbones`")
    weights: WeightsName = Field(description='"builtin:NAME", "hf:ORG/NAME[@revision]", or a folder')
    checkpoint: WeightsName | None = Field(
        None, description='a fine-tuned transformer instead of the weights\' own: a folder, a file, "hf:ORG/NAME:FILE"'
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


class ClipRule(Strict):
    """How a source becomes clips."""

    num_frames: int = Field(163, ge=1, le=10_000)
    width: int = Field(848, ge=8, le=8192)
    height: int = Field(480, ge=8, le=8192)
    fps: float | None = Field(24, gt=0, le=240, description="retime to this rate; null keeps the source's")
    windows: Literal["first", "all"] = Field("first", description="the first clip of a source, or all that fit")


class IngestManifest(Strict):
    """videos + captions -> a table of verified clips."""

    kind: Literal["ingest"] = "ingest"
    source: InputPath = Field(description="a folder with captions beside the videos, or metadata.csv / .jsonl")
    clips: ClipRule = ClipRule()


class PrecomputeManifest(Strict):
    """clips -> latents and text features in Parquet."""

    kind: Literal["precompute"] = "precompute"
    clips: InputPath | None = Field(None, description="the clips table; this run's where none is named")
    model: ModelSpec
    batch_size: int = Field(4, ge=1, le=1024, description="clips encoded at once")
    shard_rows: int = Field(32, ge=1, le=100_000, description="rows a file")


class FinetuneManifest(Strict):
    """latents -> a transformer that takes one noise level per latent frame."""

    kind: Literal["finetune"] = "finetune"
    latents: InputPath | None = Field(None, description="the latents table; this run's where none is named")
    base: ModelSpec
    levels: Literal["independent", "shared"] = Field("independent", description="one level per frame, or per clip")
    density: Literal["linear_quadratic", "uniform", "logit_normal"] = Field(
        "linear_quadratic", description="where levels are drawn; the published recipe is linear_quadratic"
    )
    steps: int = Field(500, ge=1)
    batch_size: int = Field(32, ge=1)
    learning_rate: float = Field(1e-5, gt=0, le=1)
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0, description="largest gradient norm")
    caption_dropout: float = Field(0.1, ge=0, le=1, description="share of samples without a caption")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="moving average that checkpoints hold; 0 is none")
    checkpoint_every: int = Field(100, ge=1)
    seed: int = Field(0, ge=0, lt=2**31)


class Defaults(Settings):
    """What every job gets that does not say otherwise."""


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
        seen: set[str] = set()
        partial = (info.context or {}).get("partial", ())
        for index, job in enumerate(jobs):
            name = job.id.casefold()  # a file system may not tell Ball.mp4 from ball.mp4
            if name in seen and index not in partial:
                raise ValueError(f"two jobs have the id {job.id!r}")
            if index not in partial:  # such a job's id lacks the parts that tell it from its neighbours
                seen.add(name)
            _known(job.noise_schedule, NOISE_SCHEDULES, "noise schedule")
        return jobs


Manifest = IngestManifest | PrecomputeManifest | FinetuneManifest | GenerateManifest
KINDS: dict[str, type[Manifest]] = {
    "ingest": IngestManifest,
    "precompute": PrecomputeManifest,
    "finetune": FinetuneManifest,
    "generate": GenerateManifest,
}


def default_run_dir(manifest: Path) -> Path:
    """runs/<name of the manifest's folder>, under the current folder. A folder of manifests names itself."""
    folder = manifest if manifest.is_dir() else manifest.parent
    return Path("runs", folder.resolve().name)


def load_manifest(path: Path, run_dir: Path, kind: str | None = None) -> Manifest:
    """Read one manifest.

    Args:
        path: a YAML file; its relative paths are relative to it.
        run_dir: what RUN/ stands for.
        kind: refuse any other kind.

    Raises:
        ManifestError: it cannot be read; every problem found is named, a line each.
    """
    data = _read_yaml(path)
    found = data.get("kind")
    if not isinstance(found, str) or found not in KINDS:
        raise ManifestError(f"{path}: kind is {found!r}; allowed are {', '.join(KINDS)}")
    if kind is not None and found != kind:
        raise ManifestError(f"{path}: kind is {found!r}, but {kind!r} is wanted here")
    context = {"folder": path.parent.absolute(), "run_dir": run_dir.absolute()}
    manifest, wrong = _validate(data, KINDS[found], context)
    if manifest is None or wrong:
        raise ManifestError("\n  ".join([f"{path}:", *wrong]))
    return manifest


def _validate(
    data: dict[str, Any], model: type[Manifest], context: dict[str, Path]
) -> tuple[Manifest | None, list[str]]:
    """The manifest with its jobs expanded, if there is one, and a line for each problem."""
    expansion = expand(data, context) if model is GenerateManifest else Expansion(data)
    wrong = expansion.problems
    try:
        return model.model_validate(expansion.data, context={**context, "partial": expansion.partial}), wrong
    except ValidationError as error:
        found = problems(error, model, expansion.as_written, {Job: SYNTAX})
    told = {line.partition(": ")[0] for line in wrong}  # of their values none may be left
    return None, wrong + [line for line in found if line.removesuffix(": Field required") not in told]


def _read_yaml(path: Path) -> dict[str, Any]:
    text = read_text(path, MAX_BYTES)
    try:
        _refuse_bombs(text, path)
        loader = _Loader(text)
        node = loader.get_single_node()
        _refuse_duplicates(node, path)
        data = loader.construct_document(node) if node is not None else None
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, PusaError):
            raise
        raise ManifestError(f"{path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ManifestError(f"{path} holds {type(data).__name__}; a manifest is a mapping that begins with 'kind:'")
    return data


def _refuse_bombs(text: str, path: Path) -> None:
    """A few lines of aliases can expand to gigabytes (the "billion laughs"), and deep nesting overflows the stack."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent):
            raise ManifestError(f"{path}: line {line} uses a YAML alias; manifests may not")
        if depth > MAX_DEPTH:
            raise ManifestError(f"{path}: line {line} is nested more than {MAX_DEPTH} deep")


def _refuse_duplicates(node: Any, path: Path) -> None:
    """YAML lets a later key silently win over an earlier one of the same name."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                raise ManifestError(f"{path}: line {key.start_mark.line + 1} gives {key.value!r} a second time")
            seen.add(str(key.value))
            _refuse_duplicates(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item, path)
