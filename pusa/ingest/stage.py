"""Stage 1: videos + captions -> a table of verified clips, and a table of what was refused and why."""

import logging
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pusa.data.reader import Table
from pusa.data.schema import CLIPS, REJECTS
from pusa.data.writer import INDEX, write_index, write_shard
from pusa.errors import ManifestError, StageError, TableError
from pusa.ingest.accounts import Accounts, ClipRows, settle
from pusa.ingest.ledger import PASSING, Ledger, Verdict, key_of
from pusa.ingest.sources import Catalogue, Source, find_sources
from pusa.ingest.verdict import judge
from pusa.manifest.models import IngestManifest
from pusa.system.files import digest
from pusa.system.locks import sole_writer
from pusa.system.progress import Progress
from pusa.system.text import printable
from pusa.system.threads import run_in_threads

log = logging.getLogger(__name__)
SHARD_ROWS = 8192
LEDGER = "ledger"
PATIENCE = 1.0  # seconds between looks at what is due
LONGEST = 10_000  # characters of a line of the log
_SHARD = re.compile(r"(clips|rejects)-[0-9a-f]{16}(-\d{5})?\.parquet")  # the names that `_write` gives


@dataclass(frozen=True)
class Ingested:
    """What a run made: every source has clips or is in `rejects`."""

    table: Path
    sources: int
    clips: int
    rejects: int
    retimed_frames: int
    duplicates: int
    near_duplicates: int
    skipped: bool = False


def ingest(manifest: IngestManifest, run_dir: Path) -> Ingested:
    """Make `run_dir/clips`; where it is already made from the same sources and rule, do nothing.

    What a source was found to give is remembered: only new and changed files are decoded, even after a kill.

    Raises:
        ManifestError: the source is not there or holds no videos, captions are missing and must not be, or the table
            would lie among the sources, or something else lies there.
        OSError: the table cannot be written; the same command goes on.
        StageError: not one source gave a clip, or another process is at it.
    """
    manifest, folder = manifest.resolve_paths(run_dir), run_dir / "clips"
    catalogue = find_sources(manifest)
    if catalogue.mixes_with(folder):
        told = f"the table {folder} would mix with the files of its source {manifest.source}; name another --run-dir"
        raise ManifestError(told)
    key = _key(manifest, catalogue.sources)
    done = _finished(folder, key)
    if done is not None:
        _tidy(folder)
    else:
        _require_ours(folder)
        with sole_writer(folder):
            done = _make_table(manifest, catalogue, folder, key)
    if not done.clips:
        told = f"not one of {done.sources} sources gave a clip; `pusa inspect {folder}` says why"
        raise StageError(f"{manifest.source}: {told}: {Table.open(folder).facts['rejects_by_reason']}")
    return done


def _require_ours(folder: Path) -> None:
    """Refuse to write over the index of something else: beside ours there is a ledger, or it can be read."""
    if (folder / INDEX).exists() and not (folder / LEDGER).exists():
        try:
            Table.open(folder, "clips")
        except TableError as error:
            raise ManifestError(f"{folder} holds an {INDEX} of something else; name another --run-dir") from error


def _make_table(manifest: IngestManifest, catalogue: Catalogue, folder: Path, key: str) -> Ingested:
    with Ledger.open(folder / LEDGER, key_of(manifest.clips, manifest.limits)) as ledger:
        _judge_all(catalogue.sources, ledger, manifest)
        accounts = settle(catalogue.sources, ledger, manifest)
        for reject in accounts.rejects:
            log.warning("rejected %s", printable(": ".join(reject.values()), LONGEST))
        if not accounts.kept and accounts.reasons.keys() <= set(PASSING) and _has_clips(folder):
            told = f"not one of {len(accounts.rejects)} sources can be read now: {dict(accounts.reasons)}"
            raise StageError(f"{manifest.source}: {told}; the table of the run before stays as it is")
        _write(folder, key, manifest, accounts, ClipRows(accounts, ledger, catalogue))
        ledger.compact({str(source.path): source.stamp for source in catalogue.sources})
    return _summary(Table.open(folder))


