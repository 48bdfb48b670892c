"""Say what a run will find and need: jobs that are made already, disk space, time, and the sizes that are allowed.

All of it is read off the records in the run folder; no weights are hashed. So a job counts as made if its video has its
settings: whether weights or inputs were changed since shows when it runs.
"""

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pusa.backbones.family import Geometry
from pusa.errors import MediaError, error_messages
from pusa.generate.canonical import NOT_OF_THE_VIDEO
from pusa.generate.drafts import readers_of_drafts
from pusa.generate.ledger import DRAFT, DRAFTS, is_as_asked, read_good_record, settings_in, settings_of
from pusa.generate.outputs import RECORD, VIDEO, Outputs
from pusa.generate.sampling import total_steps
from pusa.generate.summary import describe_seconds
from pusa.generate.timings import Timings, seconds_of
from pusa.manifest.models import GenerateManifest
from pusa.system.disk import free_bytes
from pusa.system.files import read_object
from pusa.system.text import printable
from pusa.tasks.base import Job
from pusa.video.formats import FORMATS

BITS_PER_PIXEL = 0.5  # of a video, where none was made yet: H.264 at high quality
MOST_DEVICES = 10  # that are shown
LONGEST = 1 << 20  # pixels or frames in a record that are believed


@dataclass(frozen=True)
class Outlook:
    """What the jobs of a manifest that are left need.

    Attributes:
        done: the number of jobs that are made already.
        left: the number of the others.
        latent_bytes: the disk space of their latents.
        video_bytes: the estimated disk space of their videos.
        measured: the number of videos that the estimate is from; 0 if it is assumed.
        free_bytes: the free disk space.
        seconds: device -> the estimated time of all jobs that are left, one after another; empty if it is unknown.
        timed: the number of jobs that the times are from.
        slots: how many jobs are made at a time.
    """

    done: int
    left: int
    latent_bytes: int
    video_bytes: int
    measured: int
    free_bytes: int
    seconds: Mapping[str, float]
    timed: int
    slots: int

    def lines(self, geometry: Geometry, folder: Path) -> list[str]:
        """Return the outlook as lines."""
        need = self.latent_bytes + self.video_bytes
        basis = (
            f"as {self.measured:,} video{'s' * (self.measured != 1)} in {folder}"
            if self.measured
            else f"assumed {BITS_PER_PIXEL} bits a pixel"
        )
        fits = "fits" if need <= self.free_bytes else "does NOT fit"
        lines = [
            f"jobs: {self.done:,} made already, {self.left:,} to make",
            f"sizes: width and height are multiples of {geometry.pixel_step}, num_frames is {geometry.temporal}k + 1",
            f"disk: {_size(self.latent_bytes)} of latents and about {_size(self.video_bytes)} of videos ({basis}), "
            f"{fits} into {_size(self.free_bytes)}",
        ]
        if not self.left:
            return lines
        if not self.seconds:
            return [*lines, f"time: unknown, since no job was timed in {folder} yet"]
        at_once = f", {self.slots} at a time" if self.slots > 1 else ""
        for name, seconds in [*self.seconds.items()][:MOST_DEVICES]:
            lines.append(f"time: about {describe_seconds(seconds / self.slots)} on {printable(name)}{at_once}")
        return [
            *lines,
            f"  (from {'1 job that was' if self.timed == 1 else f'{self.timed:,} jobs that were'} timed in {folder})",
        ]


def look_ahead(jobs: Sequence[Job], geometry: Geometry, folder: Path, slots: int) -> Outlook:
    """Return what jobs will find and need in the folder of their videos, made in `slots` at a time."""
    wanted, made = {job.id: job for job in jobs}, set()
    timings: dict[str, Timings] = {}
    timed = measured = video_bytes = video_pixels = 0
    for id, record in _records_in(folder):
        if id in wanted and _is_made(wanted[id], record, folder):
            made.add(id)
        if (seconds := seconds_of(record)) is not None:
            timings.setdefault(str(record.get("device")), Timings()).add(record["job"], seconds)
            timed += 1
        if pixels := _pixels_of(record):
            with suppress(OSError):
                video_bytes += (folder / f"{id}{VIDEO}").stat().st_size
                video_pixels += pixels
                measured += 1
    left = [job for job in jobs if job.id not in made]
    bits = 8 * video_bytes / video_pixels if measured else BITS_PER_PIXEL
    return Outlook(
        done=len(made),
        left=len(left),
        latent_bytes=sum(_latent_bytes(job, geometry) for job in left),
        video_bytes=round(sum(job.width * job.height * job.num_frames * _bits(job, bits) for job in left) / 8),
        measured=measured,
        free_bytes=free_bytes(folder),
        seconds={device: total for device, known in timings.items() if (total := _total(known, left)) is not None},
        timed=timed,
        slots=slots,
    )


