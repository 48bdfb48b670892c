"""Import published latents into a latents table that trains like one made by precompute.

Nothing is encoded except the empty prompt. Any number of processes share the pairs in segments; each pair is read once.
"""

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pusa.data.encoding import DTYPES, ENCODINGS, pack, smallest
from pusa.data.reader import Table
from pusa.data.schema import CONVERSION, TEXTS, latents_schema
from pusa.data.shard import Shard
from pusa.data.writer import INDEX, write_hashed_shard
from pusa.errors import ConditionError, Reason, Rejected, StageError, TableError
from pusa.exchange.layout import Pair, PairList, find_pairs
from pusa.exchange.ledger import ImportLedger
from pusa.exchange.reading import read_features, read_latents, read_tensors
from pusa.manifest.models import ModelSpec
from pusa.precompute.encode import latent_statistics, latents_row, text_row, text_rows
from pusa.precompute.rows import PlannedRows, Segment, complete_segments, text_key
from pusa.precompute.shards import RejectEntry, RejectFiles, Store
from pusa.precompute.table import (
    CLIP_COLUMNS,
    STORED_SPACE,
    clean_up,
    model_facts,
    open_finished,
    package_versions,
    remove_unused,
    write_table,
)
from pusa.system.failures import make_or_reject, require_none_failed
from pusa.system.files import digest, read_object, require_own
from pusa.system.locks import WorkGroup, join_work
from pusa.system.text import printable
from pusa.weights.model import Model