def _has_clips(folder: Path) -> bool:
    try:
        return Table.open(folder, "clips").rows("clips") > 0
    except TableError:
        return False


def _judge_all(sources: Sequence[Source], ledger: Ledger, manifest: IngestManifest) -> None:
    """Decode what the ledger does not know; of a path that is listed twice, once."""
    known = ledger.stamps()
    todo = {s.path: s for s in sources if s.reject is None and known.get(str(s.path)) != s.stamp}
    if len(todo) < len(sources):
        log.info("%d of %d sources are to be decoded", len(todo), len(sources))

    def work(source: Source) -> Verdict:
        return judge(source, manifest.clips, manifest.limits)

    workers = manifest.workers or os.cpu_count() or 1
    with Progress("ingest", len(todo)) as progress:
        for verdict in run_in_threads(work, list(todo.values()), workers, PATIENCE):
            if verdict is not None:
                ledger.add(verdict)
                progress.advance()
            ledger.flush_if_due()
        ledger.flush()


def _write(folder: Path, key: str, manifest: IngestManifest, accounts: Accounts, clips: ClipRows) -> None:
    # Named by what they were made from, so that no index ever points at shards of another run.
    passing = [reject for reject in accounts.rejects if reject["reason"] in PASSING]
    name = digest([key, passing])[:16]
    shards: dict[str, list[Path]] = {"clips": [], "rejects": [folder / f"rejects-{name}.parquet"]}
    tables = clips.shards(SHARD_ROWS) if accounts.kept else [CLIPS.empty_table()]
    for number, table in enumerate(tables):
        shards["clips"].append(folder / f"clips-{name}-{number:05d}.parquet")
        write_shard(shards["clips"][-1], table, CLIPS)
    write_shard(shards["rejects"][0], accounts.rejects, REJECTS)
    write_index(folder, shards, {"key": key, **clips.facts(), "rule": manifest.clips.model_dump(mode="json")})
    _remove_stale(folder)


def _tidy(folder: Path) -> None:
    """Remove what killed runs left of a finished table, unless another writes there now, or nothing can be written."""
    with suppress(StageError, OSError), sole_writer(folder), sole_writer(folder / LEDGER):
        _remove_stale(folder)


def _remove_stale(folder: Path) -> None:
    """Shards of other runs. What has not such a name is not ours."""
    named = {shard["name"] for shards in Table.open(folder).parts.values() for shard in shards}
    for path in folder.iterdir():
        if _SHARD.fullmatch(path.name) and path.name not in named:
            path.unlink()


def _key(manifest: IngestManifest, sources: Sequence[Source]) -> str:
    """Changes when a source, a caption or the rule does. Sizes and times stand for content: hashing is for clips."""
    asked = manifest.model_dump(mode="json", exclude={"workers": True, "limits": {"decoding_seconds"}})
    listed = [(s.shown, s.caption, s.caption_from, s.stamp, s.reject and str(s.reject)) for s in sources]
    return digest([key_of(manifest.clips, manifest.limits), asked, listed])


def _finished(folder: Path, key: str) -> Ingested | None:
    """The table as it is, where it was made from the same and another try could change nothing."""
    try:
        table = Table.open(folder, "clips")
        if table.fact("key") != key or not table.is_intact():
            return None
        return None if any(reason in table.fact("rejects_by_reason") for reason in PASSING) else _summary(table, True)
    except TableError:
        return None


def _summary(table: Table, skipped: bool = False) -> Ingested:
    counts = {name: table.fact(name) for name in ("sources", "retimed_frames", "duplicates", "near_duplicates")}
    return Ingested(table.folder, clips=table.rows("clips"), rejects=table.rows("rejects"), **counts, skipped=skipped)
