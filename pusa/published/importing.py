"""Published latents -> a latents table that trains as one of our own: nothing is encoded but the null prompt.

Pairs are read in pieces that any number of processes share out by locks, each of them once.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pusa.claims import Crew, join
from pusa.data.reader import Table
from pusa.data.writer import INDEX
from pusa.errors import StageError, TableError
from pusa.files import digest, read_json
from pusa.manifest import ModelSpec
from pusa.model import Model
from pusa.precomputing.plan import Piece, Wanted
from pusa.precomputing.rejected import Refusals
from pusa.precomputing.shards import Store
from pusa.precomputing.table import CLIP_COLUMNS, STORED_SPACE, clear, facts_of, finished, packages, tidy, write_table
from pusa.published.layout import Found, Pair, find_pairs
from pusa.published.ledger import ReadPairs
from pusa.published.work import PAIR_VERSION, Import, name_of
from pusa.weights import ENCODERS
from pusa.words import plain


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
        StageError: not one pair can be imported, or another process makes another table there.
    """
    folder, table = folder.absolute(), table.absolute()
    _require_ours(table)
    model, found = Model(settings.model), find_pairs(folder)
    prints = model.fingerprints(*ENCODERS)
    pairs = {name_of(pair, settings.fps, prints): pair for pair in found.pairs}
    made_from = digest([PAIR_VERSION, list(pairs), found.rejects])
    plan = {"made_from": made_from, "shard_rows": settings.shard_rows}
    with join(table, lambda: tidy(table, settings.verify), plan) as crew:
        read = 0
        if finished(table, made_from) is None:
            work = _work(pairs, settings, crew, model, _facts(folder, settings, prints))
            work.make(pieces_of(pairs, crew.plan["shard_rows"]))
            with crew.claim("finish", wait=True):
                _write(work, found)
            read = work.read
        made = Table.open(table, "rows")
        if crew.is_alone():
            ReadPairs(table).compact(list(pairs))
            clear(table)
    return Imported(table, made.facts["clips"], made.rows("rows"), made.rows("rejects"), read)


def _work(pairs: Mapping[str, Pair], settings: Settings, crew: Crew, model: Model, facts: Mapping[str, Any]) -> Import:
    state = Store(crew.folder), ReadPairs(crew.folder), Refusals.before(crew.folder)
    work = Import(pairs, settings.fps, settings.compression, facts["made_with"], crew, model, *state, facts)
    work.look()
    return work


def pieces_of(pairs: Mapping[str, Pair], rows: int) -> list[Piece]:
    """Pairs in pieces of mostly one shape: until they are read, their size stands for it."""
    names = sorted(pairs, key=lambda name: (pairs[name].stamps[0][0], pairs[name].clip_id))
    return [Piece("pairs", tuple(names[start : start + rows])) for start in range(0, len(names), rows)]


def _write(work: Import, found: Found) -> None:
    """The catalogue and the index, with all that this process and others have read."""
    work.look()
    here = [name for name in work.pairs if work.is_there(name)]
    rejects = [*found.rejects, *_rejects(work, set(here))]
    if not here:
        first = plain(rejects[0]["detail"]) if rejects else "there is none"
        raise StageError(f"{work.facts['imported']['from']}: not one of {len(rejects)} pairs can be imported; {first}")
    rows = work.ledger.rows(here)
    wanted = Wanted(rows.select(CLIP_COLUMNS), rows["key"].to_pylist(), rows["text_key"].to_pylist(), work.null_key)
    model = facts_of(work.model, work.crew.folder, work.store, work.null_key)
    counts = {
        "made_from": work.crew.plan["made_from"],
        "clips": len(here) + len(rejects),
        "rejects_by_reason": Counter(item["reason"] for item in rejects),
    }
    write_table(work.crew.folder, wanted, work.store, rejects, {**work.facts, **model, **counts})


def _rejects(work: Import, here: set[str]) -> list[dict[str, str]]:
    """What was found wanting of all that is not here.

    Raises:
        StageError: something is neither: its shard was removed while this ran.
    """
    tried = work.refusals.all()
    others = {name: pair for name, pair in work.pairs.items() if name not in here}
    if lost := others.keys() - tried.keys():
        raise StageError(
            f"{work.crew.folder}: {len(lost)} pairs that were read are gone again, such as "
            f"{plain(others[min(lost)].latent)}; run the same command again"
        )
    return [
        {"source": str(pair.latent), "reason": tried[name]["reason"], "detail": tried[name]["detail"]}
        for name, pair in others.items()
    ]


def _facts(folder: Path, settings: Settings, prints: Mapping[str, str]) -> dict[str, Any]:
    """What every file says of itself."""
    return {
        "made_with": dict(prints),
        "weights": settings.model.model_dump(mode="json"),
        "stored_space": STORED_SPACE,
        "packages": packages(),
        "imported": {"from": str(folder)},
    }


def _require_ours(folder: Path) -> None:
    """Nothing but an imported table is replaced, of whatever version; one cannot tell what a damaged one was."""
    if not (folder / INDEX).exists():
        return
    index = read_json(folder / INDEX)
    facts = index.get("facts") if isinstance(index, dict) else None
    if not isinstance(facts, dict) or "imported" not in facts:
        raise TableError(
            f"{folder} holds a table that was not imported, or is damaged; remove it, or name another folder"
        )
