"""Load a model once, and make videos with it from Python. Each call is a job of `pusa generate`, with its bytes."""

import shutil
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from pusa.api.inputs import as_files
from pusa.api.video import Video
from pusa.backbones import BACKBONES, find_family
from pusa.errors import ConditionError, ManifestError, PusaError, StageError, WeightsError
from pusa.generate.decode import decode_job
from pusa.generate.ledger import InputHashes, Ledger, read_failure
from pusa.generate.outputs import VIDEO
from pusa.generate.stage import fingerprints_of, generate
from pusa.manifest.models import GenerateManifest, ModelSpec
from pusa.manifest.network import ExpertCheckpoints
from pusa.system.allowed import Allowed
from pusa.system.slots import HereSlot
from pusa.system.strict import list_problems
from pusa.system.text import join_lines
from pusa.tasks import TASKS
from pusa.tasks.base import Job
from pusa.weights.model import Model, require_settings
from pusa.weights.resolve import require_model

# A worker keeps one model in its process, and a model computes one thing at a time.
AT_WORK = threading.RLock()
FIRST_JOB = "jobs.0"  # where the one job is, in messages about a manifest
MAX_SHOWN = 40  # characters of a prompt in a message


def load(
    weights: str | Path,
    *,
    device: str | torch.device | None = None,
    run_dir: str | Path | None = None,
    defaults: Mapping[str, Any] | None = None,
    **model: Any,
) -> "LoadedModel":
    """Return a model to make videos with. Its parts are loaded on first use, and stay loaded.

    Args:
        weights: as in a manifest's `model:`: "builtin:NAME", "hf:ORG/NAME[@revision]" or a folder.
        device: where it computes; default: the first GPU if there is one, else the CPU.
        run_dir: where inputs and videos are kept, as by `pusa generate --run-dir`. Default: a temporary folder, which
            is removed with the model and its last video; `Video.save` keeps a video.
        defaults: keys for all jobs, as in a manifest's `defaults:`.
        model: the other keys of a manifest's `model:`: checkpoint, lora, loras, vae, text_encoder, offload, and so on.
            Default of backbone: the first of `pusa list backbones` that has these weights' settings; of weights that
            are not on this machine, the first of all.

    Raises:
        ManifestError: a key or its value is not allowed, or this machine does not have the device.
        WeightsError: the weights cannot be found, or are not of the backbone.
    """
    context = {"folder": Path.cwd(), "run_dir": Path(run_dir or ".").absolute(), "allowed": Allowed.from_environment()}
    device = _device(device)
    problem: PusaError | None = None
    for backbone in [model["backbone"]] if "backbone" in model else BACKBONES:
        try:
            spec = ModelSpec.model_validate({**model, "backbone": backbone, "weights": weights}, context=context)
            require_model(spec)
            require_settings(spec)
        except WeightsError as error:  # another backbone may fit
            problem = problem or error
        except ValidationError as error:
            problem = problem or _refusal(list_problems(error, ModelSpec))
        else:
            return LoadedModel(Model(spec, device), run_dir, defaults or {})
    assert problem is not None
    raise problem


def _device(name: str | torch.device | None) -> torch.device | None:
    try:
        device = None if name is None else torch.device(name)
        if device is not None:
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's for a device that is unknown, missing or not built in
        raise ManifestError(
            f"device is {str(name)!r}, which this machine does not have; expected cpu, cuda or cuda:0"
        ) from error
    return device


def _refusal(problems: Sequence[str]) -> ManifestError:
    return ManifestError(problems[0] if len(problems) == 1 else join_lines(f"{len(problems)} problems:", problems))


