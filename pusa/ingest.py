"""Stage 1: videos + captions -> a table of verified clips, and a table of what was refused and why."""

import csv
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pusa.data.reader import Table
from pusa.data.schema import CLIPS, REJECTS, Reason
from pusa.data.writer import write_index, write_shard
from pusa.errors import ManifestError, MediaError, Rejected, StageError, TableError
from pusa.files import digest, sha256_file, sole_writer
from pusa.manifest import ClipRule, IngestManifest
from pusa.progress import track
from pusa.video import VIDEO_SUFFIXES, nearest_frames, probe, read_frames

log = logging.getLogger(__name__)
VERSION = 2  # of what a rule means: raised when the same sources and rule come to give other clips


@dataclass(frozen=True)
class Source:
    """A video, its caption if it has one, and where that came from; or why it cannot even be looked at."""

    path: Path
    caption: str | None
    caption_from: str
    reject: Rejected | None = None

    @property
    def shown(self) -> str:
        """The path as text, also where its bytes are no UTF-8."""
        return os.fsencode(self.path).decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class Ingested:
    """What a run made: every source is in `clips` or in `rejects`."""

    table: Path
    sources: int
    clips: int
    rejects: int
    retimed_sources: int
    skipped: bool = False


def ingest(manifest: IngestManifest, run_dir: Path) -> Ingested:
    """Make `run_dir/clips`; where it is already made from the same sources and rule, do nothing.

    Raises:
        ManifestError: the source is not there or holds no videos.
        StageError: not one source gave a clip, or another process is at it.
    """
    manifest, folder = manifest.located(run_dir), run_dir / "clips"
    sources = list(find_sources(manifest.source))
    if not sources:
        raise ManifestError(f"{manifest.source} holds no videos; known suffixes are {', '.join(VIDEO_SUFFIXES)}")
    key = _key(manifest, sources)
    with sole_writer(folder):
        return _finished(folder, key) or _make_table(manifest, sources, folder, key)


def _make_table(manifest: IngestManifest, sources: list[Source], folder: Path, key: str) -> Ingested:
    clips: dict[str, dict[str, Any]] = {}
    rejects: list[dict[str, str]] = []
    for source in track(sources, "ingest", len(sources)):
        try:
            for clip in cut(source, manifest.clips, manifest.source):
                if clip["clip_id"] in clips:
                    raise Rejected(
                        Reason.BAD_ROW, f"{clip['clip_id']} is there already; {source.caption_from} repeats it"
                    )
                clips[clip["clip_id"]] = clip
        except Rejected as reject:
            log.warning("rejected %s: %s: %s", source.shown, reject.reason, reject.detail)
            rejects.append({"source": source.shown, "reason": reject.reason, "detail": reject.detail})
    reasons = Counter(reject["reason"] for reject in rejects)
    if not clips:
        raise StageError(f"{manifest.source}: not one of {len(sources)} sources gave a clip: {dict(reasons)}")
    facts = {
        "key": key,
        "sources": len(sources),
        "rejects_by_reason": reasons,
        "retimed_sources": len({c["source"] for c in clips.values() if c["fps"] != c["source_fps"]}),
        "rule": manifest.clips.model_dump(mode="json"),
    }
    # Named by what they were made from, so that no index ever points at shards of another run.
    shards = {"clips": [folder / f"clips-{key[:16]}.parquet"], "rejects": [folder / f"rejects-{key[:16]}.parquet"]}
    write_shard(shards["clips"][0], list(clips.values()), CLIPS)
    write_shard(shards["rejects"][0], rejects, REJECTS)
    write_index(folder, shards, facts)
    for stale in set(folder.glob("*.parquet")) - {path for paths in shards.values() for path in paths}:
        stale.unlink()
    return _summary(Table.open(folder))