log = logging.getLogger(__name__)
PAIR_VERSION = 1  # to be raised when the same files give other rows
NO_VARIANCE = -30.0  # the log-variance of a clip whose file has the posterior's mean alone: a deviation of 3e-7
NULL_DTYPE = "bfloat16"  # of the empty prompt's features: the default of precompute
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What the files do not contain, and how rows are stored."""

    model: ModelSpec  # the model that made the latents
    fps: float = 24
    shard_rows: int = 32
    compression: str = "zstd"
    verify: bool = False  # hash all existing shards, not only those whose size or time has changed


@dataclass(frozen=True)
class Imported:
    """The result of a run. Each of the pairs `found` is one of `rows` or `rejects`; this process read `read` pairs.

    Of the rejects, `failed` have an unexpected error.
    """

    table: Path
    found: int
    rows: int
    rejects: int
    read: int = 0
    failed: int = 0

    def require_all(self) -> None:
        """Raise PartlyFailed if pairs failed. The rows of all others are in the table."""
        require_none_failed(self.failed, "pairs", self.table)


def import_latents(folder: Path, table: Path, settings: Settings) -> Imported:
    """Make a latents table of a folder in the published layout, together with other processes that do the same.

    Pairs that were read before are not read again.

    Args:
        folder: contains `videos/**/X.latent.pt` and `captions/**/X.embed.pt`, or both kinds of files side by side; or
            `train/**/X.tensors.pth` and `metadata.csv`, as V1.0's data set.
        table: the folder to write.
        settings: the model that made the latents, their frame rate, and how to store them.

    Raises:
        MediaError: the folder does not exist.
        ManifestError: its metadata.csv cannot be read.
        TableError: `table` holds a table that was not imported.
        WeightsError: the model's encoders cannot be found.
        StageError: no pair can be imported, or another process makes another table there.
        OSError: the table cannot be written. Unexpected errors of single pairs are recorded, and not raised.
    """
    folder, table = folder.absolute(), table.absolute()
    if table.resolve() == folder.resolve():
        raise StageError(f"{table} holds the pairs to import; name another folder for the table")
    _require_imported(table)
    require_own(table)  # before the weights are hashed, which may take minutes
    model, pair_list = Model(settings.model), find_pairs(folder)
    fingerprints = model.fingerprints(*model.backbone.family.encoders)
    pairs = {pair_key(pair, settings.fps, fingerprints): pair for pair in pair_list.pairs}
    imported = {"from": str(folder), **_describe_variance(pair_list)}
    made_from = digest([PAIR_VERSION, list(pairs), pair_list.rejects])
    plan = {"made_from": made_from, "shard_rows": settings.shard_rows}
    read = 0
    with join_work(table, lambda: clean_up(table, settings.verify), plan) as group:
        if open_finished(table, made_from) is None:
            facts = {
                "made_with": dict(fingerprints),
                "weights": settings.model.model_dump(mode="json"),
                "stored_space": STORED_SPACE,
                "packages": package_versions(),
                "imported": imported,
            }
            state = Store(table), ImportLedger(table), RejectFiles.at_start(table)
            run = ImportRun(pairs, settings.fps, settings.compression, fingerprints, group, model, *state, facts)
            run.refresh()
            run.encode_null_prompt()
            segments = make_segments(pairs, group.plan["shard_rows"])
            complete_segments(group, "import", segments, run.missing, lambda slot, segment: run.complete(segment))
            with group.lock("finish", wait=True):
                run.finish(pair_list)
            read = run.read
        made = Table.open(table, "rows")
        if group.is_alone():
            ImportLedger(table).compact(list(pairs))
            remove_unused(table)
    failed = made.read("rejects", ["reason"])["reason"].to_pylist().count(Reason.FAILED)
    return Imported(table, made.fact("clips"), made.rows("rows"), made.rows("rejects"), read, failed)


def _require_imported(folder: Path) -> None:
    """Refuse to replace a table that was not imported, or is damaged so that its origin is unknown.

    Raises:
        TableError: the folder holds such a table.
    """
    if not (folder / INDEX).exists():
        return
    facts = read_object(folder / INDEX).get("facts")
    if not isinstance(facts, dict) or "imported" not in facts:
        raise TableError(
            f"{folder} holds a table that was not imported, or is damaged; remove it, or name another folder"
        )


def _describe_variance(pair_list: PairList) -> dict[str, int]:
    """Return how many clips have no variance, as facts of the table, and log it; nothing if all have."""
    if not (count := sum(pair.embed is None for pair in pair_list.pairs)):
        return {}
    log.warning(
        "%d of %d clips have no variance: their files hold only the mean of the VAE's posterior, so each epoch trains "
        "on the same latents, as the published training does",
        count,
        len(pair_list.pairs),
    )
    return {"without_variance": count}


def pair_key(pair: Pair, fps: float, fingerprints: Mapping[str, str]) -> str:
    """Return the key of a pair: the hash of its files' names, sizes and times; the files are not read."""
    parts = [PAIR_VERSION, pair.clip_id, [str(path) for path in pair.files], pair.stamps, fps, dict(fingerprints)]
    listed = [] if pair.listed is None else [[repr(pair.listed[0]), pair.listed[1]]]
    return digest([*parts, *listed])[:32]


def make_segments(pairs: Mapping[str, Pair], rows: int) -> list[Segment]:
    """Divide pairs into segments of similar file size, so that most of a segment's latents have one shape."""
    keys = sorted(pairs, key=lambda key: (pairs[key].stamps[0][0], pairs[key].clip_id))
    return [Segment("pairs", tuple(keys[start : start + rows])) for start in range(0, len(keys), rows)]


