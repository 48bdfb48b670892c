"""Stage 2: encode clips to latents (posterior mean and log-variance) and captions to text features.

Rows are stored in Parquet shards under keys that depend on everything they are made from, so no row is made twice. Any
number of processes share the work in segments. Each command plans, and has slots make its segments (worker.py). The
last step, the catalogue and the index, is done by each command in turn; all of them write the same files.
"""

import functools
import logging
import os
import secrets
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from pusa.data.encoding import ENCODINGS
from pusa.data.reader import Table
from pusa.data.writer import INDEX
from pusa.errors import Reason, StageError, TableError
from pusa.manifest.models import PrecomputeManifest
from pusa.precompute.rows import KEY_VERSION, PlannedRows, Segment, complete_segments, plan_rows
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
from pusa.precompute.worker import Loaded, Setup, keep, let_go, make_latents, make_texts, read_statistics
from pusa.system.disk import Room
from pusa.system.failures import require_none_failed
from pusa.system.files import digest, read_object, require_own
from pusa.system.locks import WorkGroup, join_work
from pusa.system.slots import Slot, SlotLost, Step, WorkerDied, call_directly, open_slots, run_in_slots
from pusa.system.text import join_ranges, printable
from pusa.weights.model import Model

log = logging.getLogger(__name__)
MAX_CRASHES = 3  # of its worker, after which a clip or caption that was alone is a reject
BEFORE_LOADING, MAX_STARTS = "before the encoders were loaded", 8  # deaths in a row; memory may be short for a while
MAX_DEATHS = 32  # of workers in a row that made nothing; a shard's worst row takes about half as many to find
LONGEST_ID = 60  # characters of a clip's id in the name of a step
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


