"""Decide what becomes of every source (kept, rejected, duplicate), and build the rows of the clips table."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pusa.data.schema import CLIPS
from pusa.errors import Reason, Rejected
from pusa.ingest.kinds import KINDS
from pusa.ingest.sources import Catalogue, Source
from pusa.ingest.verdicts import CLIP_COLUMNS, SIGNATURE_BYTES, SOURCE_COLUMNS, Ledger
from pusa.manifest.models import IngestManifest

# Two sources are near-duplicates if the mean absolute difference of their signatures is at most this, in levels of 255.
# Measured: a video of the demo that is encoded again, or scaled up, stays within 1.3 of itself; of the demo's 96
# different videos, the closest two differ by 3.4.
MAX_NEAR_DUPLICATE_DIFFERENCE = 2.0
SIGNATURE_PICTURES = 3
FLOAT_NOISE = 1e-3  # floating-point error of means
BLOCKS = 12  # parts of a signature whose means rule out most pairs: the quarters of each picture
MAX_LISTED = 100  # near-duplicates, and damaged sources, that the table's facts list by name


def find_duplicates(hashes: Sequence[str]) -> dict[int, int]:
    """Return, for the index of each hash that occurred before, the index of its first occurrence."""
    first: dict[str, int] = {}
    return {index: earlier for index, key in enumerate(hashes) if (earlier := first.setdefault(key, index)) != index}


def find_near_duplicates(signatures: np.ndarray) -> dict[int, int]:
    """Return, for the index of each signature that looks like earlier originals, the index of the first of these.

    An original looks like no original before it. The difference of two signatures is at least the difference of their
    means, and at least the mean difference of their blocks' means. So each is compared only with its neighbours in the
    order of means, and in full only with neighbours that their blocks do not rule out.

    Args:
        signatures: (N, 576) uint8.
    """
    # (N, 576) -> (N, 12) float32 means, over the quarters of each picture and the three colours
    side = int((signatures.shape[1] / SIGNATURE_PICTURES / 3) ** 0.5)
    quarters = signatures.reshape(-1, SIGNATURE_PICTURES, 2, side // 2, 2, side // 2, 3)
    blocks = quarters.mean((3, 5, 6), dtype=np.float32).reshape(-1, BLOCKS)
    order = np.argsort(blocks.mean(1), kind="stable")
    blocks = blocks[order]
    means, limit = blocks.mean(1), MAX_NEAR_DUPLICATE_DIFFERENCE + FLOAT_NOISE
    lows, highs = np.searchsorted(means, means - limit), np.searchsorted(means, means + limit)
    is_original = np.zeros(len(order), bool)
    first_original: dict[int, int] = {}
    for index, rank in enumerate(np.argsort(order)):
        near = lows[rank] + np.flatnonzero(is_original[lows[rank] : highs[rank]])
        near = near[np.abs(blocks[near] - blocks[rank]).mean(1) <= limit]
        originals = order[near]
        differences = np.abs(signatures[originals].astype(np.int16) - signatures[index]).mean(1)
        originals = originals[differences <= MAX_NEAR_DUPLICATE_DIFFERENCE]
        if len(originals):
            first_original[index] = int(originals.min())
        else:
            is_original[rank] = True
    return first_original


@dataclass(frozen=True)
class Outcomes:
    """What became of the sources. Every source is in `kept` or in `rejects`."""

    kept: list[Source]
    verdict_rows: list[int]  # for each kept source, the row of its verdict in the ledger
    rejects: list[dict[str, str]]
    duplicates: int  # sources with the bytes of an earlier one, dropped or kept
    near_duplicates: list[tuple[str, str]]  # a source that looks like an earlier one, and that one

    @property
    def rejects_by_reason(self) -> Counter[str]:
        """The number of rejects for each reason."""
        return Counter(reject["reason"] for reject in self.rejects)


def decide_outcomes(sources: Sequence[Source], ledger: Ledger, manifest: IngestManifest) -> Outcomes:
    """Decide for every source whether it is kept or rejected.

    Only sources that would give clips can be duplicates or have some.
    """
    row_of = {path: row for row, path in enumerate(ledger.table("path")["path"].to_pylist())}
    rows = [-1 if source.reject else row_of[str(source.path)] for source in sources]
    verdicts = ledger.table("reason", "detail")
    reasons, details = verdicts["reason"].to_pylist(), verdicts["detail"].to_pylist()
    rejects: dict[int, Rejected] = {}  # here and below, sources are identified by their index
    for index, (source, row) in enumerate(zip(sources, rows, strict=True)):
        if source.reject is not None:
            rejects[index] = source.reject
        elif reasons[row] is not None:
            rejects[index] = Rejected(reasons[row], details[row])

    good = [index for index in range(len(sources)) if index not in rejects]
    hashes = _column(ledger, "source_sha256", [rows[index] for index in good]).to_pylist()
    same = {good[later]: good[first] for later, first in find_duplicates(hashes).items()}
    distinct = [index for index in good if index not in same]
    signatures = _signatures(ledger, [rows[index] for index in distinct])
    near = {distinct[later]: distinct[first] for later, first in find_near_duplicates(signatures).items()}
    if manifest.duplicates == "keep":
        near |= {index: near[first] for index, first in same.items() if first in near}
    if manifest.near_duplicates == "drop":
        for index, first in near.items():
            rejects[index] = _duplicate_reject(Reason.NEAR_DUPLICATE, sources[index], sources[first])
    if manifest.duplicates == "drop":
        for index, first in same.items():
            rejects[index] = _duplicate_reject(Reason.DUPLICATE, sources[index], sources[first])

    kept = [index for index in good if index not in rejects]
    assert len(kept) + len(rejects) == len(sources)
    return Outcomes(
        kept=[sources[index] for index in kept],
        verdict_rows=[rows[index] for index in kept],
        rejects=[
            {"source": sources[index].path_text, "reason": str(reject.reason), "detail": reject.detail}
            for index, reject in sorted(rejects.items())
        ],
        duplicates=len(same),
        near_duplicates=[(sources[index].path_text, sources[first].path_text) for index, first in sorted(near.items())],
    )


def _column(ledger: Ledger, column: str, rows: Sequence[int]) -> pa.ChunkedArray:
    return ledger.table(column)[column].take(pa.array(rows, pa.int64()))


def _signatures(ledger: Ledger, rows: Sequence[int]) -> np.ndarray:
    """Return (N, 576) uint8, without a copy of Arrow's memory."""
    values = _column(ledger, "signature", rows).combine_chunks()
    pixels = np.frombuffer(values.buffers()[1] or b"", np.uint8)
    return pixels[: len(values) * SIGNATURE_BYTES].reshape(-1, SIGNATURE_BYTES)


