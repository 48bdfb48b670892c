"""Make a video again from what it says about itself, and name the first thing that differs.

The facts are compared before anything is sampled, in the order in which one explains the next: Pusa's version, weights,
inputs, settings, packages, device, kernels. The frames come last.
"""

import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from pusa.diffusion.sampler import TextFeatures
from pusa.errors import MediaError, NotFiniteError
from pusa.generate.decode import write_job_video
from pusa.generate.encodings import Encodings, encodings_folder
from pusa.generate.ledger import InputHashes
from pusa.generate.outputs import VIDEO
from pusa.generate.recorded import (
    Batch,
    Recorded,
    compare_facts,
    find_inputs,
    job_of,
    model_of,
    read_recorded,
)
from pusa.generate.records import describe_environment, describe_provenance
from pusa.generate.sampling import Prepared, prepare, sample_together, total_steps
from pusa.generate.stage import fingerprints_of
from pusa.manifest.loading import load_manifest
from pusa.manifest.models import GenerateManifest
from pusa.system.files import PARTIAL, publish, sha256_file
from pusa.system.text import join_lines, printable
from pusa.tasks.base import Job
from pusa.video.media import probe, read_frames
from pusa.weights.model import Model
from pusa.weights.resolve import require_model

log = logging.getLogger(__name__)
FRAME_BYTES = 1 << 28  # of the frames that are compared at a time


@dataclass(frozen=True)
class Replay:
    """How a video that was made again compares with the first one.

    Attributes:
        video: the first one.
        differences: the facts that differ, each with its name, in the order of their weight.
        pixels: how the frames differ; "" if they are identical; None if nothing was made.
        same_bytes: whether the files are identical, too.
        frames: how many there are.
    """

    video: Path
    differences: list[str] = field(default_factory=list)
    pixels: str | None = None
    same_bytes: bool = False
    frames: int = 0

    @property
    def is_identical(self) -> bool:
        """Return whether the frames are the same; if none were made, whether the facts are."""
        return not self.differences if self.pixels is None else not self.pixels

    def text(self) -> str:
        """Return the outcome for a terminal: the first line says all."""
        first, *others = [*map(printable, self.differences), ""][: len(self.differences) or 1]
        if self.pixels is None:
            head = f"differs: {first}" if first else "all recorded facts are equal; nothing was made (--check)"
        elif self.pixels:
            head = f"differs: {first}; {self.pixels}" if first else f"all recorded facts are equal, but {self.pixels}"
        elif self.same_bytes:
            head = f"identical: all {self.frames} frames, and every byte of the file"
        else:
            why = first or "another program has written it since"
            head = f"identical: all {self.frames} frames; the bytes of the file differ: {why}"
        return join_lines(head, [f"also: {other}" for other in others])


def replay(
    video: Path,
    *,
    manifest: Path | None = None,
    weights: Sequence[Path] = (),
    inputs: Path | None = None,
    output: Path | None = None,
    check: bool = False,
) -> Replay:
    """Compare the facts in a video with those here, make it again, and compare the frames.

    Args:
        video: an mp4 of `generate`.
        manifest: a generate manifest whose model is used; if it has the job, its settings are compared, too.
        weights: folders or files on this machine, for names of weights that are local.
        inputs: a folder in which inputs are looked for that are not beside the video.
        output: where the new video is kept; default: nowhere.
        check: compare the facts alone.

    Raises:
        MediaError: the video holds no settings, or an input is missing.
        ManifestError: its settings are not allowed by this version of Pusa.
        WeightsError: weights are missing, or do not fit.
        PusaError: whatever makes a job fail.
    """
    recorded = read_recorded(video)
    if output is not None and (output.exists() or output.suffix != VIDEO):
        why = "exists" if output.exists() else "is not the name of an mp4"
        raise MediaError(f"{output} {why}; expected a new file that ends in {VIDEO}")
    run_dir = video.absolute().parent.parent
    read = load_manifest(manifest, run_dir, "generate") if manifest else None
    given = read if isinstance(read, GenerateManifest) else None
    spec = given.model if given else model_of(recorded, weights)
    require_model(spec)
    model = Model(spec, "cpu" if recorded.device == "cpu" else None)
    with _threads_of(recorded):
        found = find_inputs(recorded, [video.absolute().parent, *([inputs] if inputs else [])])
        job = job_of(recorded, spec, found[0], video)
        fingerprints = fingerprints_of(model)
        differences = compare_facts(recorded, job, model, fingerprints, found, given)
        if check:
            return Replay(video, differences)
        for difference in differences:
            log.warning("differs: %s", printable(difference))
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
        place = None if output is None else output.absolute().parent  # of the same disk, so that a rename suffices
        with tempfile.TemporaryDirectory(dir=place, prefix=f"{PARTIAL}replay-") as folder:
            made = Path(folder, f"{job.id}{VIDEO}")  # its picture is written beside it
            _make(recorded, job, model, fingerprints, made)
            compared = _compare(video, made, differences)
            if output is not None:
                publish(made, output)
            return compared