def precompute(manifest: PrecomputeManifest, run_dir: Path, *, step: Step = call_directly) -> Precomputed:
    """Make the latents table `run_dir/latents`, together with other processes that do the same.

    Rows that exist and were made from the same clips with the same encoders are kept.

    Args:
        manifest: the clips and the encoders.
        run_dir: the folder of the run.
        step: calls a function that makes rows of a segment; it gets a name for it, too.

    Raises:
        TableError: the clips table is incomplete or empty, or the folder holds an imported table.
        ConditionError: the backbone does not support the size or length of the clips.
        WeightsError: the encoders cannot be loaded.
        StageError: no clip could be encoded, another process makes another table there, or workers die whatever they
            do.
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
    vae_dtype, latent_settings = manifest.model.vae_dtype, dict(model.backbone.family.latent_settings)
    decisive = filter(None, (vae_dtype, latent_settings))  # beside weights
    made_from = digest([KEY_VERSION, clips.fingerprint, manifest.dtype, fingerprints, *decisive])
    plan = {"made_from": made_from, "shard_rows": manifest.shard_rows}
    made: Counter[str] = Counter()
    with join_work(folder, lambda: clean_up(folder, manifest.verify == "all"), plan) as group:
        if open_finished(folder, made_from) is None:
            planned = plan_rows(clips.read("clips"), manifest.dtype, model.backbone.family, fingerprints, vae_dtype)
            for bucket in planned.clips["bucket"].unique().to_pylist():
                model.backbone.geometry.check(*map(int, bucket.split("x")))
            facts = _facts(manifest, fingerprints, clips, made_from)
            facts |= {"latent_settings": latent_settings} if latent_settings else {}
            made = _make_table(manifest, group, model, planned, facts, step)
        table = Table.open(folder, "rows")
        if group.is_alone():
            remove_unused(folder, manifest.unused_days)
    failed = table.read("rejects", ["reason"])["reason"].to_pylist().count(Reason.FAILED)
    rows, rejects = table.rows("rows"), table.rows("rejects")
    return Precomputed(folder, table.fact("clips"), rows, rejects, made["latents"], made["texts"], failed)


def _facts(
    manifest: PrecomputeManifest, fingerprints: Mapping[str, str], clips: Table, made_from: str
) -> dict[str, Any]:
    """Return what every file of the table says about its origin."""
    return {
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


def _make_table(
    manifest: PrecomputeManifest,
    group: WorkGroup,
    model: Model,
    planned: PlannedRows,
    facts: Mapping[str, Any],
    step: Step,
) -> Counter[str]:
    """Make the rows that are missing, then write the table; return how many rows of each part this process made."""
    folder = group.folder
    with open_slots(manifest.model_dump(mode="json")["place"], folder) as slots:
        threads = max(1, min(manifest.batch_size, (os.cpu_count() or 1) // len(slots)))
        setup = Setup(secrets.token_hex(8), folder, manifest, model.known(), threads, facts)
        run = PrecomputeRun(setup, group, planned, Store(folder), RejectFiles.at_start(folder), step)
        keep(setup, model)  # for a slot in this process
        try:
            run.store.refresh()
            segments, room = planned.segments(group.plan["shard_rows"]), Room(folder, manifest.min_free_gib)
            complete_segments(group, "precompute", segments, run.store.missing, run.complete, slots, room)
            statistics = run.statistics or _statistics(slots, setup)
            with group.lock("finish", wait=True):
                run.finish(statistics)
        finally:
            let_go()
    return run.made


def _statistics(slots: Sequence[Slot], setup: Setup) -> list[list[float]]:
    """Return the VAE's latent statistics, from the first slot that can work. Call it without a lock.

    Another slot may wait for its GPU, which may be that of a process that waits for the lock.
    """
    found: list[list[list[float]]] = []
    waiting = deque((setup,))

    def read(slot: Slot, setup: Setup) -> None:
        try:
            found.append(slot.run(read_statistics, setup, on_event=lambda event: None))
        except SlotLost:
            waiting.append(setup)
            raise

    run_in_slots(slots, lambda: waiting.popleft() if waiting else None, read)
    return found[0]


@dataclass
class PrecomputeRun:
    """The rows to make, the rows that exist, and how many of them this process made. Slots complete segments of it."""

    setup: Setup
    group: WorkGroup
    planned: PlannedRows
    store: Store
    reject_files: RejectFiles
    step: Step
    made: Counter[str] = field(default_factory=Counter)  # part -> rows
    deaths: Counter[str] = field(default_factory=Counter)  # of workers since one last made something, by when
    statistics: list[list[float]] | None = None  # of the VAE, once a worker has loaded it
    _changing: Lock = field(default_factory=Lock)  # the store and the counts

    def complete(self, slot: Slot, segment: Segment) -> None:
        """Make the rows of a segment that no process has made or rejected in the meantime."""
        rejected = {entry["key"] for entry in self.reject_files.of(segment)}
        self._make(slot, segment, [key for key in segment.keys if key not in rejected])

    def _make(self, slot: Slot, segment: Segment, keys: Sequence[str]) -> None:
        """Make those of the keys' rows that are missing: together or, if the worker dies, in halves.

        Raises:
            StageError: workers die whatever they do.
        """
        for crash in range(1, MAX_CRASHES + 1):
            keys = self._missing(segment, keys)
            if not keys:
                return
            try:
                self._make_once(slot, segment, keys)
                return
            except WorkerDied as died:
                if len(keys) > 1:
                    break
                if crash == MAX_CRASHES:
                    detail = f"its worker died {MAX_CRASHES} times while it encoded this alone ({died.how})"
                    log.warning("rejected %s: %s", self._name_of(segment, keys), detail)
                    self.reject_files.add(segment, [{"key": keys[0], "reason": Reason.CRASHED, "detail": detail}])
                    return
        middle = len(keys) // 2
        self._make(slot, segment, keys[:middle])
        self._make(slot, segment, keys[middle:])

    def _make_once(self, slot: Slot, segment: Segment, keys: Sequence[str]) -> None:
        """Have a slot make the rows of keys; record its rejects, and count its rows.

        Raises:
            WorkerDied: the worker died while it made them.
            StageError: workers die whatever they do.
        """
        make = make_texts if segment.part == "texts" else make_latents
        call = partial(slot.run, make, self.setup, segment.name, self._given(segment.part, keys))
        name = f"{self._name_of(segment, keys)} on {slot.name}"
        while True:
            loaded: list[Loaded] = []
            try:
                rejects = self.step(name, partial(call, on_event=loaded.append))
                break
            except WorkerDied as died:
                log.warning("%s died (%s) at %s", slot.name, died.how, name)
                self._count_death(died, bool(loaded))
                if loaded:
                    raise
        if rejects:
            self.reject_files.add(segment, rejects)
        made = len(keys) - len(self._missing(segment, keys))
        with self._changing:
            self.deaths.clear()
            self.made[segment.part] += made
            self.statistics = self.statistics or loaded[0].statistics

    def _count_death(self, died: WorkerDied, loaded: bool) -> None:
        """Raise StageError if workers die whatever they do, so that not every row is blamed for it."""
        when, limit = ("in a row, and made nothing", MAX_DEATHS) if loaded else (BEFORE_LOADING, MAX_STARTS)
        with self._changing:
            if loaded:
                del self.deaths[BEFORE_LOADING]
            self.deaths[when] += 1
            count = self.deaths[when]
        if count >= limit:
            raise StageError(f"workers died {count} times {when} ({died.how}); see the log") from died

    def _missing(self, segment: Segment, keys: Sequence[str]) -> list[str]:
        with self._changing:
            self.store.refresh(segment.name)
            missing = set(self.store.missing(segment))
        return [key for key in keys if key in missing]

    def _given(self, part: str, keys: Sequence[str]) -> dict[str, Any]:
        """Return for each key its caption, or its row of the clips table."""
        clips, row_of = self.planned.clips, self._row_of[part]
        if part == "texts":
            captions, null_key = clips["caption"], self.planned.null_key
            return {key: "" if key == null_key else captions[row_of[key]].as_py() for key in keys}
        return {key: clips.slice(row_of[key], 1).to_pylist()[0] for key in keys}

    def _name_of(self, segment: Segment, keys: Sequence[str]) -> str:
        """Return a name for people: "latents 64x64x31, clips 1-12", numbered as in the clips table, or a clip's id."""
        if segment.part == "texts":
            return f"texts of {len(keys)} captions"
        clips, rows = self.planned.clips, [self._row_of["latents"][key] for key in keys]
        if len(rows) == 1:
            which = f"clip {rows[0] + 1} ({printable(clips['clip_id'][rows[0]].as_py(), LONGEST_ID)})"
        else:
            which = f"clips {join_ranges(row + 1 for row in rows)}"
        return f"latents {clips['bucket'][rows[0]].as_py()}, {which}"

    @functools.cached_property
    def _row_of(self) -> dict[str, dict[str, int]]:
        return {part: self.planned.rows_of(part) for part in ("latents", "texts")}

    def finish(self, statistics: list[list[float]]) -> None:
        """Write the catalogue, the rejects and the index, with the rows of all processes.

        Args:
            statistics: the VAE's latent statistics.

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
        encoders = model_facts(statistics, folder, store, planned.null_key)
        write_table(folder, planned, store, rejects, {**self.setup.facts, **encoders, **counts})