def describe_drafts(
    manifest: GenerateManifest, geometry: Geometry, folder: Path, impossible: Container[str] = ()
) -> list[str]:
    """Return what `drafts` and `until` of a manifest mean, as lines: of drafts, those that are still to come.

    Args:
        manifest: the manifest.
        geometry: of its model.
        folder: the folder of the videos.
        impossible: the ids of jobs that cannot be made, which are left out.
    """
    lines = []
    if manifest.drafts:
        limit = manifest.drafts.steps
        outputs = Outputs(folder, manifest.jobs)
        possible = [job for job in outputs.in_order()[0] if job.id not in impossible]
        in_order = [job for job in possible if not error_messages(partial(job.passes, geometry))]
        by_id = {job.id: job for job in in_order}
        made = {id for id, record in _records_in(folder) if id in by_id and _is_made(by_id[id], record, folder)}
        in_order = [job for job in in_order if job.id not in made]
        waits = readers_of_drafts(in_order, {job.id: outputs.reads(job) for job in in_order}, geometry, limit)
        steps = {job.id: total_steps(job, geometry) for job in in_order if job.id not in waits}
        drafts = [job for job in in_order if steps.get(job.id, 0) > limit and not _is_drafted(job, folder, limit)]
        share = len(drafts) * limit / max(1, sum(steps[job.id] for job in drafts))
        # A state holds latents, the estimate that the draft is decoded from, and the latents of a pass before.
        size = sum(_latent_bytes(job, geometry) * (1 + len(job.passes(geometry))) for job in drafts)
        short = sum(total <= limit for total in steps.values())
        there = len(steps) - short - len(drafts)
        waiting = "1 job waits" if len(drafts) == 1 else f"{len(drafts):,} jobs wait"
        kept = f"{waiting} after {limit:,} steps ({share:.0%} of theirs), {_size(size)} of states are kept"
        parts = [kept if drafts else "none is to come"]
        parts += [f"{there:,} drafted already"] * bool(there)
        parts += [f"{short:,} with no more steps {'is' if short == 1 else 'are'} made whole"] * bool(short)
        parts += [f"{len(waits):,} that must read their results: left to `pusa finish`"] * bool(waits)
        lines.append(f"drafts: {'; '.join(parts)}")
    if manifest.until:
        lines.append(
            f"until: no work is started after {manifest.until} local time, the next from the start of a run on"
        )
    return lines


def _records_in(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the id and the record of each job in a folder, also of earlier manifests."""
    for path in folder.glob(f"*{RECORD}"):
        with suppress(OSError):
            record = read_object(path)
            if isinstance(record.get("job"), dict):
                yield path.name.removesuffix(RECORD), record


def _has_settings(record: Mapping[str, Any], job: Job) -> bool:
    """Return whether a record is of a job with these settings, as far as they change its video."""
    known = settings_in(record)
    wanted = {key: value for key, value in settings_of(job).items() if key not in NOT_OF_THE_VIDEO}
    return all(known.get(key) == value for key, value in wanted.items())


def _is_made(job: Job, record: Mapping[str, Any], folder: Path) -> bool:
    if not _has_settings(record, job):
        return False
    try:
        return bool(good := read_good_record(folder, job.id)) and is_as_asked(folder, job, good)
    except MediaError:
        return False


def _is_drafted(job: Job, folder: Path, steps: int) -> bool:
    """Return whether there is a draft of a job after at least `steps` steps."""
    try:
        record = read_good_record(folder / DRAFTS, job.id, DRAFT)
    except MediaError:
        return False
    made = record.get("steps")
    return isinstance(made, int) and made >= steps and _has_settings(record, job)


def _pixels_of(record: Mapping[str, Any]) -> int:
    """Return the pixels in all frames of the video of a record; 0 if it has none."""
    if record.get("status") != "done":
        return 0
    sides = [record["job"].get(key) for key in ("width", "height", "num_frames")]
    return math.prod(sides) if all(isinstance(side, int) and 0 < side < LONGEST for side in sides) else 0


def _bits(job: Job, bits: float) -> float:
    """Return the bits of a pixel in all files of a video, of which its mp4 has `bits`."""
    return bits + sum(FORMATS[name].bits for name in job.formats)


def _latent_bytes(job: Job, geometry: Geometry) -> int:
    """Return the bytes of a job's latents, which are stored in float32."""
    channels, frames, height, width = geometry.latent_shape(job.width, job.height, job.num_frames)
    return 4 * channels * (frames - job.cyclic) * height * width


def _total(timings: Timings, jobs: Sequence[Job]) -> float | None:
    estimates = [timings.seconds(job) for job in jobs]
    return None if None in estimates else sum(estimate or 0.0 for estimate in estimates)


def _size(size: int) -> str:
    """Return a number of bytes for people: "3.4 MiB"."""
    value, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.3g} {units[0]}"
