"""What became of every source: clips, or a reject with its reason. And the rows of the clips table."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pusa.data.schema import CLIPS, Reason
from pusa.errors import Rejected
from pusa.manifest import IngestManifest
from pusa.sources.catalogue import Catalogue, Source
from pusa.sources.duplicates import alike_to_earlier, same_as_earlier
from pusa.sources.ledger import OF_CLIP, OF_SOURCE, SIGNATURE, Ledger

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
