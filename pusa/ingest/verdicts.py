"""Judge every source by decoding it, and remember the verdicts in a ledger on disk, which survives kills and reruns."""

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import monotonic, time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pusa.data.schema import CLIPS, CONVERSION
from pusa.data.schema import VERSION as SCHEMA_VERSION
from pusa.data.shard import HASH_DIGITS
from pusa.data.writer import write_hashed_shard
from pusa.errors import Reason, Rejected
from pusa.ingest.cutting import Timing, cut_source
from pusa.ingest.kinds import kinds_of
from pusa.ingest.sources import Source
from pusa.manifest.models import ClipSettings, Limits
from pusa.system.failures import RUN_ERRNOS
from pusa.system.files import GONE, Stamp, digest, sha256_file, stamp_of
from pusa.system.locks import sole_writer
from pusa.system.text import first_line
from pusa.video.decoders.choice import DecoderChooser
from pusa.video.ffmpeg import hash_regular_file
from pusa.video.fit import compute_placement
from pusa.video.survey import survey_video

log = logging.getLogger(__name__)
VERSION = 5  # raise it when the same source and clip settings come to give other clips
# Another try may succeed, so verdicts with these reasons are not stored.
TRANSIENT_REASONS = (Reason.TIMEOUT, Reason.CRASHED, Reason.UNREADABLE, Reason.CHANGED, Reason.FAILED)
SIGNATURE_FRAMES = (1 / 6, 1 / 2, 5 / 6)  # positions of a signature's pictures, as shares of the source's frames
SIGNATURE_BYTES = 3 * 8 * 8 * 3  # pictures, height, width, colours

# Columns of the clips table that describe the source, and those that describe one clip.
SOURCE_COLUMNS = (
    "source_sha256", "pixel_aspect", "source_width", "source_height", "source_frames", "source_fps", "kinds", "damage",
    *(field.name for field in CONVERSION),
)  # fmt: skip
CLIP_COLUMNS = ("frames", "decoder", "start_time", "width", "height", "fit", "box", "bucket", "fps", "retimed_frames")
STAMP_COLUMNS = ("size", "mtime_ns", "ctime_ns")
VERDICTS = pa.schema(
    [
        ("path", pa.string()),
        *((name, pa.int64()) for name in STAMP_COLUMNS),
        ("reason", pa.string()),  # null for a source that gives clips
        ("detail", pa.string()),
        *((name, CLIPS.field(name).type) for name in SOURCE_COLUMNS),
        ("signature", pa.binary(SIGNATURE_BYTES)),
        ("clips", pa.list_(pa.struct([(name, CLIPS.field(name).type) for name in CLIP_COLUMNS]))),
    ]
)
Verdict = Mapping[str, Any]  # a row of VERDICTS


def judge(source: Source, clip_settings: ClipSettings, limits: Limits) -> Verdict:
    """Decode a source, and return its clips or the reason why it is rejected.

    Raises:
        StageError: no decoder process can be started. Faults of the source are in the verdict and never raised.
        pa.ArrowException: the ledger cannot hold the verdict.
        OSError: no file can be opened, because too many are open.
    """
    reject, facts = None, {}
    try:
        facts = _examine(source.path, clip_settings, limits)
    except Rejected as error:
        reject = error
    if stamp_of(source.path) != source.stamp:  # nor is a fault the source's then
        reject = Rejected(Reason.CHANGED, f"{source.path} was changed or deleted while it was decoded")
    if reject is not None:
        return verdict_of_reject(source, reject)
    verdict = {**_common(source), **facts}
    pa.Table.from_pylist([verdict], schema=VERDICTS)  # one that cannot be stored must not stop the others
    return verdict


def verdict_of_reject(source: Source, reject: Rejected) -> Verdict:
    """Return the verdict on a source that gives no clips."""
    return {**_common(source), "reason": str(reject.reason), "detail": reject.detail}


