"""What became of every source: clips, or a reject with its reason. And the rows of the clips table."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pusa.data.schema import CLIPS
from pusa.errors import Reason, Rejected
from pusa.ingest.ledger import OF_CLIP, OF_SOURCE, SIGNATURE, Ledger
from pusa.ingest.sources import Catalogue, Source
from pusa.manifest.models import IngestManifest

# Mean absolute difference of two signatures, of 255, up to which they look alike. Measured: a video of the demo that is
# encoded again, or scaled up, stays within 1.3 of itself; of the demo's 96 different ones, the closest differ by 3.4.
ALIKE = 2.0
PICTURES = 3  # pictures in a signature
NOISE = 1e-3  # of floating point, in means
BLOCKS = 12  # parts of a signature whose means rule out most pairs: the quarters of each picture


def same_as_earlier(names: Sequence[str]) -> dict[int, int]:
    """Place of each that has an equal before it -> place of the first such."""
    first: dict[str, int] = {}
    return {place: earlier for place, name in enumerate(names) if (earlier := first.setdefault(name, place)) != place}


def alike_to_earlier(signatures: np.ndarray) -> dict[int, int]:
    """Of (N, 576) uint8, place of each that looks like an earlier one -> place of the first such original.

    An original looks like none before it. Two look alike whose mean absolute difference is at most `ALIKE`. The
    difference of their means is no greater, nor is the mean difference of their blocks' means: so each is compared
    with its neighbours in the order of means, and in full with those of them alone whose blocks do not rule it out.
    """
    blocks = _block_means(signatures)
    order = np.argsort(blocks.mean(1), kind="stable")
    blocks = blocks[order]
    means = blocks.mean(1)
    lows, highs = np.searchsorted(means, means - ALIKE - NOISE), np.searchsorted(means, means + ALIKE + NOISE)
    is_original = np.zeros(len(order), bool)
    found: dict[int, int] = {}
    for place, row in enumerate(np.argsort(order)):
        near = lows[row] + np.flatnonzero(is_original[lows[row] : highs[row]])
        near = near[np.abs(blocks[near] - blocks[row]).mean(1) <= ALIKE + NOISE]
        originals = order[near]
        originals = originals[_differences(signatures[originals], signatures[place]) <= ALIKE]
        if len(originals):
            found[place] = int(originals.min())
        else:
            is_original[row] = True
    return found


def _block_means(pixels: np.ndarray) -> np.ndarray:
    """(N, 576) -> (N, 12) float32: over the quarters of each picture and its colours."""
    side = int((pixels.shape[1] / PICTURES / 3) ** 0.5)
    parts = pixels.reshape(-1, PICTURES, 2, side // 2, 2, side // 2, 3)
    return parts.mean((3, 5, 6), dtype=np.float32).reshape(-1, BLOCKS)


def _differences(some: np.ndarray, one: np.ndarray) -> np.ndarray:
    return np.abs(some.astype(np.int16) - one).mean(1)


PAIRS = 100  # of near-duplicates, listed by name


@dataclass(frozen=True)
class Accounts:
    """Every source is in `kept` or in `rejects`."""

    kept: list[Source]
    rows: list[int]  # of the verdicts, for each that is kept
    rejects: list[dict[str, str]]
    duplicates: int  # sources with the bytes of an earlier one, dropped or kept
    near: list[tuple[str, str]]  # a source that looks like an earlier one, and that one

    @property
    def reasons(self) -> Counter[str]:
        """How many rejects there are for each reason."""
        return Counter(reject["reason"] for reject in self.rejects)


def settle(sources: Sequence[Source], ledger: Ledger, manifest: IngestManifest) -> Accounts:
    """Account for every source. Only sources that would give clips have duplicates."""
    row_of = {path: row for row, path in enumerate(ledger.table("path")["path"].to_pylist())}
    rows = [-1 if source.reject else row_of[str(source.path)] for source in sources]
    refused = _refused(sources, ledger.table("reason", "detail"), rows)
    good = [place for place in range(len(sources)) if place not in refused]
    same = _places(same_as_earlier(_values(ledger, "source_sha256", rows, good).to_pylist()), good)
    distinct = [place for place in good if place not in same]
    near = _places(alike_to_earlier(_signatures(ledger, rows, distinct)), distinct)
    near |= {place: near[first] for place, first in same.items() if first in near and manifest.duplicates == "keep"}
    for choice, found, reason in (
        (manifest.near_duplicates, near, Reason.NEAR_DUPLICATE),
        (manifest.duplicates, same, Reason.DUPLICATE),
    ):
        if choice == "drop":
            refused |= {place: _twin(reason, sources[place], sources[first]) for place, first in found.items()}
    kept = [place for place in good if place not in refused]
    assert len(kept) + len(refused) == len(sources)
    return Accounts(
        kept=[sources[place] for place in kept],
        rows=[rows[place] for place in kept],
        rejects=[_reject(sources[place], refused[place]) for place in sorted(refused)],
        duplicates=len(same),
        near=[(sources[place].shown, sources[first].shown) for place, first in sorted(near.items())],
    )


class ClipRows:
    """The rows of the clips table, in the order of the catalogue, and what is to be said of them all."""

    def __init__(self, accounts: Accounts, ledger: Ledger, catalogue: Catalogue) -> None:
        self._accounts, self._catalogue = accounts, catalogue
        self._verdicts = ledger.table(*OF_SOURCE, "clips")
        self._ids: Counter[str] = Counter()
        self._retimed: Counter[str] = Counter()
        self._decoders: Counter[str] = Counter()

    def shards(self, rows: int) -> Iterator[pa.Table]:
        """So many rows at most at a time: all of them at once would be in memory several times."""
        for start in range(0, len(self._accounts.kept), rows):
            table = self._table(slice(start, start + rows))
            for row in range(0, table.num_rows, rows):
                yield table.slice(row, rows)

    def facts(self) -> dict[str, Any]:
        """What the table says of itself, once all its shards were made."""
        accounts = self._accounts
        return {
            "sources": len(accounts.kept) + len(accounts.rejects),
            "sources_with_clips": len(accounts.kept),
            "rejects_by_reason": accounts.reasons,
            "retimed_frames": self._retimed.total(),
            "retimed_sources": len(self._retimed),
            "duplicates": accounts.duplicates,
            "near_duplicates": len(accounts.near),
            "near_pairs": accounts.near[:PAIRS],
            "decoders": self._decoders,
            "unlisted": self._catalogue.unlisted,
        }

    def _table(self, sources: slice) -> pa.Table:
        kept = self._accounts.kept[sources]
        taken = self._verdicts.take(pa.array(self._accounts.rows[sources], pa.int64()))
        clips = taken["clips"].combine_chunks()
        parents, flat = pc.list_parent_indices(clips), pc.list_flatten(clips)
        columns: dict[str, Any] = {name: taken[name].take(parents) for name in OF_SOURCE}
        columns |= {name: flat.field(name) for name in OF_CLIP}
        for name, values in {
            "clip_id": [self._catalogue.name(source) for source in kept],
            "source": [str(source.path) for source in kept],
            "caption": [source.caption for source in kept],
            "caption_from": [source.caption_from for source in kept],
        }.items():
            columns[name] = pa.array(values, pa.string()).take(parents)
        columns["clip_id"] = self._distinct(columns["clip_id"], columns["frames"])
        self._tally(columns)
        return pa.table([columns[field.name] for field in CLIPS], schema=CLIPS)

    def _distinct(self, names: pa.Array, frames: pa.Array) -> pa.Array:
        """NAME@FIRST FRAME; where that is taken, as by a path that is listed twice, with ~2, ~3 and so on after it."""
        firsts = pc.list_element(frames, 0).cast(pa.string())
        ids = pc.binary_join_element_wise(names, firsts, "@").to_pylist()
        for place, id in enumerate(ids):
            self._ids[id] += 1
            if self._ids[id] > 1:
                ids[place] = f"{id}~{self._ids[id]}"
        return pa.array(ids, pa.string())

    def _tally(self, columns: Mapping[str, Any]) -> None:
        paths, retimed = columns["source"].to_pylist(), columns["retimed_frames"].to_pylist()
        for path, frames in zip(paths, retimed, strict=True):
            if frames:
                self._retimed[path] += frames
        self._decoders.update(columns["decoder"].to_pylist())


def _twin(reason: Reason, source: Source, first: Source) -> Rejected:
    if source.path == first.path:
        told = f"{source.caption_from} lists it again after {first.caption_from}; `duplicates: keep` takes both"
    else:
        told = f"it {'has the bytes of' if reason == Reason.DUPLICATE else 'looks like'} {first.shown}"
    return Rejected(reason, told)


def _refused(sources: Sequence[Source], verdicts: pa.Table, rows: Sequence[int]) -> dict[int, Rejected]:
    """Place -> why, by what the catalogue and the verdicts say."""
    reasons, details = verdicts["reason"].to_pylist(), verdicts["detail"].to_pylist()
    refused = {}
    for place, (source, row) in enumerate(zip(sources, rows, strict=True)):
        if source.reject is not None:
            refused[place] = source.reject
        elif reasons[row] is not None:
            refused[place] = Rejected(reasons[row], details[row])
    return refused


def _values(ledger: Ledger, column: str, rows: Sequence[int], places: Sequence[int]) -> pa.ChunkedArray:
    return ledger.table(column)[column].take(pa.array([rows[place] for place in places], pa.int64()))


def _signatures(ledger: Ledger, rows: Sequence[int], places: Sequence[int]) -> np.ndarray:
    """(N, 576) uint8, as they lie in memory."""
    values = _values(ledger, "signature", rows, places).combine_chunks()
    return np.frombuffer(values.buffers()[1] or b"", np.uint8)[: len(values) * SIGNATURE].reshape(-1, SIGNATURE)


def _places(found: dict[int, int], places: Sequence[int]) -> dict[int, int]:
    return {places[later]: places[first] for later, first in found.items()}


def _reject(source: Source, reject: Rejected) -> dict[str, str]:
    return {"source": source.shown, "reason": str(reject.reason), "detail": reject.detail}