@contextmanager
def _threads_of(recorded: Recorded) -> Iterator[None]:
    """Compute with as many threads as when the video was made, if this machine has the cores: it decides last bits."""
    before, threads = torch.get_num_threads(), recorded.kernels.get("threads")
    if isinstance(threads, int) and 1 <= threads <= (os.cpu_count() or 1):
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _make(recorded: Recorded, job: Job, model: Model, fingerprints: Mapping[str, str], path: Path) -> None:
    """Sample and write the video, with the facts that it has here."""
    hashes = InputHashes()
    prepared = prepare(job, model, Encodings(model, encodings_folder()), hashes)  # those that the video was made of
    hashes.require_unchanged(job)
    company = _company_of(prepared, recorded.batch)
    log.info("%d denoising steps%s", total_steps(job, model.backbone.geometry), _in_batch(recorded.batch))
    z_CFhw = sample_together(company, model)[recorded.batch.position if recorded.batch else 0]
    if isinstance(z_CFhw, NotFiniteError):
        raise z_CFhw
    batch = recorded.batch.model_dump() if recorded.batch else None
    sampled = json.dumps({"batch": batch, **describe_environment(model)})
    provenance = describe_provenance(job, recorded.key, model, fingerprints, hashes.hash_of, sampled)
    # Settings, and names of inputs and weights, are those of the video: they were compared before.
    facts = {**(provenance.facts or {}), "job": recorded.job, "model": recorded.model}
    write_job_video(job, model, z_CFhw, path, (), replace(provenance, facts=facts))()


def _in_batch(batch: Batch | None) -> str:
    return f", in a batch of {len(batch.tokens)}, as for the video" if batch and len(batch.tokens) > 1 else ""


def _company_of(prepared: Prepared, batch: Batch | None) -> list[Prepared]:
    """Return a batch of the shapes in which a job was sampled: the others are copies with prompts of their lengths."""
    company = []
    for position, (text, null) in enumerate(batch.tokens if batch else ()):
        if batch and position == batch.position:
            company.append(prepared)
        else:
            nothing = prepared.null and _of_length(prepared.null, null)
            company.append(replace(prepared, text=_of_length(prepared.text, text), null=nothing))
    return company or [prepared]


def _of_length(text: TextFeatures, tokens: int) -> TextFeatures:
    """Return features of which so many tokens are valid."""
    mask_BL = torch.arange(text.mask.shape[1])[None] < tokens
    return replace(text, mask=mask_BL)


def _compare(video: Path, made: Path, differences: list[str]) -> Replay:
    """Compare two files: their bytes, then their frames."""
    if sha256_file(video) == sha256_file(made):
        return Replay(video, differences, "", True, probe(made).num_frames)
    (count, size), (other, other_size) = ((f.num_frames, (f.width, f.height)) for f in map(probe, (made, video)))
    if (count, size) != (other, other_size):
        shapes = [f"{frames} frames of {w}x{h}" for frames, (w, h) in ((other, other_size), (count, size))]
        pixels = f"the video has {shapes[0]}, and made again {shapes[1]}"
        return Replay(video, differences, pixels, False, count)
    step = max(1, FRAME_BYTES // (3 * math.prod(size)))
    first, most, differing = -1, 0, 0
    for start in range(0, count, step):
        chunk = range(start, min(start + step, count))
        old_THWC, new_THWC = read_frames(video, chunk), read_frames(made, chunk)
        largest_T = (np.maximum(old_THWC, new_THWC) - np.minimum(old_THWC, new_THWC)).reshape(len(chunk), -1).max(1)
        frames = np.flatnonzero(largest_T)
        if len(frames):
            first = start + int(frames[0]) if first < 0 else first
            differing, most = differing + len(frames), max(most, int(largest_T.max()))
    pixels = (
        f"frame {first} differs, with {differing} of {count} frames, by at most {most} levels of 255"
        if differing
        else ""
    )
    return Replay(video, differences, pixels, False, count)
