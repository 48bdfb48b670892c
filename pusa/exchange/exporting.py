"""Export a latents table to the published layout: two torch files a clip, as the published trainer reads them."""

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch

from pusa.data.encoding import DTYPES
from pusa.data.latents import Latents
from pusa.data.reader import Table
from pusa.data.writer import INDEX
from pusa.errors import PartlyFailed, Reason, Rejected, StageError, TableError
from pusa.exchange.layout import CAPTIONS, EMBED, LATENT, TEXT, VIDEOS, export_stem
from pusa.system.failures import FAILURES, make_or_reject
from pusa.system.files import atomic, digest, read_object, remove, remove_partials, write_json, write_text
from pusa.system.locks import sole_writer
from pusa.system.names import nfc
from pusa.system.progress import track
from pusa.system.text import printable

log = logging.getLogger(__name__)
RECORD = "export.json"
COLUMNS = ("clip_id", "caption", "key", "latents_shard", "latents_row")


@dataclass(frozen=True)
class Exported:
    """The result of a run. Every row of the table is one of `clips` or `rejects`; this run wrote `written` clips.

    Of the rejects, `failed` have an unexpected error or cannot be read.
    """

    folder: Path
    rows: int
    clips: int
    rejects: int
    written: int
    failed: int

    def require_all(self) -> None:
        """Raise PartlyFailed if rows failed. The files of all others are written."""
        if self.failed:
            raise PartlyFailed(
                f"{self.failed} rows failed; {self.folder / RECORD} lists them, tracebacks of unexpected errors are in "
                f"{self.folder / FAILURES}. All others are written; run the command again to try these"
            )


def export_latents(table: Path, folder: Path, captions: bool = False) -> Exported:
    """Write `videos/ID.latent.pt` and `captions/ID.embed.pt` for each row; existing files are kept.

    Args:
        table: a latents table.
        folder: a new folder, or that of an unfinished export of the same table, as its `export.json` shows.
        captions: also write `captions/ID.txt` for each clip with a caption.

    Raises:
        TableError: the table is not complete, its latents are not in the VAE's own space, or it holds text features
            that the layout has no place for.
        StageError: `folder` holds other latents, or another process is writing it.
        OSError: the folder cannot be written. Errors of single rows are recorded, and not raised.
    """
    source = Table.open(table, "rows")
    if source.facts.get("stored_space") != "vae":
        raise TableError(f"{table} does not hold latents in the VAE's own space, which the layout requires")
    if "pooled_width" in source.facts:
        raise TableError(f"{table} has pooled text features, for which the published layout has no place")
    content = digest([source.fingerprint, source.read("rows", ("caption",))["caption"].to_pylist()])
    record = {"content": content, "table": str(table.absolute())}
    if (folder / INDEX).exists():
        raise StageError(f"{folder} holds a table; name another folder for the export")
    with sole_writer(folder):
        existing = read_object(folder / RECORD)
        existing_content = existing.get("content")
        if existing_content is None and any((folder / name).exists() for name in (VIDEOS, CAPTIONS)):
            raise StageError(f"{folder} has {VIDEOS} or {CAPTIONS} that no export wrote; name another folder")
        if existing_content not in (None, content):
            raise StageError(
                f"{folder} holds the export of {existing.get('table')}, with other content; name another folder"
            )
        remove(folder / FAILURES)
        write_json(folder / RECORD, record)
        exported, rejects = _export_all(source, folder, captions)
        write_json(folder / RECORD, {**record, "clips": exported.clips, "rejects": rejects})
    return exported


def _export_all(source: Table, folder: Path, captions: bool) -> tuple[Exported, list[dict[str, str]]]:
    """Write the missing files of all clips, in the order of the shards; return the result and the rejects."""
    clips, latents = source.read("rows", COLUMNS), Latents(source)
    same_file = _same_file_of(folder)
    order = pc.sort_indices(clips, [("latents_shard", "ascending"), ("latents_row", "ascending")])
    stored = source.read("latents", ("key", "dtype"))
    dtypes = dict(zip(stored["key"].to_pylist(), (DTYPES[name] for name in stored["dtype"].to_pylist()), strict=True))
    rejects: list[dict[str, str]] = []
    taken: set[str] = set()
    swept: set[Path] = set()
    written = 0

    def export(index: int, clip: Mapping[str, Any]) -> bool:
        """Write the missing files of a clip; return whether there were any. Raises Rejected if its id is unusable."""
        stem = export_stem(clip["clip_id"])
        if same_file(stem) in taken:
            raise Rejected(Reason.DUPLICATE, f"another row has the clip id {clip['clip_id']!r} too, and its files")
        taken.add(same_file(stem))
        # Suffixes are appended, never replaced: ids may end in something like `.mp4@0`.
        latent, embed = folder / f"{VIDEOS}/{stem}{LATENT}", folder / f"{CAPTIONS}/{stem}{EMBED}"
        text = folder / f"{CAPTIONS}/{stem}{TEXT}"
        for parent in {latent.parent, embed.parent} - swept:
            remove_partials(parent)
            swept.add(parent)
        was_missing = _export_clip(latents, index, dtypes[clip["key"]], latent, embed)
        if captions and clip["caption"] and not text.is_file():
            write_text(text, clip["caption"] + "\n")
        return was_missing

    for index in track(order.to_pylist(), "export", len(order)):
        clip = clips.slice(index, 1).to_pylist()[0]
        made = make_or_reject(functools.partial(export, index, clip), folder, digest(clip["clip_id"])[:16])
        if isinstance(made, Rejected):
            log.warning("rejected %s: %s: %s", printable(clip["clip_id"]), made.reason, printable(made.detail))
            rejects.append({"source": clip["clip_id"], "reason": made.reason, "detail": made.detail})
        else:
            written += made
    failed = sum(reject["reason"] == Reason.FAILED for reject in rejects)
    return Exported(folder, len(order), len(order) - len(rejects), len(rejects), written, failed), rejects


def _same_file_of(folder: Path) -> Callable[[str], str]:
    """Return a function that is equal for two names if they may name one file in a folder with a record.

    No file system needs to distinguish Unicode forms, and some do not distinguish case.
    """
    ignores_case = (folder / RECORD.upper()).is_file()
    return lambda name: nfc(nfc(name).casefold() if ignores_case else name)


def _export_clip(latents: Latents, index: int, dtype: torch.dtype, latent: Path, embed: Path) -> bool:
    """Write the missing files of a clip, atomically; return whether there were any.

    Latents are (1, C, F, h, w) in their stored dtype; features are (1, L, width) fp32, zero beyond the valid tokens.
    """
    missing = [path for path in (latent, embed) if not path.is_file()]
    if latent in missing:
        arrays = (array.to(dtype) for array in latents.posterior([index]))
        _save(latent, dict(zip(("mean", "logvar"), arrays, strict=True)))
    if embed in missing:
        text = latents.text([index])
        _save(embed, {"y_feat": [text.features], "y_mask": [text.mask]})
    return bool(missing)


def _save(path: Path, value: Mapping[str, Any]) -> None:
    # An open file has no name for torch to store in the archive, so equal values give equal bytes.
    with atomic(path) as partial, partial.open("wb") as file:
        torch.save(value, file)
