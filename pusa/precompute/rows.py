"""Plan which rows a clips table needs, and in which segments they are made.

Each row has a key: the hash of everything it is made from. So rows that exist already are recognised.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from pusa.backbones.family import Family
from pusa.data.schema import CUT
from pusa.errors import Rejected
from pusa.system.disk import Room
from pusa.system.failures import Failure, attempt, make_or_reject
from pusa.system.files import digest
from pusa.system.locks import WorkGroup, WorkQueue
from pusa.system.progress import Progress
from pusa.system.slots import HereSlot, Slot, run_in_slots

Item = TypeVar("Item")
KEY_VERSION = 1  # to be raised when the same clip and encoders give other rows
TEXTS_PER_SHARD = 1024
# The decoder does not matter, since ingest checked that it reads the same frames; start_time and bucket follow from the
# other columns.
MADE_FROM = tuple(field.name for field in CUT if field.name not in ("decoder", "start_time", "bucket"))


@dataclass(frozen=True)
class Segment:
    """Rows of one part that one process makes at a time, and writes as one shard."""

    part: str
    keys: tuple[str, ...]

    @property
    def name(self) -> str:
        """The segment's name, which is the same in every process."""
        return f"{self.part}-{digest(self.keys)[:12]}"


@dataclass(frozen=True)
class PlannedRows:
    """The rows of a clips table, and for each of them the keys of its latents and its text features."""

    clips: pa.Table
    keys: list[str]
    text_keys: list[str]
    null_key: str  # of the text features of an empty prompt

    def segments(self, shard_rows: int) -> list[Segment]:
        """Divide all rows into segments, whether they exist already or not.

        Texts are sorted by length, so that a batch needs little padding; latents are grouped by shape.
        """
        captions = dict(zip(self.text_keys, self.clips["caption"].to_pylist(), strict=True))
        by_length = sorted({**captions, self.null_key: ""}.items(), key=lambda item: (len(item[1]), item[0]))
        by_shape: dict[str, dict[str, None]] = {}
        for key, bucket in zip(self.keys, self.clips["bucket"].to_pylist(), strict=True):
            by_shape.setdefault(bucket, {})[key] = None
        texts = [Segment("texts", tuple(keys)) for keys in _chunks([key for key, _ in by_length], TEXTS_PER_SHARD)]
        latents = [
            Segment("latents", tuple(keys)) for shape in by_shape.values() for keys in _chunks(list(shape), shard_rows)
        ]
        return texts + latents

    def rows_of(self, part: str) -> dict[str, int]:
        """Return for each key of a part the first row of the clips table that has it."""
        keys = self.keys if part == "latents" else self.text_keys
        return {key: row for row, key in reversed(list(enumerate(keys)))}


def plan_rows(
    clips: pa.Table, dtype: str, family: Family, fingerprints: Mapping[str, str], vae_dtype: str | None = None
) -> PlannedRows:
    """Compute the keys of all rows that a clips table needs.

    Args:
        clips: the part "clips" of a clips table.
        dtype: the dtype in which arrays are stored.
        family: of the model.
        fingerprints: the fingerprint of each encoder.
        vae_dtype: the dtype in which the VAE computes, where the manifest sets it. It is not part of the keys where it
            does not: on a GPU and on a CPU they are the same.
    """
    vae = [fingerprints["vae"], *filter(None, (vae_dtype, dict(family.latent_settings)))]
    text = [fingerprints[part] for part in family.text_parts]
    keys, text_keys = [], []
    for batch in clips.select([*MADE_FROM, "caption"]).to_batches(max_chunksize=1024):
        for clip in batch.to_pylist():
            made_from = {name: clip[name] for name in MADE_FROM}
            keys.append(digest([KEY_VERSION, dtype, made_from, *vae])[:32])
            text_keys.append(text_key(clip["caption"], dtype, text))
    return PlannedRows(clips, keys, text_keys, text_key("", dtype, text))


def text_key(caption: str, dtype: str, encoders: Sequence[str]) -> str:
    """Return the key of a caption's features; all blank captions have that of the empty prompt.

    Args:
        caption: the caption.
        dtype: the dtype in which features are stored.
        encoders: the fingerprints of the family's `text_parts`.
    """
    return digest([KEY_VERSION, dtype, caption if caption.strip() else "", encoders])[:32]


def complete_segments(
    group: WorkGroup,
    label: str,
    segments: Sequence[Segment],
    missing: Callable[[Segment], Any],
    make: Callable[[Slot, Segment], None],
    slots: Sequence[Slot] = (HereSlot(),),
    room: Room | None = None,
) -> None:
    """Return once all segments are made, by this process or by others; show the progress.

    Args:
        group: the processes that share the work.
        label: the name of the work.
        segments: all segments; those that are complete are only counted.
        missing: returns what a segment lacks, empty if it is complete.
        make: makes what a segment lacks, in a slot; it is called under the segment's lock.
        slots: where the work is done.
        room: the free space that a segment needs; None: it is not looked at.
    """
    todo = [segment for segment in segments if missing(segment)]
    total, left = (sum(len(segment.keys) for segment in part) for part in (segments, todo))
    queue = WorkQueue(group, todo)
    with Progress(label, total, total - left) as progress:

        def complete(slot: Slot, segment: Segment) -> None:
            make(slot, segment)
            progress.advance(len(segment.keys))

        def work(slot: Slot, segment: Segment) -> None:
            queue.complete(segment, partial(complete, slot, segment))

        run_in_slots(slots, room.before(queue.take) if room else queue.take, work)


def make_each(
    keys: Sequence[str], make: Callable[[Sequence[str]], Mapping[str, Item]], folder: Path
) -> dict[str, Item | Rejected]:
    """Make an item for each key together or, where that fails, in halves: at last the keys that fail are alone.

    Args:
        keys: at least one.
        make: makes the items of some keys. It may raise `Rejected` for one of them.
        folder: the table's folder.

    Returns:
        for each key its item, or why there is none.
    """
    if len(keys) == 1:
        return {keys[0]: make_or_reject(lambda: make(keys)[keys[0]], folder, keys[0])}
    made = attempt(lambda: make(keys), folder)
    if not isinstance(made, Failure):
        return dict(made)
    middle = len(keys) // 2
    return {**make_each(keys[:middle], make, folder), **make_each(keys[middle:], make, folder)}


def _chunks(items: list[Item], size: int) -> list[list[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
