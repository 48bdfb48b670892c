"""Stage 1: videos + captions -> a table of verified clips, and a table of what was refused and why."""

import csv
import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pusa.data.reader import Table
from pusa.data.schema import CLIPS, REJECTS, Reason
from pusa.data.writer import write_index, write_shard
from pusa.errors import ManifestError, MediaError, StageError, TableError
from pusa.files import digest, sha256_file, sole_writer
from pusa.manifest import ClipRule, IngestManifest
from pusa.progress import track
from pusa.video import VIDEO_SUFFIXES, probe, read_frames

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A video, its caption if it has one, and where that came from."""

    path: Path
    caption: str | None
    caption_from: str


@dataclass(frozen=True)
class Ingested:
    """What a run made: every source is in `clips` or in `rejects`."""

    table: Path
    sources: int
    clips: int
    rejects: int
    retimed_sources: int
    skipped: bool = False


class Rejected(MediaError):
    """A source that gives no clip, with its reason."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def ingest(manifest: IngestManifest, run_dir: Path) -> Ingested:
    """Make `run_dir/clips`; where it is already made from the same sources and rule, do nothing.

    Raises:
        ManifestError: the source is not there or holds no videos.
        StageError: not one source gave a clip, or another process is at it.
    """
    folder = run_dir / "clips"
    sources = list(find_sources(manifest.source))
    if not sources:
        raise ManifestError(f"{manifest.source} holds no videos; known suffixes are {', '.join(VIDEO_SUFFIXES)}")
    key = _key(manifest, sources)
    with sole_writer(folder):
        return _finished(folder, key) or _make_table(manifest, sources, folder, key)


def _make_table(manifest: IngestManifest, sources: list[Source], folder: Path, key: str) -> Ingested:
    clips: list[dict[str, Any]] = []
    rejects: list[dict[str, str]] = []
    for source in track(sources, "ingest", len(sources)):
        try:
            clips += cut(source, manifest.clips, manifest.source)
        except Rejected as reject:
            log.warning("rejected %s: %s: %s", source.path, reject.reason, reject.detail)
            rejects.append({"source": str(source.path), "reason": reject.reason.value, "detail": reject.detail})
    reasons = Counter(reject["reason"] for reject in rejects)
    if not clips:
        raise StageError(f"{manifest.source}: not one of {len(sources)} sources gave a clip: {dict(reasons)}")
    facts = {
        "key": key,
        "sources": len(sources),
        "rejects_by_reason": reasons,
        "retimed_sources": len({clip["source"] for clip in clips if clip["fps"] != clip["source_fps"]}),
        "rule": manifest.clips.model_dump(mode="json"),
    }
    shards = {"clips": [folder / "clips-00000.parquet"], "rejects": [folder / "rejects-00000.parquet"]}
    write_shard(shards["clips"][0], clips, CLIPS)
    write_shard(shards["rejects"][0], rejects, REJECTS)
    write_index(folder, shards, facts)
    return _summary(Table.open(folder))


def find_sources(source: Path) -> Iterator[Source]:
    """Every video of a folder with the caption beside it, or every row of a metadata.csv / .jsonl.

    Raises:
        ManifestError: `source` is not there, or is neither; or a metadata row lacks `file_name`.
    """
    if source.is_dir():
        for name in ("metadata.csv", "metadata.jsonl"):
            if (source / name).is_file():
                source = source / name
                break
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file():
                beside = path.with_suffix(".txt")
                caption = beside.read_text(encoding="utf-8", errors="replace").strip() if beside.is_file() else None
                yield Source(path.absolute(), caption, beside.name)
    elif source.suffix in (".csv", ".jsonl") and source.is_file():
        for number, row in enumerate(_metadata(source), 1):
            if not row.get("file_name"):
                raise ManifestError(f"{source}: row {number} has no file_name; its keys are {list(row)}")
            yield Source((source.parent / row["file_name"]).absolute(), row.get("text"), f"{source.name}:{number}")
    else:
        raise ManifestError(f"source {source} is neither a folder nor a metadata.csv or metadata.jsonl")


def _metadata(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            yield from csv.DictReader(file)
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ManifestError(f"{path}: line {number} is not JSON: {error}") from error
            yield row if isinstance(row, dict) else {}


def cut(source: Source, rule: ClipRule, root: Path) -> list[dict[str, Any]]:
    """The clips of one source, each decoded once to be sure of it.

    Raises:
        Rejected: with the reason.
    """
    if not (source.caption or "").strip():
        raise Rejected(Reason.NO_CAPTION, f"no caption in {source.caption_from}")
    try:
        facts = probe(source.path)
        windows = frame_windows(facts.num_frames, facts.fps, rule)
        for window in windows:
            read_frames(source.path, window)
    except MediaError as error:
        raise Rejected(Reason.UNREADABLE, str(error)) from error
    if not windows:
        wanted = f"{rule.num_frames} at {rule.fps or facts.fps:g} are needed"
        raise Rejected(Reason.TOO_SHORT, f"{facts.num_frames} frames at {facts.fps:g} a second; {wanted}")
    content = sha256_file(source.path)
    base = root if root.is_dir() else root.parent
    name = source.path.relative_to(base.absolute()) if source.path.is_relative_to(base.absolute()) else source.path
    return [
        {
            "clip_id": f"{name.with_suffix('').as_posix()}@{window[0]}",
            "source": str(source.path),
            "source_sha256": content,
            "frames": window,
            "source_fps": facts.fps,
            "fps": rule.fps or facts.fps,
            "width": rule.width,
            "height": rule.height,
            "caption": source.caption,
            "caption_from": source.caption_from,
        }
        for window in windows
    ]


def frame_windows(num_frames: int, fps: float, rule: ClipRule) -> list[list[int]]:
    """Which frames of the source each clip shows: at the rule's rate, the nearest source frame in time."""
    rate = fps / rule.fps if rule.fps else 1.0
    available = int((num_frames - 1) / rate + 1e-6) + 1
    starts = range(0, available - rule.num_frames + 1, rule.num_frames)
    if rule.windows == "first":
        starts = starts[:1]
    return [[round((start + i) * rate) for i in range(rule.num_frames)] for start in starts]


def _key(manifest: IngestManifest, sources: list[Source]) -> str:
    """Changes when a source, a caption or the rule does. Sizes and times stand for content: hashing is for clips."""
    stats = [
        (str(s.path), s.caption, s.path.stat().st_size, s.path.stat().st_mtime_ns) if s.path.is_file() else str(s.path)
        for s in sources
    ]
    return digest([manifest.model_dump(mode="json"), stats])


def _finished(folder: Path, key: str) -> Ingested | None:
    try:
        table = Table.open(folder)
    except TableError:
        return None
    return _summary(table, skipped=True) if table.facts["key"] == key and table.is_whole() else None


def _summary(table: Table, skipped: bool = False) -> Ingested:
    facts = table.facts
    return Ingested(
        table=table.folder,
        sources=facts["sources"],
        clips=table.rows("clips"),
        rejects=table.rows("rejects"),
        retimed_sources=facts["retimed_sources"],
        skipped=skipped,
    )
