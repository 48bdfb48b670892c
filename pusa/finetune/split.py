"""Divide the clips of a fine-tune: those that train, and the held-out ones, which are only measured and shown."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pusa.data.latents import Latents
from pusa.data.order import Buckets, split
from pusa.errors import TableError
from pusa.manifest.training import Validation


@dataclass(frozen=True)
class Split:
    """The rows of the training's table that train, and the held-out ones, which are rows of `measured`."""

    training: Buckets
    measured: Latents
    held_out: Buckets


def split_clips(validation: Validation | None, latents: Latents, open_latents: Callable[[Path], Latents]) -> Split:
    """Hold out the clips that a manifest says.

    Args:
        validation: the settings; None holds out none.
        latents: the training's table.
        open_latents: opens the table `validation.latents`.

    Raises:
        TableError: one of the two sides has no clip, or clips of the other table would train.
    """
    if validation is None or (not validation.held_out and validation.latents is None):
        return Split(latents.buckets, latents, {})
    if validation.latents is not None:
        other = open_latents(validation.latents)
        if not len(other):
            raise TableError(f"validation.latents: {other.table.folder} has no rows; expected at least one clip")
        if common := len(_contents(latents) & _contents(other)):
            raise TableError(
                f"validation.latents: {common} of the {len(other)} clips of {other.table.folder} are in "
                f"{latents.table.folder} too, so they would train; expected two tables without common clips"
            )
        return Split(latents.buckets, other, other.buckets)
    clips, share = len(latents), validation.held_out
    training, held_out = split(latents.buckets, latents.clip_ids(range(clips)), share)
    if not training or not held_out:
        number = "all" if held_out else "none"
        raise TableError(
            f"validation.held_out is {share:g}, and {number} of the {clips} clips of {latents.table.folder} are held "
            "out: a hash of each clip's id decides; expected another share, more clips, or another table as "
            "validation.latents"
        )
    return Split(training, latents, held_out)


def _contents(latents: Latents) -> set[str]:
    """Return the keys of what the rows of a table were made from."""
    return {*latents.table.read("rows", ("key",))["key"].to_pylist()}
