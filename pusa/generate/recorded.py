"""Read what a video says about how it was made, find its weights and inputs, and compare its facts with those here."""

import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pusa.diffusion.courses import FILE
from pusa.errors import ManifestError, MediaError, WeightsError
from pusa.generate.canonical import NOT_OF_THE_VIDEO, job_key
from pusa.generate.outputs import paths_of
from pusa.generate.records import LOCAL, describe_environment, with_names_changed
from pusa.manifest.models import GenerateManifest, ModelSpec
from pusa.system.allowed import Allowed
from pusa.system.files import sha256_file
from pusa.system.strict import list_problems
from pusa.system.text import join_lines, preview, printable, shown_path
from pusa.tasks.base import Job
from pusa.video.provenance import read_provenance
from pusa.weights.hub import HUB_PREFIX
from pusa.weights.model import Model

MAX_COMPANY = 4096  # jobs of a batch that is sampled again
MAX_SEARCHED = 1000  # files of a folder in which an input is looked for
FIRST_PACKAGES = ("torch", "diffusers", "transformers", "ffmpeg")  # compared before the others
Scalar = bool | int | float | str | None


class Batch(BaseModel):
    """What a job was sampled with: its place, and the numbers of tokens of each job's prompt and negative prompt."""

    model_config = ConfigDict(frozen=True)
    position: int = Field(ge=0)
    tokens: list[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]] = Field(max_length=MAX_COMPANY)


class Recorded(BaseModel):
    """The facts in a video. `pusa.generate.records.describe_provenance` writes them."""

    model_config = ConfigDict(frozen=True)
    format: Literal[1]
    key: str
    job: dict[str, Any]
    model: dict[str, Any]
    weights: dict[str, str]
    packages: dict[str, str]
    device: str
    kernels: dict[str, Scalar]
    batch: Batch | None
    cores: int


def read_recorded(video: Path) -> Recorded:
    """Return the facts in a video, which anybody may have written.

    Raises:
        MediaError: the file cannot be read, or holds no facts that a video can be made of.
    """
    try:
        provenance = read_provenance(video)
    except OSError as error:
        raise MediaError(f"{video} cannot be read: {error.strerror}") from error
    if provenance is None:
        raise MediaError(
            f"{video} does not say how it was made: expected an mp4 of `pusa generate`, as it was written; many "
            "programs leave out what they do not know"
        )
    if not provenance.facts:
        raise MediaError(f"{video} does not hold its settings, as with `embed: none`; they may be in the run's records")
    if left_out := provenance.facts.get("left_out"):
        raise MediaError(f"{video} does not hold {preview(left_out)}, which was too large")
    try:
        recorded = Recorded.model_validate(provenance.facts, strict=False)
    except ValidationError as error:
        raise MediaError(f"{video} holds settings that are damaged: {list_problems(error, Recorded)[0]}") from error
    if recorded.batch and recorded.batch.position >= len(recorded.batch.tokens):
        raise MediaError(f"{video} holds settings that are damaged: batch has no job {recorded.batch.position}")
    return recorded


def model_of(recorded: Recorded, weights: Sequence[Path]) -> ModelSpec:
    """Return the recorded model, with the names of local weights replaced by what there is on this machine."""

    def place(name: str) -> str:
        if not name.startswith(LOCAL):
            if not name.startswith(("builtin:", HUB_PREFIX)):  # a video must not choose files of this machine
                raise WeightsError(f"the video names weights {preview(name)}; expected builtin:, hf: or {LOCAL}")
            return name
        own = name.removeprefix(LOCAL)
        inside = [path / own for path in weights if own and Path(own).name == own and (path / own).exists()]
        named = [path for path in weights if path.absolute().name == own]
        if not (choice := [*named, *inside, *(weights if len(weights) == 1 else ())]):
            raise WeightsError(
                f"the video was made with local weights {own!r}; name them with --weights, or --manifest"
            )
        return str(choice[0])

    data = with_names_changed(recorded.model, place)
    context = {"folder": Path.cwd(), "run_dir": Path.cwd(), "allowed": Allowed.from_environment()}
    try:
        return ModelSpec.model_validate(data, context=context)
    except ValidationError as error:
        raise ManifestError(join_lines("the video's model:", list_problems(error, ModelSpec))) from error


def _is_input(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"file", "sha256"}


