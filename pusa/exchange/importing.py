"""Published latents -> a latents table that trains as one of our own: nothing is encoded but the null prompt.

Pairs are read in pieces that any number of processes share out by locks, each of them once.
"""

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from pusa.data.encoding import DTYPES, ENCODINGS, pack, smallest
from pusa.data.reader import Shard, Table
from pusa.data.schema import TEXTS, latents_schema
from pusa.data.writer import INDEX, write_stamped
from pusa.errors import ConditionError, Reason, Rejected, StageError, TableError
from pusa.exchange.layout import Found, Pair, find_pairs
from pusa.exchange.ledger import ReadPairs
from pusa.exchange.reading import read_features, read_latents, sha256_of
from pusa.manifest.models import ModelSpec
from pusa.precompute.encode import latents_row, text_row, text_rows
from pusa.precompute.rows import Piece, Wanted, make_all, text_key
from pusa.precompute.shards import Item, Refusals, Store
from pusa.precompute.table import CLIP_COLUMNS, STORED_SPACE, clear, facts_of, finished, packages, tidy, write_table
from pusa.system.files import digest, read_json
from pusa.system.locks import WorkGroup, join_work
from pusa.system.text import printable
from pusa.weights.model import Model

log = logging.getLogger(__name__)
PAIR_VERSION = 1  # raised when the same files come to give other rows
NULL_DTYPE = "bfloat16"  # of the null prompt's features, as precompute stores them where nothing else is asked
NAMES = {dtype: name for name, dtype in DTYPES.items()}
Row = dict[str, Any]


@dataclass
class Import:
    """What is to be read, what there is, and how much of it this process read."""

    pairs: Mapping[str, Pair]  # by name_of
    fps: float
    compression: str
    prints: Mapping[str, str]  # the fingerprints of the encoders
    group: WorkGroup
    model: Model
    store: Store
    ledger: ReadPairs
    refusals: Refusals
    facts: Mapping[str, Any]  # that every file says of itself
    read: int = 0

    def look(self) -> None:
        """Take in what others have made."""
        self.store.look()
        self.ledger.look()

    def make(self, pieces: Sequence[Piece]) -> None:
        """Read what is missing, until this process or others have read all of it."""
        self._make_null()
        make_all(self.group, "import", pieces, self._missing, self._complete)

    def is_there(self, name: str) -> bool:
        """Whether a pair was read, and what it gave is in shards."""
        key, text = self.ledger.keys.get(name, ("", ""))
        return key in self.store.places["latents"] and text in self.store.places["texts"]

    @property
    def null_key(self) -> str:
        """Of the text features of an empty prompt."""
        return text_key("", NULL_DTYPE, self.prints)

    def _make_null(self) -> None:
        """Encode the empty prompt: what the files' features must be like, and what training drops captions to."""
        piece = Piece("texts", (self.null_key,))
        with self.group.lock(piece.name, wait=True):
            self.store.look(piece.name)
            if self.store.missing(piece):
                rows = text_rows({self.null_key: ""}, self.model, 1, NULL_DTYPE, self._encoding)
                self._write(piece, rows)

    def _missing(self, piece: Piece) -> list[str]:
        return [name for name in piece.keys if not self.is_there(name)]

    def _complete(self, piece: Piece) -> None:
        """Read the pairs of a piece that nobody has read, or has found wanting, in the meantime."""
        self.look()
        tried = {item["key"] for item in self.refusals.of(piece)}
        gained, rejects = [], []
        for name in self._missing(piece):
            if name in tried:
                continue
            try:
                gained.append(self._read(name))
            except Rejected as reject:
                rejects.append(_recorded(name, self.pairs[name], reject))
        if rejects:
            self.refusals.write(piece, rejects)
        if gained:
            self._store(piece, gained)
        self.read += len(gained)

    def _store(self, piece: Piece, gained: Sequence[tuple[Row, Row, Row]]) -> None:
        """Shards of one dtype, and latents of one shape; then the ledger, so that what it knows is there."""
        latents: dict[tuple[str, ...], dict[str, Row]] = defaultdict(dict)
        texts: dict[str, dict[str, Row]] = defaultdict(dict)
        for _, latent, text in gained:
            if latent["key"] not in self.store.places["latents"]:
                latents[latent["bucket"], latent["dtype"]][latent["key"]] = latent
            if text["text_key"] not in self.store.places["texts"]:
                texts[text["dtype"]][text["text_key"]] = text
        for rows in latents.values():
            self._write(Piece("latents", piece.keys), list(rows.values()))
        for rows in texts.values():
            self._write(Piece("texts", piece.keys), list(rows.values()))
        self.ledger.add([row for row, _, _ in gained])

    def _write(self, piece: Piece, rows: Sequence[Row]) -> None:
        schema = TEXTS if piece.part == "texts" else latents_schema(len(rows[0]["latent_mean"]))
        stored = {"compression": self.compression, "encoding": self._encoding, "dtype": rows[0]["dtype"]}
        write_stamped(self.group.folder, piece.name, rows, schema, self.compression, {**self.facts, **stored})
        self.store.look(piece.name)

    def _read(self, name: str) -> tuple[Row, Row, Row]:
        """What a pair gives to the catalogue, to "latents" and to "texts"."""
        pair = self.pairs[name]
        sha256 = sha256_of(pair.latent)
        mean, logvar = read_latents(pair.latent, self.model.backbone.geometry.channels)
        features, valid = read_features(pair.embed, *self._text_shape)
        clip = self._clip(pair, mean, sha256)
        dtype = NAMES[mean.dtype]
        key = digest([PAIR_VERSION, sha256, self.prints["vae"]])[:32]
        latent = latents_row(key, clip, mean, logvar, 0, dtype, self._encoding)
        text = self._text_row(clip["caption"], features, valid)
        if name_of(pair, self.fps, self.prints) != name:
            raise Rejected(Reason.CHANGED, f"{pair.latent} or what goes with it was changed while it was read")
        row = {**clip, "pair": name, "key": key, "text_key": text["text_key"], "dtype": dtype}
        return row, latent, text

    def _clip(self, pair: Pair, mean: Tensor, sha256: str) -> Row:
        """A pair as a clip: whole frames, each at its place, since the files know no more."""
        geometry = self.model.backbone.geometry
        _, latent_frames, h, w = mean.shape
        frames, width, height = geometry.num_frames(latent_frames), w * geometry.spatial, h * geometry.spatial
        try:
            geometry.check(width, height, frames)
        except ConditionError as error:
            raise Rejected(Reason.BAD_PAIR, f"{pair.latent}: of latents {tuple(mean.shape)}, {error}") from error
        caption, caption_from = pair.caption()
        return {
            "clip_id": pair.clip_id,
            "caption": caption,
            "caption_from": caption_from,
            "source": str(pair.latent),
            "source_sha256": sha256,
            "frames": list(range(frames)),
            "decoder": "none",
            "start_time": 0.0,
            "width": width,
            "height": height,
            "fit": "crop",
            "box": [0.0, 0.0, float(width), float(height)],
            "pixel_aspect": 1.0,
            "bucket": f"{width}x{height}x{frames}",
            "source_fps": self.fps,
            "fps": self.fps,
        }

    def _text_row(self, caption: str, features: Tensor, valid: int) -> Row:
        dtype = smallest(features)
        content = hashlib.sha256(pack(features, dtype, "raw")).hexdigest()
        encoders = [self.prints[part] for part in ("text_encoder", "tokenizer")]
        key = digest([PAIR_VERSION, content, dtype, list(features.shape), valid, encoders])[:32]
        return text_row(key, caption, features, valid, dtype, self._encoding)

    @property
    def _encoding(self) -> str:
        return ENCODINGS[self.compression]

    @cached_property
    def _text_shape(self) -> tuple[int, int]:
        """Tokens and width that features must have: the null prompt's."""
        name, row = self.store.places["texts"][self.null_key]
        tokens, width = Shard(self.group.folder / name).row(row, ("text_shape",))["text_shape"]
        return tokens, width


