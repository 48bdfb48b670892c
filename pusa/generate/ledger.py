"""Keep the ledger of a run: what each job is, and its state, read off its files.

In `run_dir/videos`, the files of a finished job are `<id>.mp4`, `<id>.latents.safetensors`, and last the record
`<id>.json`, which says what the video was made from and has its hash. What is unfinished lies in `.work/`, and videos
of jobs that were changed since in `.old/`. If a job fails, and a video of an earlier run is there, this video and its
record stay, and the failure is added under `failure`. A job without a video has a record of its failure alone.
"""

import json
import logging
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pusa.backbones.family import Geometry
from pusa.diffusion.courses import SCHEDULE
from pusa.errors import MediaError, StageError
from pusa.generate.outputs import LATENTS, PREVIEW, PREVIEWS, RECORD, VIDEO, paths_of, with_paths_changed
from pusa.system.failures import Failure
from pusa.system.files import (
    State,
    digest,
    make_own_folder,
    own_digest,
    publish,
    read_object,
    remove,
    sha256_file,
    state_of,
    write_json,
)
from pusa.system.names import log_once
from pusa.tasks.base import Job
from pusa.video.formats import FORMATS, beside, hash_output, remove_output

if TYPE_CHECKING:  # torch is imported where it is used: `pusa gallery` and other commands that only read start at once
    from torch import Tensor

log = logging.getLogger(__name__)
WORK, OLD, DRAFTS = ".work", ".old", "drafts"  # folders
DRAFT = "draft"  # the status in the record of a draft
STATE = ".state.safetensors"  # of the sampling of a batch, after the id of its first job, in `.work/`
CRASHED = "crashed"  # the `reason` of a job that killed its worker again and again
AFTER_DECODING = frozenset({"exact"})  # settings without effect on the latents
# Settings that came with a later version, and their values for what jobs did before.
LATER: Mapping[str, Any] = {"embedded_guidance": None, "levels": SCHEDULE, "embed": "all"}


class JobState(StrEnum):
    """How far a job is."""

    PENDING = "pending"
    SAMPLING = "sampling"  # a state of its sampling is saved
    DRAFTED = "drafted"  # what it seems to become is shown in `drafts/`, and the state of its sampling is saved
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
        with reading(path):
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
            with reading(path):
                now = state_of(path), sha256_file(path)
            if now != self._known.get(path):
                raise MediaError(f"{path} was changed while it was read; run again")


