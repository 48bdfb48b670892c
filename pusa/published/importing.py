"""Published latents -> a latents table that trains as one of our own: nothing is encoded but the null prompt.

Pairs are read in pieces that any number of processes share out by locks, each of them once.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from pusa.claims import join
from pusa.data.encoding import DTYPES, ENCODINGS
from pusa.data.reader import Table
from pusa.errors import StageError, TableError
from pusa.files import digest
from pusa.manifest import ModelSpec
from pusa.model import Model
from pusa.precomputing.plan import Piece, Wanted
from pusa.precomputing.rejected import Rejected
from pusa.precomputing.shards import Store
from pusa.precomputing.table import CLIP_COLUMNS, STORED_SPACE, clear, facts_of, finished, packages, tidy, write_table
from pusa.published.layout import Found, Pair, find_pairs
from pusa.published.ledger import Ledger
from pusa.published.work import KEY_VERSION, Work, name_of
from pusa.weights import ENCODERS


@dataclass(frozen=True)
class Settings:
    """What the files do not tell, and how they are stored."""

    model: ModelSpec  # that made them
    fps: float = 24
    shard_rows: int = 32
    compression: str = "zstd"
    verify: bool = False  # hash all shards that are there, not only those whose size or time changed


@dataclass(frozen=True)
class Imported:
    """What a run made: everything found is in `rows` or in `rejects`. Of the rows, this process read `read`."""

    table: Path
    found: int
    rows: int
    rejects: int
    read: int = 0


def import_latents(folder: Path, table: Path, settings: Settings) -> Imported:
    """Make a latents table of a folder in the published layout, or help others to. What was read is not read again.

    Args:
        folder: holds `videos/**/X.latent.pt` and `captions/**/X.embed.pt`, or both side by side.
        table: the folder to write.
        settings: the model that made the latents, their rate, and how they are stored.

    Raises:
        MediaError: there is no such folder.
        TableError: `table` is one that was not imported.
        WeightsError: the model's encoders cannot be found.
        StageError: not one pair can be imported.
    """
    folder, table = folder.absolute(), table.absolute()
    _require_ours(table)
    model, found = Model(settings.model), find_pairs(folder)
    prints = model.fingerprints(*ENCODERS)
    pairs = {name_of(pair, settings.fps, prints): pair for pair in found.pairs}
    made_from = digest([KEY_VERSION, list(pairs), found.rejects])
    with join(table, lambda: tidy(table, settings.verify)) as crew:
        if (done := finished(table, made_from)) is not None:
            return _summary(done)
        facts = _facts(folder, settings, prints)
        state = Store(table), Ledger(table), Rejected.before(table)
        work = Work(pairs, settings.fps, settings.compression, prints, crew, model, *state, facts)
        work.look()
        work.make(_pieces(pairs, settings.shard_rows))
        with crew.claim("finish", wait=True):
            _write(work, found, {**facts, "made_from": made_from})
        if crew.is_alone():
            work.ledger.compact([name for name in pairs if work.is_there(name)])
            clear(table)
    return _summary(Table.open(table), work.read)


def _pieces(pairs: Mapping[str, Pair], rows: int) -> list[Piece]:
    """Pairs in pieces of mostly one shape: until they are read, their size stands for it."""
    names = sorted(pairs, key=lambda name: (pairs[name].stamps[0][0], pairs[name].clip_id))
    return [Piece("pairs", tuple(names[start : start + rows])) for start in range(0, len(names), rows)]


def _write(work: Work, found: Found, facts: Mapping[str, Any]) -> None:
    """The catalogue and the index, with all that this process and others have read."""
    work.look()
    here = [name for name in work.pairs if work.is_there(name)]
    rejects = [*found.rejects, *_rejects(work, set(here))]
    if not here:
        first = rejects[0]["detail"] if rejects else "there is none"
        raise StageError(f"{facts['imported']['from']}: not one of {len(rejects)} pairs can be imported; {first}")
    rows = work.ledger.rows(here)
    wanted = Wanted(rows.select(CLIP_COLUMNS), rows["key"].to_pylist(), rows["text_key"].to_pylist(), work.null_key)
    model = facts_of(work.model, work.crew.folder, work.store, work.null_key)
    counts = {
        "clips": len(here) + len(rejects),
        "rejects_by_reason": Counter(item["reason"] for item in rejects),
        "dtype": max(pc.unique(rows["dtype"]).to_pylist(), key=lambda name: DTYPES[name].itemsize),
    }
    write_table(work.crew.folder, wanted, work.store, rejects, {**facts, **model, **counts})


def _rejects(work: Work, here: set[str]) -> list[dict[str, str]]:
    tried = work.rejected.all()
    return [
        {"source": str(pair.latent), "reason": tried[name]["reason"], "detail": tried[name]["detail"]}
        for name, pair in work.pairs.items()
        if name not in here
    ]


def _facts(folder: Path, settings: Settings, prints: Mapping[str, str]) -> dict[str, Any]:
    """What every file says of itself."""
    return {
        "made_with": dict(prints),
        "weights": settings.model.model_dump(mode="json"),
        "stored_space": STORED_SPACE,
        "compression": settings.compression,
        "encoding": ENCODINGS[settings.compression],
        "packages": packages(),
        "imported": {"from": str(folder)},
    }


def _require_ours(folder: Path) -> None:
    try:
        table = Table.open(folder)
    except TableError:
        return
    if "imported" not in table.facts:
        raise TableError(f"{folder} holds a table that was not imported; name another folder")


def _summary(table: Table, read: int = 0) -> Imported:
    return Imported(table.folder, table.facts["clips"], table.rows("rows"), table.rows("rejects"), read)
