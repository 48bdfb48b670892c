"""Keep the ledger of a run: what each job is, and its state, read off its files.

In `run_dir/videos`, the files of a finished job are `<id>.mp4`, `<id>.latents.safetensors`, and last the record
`<id>.json`, which says what the video was made from and has its hash. What is unfinished lies in `.work/`, and videos
of jobs that were changed since in `.old/`. If a job fails, and a video of an earlier run is there, this video and its
record stay, and the failure is added under `failure`. A job without a video has a record of its failure alone.
"""

import json
import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from pusa.backbones.family import Geometry
from pusa.errors import MediaError
from pusa.generate.canonical import canonical
from pusa.generate.latents import read_header, read_latents, save_latents
from pusa.generate.outputs import LATENTS, RECORD, VIDEO, paths_of, with_paths_changed
from pusa.system.failures import Failure
from pusa.system.files import (
    State,
    digest,
    make_own_folder,
    own_digest,
    publish,
    read_object,
    sha256_file,
    state_of,
    write_json,
)
from pusa.system.names import log_once
from pusa.tasks.base import Job

log = logging.getLogger(__name__)
VERSION = 2  # part of each job's key; raise it when the same settings come to make another video
WORK, OLD = ".work", ".old"  # folders
STATE = ".state.safetensors"  # of the sampling of a batch, after the id of its first job, in `.work/`
JOBS = "jobs.json"  # in `.work/`: the jobs of the manifest that was run last
JOBS_VERSION = 1
NO_KEYS = {"key": None, "latents_key": None}
CRASHED = "crashed"  # the `reason` of a job that killed its worker again and again
AFTER_DECODING = frozenset({"exact"})  # settings without effect on the latents


class JobState(StrEnum):
    """How far a job is."""

    PENDING = "pending"
    SAMPLING = "sampling"  # a state of its sampling is saved
    SAMPLED = "sampled"  # its latents are on the disk
    DONE = "done"
    FAILED = "failed"


class InputHashes:
    """The hashes of a run's input files. A file is hashed once, and again if it has changed since."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[State, str]] = {}

    def hash_of(self, path: Path) -> str:
        """Return the hash of a file.

        Raises:
            MediaError: it cannot be read, or changes while it is read.
        """
        with _reading(path):
            before = state_of(path)
            if path not in self._known or self._known[path][0] != before:
                self._known[path] = before, sha256_file(path)
                if state_of(path) != before:
                    raise MediaError(f"{path} was changed while it was read; run again")
        return self._known[path][1]

    def require_unchanged(self, job: Job) -> None:
        """Check that a job's inputs, which were read since they were hashed, are those that were hashed.

        Raises:
            MediaError: one was changed or replaced.
        """
        for path in paths_of(job):
            # Two changes within a tick of the file system's clock leave the same times: hence the content as well.
            with _reading(path):
                now = state_of(path), sha256_file(path)
            if now != self._known.get(path):
                raise MediaError(f"{path} was changed while it was read; run again")


def job_key(
    job: Job,
    geometry: Geometry,
    fingerprints: Mapping[str, str],
    hashes: InputHashes,
    without: Set[str] = frozenset(),
) -> str:
    """Return a hash of everything that a video depends on: settings, weights, and the bytes of inputs, not their names.

    Settings without effect on it do not count, and neither do those that `without` names.
    """
    rules = VERSION + (job.seed >= 2**32)  # in earlier versions, two of these seeds could give the same noise
    settings = {key: value for key, value in canonical(job, geometry).items() if key not in without}
    return digest([rules, with_paths_changed(settings, hashes.hash_of), dict(fingerprints)])[:32]


@dataclass(frozen=True)
class Keys:
    """What identifies a job's video, and its latents, which settings that act after decoding do not change."""

    video: str
    latents: str