@dataclass(frozen=True)
class Keys:
    """What identifies a job's video, and its latents, which settings that act after decoding do not change."""

    video: str
    latents: str
    inputs: Mapping[str, str] = field(default_factory=dict, compare=False)  # the hashes that they count, by path


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
        from pusa.generate.canonical import job_key

        inputs = {}

        def hash_of(path: Path) -> str:
            inputs[str(path)] = self.hashes.hash_of(path)
            return inputs[str(path)]

        key = partial(job_key, job, self.geometry, self.fingerprints, hash_of)
        return Keys(key(), key(without=AFTER_DECODING), inputs)

    def is_done(self, job: Job, keys: Keys, with_latents: bool = False) -> bool:
        """Return whether a job's video exists, was made with this key, and has the bytes that were written.

        So must its files in the other formats that the job names. Its latents may have been removed, unless
        `with_latents`; but where they are, they must be intact.

        Raises:
            MediaError: a file cannot be read.
        """
        record = read_good_record(self.folder, job.id)
        if record.get("key") != keys.video or not is_as_asked(self.folder, job, record):
            return False
        latents = self.path(job.id, LATENTS)
        return _read_latents(latents, keys) is not None if with_latents or latents.exists() else True

    def sampled(self, job: Job, keys: Keys) -> "Tensor | None":
        """Return a job's latents (C, F, h, w); None if there are none, of other settings, or damaged."""
        found = _read_latents(self.work(f"{job.id}{LATENTS}"), keys)
        return _read_latents(self.path(job.id, LATENTS), keys) if found is None else found

    def facts_of_latents(self, job: Job, keys: Keys) -> Mapping[str, str]:
        """Return what the file that `sampled` reads says about a job's latents; nothing if there is none."""
        from pusa.generate.latents import read_facts

        for path in (self.work(f"{job.id}{LATENTS}"), self.path(job.id, LATENTS)):
            with suppress(MediaError):
                if (facts := read_facts(path)).get("key") == keys.latents:
                    return facts
        return {}

    def save_sampled(self, job: Job, keys: Keys, z_CFhw: "Tensor", facts: Mapping[str, str]) -> None:
        """Keep a job's latents until its video is made."""
        from pusa.generate.latents import save_latents

        save_latents(self.work(f"{job.id}{LATENTS}"), z_CFhw, {"key": keys.latents, **facts})

    def publish(self, job: Job, keys: Keys, video: Path, facts: Mapping[str, Any]) -> None:
        """Give a job's finished video and latents their names, then record them. Call it with the job's lock.

        A video of other settings is moved away before. Where this is interrupted, the job is not done, and its latents
        are found in either place. Files of the same video in formats that the job names no more stay as they are.

        Args:
            job: the job.
            keys: its keys, of the inputs that were read.
            video: the video's file, complete, of another name in the same file system; those in the job's other formats
                and the picture are beside it.
            facts: what to record beside the settings, the weights and the packages.
        """
        sampled, latents = self.work(f"{job.id}{LATENTS}"), self.path(job.id, LATENTS)
        final = self.path(job.id, VIDEO)
        self._put_away(job.id, keys.video)
        if sampled.exists():
            publish(sampled, latents)
        for name in job.formats:
            if (place := beside(final, name)).is_dir():  # which a rename does not replace
                remove_output(place)
            publish(beside(video, name), place)
        publish(video, final)
        self._publish_picture(job.id, video.with_suffix(PREVIEW))
        hashes = {name: known for name, known in self._hashes(job.id, keys.video).items() if name in FORMATS}
        hashes |= {**facts.get("hashes", {}), **({"latents": sha256_file(latents)} if latents.exists() else {})}
        facts = {**facts, "hashes": hashes, **self._made_with(job, keys)}
        self._write(job.id, {"id": job.id, "status": "done", "key": keys.video, **facts})

    def _hashes(self, id: str, key: str) -> dict[str, Any]:
        """Return the recorded hashes of the files of a video of this key; none if the record is of another."""
        record = read_record(self.path(id, RECORD))
        hashes = record.get("hashes")
        return hashes if record.get("key") == key and isinstance(hashes, dict) else {}

    def _publish_picture(self, id: str, picture: Path) -> None:
        """Give the picture of a video its name. Nothing depends on it, so an error costs a warning."""
        if not picture.exists():
            return
        try:
            make_own_folder(self.folder / PREVIEWS, "previews")
            publish(picture, self.folder / PREVIEWS / f"{id}{PREVIEW}")
        except (OSError, StageError) as error:
            log.warning("job %s has no picture in %s: %s", id, PREVIEWS, error)
            remove(picture)

    def publish_draft(self, job: Job, keys: Keys, video: Path, facts: Mapping[str, Any]) -> None:
        """Give a job's draft its name in place of an older one, then record it. Arguments: as `publish`."""
        drafts = replace(self, folder=self.folder / DRAFTS)
        make_own_folder(drafts.folder, "drafts")
        publish(video, drafts.path(job.id, VIDEO))
        drafts._write(job.id, {"id": job.id, "status": DRAFT, "key": keys.video, **facts, **self._made_with(job, keys)})
        self.forget_failure(job.id)

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
        """Remove a failure, from a video's record or with its own: the job is done, or drafted."""
        record = read_object(self.path(id, RECORD))
        if record.get("status") == "failed":
            remove(self.path(id, RECORD))
        elif record.pop("failure", None) is not None:
            self._write(id, record)

    def path(self, id: str, end: str) -> Path:
        """Return the path of one of a job's finished files."""
        return self.folder / f"{id}{end}"

    def work(self, name: str) -> Path:
        """Return the path of an unfinished file."""
        return self.folder / WORK / name

    def _put_away(self, id: str, key: str) -> None:
        """Move the files of a video of another key to `.old/`, the record last, so that an interrupted move continues.

        With `keep_old: false` they stay, and are replaced one by one; those in other formats are removed.
        """
        record = read_object(self.path(id, RECORD))
        old = record.get("key")
        if record.get("status") != "done" or old == key or not isinstance(old, str):
            return
        if not self.keep_old:
            for name in FORMATS.keys() & self._hashes(id, old).keys():
                remove_output(beside(self.path(id, VIDEO), name))
            return
        for end in (VIDEO, LATENTS, *(kind.end for kind in FORMATS.values()), RECORD):
            if (path := self.path(id, end)).exists():
                target = self.folder / OLD / f"{id}.{digest(old)[:8]}{end}"
                make_own_folder(target.parent, "old videos")
                if target.is_dir():  # of the same settings, which the job had before
                    remove_output(target)
                publish(path, target)

    def _write(self, id: str, record: Mapping[str, Any]) -> None:
        write_json(self.path(id, RECORD), {**record, "sha256": own_digest(record)})

    def _made_with(self, job: Job, keys: Keys | None = None) -> dict[str, Any]:
        packages = {name: version(name) for name in ("torch", "diffusers")}
        inputs = {"inputs": dict(keys.inputs)} if keys else {}
        return {"job": settings_of(job), **inputs, "weights": dict(self.fingerprints), "packages": packages}


