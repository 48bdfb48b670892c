"""Stage 2: clips -> latents (posterior mean and log-variance) and text features, in Parquet shards."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pusa.backbones.base import TextFeatures
from pusa.data.reader import Table, to_bytes
from pusa.data.schema import LATENTS, REJECTS, VERSION, Reason
from pusa.data.writer import write_index, write_shard
from pusa.errors import MediaError, Rejected, StageError, TableError
from pusa.files import digest, sha256_file, sole_writer
from pusa.manifest import PrecomputeManifest
from pusa.model import Model
from pusa.progress import Progress
from pusa.video import fit, read_frames
from pusa.weights import ENCODERS

log = logging.getLogger(__name__)
DTYPE = "float16"
STORED_SPACE = "vae"  # rows are the VAE's own output; training normalises them
Clip = Mapping[str, Any]  # a row of the clips table


@dataclass(frozen=True)
class Precomputed:
    """What a run made: every clip is in `rows` or in `rejects`."""

    table: Path
    clips: int
    rows: int
    rejects: int
    encoded: int


def precompute(manifest: PrecomputeManifest, run_dir: Path) -> Precomputed:
    """Make `run_dir/latents`. Rows that are there already, made from the same clips and encoders, stay.

    Raises:
        TableError: the clips table is not complete.
        ConditionError: the backbone cannot take the clips' size or length.
        StageError: not one clip could be encoded.
    """
    manifest = manifest.located(run_dir)
    clips = Table.open(manifest.clips or run_dir / "clips").read("clips").to_pylist()
    model = Model(manifest.model)
    for width, height, frames in {(c["width"], c["height"], len(c["frames"])) for c in clips}:
        model.backbone.geometry.check(width, height, frames)
    prints = model.fingerprints(*ENCODERS)
    todo = {_row_key(clip, prints): clip for clip in clips}
    with sole_writer(run_dir / "latents"):
        return _make_table(todo, model, run_dir / "latents", manifest)


def _make_table(todo: Mapping[str, Clip], model: Model, folder: Path, manifest: PrecomputeManifest) -> Precomputed:
    """Shards are named by the keys of the clips they should hold, so what a shard is for never changes."""
    keys, size = list(todo), manifest.shard_rows
    shards = [keys[i : i + size] for i in range(0, len(keys), size)]
    paths = [folder / f"latents-{digest(shard)[:16]}.parquet" for shard in shards]
    if (done := _finished(folder, paths, todo)) is not None:
        return done
    encoded = 0
    rejects: list[dict[str, str]] = []
    with Progress("precompute", len(keys)) as progress:
        for shard, path in zip(shards, paths, strict=True):
            encoded += _complete_shard(path, {key: todo[key] for key in shard}, model, manifest.batch_size, rejects)
            progress.advance(len(shard))
    if len(rejects) == len(keys):
        raise StageError(f"{folder}: not one of {len(keys)} clips could be encoded; the first: {rejects[0]['detail']}")

    rejects_path = folder / f"rejects-{digest(rejects)[:16]}.parquet"
    write_shard(rejects_path, rejects, REJECTS)
    facts = {
        "stored_space": STORED_SPACE,
        "statistics": [value.flatten().tolist() for value in model.backbone.latent_statistics(model.vae)],
        "text_tokens": model.encode_text([""]).features.shape[1],
        "made_with": model.fingerprints(*ENCODERS),
        "packages": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "clips": len(keys),
    }
    write_index(folder, {"latents": paths, "rejects": [rejects_path]}, facts)
    for stale in set(folder.glob("*.parquet")) - {*paths, rejects_path}:
        stale.unlink()
    return _summary(Table.open(folder), encoded)


def _complete_shard(
    path: Path, clips: Mapping[str, Clip], model: Model, batch_size: int, rejects: list[dict[str, str]]
) -> int:
    """Make the rows that the shard lacks; what cannot be made goes to `rejects`. Gives how many were made."""
    have = _keys_in(path)
    missing = [key for key in clips if key not in have]
    made: dict[str, dict[str, Any]] = {}
    for start in range(0, len(missing), batch_size):
        frames = {}
        for key in missing[start : start + batch_size]:
            try:
                frames[key] = _frames(clips[key])
            except Rejected as reject:
                log.warning("rejected %s: %s", clips[key]["clip_id"], reject.detail)
                rejects.append({"source": clips[key]["clip_id"], "reason": reject.reason, "detail": reject.detail})
        if frames:
            made |= _encode({key: clips[key] for key in frames}, np.stack(list(frames.values())), model)
    if made or not path.exists():
        kept = {row["key"]: row for row in pq.read_table(path).to_pylist()} if have else {}
        rows = {**kept, **made}
        write_shard(path, [rows[key] for key in clips if key in rows], LATENTS)
    return len(made)


def _keys_in(path: Path) -> set[str]:
    """The rows that a shard has; none where it is not there or not whole."""
    try:
        return set(pq.read_table(path, columns=["key"])["key"].to_pylist())
    except (FileNotFoundError, pa.ArrowInvalid):
        return set()


def _finished(folder: Path, paths: Sequence[Path], todo: Mapping[str, Clip]) -> Precomputed | None:
    """The table as it is, if it was made from these clips and none of those it lacks has come back."""
    try:
        table = Table.open(folder)
    except TableError:
        return None
    same = [shard["name"] for shard in table.parts["latents"]] == [path.name for path in paths]
    if not same or not table.is_whole():
        return None
    lost = set(table.read("rejects")["source"].to_pylist())
    back = any(clip["clip_id"] in lost and _is_as_ingested(clip) for clip in todo.values())
    return None if back else _summary(table, encoded=0)


def _summary(table: Table, encoded: int) -> Precomputed:
    return Precomputed(table.folder, table.facts["clips"], table.rows("latents"), table.rows("rejects"), encoded)


def _row_key(clip: Clip, prints: Mapping[str, str]) -> str:
    names = ("clip_id", "source_sha256", "frames", "fps", "width", "height", "caption")
    return digest([VERSION, DTYPE, {name: clip[name] for name in names}, dict(prints)])[:32]


def _frames(clip: Clip) -> np.ndarray:
    """The clip's frames as they were ingested.

    Raises:
        Rejected: the file is gone, is another one now, or cannot be decoded. An outage of the disk is none of these.
    """
    path = Path(clip["source"])
    if not _is_as_ingested(clip):
        raise Rejected(Reason.CHANGED, f"{path} is not the file that was ingested, or is gone")
    try:
        return fit(read_frames(path, clip["frames"]), clip["width"], clip["height"])
    except MediaError as error:
        raise Rejected(Reason.UNREADABLE, str(error)) from error


def _is_as_ingested(clip: Clip) -> bool:
    try:
        return sha256_file(Path(clip["source"])) == clip["source_sha256"]
    except FileNotFoundError:
        return False


def _encode(clips: Mapping[str, Clip], frames_BTHWC: np.ndarray, model: Model) -> dict[str, dict[str, Any]]:
    mean, logvar = model.posterior(frames_BTHWC)
    text = model.encode_text([clip["caption"] for clip in clips.values()])
    return {key: _row(clip, key, mean[i], logvar[i], text, i) for i, (key, clip) in enumerate(clips.items())}


def _row(
    clip: Clip, key: str, mean: torch.Tensor, logvar: torch.Tensor, text: TextFeatures, sample: int
) -> dict[str, Any]:
    valid = text.features[sample][text.mask[sample]].float()
    return {
        "key": key,
        "clip_id": clip["clip_id"],
        "caption": clip["caption"],
        "source_sha256": clip["source_sha256"],
        "fps": clip["fps"],
        "dtype": DTYPE,
        "latent_shape": list(mean.shape),
        "latent_mean": to_bytes(mean, DTYPE),
        "latent_logvar": to_bytes(logvar, DTYPE),
        "text_shape": list(valid.shape),
        "text": to_bytes(valid, DTYPE),
    }
