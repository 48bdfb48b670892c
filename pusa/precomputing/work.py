"""One process at one latents table: it makes pieces, those that no other process is at."""

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pusa.claims import Crew
from pusa.daemons import Daemons
from pusa.data.encoding import ENCODINGS
from pusa.data.schema import TEXTS, latents_schema
from pusa.data.writer import write_stamped
from pusa.errors import Rejected
from pusa.manifest import PrecomputeManifest
from pusa.model import Model
from pusa.precomputing.encode import VideoEncoder, latents_row, text_rows
from pusa.precomputing.frames import Clip, Frames, read_ahead
from pusa.precomputing.plan import Piece, Wanted, make_all
from pusa.precomputing.rejected import Item, Refusals
from pusa.precomputing.shards import Store
from pusa.words import plain

log = logging.getLogger(__name__)
TEXT_BATCH = 32  # captions at once: of no more than 256 tokens each, they need little memory


@dataclass
class Work:
    """What is to be made, what there is, and how much of it this process made."""

    manifest: PrecomputeManifest
    crew: Crew
    model: Model
    wanted: Wanted
    store: Store
    refusals: Refusals
    pool: Daemons  # of threads that decode
    facts: Mapping[str, Any]  # that every file says of itself
    encoded: int = 0
    texts: int = 0

    def make(self, pieces: Sequence[Piece]) -> None:
        """Make what is missing, until this process or others have made all of it."""
        make_all(self.crew, "precompute", pieces, self.store.missing, self._complete)

    def _complete(self, piece: Piece) -> None:
        """Make the rows of a piece that nobody has made, or has found wanting, in the meantime."""
        self.store.look(piece.name)
        tried = {item["key"] for item in self.refusals.of(piece)}
        missing = [key for key in self.store.missing(piece) if key not in tried]
        rows = self._make_rows(piece, missing) if missing else []
        if rows:
            schema = TEXTS if piece.part == "texts" else latents_schema(len(rows[0]["latent_mean"]))
            write_stamped(self.crew.folder, piece.name, rows, schema, self.manifest.compression, self.facts)
            self.store.look(piece.name)

    def _make_rows(self, piece: Piece, keys: Sequence[str]) -> list[dict[str, Any]]:
        if piece.part == "texts":
            rows = text_rows(self._captions(keys), self.model, TEXT_BATCH, self.manifest.dtype, self._encoding)
            self.texts += len(rows)
            return rows
        rejects: list[Item] = []
        rows = self._latents({key: self._clip(key) for key in keys}, rejects)
        if rejects:
            self.refusals.write(piece, rejects)
        self.encoded += len(rows)
        return rows

    def _latents(self, clips: Mapping[str, Clip], rejects: list[Item]) -> list[dict[str, Any]]:
        """Rows of clips of one shape; what cannot be made goes to `rejects`."""
        rows = []
        for batch in read_ahead(self.pool, clips, self.manifest.batch_size, self.manifest.decoding_seconds):
            frames = _whole(batch, clips, rejects)
            if not frames:
                continue
            mean, logvar, tile = self._encoder.encode(np.stack(list(frames.values())))
            for i, key in enumerate(frames):
                try:
                    rows.append(
                        latents_row(key, clips[key], mean[i], logvar[i], tile, self.manifest.dtype, self._encoding)
                    )
                except Rejected as reject:
                    _record(reject, key, clips[key], rejects)
        return rows

    def _captions(self, keys: Sequence[str]) -> dict[str, str]:
        captions = self.wanted.clips["caption"]
        return {key: captions[self._rows["texts"][key]].as_py() if key != self.wanted.null_key else "" for key in keys}

    def _clip(self, key: str) -> Clip:
        return self.wanted.clips.slice(self._rows["latents"][key], 1).to_pylist()[0]

    @functools.cached_property
    def _rows(self) -> dict[str, dict[str, int]]:
        return {part: self.wanted.rows_of(part) for part in ("latents", "texts")}

    @functools.cached_property
    def _encoder(self) -> VideoEncoder:
        return VideoEncoder(self.model)

    @property
    def _encoding(self) -> str:
        return ENCODINGS[self.manifest.compression]


def _whole(batch: Mapping[str, Frames], clips: Mapping[str, Clip], rejects: list[Item]) -> dict[str, np.ndarray]:
    """The frames of those clips that could be read."""
    frames = {}
    for key, future in batch.items():
        try:
            frames[key] = future.result()
        except Rejected as reject:
            _record(reject, key, clips[key], rejects)
    return frames


def _record(reject: Rejected, key: str, clip: Clip, rejects: list[Item]) -> None:
    log.warning("rejected %s", plain(f"{clip['clip_id']}: {reject.reason}: {reject.detail}"))
    rejects.append({"key": key, "reason": reject.reason, "detail": reject.detail})
