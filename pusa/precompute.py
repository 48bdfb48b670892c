"""Stage 2: clips -> latents (posterior mean and log-variance) and text features, in Parquet shards."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from pusa.backbones.base import TextFeatures
from pusa.data.reader import Table, to_bytes
from pusa.data.schema import LATENTS, REJECTS, VERSION, Reason
from pusa.data.writer import write_index, write_shard
from pusa.errors import MediaError, StageError, TableError
from pusa.files import digest, sha256_file, sole_writer
from pusa.manifest import PrecomputeManifest
from pusa.model import ENCODERS, Model
from pusa.progress import Progress
from pusa.video import fit, read_frames

log = logging.getLogger(__name__)
DTYPE = "float16"


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
    clips_table = Table.open(manifest.clips)
    clips = clips_table.read("clips").to_pylist()
    model = Model(manifest.model)
    for width, height, frames in {(c["width"], c["height"], len(c["frames"])) for c in clips}:
        model.backbone.geometry.check(width, height, frames)
    prints = model.fingerprints(*ENCODERS)

    keys = [_row_key(clip, prints) for clip in clips]
    with sole_writer(run_dir / "latents"):
        return _make_table(manifest, model, clips, keys, run_dir / "latents")


def _make_table(
    manifest: PrecomputeManifest, model: Model, clips: list[Any], keys: list[str], folder: Path
) -> Precomputed:
    size = manifest.shard_rows
    shards = [range(i, min(i + size, len(clips))) for i in range(0, len(clips), size)]
    paths = [folder / f"latents-{digest([keys[i] for i in shard])[:16]}.parquet" for shard in shards]
    if (done := _finished(folder, paths)) is not None:
        return done
    encoded = 0
    with Progress("precompute", len(clips)) as progress:
        for shard, path in zip(shards, paths, strict=True):
            kept = pq.read_table(path).to_pylist() if path.exists() else []
            have = {row["key"] for row in kept}
            missing = [i for i in shard if keys[i] not in have]
            made = _encode([clips[i] for i in missing], [keys[i] for i in missing], model, manifest.batch_size)
            if made or not path.exists():
                write_shard(path, [*kept, *made], LATENTS)
            encoded += len(made)
            progress.advance(len(shard))
    rejects_path = folder / f"rejects-{digest(keys)[:16]}.parquet"
    return _finish(folder, paths, rejects_path, clips, model, encoded)


def _finish(
    folder: Path, paths: list[Path], rejects_path: Path, clips: list[Any], model: Model, encoded: int
) -> Precomputed:
    """Rejects are the clips that no shard has; then the index, then what no index names goes."""
    made = {id for path in paths for id in pq.read_table(path, columns=["clip_id"])["clip_id"].to_pylist()}
    rejects = [
        {"source": clip["clip_id"], "reason": Reason.UNREADABLE.value, "detail": f"{clip['source']} changed or broke"}
        for clip in clips
        if clip["clip_id"] not in made
    ]
    if not made:
        raise StageError(f"{folder}: not one of {len(clips)} clips could be encoded")
    write_shard(rejects_path, rejects, REJECTS)
    facts = {
        "latent_space": "vae",  # rows are the VAE's own output; training normalises them
        "statistics": [value.flatten().tolist() for value in model.backbone.latent_statistics(model.vae)],
        "text_tokens": model.text_encoder[0].model_max_length,
        "made_with": model.fingerprints(*ENCODERS),
        "packages": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "clips": len(clips),
    }
    write_index(folder, {"latents": paths, "rejects": [rejects_path]}, facts)
    for stale in set(folder.glob("*.parquet")) - {*paths, rejects_path}:
        stale.unlink()
    return _summary(Table.open(folder), encoded)


def _finished(folder: Path, paths: Sequence[Path]) -> Precomputed | None:
    try:
        table = Table.open(folder)
    except TableError:
        return None
    same = [shard["name"] for shard in table.parts["latents"]] == [path.name for path in paths]
    # Where clips were rejected, they are tried again: their file may be back.
    return _summary(table, encoded=0) if same and table.is_whole() and not table.rows("rejects") else None


def _summary(table: Table, encoded: int) -> Precomputed:
    return Precomputed(table.folder, table.facts["clips"], table.rows("latents"), table.rows("rejects"), encoded)


def _row_key(clip: dict[str, Any], prints: dict[str, str]) -> str:
    made_from = {name: clip[name] for name in ("source_sha256", "frames", "width", "height", "caption")}
    return digest([VERSION, DTYPE, made_from, prints])[:32]


def _encode(
    clips: Sequence[dict[str, Any]], keys: Sequence[str], model: Model, batch_size: int
) -> list[dict[str, Any]]:
    """The rows of the clips that can still be read as they were ingested."""
    rows: list[dict[str, Any]] = []
    readable = [
        (clip, key, frames) for clip, key in zip(clips, keys, strict=True) if (frames := _frames(clip)) is not None
    ]
    for start in range(0, len(readable), batch_size):
        batch = readable[start : start + batch_size]
        mean, logvar = model.posterior(np.stack([frames for _, _, frames in batch]))
        text = model.encode_text([clip["caption"] for clip, _, _ in batch])
        rows += [_row(clip, key, mean[i], logvar[i], text, i) for i, (clip, key, _) in enumerate(batch)]
    return rows


def _frames(clip: dict[str, Any]) -> np.ndarray | None:
    path = Path(clip["source"])
    try:
        if sha256_file(path) != clip["source_sha256"]:
            raise MediaError(f"{path} is not the file that was ingested")
        return fit(read_frames(path, clip["frames"]), clip["width"], clip["height"])
    except (MediaError, OSError) as error:
        log.warning("rejected %s: %s", clip["clip_id"], error)
        return None


def _row(
    clip: dict[str, Any], key: str, mean: torch.Tensor, logvar: torch.Tensor, text: TextFeatures, sample: int
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