def read_good_record(folder: Path, id: str, status: str = "done") -> dict[str, Any]:
    """Return the record of a job's video; empty if there is none, or either has not the bytes that were written.

    In the folder of drafts, the status is another one.

    Raises:
        MediaError: a file is there and cannot be read. It may be good, so it is not replaced.
    """
    path, video = folder / f"{id}{RECORD}", folder / f"{id}{VIDEO}"
    with reading(path):
        record = read_record(path)
    if record.get("status") != status or not video.is_file():
        return {}
    with reading(video):
        return record if record.get("video_sha256") == sha256_file(video) else {}


def is_as_asked(folder: Path, job: Job, record: Mapping[str, Any]) -> bool:
    """Return whether a job's video embeds what the job says, and its other formats have the recorded hashes.

    A video of a version that embedded nothing is good as it is.

    Raises:
        MediaError: one cannot be read.
    """
    hashes = record.get("hashes")
    if not embeds_as(job.embed, record):
        return False
    for name in job.formats:
        path = beside(folder / f"{job.id}{VIDEO}", name)
        with reading(path):
            if not path.exists() or not isinstance(hashes, dict) or hashes.get(name) != hash_output(path):
                return False
    return True


def embeds_as(embed: Any, record: Mapping[str, Any]) -> bool:
    """Return whether the video of a record was made with this value of `embed`, or before there was such a key."""
    made = record.get("job")
    return not isinstance(made, dict) or made.get("embed", embed) == embed


def read_record(path: Path) -> dict[str, Any]:
    """Return a record; empty if it has not the bytes that were written. Those of earlier versions have no hash."""
    record = read_object(path)
    return record if record.get("sha256") in (None, own_digest(record)) else {}


def _read_latents(path: Path, keys: Keys) -> "Tensor | None":
    from pusa.generate.latents import read_header, read_latents

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


def settings_of(job: Job) -> Any:
    """Return a job's settings as JSON values. pydantic would refuse paths that are not UTF-8."""
    return json.loads(json.dumps(with_paths_changed(job.model_dump(), str)))  # as they are when they are read again


def settings_in(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in the record of a video or a failure, also of an earlier version; empty if it has none."""
    made = record.get("job")
    return {**LATER, **made} if isinstance(made, dict) else {}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise an error of reading a file as a MediaError that names it."""
    try:
        yield
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error.strerror}") from error