@dataclass
class ImportRun:
    """The pairs to read, the rows that exist, and how many pairs this process read."""

    pairs: Mapping[str, Pair]  # by pair_key
    fps: float
    compression: str
    fingerprints: Mapping[str, str]  # of the encoders
    group: WorkGroup
    model: Model
    store: Store
    ledger: ImportLedger
    reject_files: RejectFiles
    facts: Mapping[str, Any]  # stored in every file
    read: int = 0

    def refresh(self) -> None:
        """Read what other processes have made since the last time."""
        self.store.refresh()
        self.ledger.refresh()

    def is_made(self, key: str) -> bool:
        """Return whether a pair was read and its rows are in shards."""
        latents, text = self.ledger.row_keys.get(key, ("", ""))
        return latents in self.store.locations["latents"] and text in self.store.locations["texts"]

    @property
    def null_key(self) -> str:
        """The key of the empty prompt's text features."""
        return text_key("", NULL_DTYPE, self._text_encoders)

    def encode_null_prompt(self) -> None:
        """Encode the empty prompt. It gives the shape of all features, and is used where training drops a caption.

        Raises:
            StageError: the model has text features that the published files lack.
        """
        segment = Segment("texts", (self.null_key,))
        with self.group.lock(segment.name, wait=True):
            self.store.refresh(segment.name)
            if self.store.missing(segment):
                rows = text_rows({self.null_key: ""}, self.model, 1, NULL_DTYPE, ENCODINGS[self.compression])
                if rows[0]["pooled"] is not None:
                    raise StageError(
                        f"{self.facts['imported']['from']} cannot be imported: {self.model.spec.backbone} has pooled "
                        "text features, which the published files lack; use `pusa precompute` on the videos"
                    )
                self._write_shard(segment, rows)

    def missing(self, segment: Segment) -> list[str]:
        """Return the keys of a segment's pairs that are not made."""
        return [key for key in segment.keys if not self.is_made(key)]

    def complete(self, segment: Segment) -> None:
        """Read the pairs of a segment that no process has read or rejected in the meantime.

        A shard holds one dtype, and latents of one shape. The ledger is written last, so that rows it lists exist.
        """
        self.refresh()
        rejected = {entry["key"] for entry in self.reject_files.of(segment)}
        rejects: list[RejectEntry] = []
        catalogue: list[Row] = []
        latents: dict[tuple[str, ...], dict[str, Row]] = defaultdict(dict)
        texts: dict[str, dict[str, Row]] = defaultdict(dict)
        for key in self.missing(segment):
            if key in rejected:
                continue
            made = make_or_reject(partial(self._read_pair, key), self.group.folder, key)
            if isinstance(made, Rejected):
                clip_id = printable(self.pairs[key].clip_id)
                log.warning("rejected %s: %s: %s", clip_id, made.reason, printable(made.detail))
                rejects.append({"key": key, "reason": made.reason, "detail": made.detail})
                continue
            row, latents_of_pair, text = made
            catalogue.append(row)
            if row["key"] not in self.store.locations["latents"]:
                latents[row["bucket"], row["dtype"]][row["key"]] = latents_of_pair
            if row["text_key"] not in self.store.locations["texts"]:
                texts[text["dtype"]][row["text_key"]] = text
        if rejects:
            self.reject_files.add(segment, rejects)
        for rows in latents.values():
            self._write_shard(Segment("latents", segment.keys), list(rows.values()))
        for rows in texts.values():
            self._write_shard(Segment("texts", segment.keys), list(rows.values()))
        if catalogue:
            self.ledger.add(catalogue)
        self.read += len(catalogue)

    def _write_shard(self, segment: Segment, rows: Sequence[Row]) -> None:
        schema = TEXTS if segment.part == "texts" else latents_schema(len(rows[0]["latent_mean"]))
        encoding = ENCODINGS[self.compression]
        facts = {**self.facts, "compression": self.compression, "encoding": encoding, "dtype": rows[0]["dtype"]}
        write_hashed_shard(self.group.folder, segment.name, rows, schema, self.compression, facts)
        self.store.refresh(segment.name)

    def _read_pair(self, key: str) -> tuple[Row, Row, Row]:
        """Return a pair's rows of the catalogue, of "latents" and of "texts".

        Raises:
            Rejected: a file is not valid, or was changed while it was read.
        """
        pair, encoding = self.pairs[key], ENCODINGS[self.compression]
        channels = self.model.backbone.geometry.channels
        if pair.embed is not None:
            mean, logvar, sha256 = read_latents(pair.latent, channels)
            features, valid = read_features(pair.embed, *self._text_shape)
        else:
            z, features, valid, sha256 = read_tensors(pair.latent, channels, *self._text_shape)
            center, scale = (torch.tensor(values).view(-1, 1, 1, 1) for values in self._statistics)
            mean = z.float() * scale + center  # in fp32, so that normalising it again gives the file's values back
            logvar = torch.full_like(mean, NO_VARIANCE)
        clip = self._clip_row(pair, mean, sha256)
        dtype, text_dtype = DTYPE_NAMES[mean.dtype], smallest(features)
        latents_key = digest([PAIR_VERSION, sha256, self.fingerprints["vae"]])[:32]
        latents = latents_row(latents_key, clip, mean, logvar, 0, dtype, encoding)
        content = hashlib.sha256(pack(features, text_dtype, "raw")).hexdigest()
        features_key = digest([PAIR_VERSION, content, text_dtype, list(features.shape), valid, self._text_encoders])[
            :32
        ]
        text = text_row(features_key, clip["caption"], features, valid, text_dtype, encoding)
        if pair_key(pair, self.fps, self.fingerprints) != key:
            raise Rejected(Reason.CHANGED, f"{pair.latent}, or a file beside it, was changed while it was read")
        return {**clip, "pair": key, "key": latents_key, "text_key": features_key, "dtype": dtype}, latents, text

    def _clip_row(self, pair: Pair, mean: Tensor, sha256: str) -> Row:
        """Return a pair as the row of a clip. The source is unknown, so the clip counts as its own source, uncut.

        Raises:
            Rejected: the backbone does not support the size of the latents (C, F, h, w), or the caption is not valid.
        """
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
            **{field.name: 0 if field.name == "stream" else "unknown" for field in CONVERSION},
            "source_fps": self.fps,
            "fps": self.fps,
        }

    @cached_property
    def _text_encoders(self) -> list[str]:
        """The fingerprints of the parts that turn prompts into features."""
        return [self.fingerprints[part] for part in self.model.backbone.family.text_parts]

    @cached_property
    def _statistics(self) -> list[list[float]]:
        """Mean and standard deviation of each channel of the VAE's output."""
        return latent_statistics(self.model)

    @cached_property
    def _text_shape(self) -> tuple[int, int]:
        """The tokens and the width that features must have: those of the empty prompt."""
        name, row = self.store.locations["texts"][self.null_key]
        tokens, width = Shard(self.group.folder / name).row(row, ("text_shape",))["text_shape"]
        return tokens, width

    def finish(self, pair_list: PairList) -> None:
        """Write the catalogue, the rejects and the index, with the rows of all processes.

        Raises:
            StageError: no pair was imported, or a shard was removed while this ran.
        """
        self.refresh()
        folder, rejected = self.group.folder, self.reject_files.by_key()
        made = [key for key in self.pairs if self.is_made(key)]
        made_set = set(made)
        others = {key: pair for key, pair in self.pairs.items() if key not in made_set}
        if lost := others.keys() - rejected.keys():
            raise StageError(
                f"{folder}: {len(lost)} pairs that were read are missing, such as "
                f"{printable(others[min(lost)].latent)}; run the same command again"
            )
        rejects = list(pair_list.rejects)
        for key, pair in others.items():
            entry = rejected[key]
            rejects.append({"source": str(pair.latent), "reason": entry["reason"], "detail": entry["detail"]})
        if not made:
            first = printable(rejects[0]["detail"]) if rejects else "the folder holds no pairs"
            raise StageError(f"{self.facts['imported']['from']}: none of {len(rejects)} pairs can be imported; {first}")
        rows = self.ledger.rows(made)
        keys, text_keys = rows["key"].to_pylist(), rows["text_key"].to_pylist()
        planned = PlannedRows(rows.select(CLIP_COLUMNS), keys, text_keys, self.null_key)
        encoders = model_facts(self._statistics, folder, self.store, self.null_key)
        counts = {
            "made_from": self.group.plan["made_from"],
            "clips": len(made) + len(rejects),
            "rejects_by_reason": Counter(reject["reason"] for reject in rejects),
        }
        write_table(folder, planned, self.store, rejects, {**self.facts, **encoders, **counts})
