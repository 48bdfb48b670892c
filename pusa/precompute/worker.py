"""Make rows of one segment in a slot: decode and encode clips, or encode captions, and write a shard.

The parent holds the segment's lock and records the rejects. A slot keeps the model and the decoders for the next call.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pusa.data.encoding import ENCODINGS
from pusa.data.schema import TEXTS, latents_schema
from pusa.data.writer import write_hashed_shard
from pusa.errors import Rejected
from pusa.manifest.models import PrecomputeManifest
from pusa.precompute.encode import latent_statistics, latents_row, text_rows
from pusa.precompute.frames import ClipRow, decode_ahead
from pusa.precompute.rows import make_each
from pusa.precompute.shards import RejectEntry
from pusa.system.failures import make_or_reject
from pusa.system.slots import Emit
from pusa.system.text import preview, printable
from pusa.system.threads import DaemonThreadPool
from pusa.weights.memory import VideoEncoder
from pusa.weights.model import KnownFiles, Model

log = logging.getLogger(__name__)
TEXT_BATCH = 32  # captions encoded at a time: with at most 512 tokens each, they need little memory
Row = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """What every call of a run needs. `run` tells runs apart, so that a worker keeps one run's model."""

    run: str
    folder: Path
    manifest: PrecomputeManifest
    known: KnownFiles
    threads: int  # that decode
    facts: Mapping[str, Any]  # stored in every file


@dataclass(frozen=True)
class Encoders:
    """A model, and what remembers how much of it fits in memory."""

    model: Model
    video: VideoEncoder
    pool: DaemonThreadPool  # the threads that decode


@dataclass(frozen=True)
class Loaded:
    """The encoders are there: if the worker dies from now on, a row may be why. `statistics` are the VAE's."""

    statistics: list[list[float]] | None = None


_kept: dict[str, Encoders] = {}  # of the run that this process works for


def keep(setup: Setup, model: Model) -> Encoders:
    """Keep a run's model in this process, and let go of that of any other run."""
    let_go()
    _kept[setup.run] = Encoders(model, VideoEncoder(model), DaemonThreadPool(setup.threads))
    return _kept[setup.run]


def let_go() -> None:
    """Let go of the model that this process keeps, and of its decoders."""
    for encoders in _kept.values():
        encoders.pool.close()
    _kept.clear()


def _encoders(setup: Setup) -> Encoders:
    if setup.run in _kept:
        return _kept[setup.run]
    model = Model(setup.manifest.model)
    model.expect(setup.known)
    return keep(setup, model)


def read_statistics(setup: Setup, emit: Emit) -> list[list[float]]:
    """Return the VAE's latent statistics."""
    return latent_statistics(_encoders(setup).model)


def make_texts(setup: Setup, segment: str, captions: Mapping[str, str], emit: Emit) -> list[RejectEntry]:
    """Write the features of captions as a shard, and return why some have none.

    Args:
        setup: what every call of a run needs.
        segment: the name of the segment that the captions are of.
        captions: the captions by key.
        emit: gets `Loaded`.
    """
    model, manifest = _encoders(setup).model, setup.manifest
    dtype, encoding = manifest.dtype, ENCODINGS[manifest.compression]

    def encode(some: Sequence[str]) -> dict[str, Row]:
        rows = text_rows({key: captions[key] for key in some}, model, TEXT_BATCH, dtype, encoding)
        return {row["text_key"]: row for row in rows}

    _ = model.text_parts  # an encoder that cannot be loaded is no caption's fault
    emit(Loaded())
    made = make_each(list(captions), encode, setup.folder)
    return _write(setup, segment, made, {key: f"caption {preview(caption)}" for key, caption in captions.items()})


def make_latents(setup: Setup, segment: str, clips: Mapping[str, ClipRow], emit: Emit) -> list[RejectEntry]:
    """Write the latents of clips of one shape as a shard, and return why some have none.

    Args:
        setup: what every call of a run needs.
        segment: the name of the segment that the clips are of.
        clips: rows of the clips table by key.
        emit: gets `Loaded`.
    """
    encoders, manifest, folder = _encoders(setup), setup.manifest, setup.folder
    dtype, encoding = manifest.dtype, ENCODINGS[manifest.compression]
    made: dict[str, Row | Rejected] = {}
    frames: dict[str, np.ndarray] = {}

    def encode(some: Sequence[str]) -> dict[str, Row | Rejected]:
        mean, logvar, tile = encoders.video.encode(np.stack([frames[key] for key in some]))
        rows: dict[str, Row | Rejected] = {}
        for i, key in enumerate(some):
            try:
                rows[key] = latents_row(key, clips[key], mean[i], logvar[i], tile, dtype, encoding)
            except Rejected as reject:
                rows[key] = reject.with_traceback(None)
        return rows

    emit(Loaded(latent_statistics(encoders.model)))  # a VAE that cannot be loaded is no clip's fault
    for batch in decode_ahead(encoders.pool, clips, manifest.batch_size, manifest.decoding_seconds):
        frames.clear()
        for key, future in batch.items():
            decoded = make_or_reject(future.result, folder, key)
            if isinstance(decoded, Rejected):
                made[key] = decoded
            else:
                frames[key] = decoded
        if frames:
            made |= make_each(list(frames), encode, folder)
    return _write(setup, segment, made, {key: str(clip["clip_id"]) for key, clip in clips.items()})


def _write(
    setup: Setup, segment: str, made: Mapping[str, Row | Rejected], names: Mapping[str, str]
) -> list[RejectEntry]:
    """Write the rows among what was made as a shard; log and return the rejects."""
    rejects = {key: item for key, item in made.items() if isinstance(item, Rejected)}
    for key, reject in rejects.items():
        log.warning("rejected %s", printable(f"{names[key]}: {reject.reason}: {reject.detail}"))
    if rows := [item for item in made.values() if not isinstance(item, Rejected)]:
        schema = latents_schema(len(rows[0]["latent_mean"])) if "latent_mean" in rows[0] else TEXTS
        write_hashed_shard(setup.folder, segment, rows, schema, setup.manifest.compression, setup.facts)
    return [{"key": key, "reason": reject.reason, "detail": reject.detail} for key, reject in rejects.items()]