def _common(source: Source) -> dict[str, Any]:
    columns = dict.fromkeys(VERDICTS.names) | {"path": str(source.path), "clips": []}
    return columns | dict(zip(STAMP_COLUMNS, source.stamp, strict=True))


def has_hash(source: Source, sha256: str) -> bool:
    """Return whether a source has the bytes that an earlier verdict is about.

    Raises:
        Rejected: it cannot be read.
    """
    return hash_regular_file(source.path) == sha256 and stamp_of(source.path) == source.stamp


def _examine(path: Path, clip_settings: ClipSettings, limits: Limits) -> dict[str, Any]:
    """Return the facts of a good source: `SOURCE_COLUMNS`, its signature and its clips."""
    survey = survey_video(
        path, limits, clip_settings.scenes, clip_settings.background, clip_settings.hdr, clip_settings.interlaced
    )
    if survey.damage and clip_settings.damaged == "reject":
        raise Rejected(Reason.DAMAGED, f"{path} is damaged: {survey.damage}")
    size = (survey.width, survey.height)
    timing = Timing(survey.times, survey.fps, survey.scene_starts, survey.usable)
    try:
        cuts = cut_source(timing, survey.width * survey.pixel_aspect, survey.height, clip_settings)
    except Rejected as reject:
        if survey.damage:
            detail = f"{path} is damaged: {survey.damage}; the rest gives no clip: {reject.detail}"
            raise Rejected(Reason.DAMAGED, detail) from reject
        raise
    chooser = DecoderChooser(path, survey, limits.decoding_seconds)
    fit, damage, clips = clip_settings.fit, survey.damage, []
    for cut in cuts:
        try:
            decoder = chooser.choose(cut.frames.tolist())
        except Rejected as reject:  # of a damaged source; its other clips may be the same each time
            if reject.reason != Reason.DAMAGED:
                raise
            damage = reject.detail
            continue
        width, height, num_frames = cut.shape.width, cut.shape.height, cut.shape.num_frames
        clips.append(
            {
                "frames": cut.frames,
                "decoder": decoder,
                "start_time": float(survey.times[cut.frames[0]]),
                "width": width,
                "height": height,
                "fit": fit,
                "box": compute_placement(*size, survey.pixel_aspect, width, height, fit).box,
                "bucket": f"{width}x{height}x{num_frames}",
                "fps": cut.fps,
                "retimed_frames": cut.retimed,
            }
        )
    if not clips:
        raise Rejected(Reason.DAMAGED, damage)
    return {
        "source_sha256": hash_regular_file(path),
        "pixel_aspect": survey.pixel_aspect,
        "source_width": survey.width,
        "source_height": survey.height,
        "source_frames": len(survey.times),
        "source_fps": survey.fps,
        "kinds": kinds_of(survey),
        "damage": damage,
        **asdict(survey.conversion),
        "signature": signature_of(survey.thumbnails),
        "clips": clips,
    }


def signature_of(thumbnails: np.ndarray) -> bytes:
    """Return three of the thumbnails (T, 8, 8, 3) as bytes. They hardly depend on a video's size and encoding."""
    return thumbnails[[int(len(thumbnails) * share) for share in SIGNATURE_FRAMES]].tobytes()


CHUNK, SECONDS = 64, 10.0  # verdicts in a file, and seconds between files: the most that a kill may cost
KEEP_SECONDS = 30 * 24 * 3600.0  # how long the unused ledger of other clip settings is kept
BATCH_ROWS = 4096
# The key, a number, and the hash of the bytes; files of earlier versions lack the hash.
_LEDGER_FILE = re.compile(r"([0-9a-f]{16})-(\d{8})(?:-([0-9a-f]{32}))?\.parquet")


def key_of(clip_settings: ClipSettings, limits: Limits) -> str:
    """Return a hash of everything but the source that a verdict depends on: not of captions, nor of the time limit."""
    relevant = limits.model_dump(mode="json", include={"source_seconds", "source_pixels"})
    return digest([VERSION, SCHEMA_VERSION, clip_settings.model_dump(mode="json"), relevant])[:16]


