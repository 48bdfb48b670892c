"""Identify a job by everything that its video depends on, and keep the record of each video beside it.

`<id>.json` describes the video `<id>.mp4`. If the job fails later, the record of the video that is there stays, and the
failure is added to it under `failure`. A job without a video has a record of its failure alone.
"""

import logging
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pusa.errors import MediaError
from pusa.generate.outputs import RECORD, VIDEO, paths_of, with_paths_changed
from pusa.system.failures import Failure
from pusa.system.files import State, digest, read_object, sha256_file, state_of, write_json
from pusa.tasks.base import Job

log = logging.getLogger(__name__)
VERSION = 2  # part of each job's key; raise it when the same settings come to make another video


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
            if now != self._known[path]:
                raise MediaError(f"{path} was changed while it was read; run again")


def job_key(job: Job, fingerprints: Mapping[str, str], hashes: InputHashes, without: Set[str] = frozenset()) -> str:
    """Return a hash of everything that a video depends on: settings, weights, and the bytes of inputs, not their names.

    `without` names settings that are left out.
    """
    rules = VERSION + (job.seed >= 2**32)  # in earlier versions, two of these seeds could give the same noise
    settings = with_paths_changed(job.model_dump(exclude={"id", "priority", *without}), hashes.hash_of)
    return digest([rules, settings, dict(fingerprints)])[:32]


def read_good_record(folder: Path, id: str) -> dict[str, Any]:
    """Return the record of a job's video; empty if there is none, or not with the bytes that were written.

    Raises:
        MediaError: a file is there and cannot be read. It may be good, so it is not replaced.
    """
    path, video = folder / f"{id}{RECORD}", folder / f"{id}{VIDEO}"
    with _reading(path):
        record = read_object(path)
    if record.get("status") != "done" or not video.is_file():
        return {}
    with _reading(video):
        return record if record.get("video_sha256") == sha256_file(video) else {}


def is_done(folder: Path, id: str, key: str) -> bool:
    """Return whether a job's video exists, was made with this key, and has the bytes that were written."""
    return read_good_record(folder, id).get("key") == key


def record_video(folder: Path, job: Job, fingerprints: Mapping[str, str], facts: Mapping[str, Any]) -> None:
    """Record a job's video: its key, what it was given, its hash, its settings, and the weights and packages used."""
    _write(folder, job.id, {"id": job.id, "status": "done", **facts, **_made_with(job, fingerprints)})


def record_failure(folder: Path, job: Job, fingerprints: Mapping[str, str], failure: Failure) -> None:
    """Record why a job failed, with the traceback of an unexpected error. The record of an intact video is kept."""
    why = {"error": failure.message} | ({"traceback": failure.traceback} if failure.traceback else {})
    if record := read_good_record(folder, job.id):
        log.warning("job %s: the video of an earlier run is kept", job.id)
        _write(folder, job.id, {**record, "failure": {**why, "job": _settings(job)}})
    else:
        _write(folder, job.id, {"id": job.id, "status": "failed", **why, **_made_with(job, fingerprints)})


def forget_failure(folder: Path, id: str) -> None:
    """Remove the failure from a video's record: the job is done."""
    record = read_object(folder / f"{id}{RECORD}")
    if record.pop("failure", None) is not None:
        _write(folder, id, record)


def _made_with(job: Job, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    packages = {name: version(name) for name in ("torch", "diffusers")}
    return {"job": _settings(job), "weights": dict(fingerprints), "packages": packages}


def _settings(job: Job) -> Any:
    """Return a job's settings as JSON values. pydantic would refuse paths that are not UTF-8."""
    return with_paths_changed(job.model_dump(), str)


def _write(folder: Path, id: str, record: Mapping[str, Any]) -> None:
    write_json(folder / f"{id}{RECORD}", record)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise an error of reading a file as a MediaError that names it."""
    try:
        yield
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error.strerror}") from error
