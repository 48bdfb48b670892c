"""Stage 2: clips -> latents (posterior mean and log-variance) and text features, in Parquet shards.

Rows are named by what they are made from, and made in pieces that any number of processes share out by locks. What is
there is never made again; who finds everything made writes the catalogue and the index.
"""

import functools
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pusa.backbones import find_family
from pusa.data.encoding import ENCODINGS
from pusa.data.reader import Table
from pusa.data.schema import TEXTS, latents_schema
from pusa.data.writer import INDEX, write_stamped
from pusa.errors import Rejected, StageError, TableError
from pusa.manifest.models import PrecomputeManifest
from pusa.precompute.encode import VideoEncoder, latents_row, text_rows
from pusa.precompute.frames import Clip, Frames, read_ahead
from pusa.precompute.rows import KEY_VERSION, Piece, Wanted, make_all, want
from pusa.precompute.shards import Item, Refusals, Store
from pusa.precompute.table import STORED_SPACE, clear, facts_of, finished, packages, tidy, write_table
from pusa.system.files import digest, read_json
from pusa.system.locks import WorkGroup, join_work
from pusa.system.text import printable
from pusa.system.threads import DaemonThreadPool
from pusa.weights.model import Model

log = logging.getLogger(__name__)
TEXT_BATCH = 32  # captions at once: of no more than 256 tokens each, they need little memory


@dataclass
class Work:
    """What is to be made, what there is, and how much of it this process made."""

    manifest: PrecomputeManifest
    group: WorkGroup
    model: Model
    wanted: Wanted
    store: Store
    refusals: Refusals
    pool: DaemonThreadPool  # of threads that decode
    facts: Mapping[str, Any]  # that every file says of itself
    encoded: int = 0
    texts: int = 0

    def make(self, pieces: Sequence[Piece]) -> None:
        """Make what is missing, until this process or others have made all of it."""
        make_all(self.group, "precompute", pieces, self.store.missing, self._complete)

    def _complete(self, piece: Piece) -> None:
        """Make the rows of a piece that nobody has made, or has found wanting, in the meantime."""
        self.store.look(piece.name)
        tried = {item["key"] for item in self.refusals.of(piece)}
        missing = [key for key in self.store.missing(piece) if key not in tried]
        rows = self._make_rows(piece, missing) if missing else []
        if rows:
            schema = TEXTS if piece.part == "texts" else latents_schema(len(rows[0]["latent_mean"]))
            write_stamped(self.group.folder, piece.name, rows, schema, self.manifest.compression, self.facts)
            self.store.look(piece.name)

    def _make_rows(self, piece: Piece, keys: Sequence[str]) -> list[dict[str, Any]]:
        if piece.part == "texts":
            rows = text_rows(self._captions(keys), self.model, TEXT_BATCH, self.manifest.dtype, self._encoding)
            self.texts += len(rows)
            return rows
        rejects: list[Item] = []
        rows = self._latents({key: self._clip(key) for key in keys}, rejects)
        if rejects:
            self.refusals.write(piece, rejects)
        self.encoded += len(rows)
        return rows

    def _latents(self, clips: Mapping[str, Clip], rejects: list[Item]) -> list[dict[str, Any]]:
        """Rows of clips of one shape; what cannot be made goes to `rejects`."""
        rows = []
        for batch in read_ahead(self.pool, clips, self.manifest.batch_size, self.manifest.decoding_seconds):
            frames = _whole(batch, clips, rejects)
            if not frames:
                continue
            mean, logvar, tile = self._encoder.encode(np.stack(list(frames.values())))
            for i, key in enumerate(frames):
                try:
                    rows.append(
                        latents_row(key, clips[key], mean[i], logvar[i], tile, self.manifest.dtype, self._encoding)
                    )
                except Rejected as reject:
                    _record(reject, key, clips[key], rejects)
        return rows

    def _captions(self, keys: Sequence[str]) -> dict[str, str]:
        captions = self.wanted.clips["caption"]
        return {key: captions[self._rows["texts"][key]].as_py() if key != self.wanted.null_key else "" for key in keys}

    def _clip(self, key: str) -> Clip:
        return self.wanted.clips.slice(self._rows["latents"][key], 1).to_pylist()[0]

    @functools.cached_property
    def _rows(self) -> dict[str, dict[str, int]]:
        return {part: self.wanted.rows_of(part) for part in ("latents", "texts")}

    @functools.cached_property
    def _encoder(self) -> VideoEncoder:
        return VideoEncoder(self.model)

    @property
    def _encoding(self) -> str:
        return ENCODINGS[self.manifest.compression]


def _whole(batch: Mapping[str, Frames], clips: Mapping[str, Clip], rejects: list[Item]) -> dict[str, np.ndarray]:
    """The frames of those clips that could be read."""
    frames = {}
    for key, future in batch.items():
        try:
            frames[key] = future.result()
        except Rejected as reject:
            _record(reject, key, clips[key], rejects)
    return frames