@dataclass(frozen=True)
class Ledger:
    """The jobs' files in a folder, for jobs that are made with weights of these fingerprints."""

    folder: Path
    geometry: Geometry
    fingerprints: Mapping[str, str]
    hashes: InputHashes
    keep_old: bool = True

    def keys_of(self, job: Job) -> Keys:
        """Return a job's keys, as its inputs are now.

        Raises:
            MediaError: an input cannot be read.
        """
        key = partial(job_key, job, self.geometry, self.fingerprints, self.hashes)
        return Keys(key(), key(without=AFTER_DECODING))

    def is_done(self, job: Job, keys: Keys, with_latents: bool = False) -> bool:
        """Return whether a job's video exists, was made with this key, and has the bytes that were written.

        Its latents may have been removed, unless `with_latents`; but where they are, they must be intact.

        Raises:
            MediaError: a file cannot be read.
        """
        if read_good_record(self.folder, job.id).get("key") != keys.video:
            return False
        latents = self.path(job.id, LATENTS)
        return _read_latents(latents, keys) is not None if with_latents or latents.exists() else True

    def sampled(self, job: Job, keys: Keys) -> Tensor | None:
        """Return a job's latents (C, F, h, w); None if there are none, of other settings, or damaged."""
        found = _read_latents(self.work(f"{job.id}{LATENTS}"), keys)
        return _read_latents(self.path(job.id, LATENTS), keys) if found is None else found

    def save_sampled(self, job: Job, keys: Keys, z_CFhw: Tensor, facts: Mapping[str, str]) -> None:
        """Keep a job's latents until its video is made."""
        save_latents(self.work(f"{job.id}{LATENTS}"), z_CFhw, {"key": keys.latents, **facts})

    def publish(self, job: Job, keys: Keys, video: Path, facts: Mapping[str, Any]) -> None:
        """Give a job's finished video and latents their names, then record them. Call it with the job's lock.

        A video of other settings is moved away before. Where this is interrupted, the job is not done, and its latents
        are found in either place.

        Args:
            job: the job.
            keys: its keys, of the inputs that were read.
            video: the video's file, complete, of another name in the same file system.
            facts: what to record beside the settings, the weights and the packages.
        """
        sampled = self.work(f"{job.id}{LATENTS}")
        self._put_away(job.id, keys.video)
        if sampled.exists():
            publish(sampled, self.path(job.id, LATENTS))
        publish(video, self.path(job.id, VIDEO))
        self._write(job.id, {"id": job.id, "status": "done", "key": keys.video, **facts, **self._made_with(job)})

    def record_failure(self, job: Job, failure: Failure, reason: str | None = None) -> None:
        """Record why a job failed, with the traceback of an unexpected error. The record of an intact video is kept.

        Args:
            job: the job.
            failure: the error.
            reason: `CRASHED`, if the job is not to be tried again by itself.
        """
        why = {"error": failure.message, "attempt": secrets.token_hex(8)}
        why |= {"traceback": failure.traceback} if failure.traceback else {}
        why |= {"kind": failure.kind} if failure.kind else {}
        why |= {"reason": reason, "key": self.keys_of(job).video} if reason else {}
        if record := read_good_record(self.folder, job.id):
            log.warning("job %s: the video of an earlier run is kept", job.id)
            record = {**record, "failure": {**why, "job": settings_of(job)}}
        else:
            record = {"id": job.id, "status": "failed", **why, **self._made_with(job)}
        self._write(job.id, record)

    def forget_failure(self, id: str) -> None:
        """Remove the failure from a video's record: the job is done."""
        record = read_object(self.path(id, RECORD))
        if record.pop("failure", None) is not None:
            self._write(id, record)

    def path(self, id: str, end: str) -> Path:
        """Return the path of one of a job's finished files."""
        return self.folder / f"{id}{end}"

    def work(self, name: str) -> Path:
        """Return the path of an unfinished file."""
        return self.folder / WORK / name

    def _put_away(self, id: str, key: str) -> None:
        """Move the files of a video of another key to `.old/`, the record last, so that an interrupted move continues.

        With `keep_old: false` they stay, and are replaced one by one.
        """
        record = read_object(self.path(id, RECORD))
        old = record.get("key")
        if record.get("status") != "done" or old == key or not isinstance(old, str) or not self.keep_old:
            return
        for end in (VIDEO, LATENTS, RECORD):
            if (path := self.path(id, end)).exists():
                target = self.folder / OLD / f"{id}.{digest(old)[:8]}{end}"
                make_own_folder(target.parent, "old videos")
                publish(path, target)

    def _write(self, id: str, record: Mapping[str, Any]) -> None:
        write_json(self.path(id, RECORD), {**record, "sha256": own_digest(record)})

    def _made_with(self, job: Job) -> dict[str, Any]:
        packages = {name: version(name) for name in ("torch", "diffusers")}
        return {"job": settings_of(job), "weights": dict(self.fingerprints), "packages": packages}