def _inputs_in(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the files that recorded settings name."""
    if _is_input(value):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _inputs_in(inner)


def find_inputs(recorded: Recorded, folders: Sequence[Path]) -> tuple[dict[str, Path], list[str]]:
    """Return the files with the recorded hashes, by hash, and how they differ.

    A file of the name with another content is used where there is none of the content.

    Raises:
        MediaError: there is neither.
    """
    found: dict[str, Path] = {}
    differences = []
    for each in _inputs_in(recorded.job):
        name, sha256 = str(each["file"]), str(each["sha256"])
        if Path(name).name != name or "\0" in name:
            raise MediaError(
                f"the video names the input {preview(name)}; expected the name of a file, without a folder"
            )
        named = [path for folder in folders if (path := folder / name).is_file()]
        others = (path for folder in folders for path in islice(sorted(folder.glob("*")), MAX_SEARCHED))
        same = (path for path in (*named, *others) if path.is_file() and path.suffix == Path(name).suffix)
        if match := next((path for path in same if sha256_file(path) == sha256), None):
            found[sha256] = match
        elif named:
            found[sha256] = named[0]
            now = sha256_file(named[0])
            differences.append(f"input {name}: {named[0]} has the sha256 {now}, and had {sha256} for the video")
        else:
            where = " and ".join(map(shown_path, folders))
            raise MediaError(
                f"input {preview(name)} with the sha256 {preview(sha256)} is not in {where}; name its folder with "
                "--inputs"
            )
    return found, differences


def job_of(recorded: Recorded, spec: ModelSpec, found: Mapping[str, Path], video: Path) -> Job:
    """Return the recorded job, with the inputs that were found.

    Raises:
        ManifestError: its settings are not allowed by this version of Pusa.
    """

    def read(value: Any) -> Any:
        if _is_input(value):
            return str(found[str(value["sha256"])].absolute())
        if isinstance(value, dict):
            return {_key(key): read(inner) for key, inner in value.items()}
        return list(map(read, value)) if isinstance(value, list) else value

    data, known = read(recorded.job), {path.absolute() for path in found.values()}
    data = {key: value for key, value in data.items() if key not in NOT_OF_THE_VIDEO - {"id"}}
    context = {"folder": video.absolute().parent, "run_dir": video.absolute().parent, "allowed": Allowed()}
    problems = [f"levels is {preview(data['levels'])}; expected a matrix"] * str(data.get("levels")).endswith(FILE)
    if not problems:
        try:
            (job,) = GenerateManifest.model_validate({"model": spec, "jobs": [data]}, context=context).jobs
            problems = [f"{path} is not an input of the video" for path in paths_of(job) if path not in known]
        except ValidationError as error:
            problems = list_problems(error, GenerateManifest)
    if problems:
        made = recorded.packages.get("pusa")
        head = f"the settings in {video}, of pusa {made}, are not allowed by pusa {version('pusa')}:"
        raise ManifestError(join_lines(head, [printable(problem) for problem in problems]))
    # Defaults of classes are not validated: in a job's key, the default 24 of a float differs from 24.0.
    whole = {key: value for key, value in data.items() if type(value) is int and type(getattr(job, key)) is float}
    return job.model_copy(update=whole)


def _key(key: str) -> Any:
    """Return a key of recorded settings; those that are numbers became text as JSON."""
    return int(key) if key.removeprefix("-").isdecimal() and len(key) < 10 else key


def compare_facts(
    recorded: Recorded,
    job: Job,
    model: Model,
    fingerprints: Mapping[str, str],
    inputs: tuple[Mapping[str, Path], Sequence[str]],
    manifest: GenerateManifest | None = None,
) -> list[str]:
    """Return how a video's facts differ from those here, by their names, those first that explain others.

    Args:
        recorded: the facts in the video.
        job: its job, as `job_of` returns it.
        model: the model here.
        fingerprints: those of the model.
        inputs: what `find_inputs` returned.
        manifest: if it has a job of this id, the settings of the two are compared.
    """
    found, changed = inputs
    now = describe_environment(model)
    others = sorted(recorded.packages.keys() | now["packages"].keys() - {"pusa", *FIRST_PACKAGES})
    packages = _differing(now["packages"], recorded.packages, ["pusa", *FIRST_PACKAGES, *others])
    weights = _differing(fingerprints, recorded.weights, [*fingerprints, *recorded.weights])
    kernels = _differing(now["kernels"], recorded.kernels, [*recorded.kernels, *now["kernels"]])
    places = _differing({"device": now["device"]}, {"device": recorded.device}, ["device"])
    cores = _differing({"cores": len(os.sched_getaffinity(0))}, {"cores": recorded.cores}, ["cores"])
    return [
        *(f"version of {line}" for line in packages if line.startswith("pusa: ")),
        *(f"weights of {line}" for line in weights),
        *changed,
        *_compare_settings(recorded, job, model, found, manifest),
        *(f"package {line}" for line in packages if not line.startswith("pusa: ")),
        *places,
        *(f"kernel setting {line}" for line in kernels),
        *(f"{line}; the encoder's result depends on it" for line in cores),
    ]


def _differing(here: Mapping[str, Any], there: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Return a line for each of the names whose values differ."""
    known = dict.fromkeys(names)
    lines = {name: f"{name}: {_shown(here.get(name))} here, {_shown(there.get(name))} in the video" for name in known}
    return [lines[name] for name in known if here.get(name) != there.get(name)]


def _shown(value: Any) -> str:
    return "none" if value is None else printable(value)


def _compare_settings(
    recorded: Recorded, job: Job, model: Model, found: Mapping[str, Path], manifest: GenerateManifest | None
) -> list[str]:
    """Return how settings differ: from those of the manifest's job of this id, and from those of the key."""
    differences = []
    for other in (other for other in (manifest.jobs if manifest else ()) if other.id == job.id):
        theirs, ours = other.model_dump(exclude=set(NOT_OF_THE_VIDEO)), job.model_dump(exclude=set(NOT_OF_THE_VIDEO))
        pairs = {key: (theirs.get(key), ours.get(key)) for key in dict.fromkeys([*ours, *theirs])}
        differences += [
            f"setting {key}: {preview(there)} in the manifest, {preview(here)} in the video"
            for key, (there, here) in pairs.items()
            if there != here and not (isinstance(there, Path) and isinstance(here, Path))
        ]
    hashes = {path.absolute(): sha256 for sha256, path in found.items()}
    key = job_key(job, model.backbone.geometry, recorded.weights, lambda path: hashes[path])
    if key != recorded.key:
        differences.append(f"settings: their key is {key}, and the video's is {recorded.key}: they were edited since")
    return differences