def _record(reject: Rejected, key: str, clip: Clip, rejects: list[Item]) -> None:
    log.warning("rejected %s", printable(f"{clip['clip_id']}: {reject.reason}: {reject.detail}"))
    rejects.append({"key": key, "reason": reject.reason, "detail": reject.detail})


@dataclass(frozen=True)
class Precomputed:
    """What a run made: every clip is in `rows` or in `rejects`. Of the rows, this process made `encoded`."""

    table: Path
    clips: int
    rows: int
    rejects: int
    encoded: int = 0
    texts: int = 0


def precompute(manifest: PrecomputeManifest, run_dir: Path) -> Precomputed:
    """Make `run_dir/latents`, or help others to. Rows that are there, made from the same clips and encoders, stay.

    Raises:
        TableError: the clips table is not complete, or the latents there were imported.
        ConditionError: the backbone cannot take the clips' size or length.
        StageError: not one clip could be encoded, or another process makes another table there.
    """
    manifest, folder = manifest.resolve_paths(run_dir), run_dir / "latents"
    clips = Table.open(manifest.clips or run_dir / "clips", "clips")
    if not clips.rows("clips"):
        raise TableError(f"{clips.folder} holds no clips; `pusa inspect {clips.folder}` says why")
    _require_ours(folder)
    model = Model(manifest.model)
    prints = model.fingerprints(*model.backbone.family.encoders)
    made_from = digest([KEY_VERSION, clips.fingerprint, manifest.dtype, prints])
    plan = {"made_from": made_from, "shard_rows": manifest.shard_rows}
    with join_work(folder, lambda: tidy(folder, manifest.verify == "all"), plan) as group:
        encoded = texts = 0
        if finished(folder, made_from) is None:
            wanted = want(clips.read("clips"), manifest.dtype, prints)
            _require_shapes(wanted, manifest)
            facts = {**_facts(clips, manifest, prints), "made_from": made_from}
            encoded, texts = _make(manifest, group, model, wanted, facts)
        table = Table.open(folder, "rows")
        if group.is_alone():
            clear(folder, manifest.unused_days)
    return Precomputed(folder, table.facts["clips"], table.rows("rows"), table.rows("rejects"), encoded, texts)


def _make(
    manifest: PrecomputeManifest, group: WorkGroup, model: Model, wanted: Wanted, facts: Mapping[str, Any]
) -> tuple[int, int]:
    """Make the table, with others; gives how many latents and texts this process made."""
    with closing(DaemonThreadPool(min(manifest.batch_size, os.cpu_count() or 1))) as pool:
        work = Work(manifest, group, model, wanted, Store(group.folder), Refusals.before(group.folder), pool, facts)
        work.store.look()
        work.make(wanted.pieces(group.plan["shard_rows"]))
    with group.lock("finish", wait=True):
        _write(work)
    return work.encoded, work.texts


def _require_ours(folder: Path) -> None:
    index = read_json(folder / INDEX)
    if isinstance(index, dict) and "imported" in (index.get("facts") or {}):
        raise TableError(f"{folder} holds an imported table; use another --run-dir, or remove it")


def _write(work: Work) -> None:
    """The catalogue and the index, with all that this process and others have made."""
    work.store.look()
    tried = work.refusals.all()
    lost = [key for key in work.wanted.keys if key not in work.store.places["latents"] and key not in tried]
    if lost:
        raise StageError(
            f"{work.group.folder}: {len(lost)} rows that were made are gone again; run the same command again"
        )
    rejects = [
        {"source": clip_id, "reason": tried[key]["reason"], "detail": tried[key]["detail"]}
        for key, clip_id in zip(work.wanted.keys, work.wanted.clips["clip_id"].to_pylist(), strict=True)
        if key not in work.store.places["latents"]
    ]
    counts = {"clips": len(work.wanted.keys), "rejects_by_reason": Counter(item["reason"] for item in rejects)}
    model = facts_of(work.model, work.group.folder, work.store, work.wanted.null_key)
    write_table(work.group.folder, work.wanted, work.store, rejects, {**work.facts, **model, **counts})


def _facts(clips: Table, manifest: PrecomputeManifest, prints: Mapping[str, str]) -> dict[str, Any]:
    """What every file says of itself."""
    told = ("retimed_frames", "duplicates", "near_duplicates", "rule")
    return {
        "made_with": dict(prints),
        "weights": manifest.model.model_dump(mode="json"),
        "stored_space": STORED_SPACE,
        "dtype": manifest.dtype,
        "compression": manifest.compression,
        "encoding": ENCODINGS[manifest.compression],
        "packages": packages(),
        "ingest": {name: clips.facts.get(name) for name in told},
    }


def _require_shapes(wanted: Wanted, manifest: PrecomputeManifest) -> None:
    geometry = find_family(manifest.model.backbone).geometry
    for bucket in wanted.clips["bucket"].unique().to_pylist():
        geometry.check(*map(int, bucket.split("x")))
