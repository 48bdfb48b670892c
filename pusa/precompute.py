"""Stage 2: clips -> latents (posterior mean and log-variance) and text features, in Parquet shards.

Rows are named by what they are made from, and made in pieces that any number of processes share out by locks. What is
there is never made again; who finds everything made writes the catalogue and the index.
"""

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pusa.backbones.geometry import GEOMETRIES
from pusa.claims import Crew, join
from pusa.daemons import Daemons
from pusa.data.encoding import ENCODINGS
from pusa.data.reader import Table
from pusa.data.writer import INDEX
from pusa.errors import StageError, TableError
from pusa.files import digest, read_json
from pusa.manifest import PrecomputeManifest
from pusa.model import Model
from pusa.precomputing.plan import KEY_VERSION, Wanted, want
from pusa.precomputing.rejected import Refusals
from pusa.precomputing.shards import Store
from pusa.precomputing.table import STORED_SPACE, clear, facts_of, finished, packages, tidy, write_table
from pusa.precomputing.work import Work
from pusa.weights import ENCODERS


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
    manifest, folder = manifest.located(run_dir), run_dir / "latents"
    clips = Table.open(manifest.clips or run_dir / "clips", "clips")
    if not clips.rows("clips"):
        raise TableError(f"{clips.folder} holds no clips; `pusa inspect {clips.folder}` says why")
    _require_ours(folder)
    model = Model(manifest.model)
    prints = model.fingerprints(*ENCODERS)
    made_from = digest([KEY_VERSION, clips.fingerprint, manifest.dtype, prints])
    plan = {"made_from": made_from, "shard_rows": manifest.shard_rows}
    with join(folder, lambda: tidy(folder, manifest.verify == "all"), plan) as crew:
        encoded = texts = 0
        if finished(folder, made_from) is None:
            wanted = want(clips.read("clips"), manifest.dtype, prints)
            _require_shapes(wanted, manifest)
            facts = {**_facts(clips, manifest, prints), "made_from": made_from}
            encoded, texts = _make(manifest, crew, model, wanted, facts)
        table = Table.open(folder, "rows")
        if crew.is_alone():
            clear(folder, manifest.unused_days)
    return Precomputed(folder, table.facts["clips"], table.rows("rows"), table.rows("rejects"), encoded, texts)


def _make(
    manifest: PrecomputeManifest, crew: Crew, model: Model, wanted: Wanted, facts: Mapping[str, Any]
) -> tuple[int, int]:
    """Make the table, with others; gives how many latents and texts this process made."""
    with closing(Daemons(min(manifest.batch_size, os.cpu_count() or 1))) as pool:
        work = Work(manifest, crew, model, wanted, Store(crew.folder), Refusals.before(crew.folder), pool, facts)
        work.store.look()
        work.make(wanted.pieces(crew.plan["shard_rows"]))
    with crew.claim("finish", wait=True):
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
            f"{work.crew.folder}: {len(lost)} rows that were made are gone again; run the same command again"
        )
    rejects = [
        {"source": clip_id, "reason": tried[key]["reason"], "detail": tried[key]["detail"]}
        for key, clip_id in zip(work.wanted.keys, work.wanted.clips["clip_id"].to_pylist(), strict=True)
        if key not in work.store.places["latents"]
    ]
    counts = {"clips": len(work.wanted.keys), "rejects_by_reason": Counter(item["reason"] for item in rejects)}
    model = facts_of(work.model, work.crew.folder, work.store, work.wanted.null_key)
    write_table(work.crew.folder, work.wanted, work.store, rejects, {**work.facts, **model, **counts})


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
    geometry = GEOMETRIES[manifest.model.backbone]
    for bucket in wanted.clips["bucket"].unique().to_pylist():
        geometry.check(*map(int, bucket.split("x")))