class Ledger:
    """The stored verdicts for one key, in numbered files of a folder. Of two verdicts on a path, the later counts."""

    def __init__(self, folder: Path, key: str, chunk: int = CHUNK, seconds: float = SECONDS) -> None:
        self._folder, self._key, self._chunk, self._seconds = folder, key, chunk, seconds
        own = sorted(path for path, file_key in _ledger_files(folder) if file_key == key)
        self._files = [path for path in own if _is_intact_or_removed(path)]
        self._last_rows: list[int] | None = None  # of all rows, the last one of each path
        self._last_number = max((int(path.stem.split("-")[1]) for path in own), default=0)
        self._pending: list[Verdict] = []
        self._transient: list[Verdict] = []
        self._renewed: dict[str, Stamp] = {}
        self._written = monotonic()

    @classmethod
    @contextmanager
    def open(cls, folder: Path, key: str, chunk: int = CHUNK, seconds: float = SECONDS) -> Iterator["Ledger"]:
        """Open the ledger for this process alone. However the work ends, all added verdicts are written.

        Ledgers with other keys that were not opened for 30 days are removed.

        Args:
            folder: of the ledger files; created if missing.
            key: see `key_of`.
            chunk: verdicts that may be pending before `flush_if_due` writes them.
            seconds: for which verdicts may be pending.

        Raises:
            StageError: another process has it open.
        """
        with sole_writer(folder):
            for path, file_key in _ledger_files(folder):
                if file_key == key:
                    os.utime(path)  # the time of last use
                elif time() - path.stat().st_mtime > KEEP_SECONDS:
                    path.unlink()
            ledger = cls(folder, key, chunk, seconds)
            try:
                yield ledger
            finally:
                ledger.flush()
                ledger._write_renewed()

    def add(self, verdict: Verdict) -> None:
        """Add a verdict. It is on disk after the next flush."""
        self._pending.append(verdict)

    def renew(self, path: str, stamp: Stamp) -> None:
        """Let the verdict on a file count for another stamp. It is on disk after `compact`, or when the work ends."""
        self._renewed[path] = stamp

    def flush_if_due(self) -> None:
        """Write the added verdicts if there are `chunk` or more, or the last write is `seconds` ago.

        Raises:
            OSError: they cannot be written.
        """
        if len(self._pending) >= self._chunk or monotonic() - self._written >= self._seconds:
            self.flush()

    def flush(self) -> None:
        """Write the added verdicts. Those with a transient reason are kept in memory, for this run only.

        Raises:
            OSError: they cannot be written.
        """
        pending, self._pending, self._written = self._pending, [], monotonic()
        lasting = [verdict for verdict in pending if verdict["reason"] not in TRANSIENT_REASONS]
        self._transient += [verdict for verdict in pending if verdict["reason"] in TRANSIENT_REASONS]
        self._last_rows = None
        if lasting:
            self._write(pa.Table.from_pylist(lasting, schema=VERDICTS))

    def table(self, *columns: str) -> pa.Table:
        """Return these columns of the last verdict on each path. The order of rows is stable until a verdict is added.

        All columns together may need hundreds of megabytes, so callers read only the columns that they use.
        """
        if self._last_rows is None:
            paths = self._read(["path"])["path"].to_pylist()
            self._last_rows = list({path: row for row, path in enumerate(paths)}.values())
        table = self._read(columns)
        return table if len(self._last_rows) == table.num_rows else table.take(pa.array(self._last_rows, pa.int64()))

    def stamps(self) -> dict[str, Stamp]:
        """Return, for each path, the stamp of the file that was judged."""
        path, *stamp = (column.to_pylist() for column in self.table("path", *STAMP_COLUMNS).columns)
        return dict(zip(path, zip(*stamp, strict=True), strict=True))

    def hashes(self) -> dict[str, str]:
        """Return, for each path with clips, the SHA-256 of the file that was judged."""
        columns = self.table("path", "source_sha256", "reason")
        return {
            path: sha256
            for path, sha256, reason in zip(*(column.to_pylist() for column in columns.columns), strict=True)
            if reason is None and sha256
        }

    def compact(self, stamps: Mapping[str, Stamp]) -> None:
        """Merge all files into one, and drop the verdicts on files of another size or time than that in `stamps`.

        Verdicts on paths that are not in `stamps`, or whose file is missing, are kept: the file may come back. One with
        another ctime only may be the same file. Transient verdicts are dropped.
        """
        self._transient, self._last_rows = [], None
        self._write_renewed()
        keep = [stamps.get(path, GONE)[:2] in (stamp[:2], GONE[:2]) for path, stamp in self.stamps().items()]
        if not self._files or (len(self._files) == 1 and all(keep)):
            return
        table = self.table(*VERDICTS.names)
        old, self._files = self._files, []
        self._write(table if all(keep) else table.filter(pa.array(keep, pa.bool_())))
        for path in old:
            path.unlink()

    def _read(self, columns: Sequence[str]) -> pa.Table:
        transient = pa.Table.from_pylist(self._transient, schema=VERDICTS).select(columns)
        batches = (batch for path in self._files for batch in _read_batches(path, columns))
        return pa.concat_tables([pa.Table.from_batches(batches, transient.schema), transient])

    def _write_renewed(self) -> None:
        if not self._renewed:
            return
        table, renewed = self.table(*VERDICTS.names), self._renewed
        rows = [row for row, path in enumerate(table["path"].to_pylist()) if path in renewed]
        table = table.take(pa.array(rows, pa.int64()))
        stamps = zip(*(renewed[path] for path in table["path"].to_pylist()), strict=True)
        for name, values in zip(STAMP_COLUMNS, stamps, strict=True):
            table = table.set_column(VERDICTS.names.index(name), VERDICTS.field(name), pa.array(values, pa.int64()))
        self._write(table)
        self._renewed, self._last_rows = {}, None

    def _write(self, table: pa.Table) -> None:
        prefix = f"{self._key}-{self._last_number + 1:08d}"
        self._files.append(write_hashed_shard(self._folder, prefix, table, VERDICTS))
        self._last_number += 1


