"""Which rows a clips table wants, each named by all that it is made from, and in which pieces they are made."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa

from pusa.data.schema import CUT
from pusa.system.files import digest
from pusa.system.locks import WorkGroup
from pusa.system.progress import Progress

Item = TypeVar("Item")
KEY_VERSION = 1  # raised when the same clip and encoders come to give other rows
TEXTS_PER_SHARD = 1024
# Which decoder reads the frames is no matter, since ingest saw that they are the same; the others follow from the rest.
MADE_FROM = tuple(field.name for field in CUT if field.name not in ("decoder", "start_time", "bucket"))


@dataclass(frozen=True)
class Piece:
    """Rows of one part that one process makes in one go, and writes as one shard."""

    part: str
    keys: tuple[str, ...]

    @property
    def name(self) -> str:
        """The same for the same rows in every process."""
        return f"{self.part}-{digest(self.keys)[:12]}"


@dataclass(frozen=True)
class Wanted:
    """The rows of a clips table, and the keys of their latents and texts, in its order."""

    clips: pa.Table
    keys: list[str]
    text_keys: list[str]
    null_key: str  # of the text features of an empty prompt

    def pieces(self, shard_rows: int) -> list[Piece]:
        """All of it, in pieces that do not depend on what is made already: texts by length, latents by shape."""
        captions = dict(zip(self.text_keys, self.clips["caption"].to_pylist(), strict=True))
        by_length = sorted({**captions, self.null_key: ""}.items(), key=lambda item: (len(item[1]), item[0]))
        texts = [Piece("texts", tuple(key for key, _ in some)) for some in _chunks(by_length, TEXTS_PER_SHARD)]
        by_shape: dict[str, dict[str, None]] = {}
        for key, bucket in zip(self.keys, self.clips["bucket"].to_pylist(), strict=True):
            by_shape.setdefault(bucket, {})[key] = None
        return texts + [
            Piece("latents", tuple(some)) for keys in by_shape.values() for some in _chunks(list(keys), shard_rows)
        ]

    def rows_of(self, part: str) -> dict[str, int]:
        """Where in the clips table each key's clip is, the first of them."""
        keys = self.keys if part == "latents" else self.text_keys
        return {key: row for row, key in reversed(list(enumerate(keys)))}


def want(clips: pa.Table, dtype: str, prints: Mapping[str, str]) -> Wanted:
    """The keys of a clips table's rows.

    Args:
        clips: its part "clips".
        dtype: what arrays are stored in.
        prints: the fingerprints of the encoders.
    """
    keys, text_keys = [], []
    for batch in clips.select([*MADE_FROM, "caption"]).to_batches(max_chunksize=1024):
        for clip in batch.to_pylist():
            keys.append(latents_key({name: clip[name] for name in MADE_FROM}, dtype, prints))
            text_keys.append(text_key(clip["caption"], dtype, prints))
    return Wanted(clips, keys, text_keys, text_key("", dtype, prints))


def latents_key(made_from: Mapping[str, Any], dtype: str, prints: Mapping[str, str]) -> str:
    """The name of a clip's latents."""
    return digest([KEY_VERSION, dtype, dict(made_from), prints["vae"]])[:32]


def text_key(caption: str, dtype: str, prints: Mapping[str, str]) -> str:
    """The name of a caption's features; all blank captions are the null prompt."""
    encoders = [prints[part] for part in ("text_encoder", "tokenizer")]
    return digest([KEY_VERSION, dtype, caption if caption.strip() else "", encoders])[:32]


def make_all(
    group: WorkGroup,
    label: str,
    pieces: Sequence[Piece],
    missing: Callable[[Piece], Any],
    make: Callable[[Piece], None],
) -> None:
    """Have all pieces made that something is missing of, by this process or by others, and show how far it has come."""
    todo = [piece for piece in pieces if missing(piece)]
    total = _count(pieces)
    with Progress(label, total, total - _count(todo)) as progress:

        def complete(piece: Piece) -> None:
            make(piece)
            progress.advance(len(piece.keys))

        group.complete_all(todo, complete)


def _count(pieces: Sequence[Piece]) -> int:
    """Their rows."""
    return sum(len(piece.keys) for piece in pieces)


def _chunks(items: list[Item], size: int) -> list[list[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
