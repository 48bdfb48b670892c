"""Export a latents table to the published layout: two torch files a clip, as the published trainer reads them."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch

from pusa.data.encoding import DTYPES
from pusa.data.latents import Latents
from pusa.data.reader import Table
from pusa.errors import Reason, Rejected, StageError, TableError
from pusa.exchange.layout import CAPTIONS, EMBED, LATENT, TEXT, VIDEOS, export_stem
from pusa.system.files import atomic, digest, read_json, remove_partials, write_json, write_text
from pusa.system.locks import sole_writer
from pusa.system.names import nfc
from pusa.system.progress import track
from pusa.system.text import printable

log = logging.getLogger(__name__)
RECORD = "export.json"
COLUMNS = ("clip_id", "caption", "key", "latents_shard", "latents_row")


@dataclass(frozen=True)
class Exported:
    """The result of a run. Every row of the table is one of `clips` or `rejects`; this run wrote `written` clips."""

    folder: Path
    rows: int
    clips: int
    rejects: int
    written: int


def export_latents(table: Path, folder: Path, captions: bool = False) -> Exported:
    """Write `videos/ID.latent.pt` and `captions/ID.embed.pt` for each row; existing files are kept.

    Args:
        table: a latents table.
        folder: a new folder, or that of an unfinished export of the same table, as its `export.json` shows.
        captions: also write `captions/ID.txt` for each clip with a caption.

    Raises:
        TableError: the table is not complete, or its latents are not in the VAE's own space.
        StageError: `folder` holds other latents, or another process is writing it.
    """
    source = Table.open(table, "rows")
    if source.facts.get("stored_space") != "vae":
        raise TableError(f"{table} does not hold latents in the VAE's own space, which the layout requires")
    content = digest([source.fingerprint, source.read("rows", ("caption",))["caption"].to_pylist()])
    record = {"content": content, "table": str(table.absolute())}
    with sole_writer(folder):
        existing = read_json(folder / RECORD)
        existing_content = existing.get("content") if isinstance(existing, dict) else None
        if existing_content is None and any((folder / name).exists() for name in (VIDEOS, CAPTIONS)):
            raise StageError(f"{folder} has {VIDEOS} or {CAPTIONS} that no export wrote; name another folder")
        if existing_content not in (None, content):
            raise StageError(
                f"{folder} holds the export of {existing.get('table')}, with other content; name another folder"
            )
        write_json(folder / RECORD, record)
        exported, rejects = _export_all(source, folder, captions)
        write_json(folder / RECORD, {**record, "clips": exported.clips, "rejects": rejects})
    return exported


def _export_all(source: Table, folder: Path, captions: bool) -> tuple[Exported, list[dict[str, str]]]:
    """Write the missing files of all clips, in the order of the shards; return the result and the rejects."""
    clips, latents = source.read("rows", COLUMNS), Latents(source)
    order = pc.sort_indices(clips, [("latents_shard", "ascending"), ("latents_row", "ascending")])
    stored = source.read("latents", ("key", "dtype"))
    dtypes = dict(zip(stored["key"].to_pylist(), (DTYPES[name] for name in stored["dtype"].to_pylist()), strict=True))
    rejects: list[dict[str, str]] = []
    taken: set[str] = set()
    swept: set[Path] = set()
    written = 0
    for index in track(order.to_pylist(), "export", len(order)):
        clip = clips.slice(index, 1).to_pylist()[0]
        try:
            stem = export_stem(clip["clip_id"])
            if nfc(stem) in taken:  # a file system may not distinguish Unicode forms
                raise Rejected(Reason.DUPLICATE, f"another row has the clip id {clip['clip_id']!r} too, and its files")
        except Rejected as reject:
            log.warning("rejected %s: %s: %s", printable(clip["clip_id"]), reject.reason, printable(reject.detail))
            rejects.append({"source": clip["clip_id"], "reason": reject.reason, "detail": reject.detail})
            continue
        taken.add(nfc(stem))
        # Suffixes are appended, never replaced: ids may end in something like `.mp4@0`.
        latent, embed = folder / f"{VIDEOS}/{stem}{LATENT}", folder / f"{CAPTIONS}/{stem}{EMBED}"
        text = folder / f"{CAPTIONS}/{stem}{TEXT}"
        for parent in {latent.parent, embed.parent} - swept:
            remove_partials(parent)
            swept.add(parent)
        written += _export_clip(latents, index, dtypes[clip["key"]], latent, embed)
        if captions and clip["caption"] and not text.is_file():
            write_text(text, clip["caption"] + "\n")
    return Exported(folder, len(order), len(order) - len(rejects), len(rejects), written), rejects


def _export_clip(latents: Latents, index: int, dtype: torch.dtype, latent: Path, embed: Path) -> bool:
    """Write the missing files of a clip, atomically; return whether there were any.

    Latents are (1, C, F, h, w) in their stored dtype; features are (1, L, width) fp32, zero beyond the valid tokens.
    """
    missing = [path for path in (latent, embed) if not path.is_file()]
    if latent in missing:
        arrays = (array.to(dtype) for array in latents.posterior([index]))
        _save(latent, dict(zip(("mean", "logvar"), arrays, strict=True)))
    if embed in missing:
        features, mask = latents.text([index])
        _save(embed, {"y_feat": [features], "y_mask": [mask]})
    return bool(missing)


def _save(path: Path, value: Mapping[str, Any]) -> None:
    # An open file has no name for torch to store in the archive, so equal values give equal bytes.
    with atomic(path) as partial, partial.open("wb") as file:
        torch.save(value, file)