def name_of(pair: Pair, fps: float, prints: Mapping[str, str]) -> str:
    """What names a pair's files as they are, without reading them."""
    names = [str(path) for path in (pair.latent, pair.embed, pair.text) if path is not None]
    return digest([PAIR_VERSION, pair.clip_id, names, pair.stamps, fps, dict(prints)])[:32]


def _recorded(name: str, pair: Pair, reject: Rejected) -> Item:
    log.warning("rejected %s: %s: %s", printable(pair.clip_id), reject.reason, printable(reject.detail))
    return {"key": name, "reason": reject.reason, "detail": reject.detail}


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
    prints = model.fingerprints(*model.backbone.family.encoders)
    pairs = {name_of(pair, settings.fps, prints): pair for pair in found.pairs}
    made_from = digest([PAIR_VERSION, list(pairs), found.rejects])
    plan = {"made_from": made_from, "shard_rows": settings.shard_rows}
    with join_work(table, lambda: tidy(table, settings.verify), plan) as group:
        read = 0
        if finished(table, made_from) is None:
            work = _work(pairs, settings, group, model, _facts(folder, settings, prints))
            work.make(pieces_of(pairs, group.plan["shard_rows"]))
            with group.lock("finish", wait=True):
                _write(work, found)
            read = work.read
        made = Table.open(table, "rows")
        if group.is_alone():
            ReadPairs(table).compact(list(pairs))
            clear(table)
    return Imported(table, made.facts["clips"], made.rows("rows"), made.rows("rejects"), read)


def _work(
    pairs: Mapping[str, Pair], settings: Settings, group: WorkGroup, model: Model, facts: Mapping[str, Any]
) -> Import:
    state = Store(group.folder), ReadPairs(group.folder), Refusals.before(group.folder)
    work = Import(pairs, settings.fps, settings.compression, facts["made_with"], group, model, *state, facts)
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
        first = printable(rejects[0]["detail"]) if rejects else "there is none"
        raise StageError(f"{work.facts['imported']['from']}: not one of {len(rejects)} pairs can be imported; {first}")
    rows = work.ledger.rows(here)
    wanted = Wanted(rows.select(CLIP_COLUMNS), rows["key"].to_pylist(), rows["text_key"].to_pylist(), work.null_key)
    model = facts_of(work.model, work.group.folder, work.store, work.null_key)
    counts = {
        "made_from": work.group.plan["made_from"],
        "clips": len(here) + len(rejects),
        "rejects_by_reason": Counter(item["reason"] for item in rejects),
    }
    write_table(work.group.folder, wanted, work.store, rejects, {**work.facts, **model, **counts})


def _rejects(work: Import, here: set[str]) -> list[dict[str, str]]:
    """What was found wanting of all that is not here.

    Raises:
        StageError: something is neither: its shard was removed while this ran.
    """
    tried = work.refusals.all()
    others = {name: pair for name, pair in work.pairs.items() if name not in here}
    if lost := others.keys() - tried.keys():
        raise StageError(
            f"{work.group.folder}: {len(lost)} pairs that were read are gone again, such as "
            f"{printable(others[min(lost)].latent)}; run the same command again"
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