def _ledger_files(folder: Path) -> list[tuple[Path, str]]:
    """Return all ledger files of a folder, each with its key."""
    return [
        (path, match[1]) for path in folder.iterdir() if (match := _LEDGER_FILE.fullmatch(path.name)) and path.is_file()
    ]


def _is_intact_or_removed(path: Path) -> bool:
    """Return whether a ledger file is as it was written. A damaged one is removed: its sources are decoded again."""
    try:
        match = _LEDGER_FILE.fullmatch(path.name)
        assert match is not None
        if match[3] and sha256_file(path)[:HASH_DIGITS] != match[3]:
            raise ValueError("its SHA-256 is not that in its name")
        for _ in _read_batches(path, VERDICTS.names):
            pass
    except (OSError, LookupError, ValueError, TypeError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno in RUN_ERRNOS:
            raise
        log.warning("%s is damaged, so its sources are decoded again: %s", path, first_line(error))
        path.unlink()
        return False
    return True


def _read_batches(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield a file in batches. Reading it at once would use three times the memory."""
    schema = pa.schema([VERDICTS.field(name) for name in columns])
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        stored = [name for name in columns if name in file.schema_arrow.names or name != "ctime_ns"]
        for batch in file.iter_batches(BATCH_ROWS, columns=stored, use_threads=False):
            if len(stored) < len(columns):  # a file of an earlier version
                zeros = pa.array(np.zeros(len(batch), np.int64))
                batch = pa.record_batch([batch[name] if name in stored else zeros for name in columns], names=columns)
            yield batch.select(columns).cast(schema)
