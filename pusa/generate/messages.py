"""What a command and its workers tell each other: what every chunk needs, and what a worker reports of its jobs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pusa.manifest.models import ModelSpec
from pusa.system.failures import Failure
from pusa.weights.model import KnownFiles, Model


@dataclass(frozen=True)
class Setup:
    """What every chunk of a run needs. `run` tells runs apart, so that a worker keeps one run's model."""

    run: str
    folder: Path
    spec: ModelSpec
    new_model: Callable[[ModelSpec], Model]
    known: KnownFiles
    fingerprints: Mapping[str, str]  # part of each job's key
    keep_old: bool
    save_every: float  # seconds
    needed: frozenset[str]  # the ids of the jobs whose latents another job reads
    encodings: Path | None  # the folder that keeps them
    slot: str  # the name of the slot, for people
    draft_steps: int = 0  # after which jobs wait as drafts; 0: they are made to the end
    preview_every: int = 0  # denoising steps


@dataclass(frozen=True)
class Busy:
    """The jobs that the worker works on from now on: if it dies, one of them is why. While it loads weights, none."""

    ids: tuple[str, ...]
    doing: str = ""  # for people


@dataclass(frozen=True)
class Stepped:
    """Denoising steps that a job has made."""

    id: str
    steps: int
    earlier: bool = False  # by another run


@dataclass(frozen=True)
class Ended:
    """A job that was made now, was made already, has a draft, or failed."""

    id: str
    made: bool = False
    drafted: bool = False  # now or before
    failure: Failure | None = None
    seconds: float | None = None  # that it took
    warning: str = ""
    unrecorded: str = ""  # why its failure could not be recorded