def find_sources(source: Path) -> Iterator[Source]:
    """Every video of a folder with the caption beside it, or every row of a metadata.csv / .jsonl.

    Raises:
        ManifestError: `source` is not there or is neither, or a metadata file cannot be read at all.
    """
    if source.is_dir():
        for name in ("metadata.csv", "metadata.jsonl"):
            if (source / name).is_file():
                source = source / name
                break
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith(".") and path.is_file():
                yield _with_sidecar(path.absolute())
    elif source.suffix in (".csv", ".jsonl") and source.is_file():
        for number, row in enumerate(_metadata(source), 1):
            yield _from_row(row, source.parent.absolute(), f"{source.name}:{number}")
    else:
        raise ManifestError(f"source {source} is neither a folder nor a metadata.csv or metadata.jsonl")


def _with_sidecar(path: Path) -> Source:
    beside = path.with_suffix(".txt")
    try:
        return Source(path, beside.read_text(encoding="utf-8").strip(), beside.name)
    except FileNotFoundError:
        return Source(path, None, beside.name)
    except (OSError, UnicodeDecodeError) as error:
        return Source(path, None, beside.name, Rejected(Reason.BAD_CAPTION, f"{beside.name} cannot be read: {error}"))


def _from_row(row: Any, folder: Path, where: str) -> Source:
    name, text = (row.get("file_name"), row.get("text")) if isinstance(row, dict) else (None, None)
    if not isinstance(name, str) or not name or "\0" in name:
        return Source(folder, None, where, Rejected(Reason.BAD_ROW, f"{where} has no usable file_name: {row!r:.200}"))
    if text is not None and not isinstance(text, str):
        return Source(
            folder / name, None, where, Rejected(Reason.BAD_CAPTION, f"{where}: text {text!r:.200} is no text")
        )
    return Source(folder / name, text, where)


def _metadata(path: Path) -> Iterator[Any]:
    """The rows of a metadata file, whatever each holds.

    Raises:
        ManifestError: it is not UTF-8, or not CSV.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file) if path.suffix == ".csv" else (_json(line) for line in file if line.strip())
    except (UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{path} cannot be read: {error}") from error


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return line


def cut(source: Source, rule: ClipRule, root: Path) -> list[dict[str, Any]]:
    """The clips of one source, each decoded once to be sure of it.

    Raises:
        Rejected: with the reason.
    """
    if source.reject is not None:
        raise source.reject
    if source.shown != str(source.path):
        raise Rejected(Reason.BAD_NAME, "the file's name is not UTF-8, which tables and decoders want")
    if not (source.caption or "").strip():
        raise Rejected(Reason.NO_CAPTION, f"no caption in {source.caption_from}")
    try:
        facts = probe(source.path)
        windows = frame_windows(facts.num_frames, facts.fps, rule)
        for window in windows:
            read_frames(source.path, window)
        content = sha256_file(source.path)
    except (MediaError, OSError) as error:
        raise Rejected(Reason.UNREADABLE, str(error)) from error
    if not windows:
        wanted = f"{rule.num_frames} at {rule.fps or facts.fps:g} are needed"
        raise Rejected(Reason.TOO_SHORT, f"{facts.num_frames} frames at {facts.fps:g} a second; {wanted}")
    base = root if root.is_dir() else root.parent
    name = source.path.relative_to(base.absolute()) if source.path.is_relative_to(base.absolute()) else source.path
    return [
        {
            "clip_id": f"{name.as_posix()}@{window[0]}",
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
    """Which frames of the source each clip shows: at the rule's rate, the nearest by the source's average rate."""
    rate = fps / rule.fps if rule.fps else 1.0
    nearest = nearest_frames(num_frames, rate)
    starts = range(0, len(nearest) - rule.num_frames + 1, rule.num_frames)
    if rule.windows == "first":
        starts = starts[:1]
    return [nearest[start : start + rule.num_frames] for start in starts]


def _key(manifest: IngestManifest, sources: list[Source]) -> str:
    """Changes when a source, a caption or the rule does. Sizes and times stand for content: hashing is for clips."""
    stats = [
        (s.shown, s.caption, s.path.stat().st_size, s.path.stat().st_mtime_ns) if s.path.is_file() else s.shown
        for s in sources
    ]
    return digest([VERSION, manifest.model_dump(mode="json"), stats])


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
