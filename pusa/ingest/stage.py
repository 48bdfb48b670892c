"""Stage 1: make a table of clips, and of rejected sources with their reasons, from videos and captions.

Four steps: list the sources, judge each by decoding it, decide what becomes of it, write the table.
"""

import logging
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pusa.data.reader import Table
from pusa.data.schema import CLIPS, REJECTS
from pusa.data.writer import INDEX, write_index, write_shard
from pusa.errors import ManifestError, Reason, Rejected, StageError, TableError
from pusa.ingest.kinds import describe_kinds
from pusa.ingest.outcomes import ClipsTable, Outcomes, decide_outcomes
from pusa.ingest.sources import Catalogue, Source, find_sources
from pusa.ingest.verdicts import TRANSIENT_REASONS, Ledger, Verdict, has_hash, judge, key_of, verdict_of_reject
from pusa.manifest.common import OPERATION
from pusa.manifest.models import IngestManifest
from pusa.system.disk import Room
from pusa.system.failures import FAILURES, attempt, make_or_reject, require_none_failed
from pusa.system.files import GONE, digest, remove
from pusa.system.locks import sole_writer
from pusa.system.progress import Progress
from pusa.system.text import printable
from pusa.system.threads import run_in_threads

log = logging.getLogger(__name__)
SHARD_ROWS = 8192
LEDGER = "ledger"
POLL_SECONDS = 1.0  # between checks whether the ledger is due to be written
MAX_LOG_CHARACTERS = 10_000
_SHARD = re.compile(r"(clips|rejects)-[0-9a-f]{16}(-\d{5})?\.parquet")  # the names that `_write_table` gives


@dataclass(frozen=True)
class Ingested:
    """What a run made. Every source has clips or is one of the rejects, of which `failed` have an unexpected error."""

    table: Path
    sources: int
    clips: int
    rejects: int
    retimed_frames: int
    duplicates: int
    near_duplicates: int
    failed: int
    kinds: dict[str, str]  # kind of source -> how many there are, and what was done to them
    skipped: bool = False

    def require_all(self) -> None:
        """Raise PartlyFailed if sources failed. The clips of all others are in the table."""
        require_none_failed(self.failed, "sources", self.table)


def ingest(manifest: IngestManifest, run_dir: Path) -> Ingested:
    """Make `run_dir/clips`, unless it is already there, made from the same sources with the same settings.

    Verdicts on sources are stored in a ledger. So a rerun decodes only new and changed files, even after a kill.

    Raises:
        ManifestError: the source is missing or holds no videos, captions are missing and the manifest makes that an
            error, or the table's folder would mix with the sources or holds another kind of table.
        OSError: the table cannot be written. Rerun the command to resume. Unexpected errors of single sources are
            recorded, and not raised.
        StageError: no source gave a clip, or another process is writing the table.
    """
    manifest, folder = manifest.resolve_paths(run_dir), run_dir / "clips"
    catalogue = find_sources(manifest)
    if catalogue.mixes_with(folder):
        raise ManifestError(
            f"the table {folder} would mix with the files of its source {manifest.source}; use another --run-dir"
        )
    key = _table_key(manifest, catalogue.sources)
    result = _read_finished(folder, key)
    if result is not None:
        # Remove leftovers of killed runs, unless another process writes there now or the folder is read-only.
        with suppress(StageError, OSError), sole_writer(folder), sole_writer(folder / LEDGER):
            _remove_stale_shards(folder)
    else:
        _require_own_folder(folder)
        with sole_writer(folder):
            result = _make_table(manifest, catalogue, folder, key)
    if not result.clips:
        reasons = Table.open(folder).fact("rejects_by_reason")
        raise StageError(
            f"{manifest.source}: none of {result.sources} sources gave a clip: {reasons}; "
            f"`pusa inspect {folder}` lists the rejects"
        )
    return result


def _table_key(manifest: IngestManifest, sources: Sequence[Source]) -> str:
    """Return a hash that changes with the sources, the captions and the settings.

    A file's size and times stand for its content here. Hashing all files would take too long.
    """
    without: dict[str, Any] = {"workers": True, "limits": {"decoding_seconds"}, **dict.fromkeys(OPERATION, True)}
    settings = manifest.model_dump(mode="json", exclude=without)
    listed = [(s.path_text, s.caption, s.caption_from, s.stamp, s.reject and str(s.reject)) for s in sources]
    return digest([key_of(manifest.clips, manifest.limits), settings, listed])


def _read_finished(folder: Path, key: str) -> Ingested | None:
    """Return the result of an earlier run if its table has this key, is undamaged and has no transient rejects."""
    try:
        table = Table.open(folder, "clips")
        if table.fact("key") != key or not table.is_intact():
            return None
        result = summarize(table, skipped=True)
    except TableError:
        return None
    return None if any(reason in table.fact("rejects_by_reason") for reason in TRANSIENT_REASONS) else result


def summarize(table: Table, skipped: bool = False) -> Ingested:
    """Return the result of the run that wrote a clips table.

    Raises:
        TableError: the table lacks facts.
    """
    counts = {name: table.fact(name) for name in ("sources", "retimed_frames", "duplicates", "near_duplicates")}
    kinds, reasons = table.fact("kinds"), table.fact("rejects_by_reason")
    if not (_are_counts(counts) and _are_counts(kinds) and _are_counts(reasons)):
        raise TableError(f"{table.folder / INDEX} has facts that are not counts; run its stage again")
    return Ingested(
        table.folder, clips=table.rows("clips"), rejects=table.rows("rejects"), **counts,
        failed=reasons.get(Reason.FAILED, 0), kinds=describe_kinds(kinds), skipped=skipped,
    )  # fmt: skip


