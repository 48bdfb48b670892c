"""Stage 2: encode clips to latents (posterior mean and log-variance) and captions to text features.

Rows are stored in Parquet shards under keys that depend on everything they are made from, so no row is made twice. Any
number of processes share the work in segments. The last step, the catalogue and the index, is done by each process in
turn; all of them write the same files.
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

from pusa.data.encoding import ENCODINGS
from pusa.data.reader import Table
from pusa.data.schema import TEXTS, latents_schema
from pusa.data.writer import INDEX, write_hashed_shard
from pusa.errors import Reason, Rejected, StageError, TableError
from pusa.manifest.models import PrecomputeManifest
from pusa.precompute.encode import latents_row, text_rows
from pusa.precompute.frames import ClipRow, decode_ahead
from pusa.precompute.rows import KEY_VERSION, PlannedRows, Segment, complete_segments, make_each, plan_rows
from pusa.precompute.shards import RejectFiles, Store
from pusa.precompute.table import (
    STORED_SPACE,
    clean_up,
    model_facts,
    open_finished,
    package_versions,
    remove_unused,
    write_table,
)
from pusa.system.failures import make_or_reject, require_none_failed
from pusa.system.files import digest, read_object, require_own
from pusa.system.locks import WorkGroup, join_work
from pusa.system.text import preview, printable
from pusa.system.threads import DaemonThreadPool
from pusa.weights.memory import VideoEncoder
from pusa.weights.model import Model

log = logging.getLogger(__name__)
TEXT_BATCH = 32  # captions encoded at a time: with at most 256 tokens each, they need little memory
Row = dict[str, Any]
INGEST_FACTS = ("retimed_frames", "duplicates", "near_duplicates", "rule")  # copied from the clips table


@dataclass(frozen=True)
class Precomputed:
    """The result of a run. Every clip is one of `rows` or `rejects`; this process made `encoded` latents.

    Of the rejects, `failed` have an unexpected error.
    """

    table: Path
    clips: int
    rows: int
    rejects: int
    encoded: int = 0
    texts: int = 0
    failed: int = 0

    def require_all(self) -> None:
        """Raise PartlyFailed if clips failed. The rows of all others are in the table."""
        require_none_failed(self.failed, "clips", self.table)


def precompute(manifest: PrecomputeManifest, run_dir: Path) -> Precomputed:
    """Make the latents table `run_dir/latents`, together with other processes that do the same.

    Rows that exist and were made from the same clips with the same encoders are kept.

    Raises:
        TableError: the clips table is incomplete or empty, or the folder holds an imported table.
        ConditionError: the backbone does not support the size or length of the clips.
        WeightsError: the encoders cannot be loaded.
        StageError: no clip could be encoded, or another process makes another table there.
        OSError: the table cannot be written. Unexpected errors of single clips are recorded, and not raised.
    """
    manifest, folder = manifest.resolve_paths(run_dir), run_dir / "latents"
    clips = Table.open(manifest.clips or run_dir / "clips", "clips")
    if not clips.rows("clips"):
        raise TableError(f"{clips.folder} holds no clips; `pusa inspect {clips.folder}` shows the reasons")
    facts_there = read_object(folder / INDEX).get("facts")
    if isinstance(facts_there, dict) and "imported" in facts_there:
        raise TableError(f"{folder} holds an imported table; use another --run-dir, or remove it")
    require_own(folder)  # before the weights are hashed, which may take minutes
    model = Model(manifest.model)
    fingerprints = model.fingerprints(*model.backbone.family.encoders)
    made_from = digest([KEY_VERSION, clips.fingerprint, manifest.dtype, fingerprints])
    plan = {"made_from": made_from, "shard_rows": manifest.shard_rows}
    encoded = texts = 0
    with join_work(folder, lambda: clean_up(folder, manifest.verify == "all"), plan) as group:
        if open_finished(folder, made_from) is None:
            planned = plan_rows(clips.read("clips"), manifest.dtype, fingerprints)
            for bucket in planned.clips["bucket"].unique().to_pylist():
                model.backbone.geometry.check(*map(int, bucket.split("x")))
            facts = {
                "made_with": dict(fingerprints),
                "weights": manifest.model.model_dump(mode="json"),
                "stored_space": STORED_SPACE,
                "dtype": manifest.dtype,
                "compression": manifest.compression,
                "encoding": ENCODINGS[manifest.compression],
                "packages": package_versions(),
                "ingest": {name: clips.facts.get(name) for name in INGEST_FACTS},
                "made_from": made_from,
                "clips_content": clips.fingerprint,
            }
            with closing(DaemonThreadPool(min(manifest.batch_size, os.cpu_count() or 1))) as pool:
                store, rejects = Store(folder), RejectFiles.at_start(folder)
                run = PrecomputeRun(manifest, group, model, planned, store, rejects, pool, facts)
                run.store.refresh()
                segments = planned.segments(group.plan["shard_rows"])
                complete_segments(group, "precompute", segments, run.store.missing, run.complete)
            with group.lock("finish", wait=True):
                run.finish()
            encoded, texts = run.encoded, run.texts
        table = Table.open(folder, "rows")
        if group.is_alone():
            remove_unused(folder, manifest.unused_days)
    failed = table.read("rejects", ["reason"])["reason"].to_pylist().count(Reason.FAILED)
    return Precomputed(folder, table.fact("clips"), table.rows("rows"), table.rows("rejects"), encoded, texts, failed)


@dataclass
class PrecomputeRun:
    """The rows to make, the rows that exist, and how many of them this process made."""

    manifest: PrecomputeManifest
    group: WorkGroup
    model: Model
    planned: PlannedRows
    store: Store
    reject_files: RejectFiles
    pool: DaemonThreadPool  # the threads that decode
    facts: Mapping[str, Any]  # stored in every file
    encoded: int = 0
    texts: int = 0

    def complete(self, segment: Segment) -> None:
        """Make the rows of a segment that no process has made or rejected in the meantime."""
        self.store.refresh(segment.name)
        rejected = {entry["key"] for entry in self.reject_files.of(segment)}
        keys = [key for key in self.store.missing(segment) if key not in rejected]
        if not keys:
            return
        made = self._encode_captions(keys) if segment.part == "texts" else self._encode_clips(keys)
        rejects = {key: item for key, item in made.items() if isinstance(item, Rejected)}
        rows = [item for item in made.values() if not isinstance(item, Rejected)]
        if rejects:
            self.reject_files.add(
                segment, [{"key": key, "reason": item.reason, "detail": item.detail} for key, item in rejects.items()]
            )
        if rows:
            schema = TEXTS if segment.part == "texts" else latents_schema(len(rows[0]["latent_mean"]))
            write_hashed_shard(self.group.folder, segment.name, rows, schema, self.manifest.compression, self.facts)
            self.store.refresh(segment.name)
        if segment.part == "texts":
            self.texts += len(rows)
        else:
            self.encoded += len(rows)

    def _encode_captions(self, keys: Sequence[str]) -> dict[str, Row | Rejected]:
        """Return the features of captions, or why they have none."""
        texts, row_of = self.planned.clips["caption"], self._row_of["texts"]
        captions = {key: "" if key == self.planned.null_key else texts[row_of[key]].as_py() for key in keys}
        dtype, encoding = self.manifest.dtype, ENCODINGS[self.manifest.compression]

        def encode(some: Sequence[str]) -> dict[str, Row]:
            rows = text_rows({key: captions[key] for key in some}, self.model, TEXT_BATCH, dtype, encoding)
            return {row["text_key"]: row for row in rows}

        _ = self.model.text_parts  # an encoder that cannot be loaded is no caption's fault
        made = make_each(keys, encode, self.group.folder)
        for key, item in made.items():
            if isinstance(item, Rejected):
                _log_reject(f"caption {preview(captions[key])}", item)
        return made

    def _encode_clips(self, keys: Sequence[str]) -> dict[str, Row | Rejected]:
        """Decode and encode clips of one shape; return their rows, or why they have none."""
        folder = self.group.folder
        dtype, encoding = self.manifest.dtype, ENCODINGS[self.manifest.compression]
        clips: dict[str, ClipRow] = {
            key: self.planned.clips.slice(self._row_of["latents"][key], 1).to_pylist()[0] for key in keys
        }
        made: dict[str, Row | Rejected] = {}
        frames: dict[str, np.ndarray] = {}

        def encode(some: Sequence[str]) -> dict[str, Row | Rejected]:
            mean, logvar, tile = self._encoder.encode(np.stack([frames[key] for key in some]))
            rows: dict[str, Row | Rejected] = {}
            for i, key in enumerate(some):
                try:
                    rows[key] = latents_row(key, clips[key], mean[i], logvar[i], tile, dtype, encoding)
                except Rejected as reject:
                    rows[key] = reject.with_traceback(None)
            return rows

        for batch in decode_ahead(self.pool, clips, self.manifest.batch_size, self.manifest.decoding_seconds):
            frames.clear()
            for key, future in batch.items():
                decoded = make_or_reject(future.result, folder, key)
                if isinstance(decoded, Rejected):
                    made[key] = decoded
                else:
                    frames[key] = decoded
            if frames:
                made |= make_each(list(frames), encode, folder)
        for key, item in made.items():
            if isinstance(item, Rejected):
                _log_reject(clips[key]["clip_id"], item)
        return made

    @functools.cached_property
    def _row_of(self) -> dict[str, dict[str, int]]:
        return {part: self.planned.rows_of(part) for part in ("latents", "texts")}

    @functools.cached_property
    def _encoder(self) -> VideoEncoder:
        _ = self.model.vae  # one that cannot be loaded is no clip's fault
        return VideoEncoder(self.model)

    def finish(self) -> None:
        """Write the catalogue, the rejects and the index, with the rows of all processes.

        Raises:
            StageError: rows are neither made nor rejected, or the empty prompt has no features.
        """
        folder, planned, store = self.group.folder, self.planned, self.store
        store.refresh()
        rejected = self.reject_files.by_key()
        rejects, lost = [], 0
        ids = planned.clips["clip_id"].to_pylist()
        for clip_id, *keys in zip(ids, planned.keys, planned.text_keys, strict=True):
            pairs = zip(("latents", "texts"), keys, strict=True)
            if missing := [key for part, key in pairs if key not in store.locations[part]]:
                reject = next((rejected[key] for key in missing if key in rejected), None)
                lost += reject is None
                rejects += [{"source": clip_id, "reason": r["reason"], "detail": r["detail"]} for r in [reject] if r]
        if lost:
            raise StageError(f"{folder}: {lost} rows that were made are missing; run the same command again")
        if planned.null_key not in store.locations["texts"]:
            why = rejected.get(planned.null_key, {}).get("detail", "it is missing")
            raise StageError(f"{folder}: the empty prompt, which every table needs, has no features: {why}")
        counts = {
            "clips": len(planned.keys),
            "rejects_by_reason": Counter(reject["reason"] for reject in rejects),
        }
        encoders = model_facts(self.model, folder, store, planned.null_key)
        write_table(folder, planned, store, rejects, {**self.facts, **encoders, **counts})


def _log_reject(name: str, reject: Rejected) -> None:
    log.warning("rejected %s", printable(f"{name}: {reject.reason}: {reject.detail}"))