class LoadedModel:
    """A model whose parts stay loaded, and the run's folder for what it makes.

    Attributes:
        spec: the manifest's `model:`.
        run_dir: the run's folder. Manifests may be run in it as well: what `pusa status` and `pusa finish` know of
            them, and their gallery, stay as they are.
    """

    def __init__(self, model: Model, run_dir: str | Path | None = None, defaults: Mapping[str, Any] = {}) -> None:
        self._model, self.spec, self._defaults = model, model.spec, dict(defaults)
        self._keeper = None if run_dir is not None else _TemporaryFolder()
        self.run_dir = self._keeper.path if self._keeper else Path(run_dir or ".").absolute()
        self._validate({"id": "job", "task": "text_to_video"})  # the defaults are wrong now or never

    def __repr__(self) -> str:
        spec, added = self.spec, ""
        if isinstance(spec.checkpoint, ExpertCheckpoints):
            added = "".join(f", {expert} checkpoint {name}" for expert, name in spec.checkpoint if name)
        elif spec.checkpoint:
            added = f", checkpoint {spec.checkpoint}"
        added += "".join(f", LoRA {lora.weights} * {lora.strength:g}" for lora in spec.adapters)
        return f"<LoadedModel {spec.weights} ({spec.backbone}{added}) on {self._model.device}, {self.run_dir}>"

    def generate(self, task: str = "text_to_video", *, id: str | None = None, **settings: Any) -> Video:
        """Make a video, or return the one that was made of the same settings before.

        The other commands of a run's folder may run at the same time. An interrupt leaves the model as it was.

        Args:
            task: a name of `pusa list tasks`. The prompt is one of the `settings`.
            id: names the files; a video of this id and other settings moves to `.old/`. Default: the task and the
                first digits of the job's key, so that each different video has its own files.
            settings: the keys of the task, as in a manifest (`pusa describe generate`). For a picture, a path, a
                picture of Pillow or an array (H, W, 3) uint8; for a clip, a path, an array (T, H, W, 3) uint8 or a list
                of pictures, at the job's fps, or another video. A tensor is as good as an array. `frames` of keyframes
                may be {0: picture, -1: picture}.

        Raises:
            ManifestError: a key is unknown, or its value is not allowed.
            ConditionError: sizes, positions, multipliers or inputs do not fit.
            MediaError: an input cannot be read, or an array is none.
            WeightsError: a part cannot be loaded.
            StageError: an unexpected error, whose traceback is in the note; or another process replaced the video.
            PusaError: any other reason why the job failed.
        """
        if isinstance(task, str) and " " in task:  # the calls of other libraries begin with the prompt
            raise ManifestError(f"task is {task[:MAX_SHOWN]!r}; expected one of {', '.join(TASKS)}, and prompt='...'")
        with AT_WORK:
            manifest = self._validate(self._with_files({**settings, "id": "job" if id is None else id, "task": task}))
            (job,) = manifest.jobs
            key = self._key_of(job)
            if id is None:
                job = job.model_copy(update={"id": f"{job.task}-{key[:8]}"})
                manifest = manifest.model_copy(update={"jobs": (job,)})
            slot = HereSlot(str(self._model.device))
            made = generate(manifest, self.run_dir, lambda spec: self._model, slots=[slot], shown=False)
        if job.id in made.failed:
            raise self._error_of(job, made.failed[job.id])
        video = Video(made.videos / f"{job.id}{VIDEO}", partial(self._decode, job), self._keeper)
        if video.sidecar.get("key") != key:
            raise StageError(f"{video.path} was replaced meanwhile, or an input was; give each call another id")
        return video

    def _with_files(self, settings: dict[str, Any]) -> dict[str, Any]:
        fps = find_family(self.spec.backbone).job.fps
        given = {**self._defaults, **settings}.get("fps")
        if isinstance(given, int | float) and 1 <= given <= 240:  # any other is refused later
            fps = given
        return as_files(settings, self.run_dir / "inputs", fps)

    def _validate(self, job: dict[str, Any]) -> GenerateManifest:
        """Return a manifest with one job. A full disk raises an error, and does not wait for room as a batch does."""
        data = {"model": self.spec, "defaults": self._defaults, "jobs": [job], "min_free_gib": 0}
        context = {"folder": Path.cwd(), "run_dir": self.run_dir, "allowed": Allowed.from_environment()}
        try:
            return GenerateManifest.model_validate(data, context=context)
        except ValidationError as error:
            lines = list_problems(error, GenerateManifest)
        lines = [line.replace(f"{FIRST_JOB}.", f"{job['task']}.", 1).removeprefix(f"{FIRST_JOB}: ") for line in lines]
        raise _refusal(lines)

    def _key_of(self, job: Job) -> str:
        geometry = self._model.backbone.geometry
        return Ledger(self.run_dir, geometry, fingerprints_of(self._model), InputHashes()).keys_of(job).video

    def _decode(self, job: Job, z_CFhw: torch.Tensor) -> np.ndarray:
        with AT_WORK:
            return decode_job(job, self._model, z_CFhw)

    def _error_of(self, job: Job, message: str) -> PusaError:
        """Return the error of a failed job, as its record has it."""
        failure = read_failure(self.run_dir / "videos", job.id)
        if failure.get("error") != message:  # a full disk kept this one from being recorded
            failure = {}
        kinds = {kind.__name__: kind for kind in PusaError.__subclasses__()}
        if trace := failure.get("traceback"):
            error: PusaError = StageError(f"job {job.id} failed: {message}")
            error.add_note(str(trace))
            return error
        return kinds.get(str(failure.get("kind")), ConditionError)(message)


class _TemporaryFolder:
    """A folder that is removed with the last object that has this one, or when Python ends."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="pusa-")).resolve()
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