def _duplicate_reject(reason: Reason, source: Source, first: Source) -> Rejected:
    if source.path == first.path:
        lines = f"{source.caption_from} lists the file again after {first.caption_from}"
        return Rejected(reason, f"{lines}; `duplicates: keep` keeps both")
    relation = "has the same bytes as" if reason == Reason.DUPLICATE else "looks like"
    return Rejected(reason, f"the file {relation} {first.path_text}")


class ClipsTable:
    """Builds the shards of the clips table, in the order of the catalogue, and the facts about all clips."""

    def __init__(self, outcomes: Outcomes, ledger: Ledger, catalogue: Catalogue) -> None:
        self._outcomes, self._catalogue = outcomes, catalogue
        self._verdicts = ledger.table(*SOURCE_COLUMNS, "clips")
        self._uses: Counter[str] = Counter()  # of each clip id
        self._retimed_frames: Counter[str] = Counter()  # of each source
        self._decoders: Counter[str] = Counter()
        self._counted: set[Path] = set()
        self._kinds: Counter[str] = Counter()  # sources of each kind
        self._losses: list[tuple[str, str]] = []  # damaged sources, and what of each is lost

    def shards(self, max_rows: int) -> Iterator[pa.Table]:
        """Yield tables of at most `max_rows` clips. All clips together would be in memory several times."""
        for start in range(0, len(self._outcomes.kept), max_rows):
            table = self._clips_of(slice(start, start + max_rows))
            for row in range(0, table.num_rows, max_rows):
                yield table.slice(row, max_rows)

    def facts(self) -> dict[str, Any]:
        """Return the facts for the table's index. Call it after all shards were built."""
        outcomes = self._outcomes
        return {
            "sources": len(outcomes.kept) + len(outcomes.rejects),
            "sources_with_clips": len(outcomes.kept),
            "rejects_by_reason": outcomes.rejects_by_reason,
            "retimed_frames": self._retimed_frames.total(),
            "retimed_sources": len(self._retimed_frames),
            "duplicates": outcomes.duplicates,
            "near_duplicates": len(outcomes.near_duplicates),
            "near_pairs": outcomes.near_duplicates[:MAX_LISTED],
            "decoders": self._decoders,
            "kinds": {kind: self._kinds[kind] for kind in KINDS if self._kinds[kind]},
            "losses": self._losses[:MAX_LISTED],
            "unlisted": self._catalogue.unlisted,
        }

    def _clips_of(self, part: slice) -> pa.Table:
        """Return the clips of a part of the kept sources, and count their decoders and retimed frames."""
        sources = self._outcomes.kept[part]
        verdicts = self._verdicts.take(pa.array(self._outcomes.verdict_rows[part], pa.int64()))
        for source, kinds, loss in zip(
            sources, verdicts["kinds"].to_pylist(), verdicts["damage"].to_pylist(), strict=True
        ):
            if source.path in self._counted:  # a metadata file may list it twice
                continue
            self._counted.add(source.path)
            self._kinds.update(kinds)
            self._losses += [(source.path_text, loss)] if loss else []
        clips = verdicts["clips"].combine_chunks()
        source_index, flat_clips = pc.list_parent_indices(clips), pc.list_flatten(clips)
        columns: dict[str, Any] = {name: verdicts[name].take(source_index) for name in SOURCE_COLUMNS}
        columns |= {name: flat_clips.field(name) for name in CLIP_COLUMNS}
        for name, values in {
            "clip_id": [self._catalogue.name(source) for source in sources],
            "source": [str(source.path) for source in sources],
            "caption": [source.caption for source in sources],
            "caption_from": [source.caption_from for source in sources],
        }.items():
            columns[name] = pa.array(values, pa.string()).take(source_index)
        columns["clip_id"] = self._unique_ids(columns["clip_id"], columns["frames"])
        paths, retimed = columns["source"].to_pylist(), columns["retimed_frames"].to_pylist()
        for path, frames in zip(paths, retimed, strict=True):
            if frames:
                self._retimed_frames[path] += frames
        self._decoders.update(columns["decoder"].to_pylist())
        return pa.table([columns[field.name] for field in CLIPS], schema=CLIPS)

    def _unique_ids(self, names: pa.Array, frames: pa.Array) -> pa.Array:
        """Return NAME@FIRST_FRAME. If an id is in use, because a path is listed twice, ~2, ~3 ... are appended."""
        first_frames = pc.list_element(frames, 0).cast(pa.string())
        ids = pc.binary_join_element_wise(names, first_frames, "@").to_pylist()
        for index, id in enumerate(ids):
            self._uses[id] += 1
            if self._uses[id] > 1:
                ids[index] = f"{id}~{self._uses[id]}"
        return pa.array(ids, pa.string())