def _are_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(type(count) is int for count in value.values())


def _require_own_folder(folder: Path) -> None:
    """Check that no other kind of table would be overwritten. A clips table has a ledger beside it, or can be read."""
    if (folder / INDEX).exists() and not (folder / LEDGER).exists():
        try:
            Table.open(folder, "clips")
        except TableError as error:
            raise ManifestError(f"{folder} holds an {INDEX} of another kind; use another --run-dir") from error


def _make_table(manifest: IngestManifest, catalogue: Catalogue, folder: Path, key: str) -> Ingested:
    """Judge the sources, decide what becomes of each, and write the table."""
    sources = catalogue.sources
    remove(folder / FAILURES)
    with Ledger.open(folder / LEDGER, key_of(manifest.clips, manifest.limits)) as ledger:
        _judge_new(sources, ledger, manifest, folder)
        outcomes = decide_outcomes(sources, ledger, manifest)
        for reject in outcomes.rejects:
            log.warning("rejected %s", printable(": ".join(reject.values()), MAX_LOG_CHARACTERS))
        reasons = outcomes.rejects_by_reason
        if not outcomes.kept and not reasons.keys().isdisjoint(TRANSIENT_REASONS) and _has_clips(folder):
            raise StageError(
                f"{manifest.source}: none of {len(sources)} sources can be used now: {dict(reasons)}; "
                "the table of the previous run is kept"
            )
        _write_table(folder, key, manifest, outcomes, ClipsTable(outcomes, ledger, catalogue))
        ledger.compact({str(source.path): source.stamp for source in sources})
    return summarize(Table.open(folder))


def _judge_new(sources: Sequence[Source], ledger: Ledger, manifest: IngestManifest, folder: Path) -> None:
    """Decode, in several threads, the sources that the ledger does not know, each path once.

    Files of which only the ctime is another than in the ledger are hashed. They are decoded if other bytes are in them.
    """
    known = ledger.stamps()
    todo = {str(s.path): s for s in sources if s.reject is None and known.get(str(s.path)) != s.stamp}
    alike = {path for path, source in todo.items() if known.get(path, GONE)[:2] == source.stamp[:2]}
    hashes = {path: sha256 for path, sha256 in ledger.hashes().items() if path in alike} if alike else {}
    if len(todo) < len(sources):
        log.info("%d of %d sources are to be decoded", len(todo) - len(hashes), len(sources))
    if hashes:
        log.info("%d others may have been replaced: they are hashed, and decoded if they were", len(hashes))

    def work(source: Source) -> Verdict | Source:
        """Return the verdict on a source, or the source itself if its earlier verdict is right."""
        room.wait()
        sha256 = hashes.get(str(source.path), "")
        if sha256 and attempt(lambda: has_hash(source, sha256), folder) is True:
            return source
        name = digest(str(source.path))[:16]
        verdict = make_or_reject(lambda: judge(source, manifest.clips, manifest.limits), folder, name)
        return verdict_of_reject(source, verdict) if isinstance(verdict, Rejected) else verdict

    room = Room(folder, manifest.min_free_gib)
    workers = manifest.workers or os.cpu_count() or 1
    with Progress("ingest", len(todo)) as progress:
        for result in run_in_threads(work, list(todo.values()), workers, POLL_SECONDS):
            if isinstance(result, Source):
                ledger.renew(str(result.path), result.stamp)
            elif result is not None:
                ledger.add(result)
            if result is not None:
                progress.advance()
            ledger.flush_if_due()
        ledger.flush()


def _has_clips(folder: Path) -> bool:
    try:
        return Table.open(folder, "clips").rows("clips") > 0
    except TableError:
        return False


def _write_table(folder: Path, key: str, manifest: IngestManifest, outcomes: Outcomes, clips: ClipsTable) -> None:
    """Write the shards, then the index, then remove the shards of earlier runs."""
    # Shards are named by a hash of their inputs, so that no index ever points at shards of another run.
    transient = [reject for reject in outcomes.rejects if reject["reason"] in TRANSIENT_REASONS]
    name = digest([key, transient])[:16]
    shards: dict[str, list[Path]] = {"clips": [], "rejects": [folder / f"rejects-{name}.parquet"]}
    tables = clips.shards(SHARD_ROWS) if outcomes.kept else [CLIPS.empty_table()]
    for number, table in enumerate(tables):
        shards["clips"].append(folder / f"clips-{name}-{number:05d}.parquet")
        write_shard(shards["clips"][-1], table, CLIPS)
    write_shard(shards["rejects"][0], outcomes.rejects, REJECTS)
    write_index(folder, shards, {"key": key, **clips.facts(), "rule": manifest.clips.model_dump(mode="json")})
    _remove_stale_shards(folder)


def _remove_stale_shards(folder: Path) -> None:
    """Remove shards that the index does not name. Files with other kinds of names are not ours and stay."""
    named = {shard["name"] for shards in Table.open(folder).parts.values() for shard in shards}
    for path in folder.iterdir():
        if _SHARD.fullmatch(path.name) and path.name not in named:
            path.unlink()
