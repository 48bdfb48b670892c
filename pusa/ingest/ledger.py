"""What is remembered of each source: the verdict that it took minutes to decode, kept through kills and re-runs."""

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, time
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pusa.data.schema import CLIPS
from pusa.data.schema import VERSION as SCHEMA_VERSION
from pusa.data.writer import write_shard
from pusa.errors import Reason
from pusa.manifest.models import ClipSettings, Limits
from pusa.system.files import GONE, Stamp, digest
from pusa.system.locks import sole_writer

VERSION = 4  # of what a rule means: raised when the same source and rule come to give other clips
# What another try may settle otherwise, so that it is never remembered.
PASSING = (Reason.TIMEOUT, Reason.CRASHED, Reason.UNREADABLE, Reason.CHANGED)
CHUNK, SECONDS = 64, 10.0  # verdicts a file, or what a kill may cost
KEPT = 30 * 24 * 3600.0  # seconds, since its last use, for which another rule's ledger is kept
ROWS_AT_ONCE = 4096
SIGNATURE = 3 * 8 * 8 * 3  # bytes: pictures, height, width, colours
_FILE = re.compile(r"([0-9a-f]{16})-\d{8}\.parquet")  # the key, and a number
log = logging.getLogger(__name__)

# Columns of the clips table by whether they are the source's or each clip's.
OF_SOURCE = ("source_sha256", "pixel_aspect", "source_width", "source_height", "source_frames", "source_fps")
OF_CLIP = ("frames", "decoder", "start_time", "width", "height", "fit", "box", "bucket", "fps", "retimed_frames")
VERDICTS = pa.schema(
    [
        ("path", pa.string()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("reason", pa.string()),  # null where it gives clips
        ("detail", pa.string()),
        *((name, CLIPS.field(name).type) for name in OF_SOURCE),
        ("signature", pa.binary(SIGNATURE)),
        ("clips", pa.list_(pa.struct([(name, CLIPS.field(name).type) for name in OF_CLIP]))),
    ]
)
Verdict = Mapping[str, Any]  # a row of it


def key_of(rule: ClipSettings, limits: Limits) -> str:
    """Names what verdicts depend on beside the source. Captions are no part of it, nor is patience."""
    limited = limits.model_dump(mode="json", include={"source_seconds", "source_pixels"})
    return digest([VERSION, SCHEMA_VERSION, rule.model_dump(mode="json"), limited])[:16]


class Ledger:
    """The verdicts of one rule, in numbered files of a folder; of two on one path, the later counts."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key
        own = sorted(path for path, of in _files(folder) if of == key)
        self._files = [path for path in own if _is_whole(path)]
        self._last_rows: list[int] | None = None  # of all rows, the last one of each path
        self._last = max((int(path.stem.rpartition("-")[2]) for path in own), default=0)
        self._pending: list[Verdict] = []
        self._passing: list[Verdict] = []
        self._written = monotonic()

    @classmethod
    @contextmanager
    def open(cls, folder: Path, key: str) -> Iterator["Ledger"]:
        """A ledger for this process alone. Whatever ends the work, what was added is written.

        Ledgers of other rules that nobody opened for 30 days are removed.
        """
        with sole_writer(folder):
            _forget_others(folder, key)
            ledger = cls(folder, key)
            try:
                yield ledger
            finally:
                ledger.flush()

    def add(self, verdict: Verdict) -> None:
        """Remember a verdict, which is on the disk once it is flushed."""
        self._pending.append(verdict)

    def flush_if_due(self) -> None:
        """Write what was added, if that is much or was long ago.

        Raises:
            OSError: as `flush`.
        """
        if len(self._pending) >= CHUNK or monotonic() - self._written >= SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was added. What is passing is kept for this run alone.

        Raises:
            OSError: it cannot be written.
        """
        pending, self._pending, self._written = self._pending, [], monotonic()
        lasting = [verdict for verdict in pending if verdict["reason"] not in PASSING]
        self._passing += [verdict for verdict in pending if verdict["reason"] in PASSING]
        self._last_rows = None
        if lasting:
            self._write(pa.Table.from_pylist(lasting, schema=VERDICTS))

    def table(self, *columns: str) -> pa.Table:
        """These columns of all verdicts, the last one of each path; their order stays as long as none is added.

        All columns together may be hundreds of megabytes, so each is read when it is wanted.
        """
        if self._last_rows is None:
            paths = self._read(["path"])["path"].to_pylist()
            self._last_rows = list({path: row for row, path in enumerate(paths)}.values())
        table = self._read(columns)
        return table if len(self._last_rows) == table.num_rows else table.take(pa.array(self._last_rows, pa.int64()))

    def stamps(self) -> dict[str, Stamp]:
        """Path -> the stamp of what was judged."""
        path, size, mtime_ns = (column.to_pylist() for column in self.table("path", "size", "mtime_ns").columns)
        return dict(zip(path, zip(size, mtime_ns, strict=True), strict=True))

    def compact(self, stamps: Mapping[str, Stamp]) -> None:
        """Put all files into one, without verdicts on what these paths' files were before.

        What is not listed now, or not there, may be again. What is passing counts for nothing any more.
        """
        self._passing, self._last_rows = [], None
        keep = [stamps.get(path, GONE) in (stamp, GONE) for path, stamp in self.stamps().items()]
        if not self._files or (len(self._files) == 1 and all(keep)):
            return
        table = self.table(*VERDICTS.names)
        old, self._files = self._files, []
        self._write(table if all(keep) else table.filter(pa.array(keep, pa.bool_())))
        for path in old:
            path.unlink()

    def _read(self, columns: Sequence[str]) -> pa.Table:
        passing = pa.Table.from_pylist(self._passing, schema=VERDICTS).select(columns)
        batches = (batch for path in self._files for batch in _batches(path, columns))
        return pa.concat_tables([pa.Table.from_batches(batches, passing.schema), passing])

    def _write(self, table: pa.Table) -> None:
        path = self._folder / f"{self._key}-{self._last + 1:08d}.parquet"
        write_shard(path, table, VERDICTS)
        self._last += 1
        self._files.append(path)


def _files(folder: Path) -> list[tuple[Path, str]]:
    """All ledgers' files, each with its key."""
    return [(path, match[1]) for path in folder.iterdir() if (match := _FILE.fullmatch(path.name))]


def _forget_others(folder: Path, key: str) -> None:
    """Remove what was not used for long; the time of a file is that of its last use."""
    for path, of in _files(folder):
        if of == key:
            os.utime(path)
        elif time() - path.stat().st_mtime > KEPT:
            path.unlink()


def _is_whole(path: Path) -> bool:
    """Whether a file can be read; if not, it goes: its verdicts are only remembered, and can be had again."""
    try:
        for _ in _batches(path, VERDICTS.names):
            pass
    except (OSError, pa.ArrowException) as error:
        log.warning("%s is damaged, and its sources are decoded again: %s", path, error)
        path.unlink()
        return False
    return True


def _batches(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """In pieces: as a whole it would take thrice the memory while it is read."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        yield from file.iter_batches(ROWS_AT_ONCE, columns=columns, use_threads=False)