def read_good_record(folder: Path, id: str) -> dict[str, Any]:
    """Return the record of a job's video; empty if there is none, or either has not the bytes that were written.

    Raises:
        MediaError: a file is there and cannot be read. It may be good, so it is not replaced.
    """
    path, video = folder / f"{id}{RECORD}", folder / f"{id}{VIDEO}"
    with _reading(path):
        record = read_record(path)
    if record.get("status") != "done" or not video.is_file():
        return {}
    with _reading(video):
        return record if record.get("video_sha256") == sha256_file(video) else {}


def read_record(path: Path) -> dict[str, Any]:
    """Return a record; empty if it has not the bytes that were written. Those of earlier versions have no hash."""
    record = read_object(path)
    return record if record.get("sha256") in (None, own_digest(record)) else {}


def _read_latents(path: Path, keys: Keys) -> Tensor | None:
    if not path.exists():
        return None
    try:
        return read_latents(path) if read_header(path).facts.get("key") == keys.latents else None
    except MediaError as error:
        log_once(f"a job is sampled again: {error}")
        return None


def read_failure(folder: Path, id: str) -> dict[str, Any]:
    """Return why a job failed when it was tried last: `error`, and perhaps `traceback`, `reason`, `key`, `attempt`.

    It is empty if the last try did not fail, there was none, or its record cannot be read.
    """
    try:
        record = read_object(folder / f"{id}{RECORD}")
    except OSError:
        return {}
    failure = record if record.get("status") == "failed" else record.get("failure")
    return failure if isinstance(failure, dict) else {}


@dataclass(frozen=True)
class ListedJob:
    """A job of the manifest that was run last. Its keys are None if it read what another job had yet to write."""

    id: str
    settings: Mapping[str, Any]
    key: str | None
    latents_key: str | None


def list_jobs(ledger: Ledger, keys: Mapping[str, Keys], jobs: Sequence[Job], min_free_gib: float) -> None:
    """Write `jobs.json`: all jobs of a manifest with their keys, the weights, and the free space that the run needs.

    `pusa status` reads it.
    """
    rows = []
    for job in jobs:
        known = {"key": keys[job.id].video, "latents_key": keys[job.id].latents} if job.id in keys else NO_KEYS
        rows.append({"id": job.id, **known, "settings": settings_of(job)})
    facts = {"weights": dict(ledger.fingerprints), "min_free_gib": min_free_gib}
    content = {"version": JOBS_VERSION, **facts, "jobs": rows}
    write_json(ledger.work(JOBS), {**content, "sha256": own_digest(content)})


def listed_jobs(folder: Path) -> tuple[list[ListedJob], dict[str, str]]:
    """Return the jobs of the manifest that was run last, and the fingerprints of its weights.

    Raises:
        MediaError: there is no list, or it is damaged.
    """
    path = folder / WORK / JOBS
    with _reading(path):
        content = read_object(path)
    if content.get("version") != JOBS_VERSION or content.get("sha256") != own_digest(content):
        raise MediaError(f"{path} is missing or damaged; run the manifest again, which writes it first")
    return [ListedJob(**row) for row in content["jobs"]], content["weights"]


def settings_of(job: Job) -> Any:
    """Return a job's settings as JSON values. pydantic would refuse paths that are not UTF-8."""
    return json.loads(json.dumps(with_paths_changed(job.model_dump(), str)))  # as they are when they are read again


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise an error of reading a file as a MediaError that names it."""
    try:
        yield
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error.strerror}") from error
