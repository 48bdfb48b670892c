"""A latents table -> the published layout: two torch files a clip, as the published trainer reads them."""

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
from pusa.system.progress import track
from pusa.system.text import printable

log = logging.getLogger(__name__)
RECORD = "export.json"
COLUMNS = ("clip_id", "caption", "key", "latents_shard", "latents_row")


@dataclass(frozen=True)
class Exported:
    """What a run made: every row is in `clips` or in `rejects`. Of the clips, this run wrote `written`."""

    folder: Path
    rows: int
    clips: int
    rejects: int
    written: int


def export_latents(table: Path, folder: Path, captions: bool = False) -> Exported:
    """Write `videos/ID.latent.pt` and `captions/ID.embed.pt` for each row; those that are there stay.

    Args:
        table: a latents table.
        folder: a new one, or that of an export of the same table, which goes on; its `export.json` says which.
        captions: also write `captions/ID.txt`, where there is a caption.

    Raises:
        TableError: the table is not complete, or holds no latents of the VAE's own space.
        StageError: `folder` holds other latents, or another process is at it.
    """
    source = Table.open(table, "rows")
    if source.facts.get("stored_space") != "vae":
        raise TableError(f"{table} is no table of latents in the VAE's own space, which the layout wants")
    content = digest([source.fingerprint, source.read("rows", ("caption",))["caption"].to_pylist()])
    record = {"content": content, "table": str(table.absolute())}
    with sole_writer(folder):
        _require_same(folder, record)
        write_json(folder / RECORD, record)
        exported, rejects = _export_all(source, folder, captions)
        write_json(folder / RECORD, {**record, "clips": exported.clips, "rejects": rejects})
    return exported


def _export_all(source: Table, folder: Path, captions: bool) -> tuple[Exported, list[dict[str, str]]]:
    clips, latents = source.read("rows", COLUMNS), Latents(source)
    order = pc.sort_indices(clips, [("latents_shard", "ascending"), ("latents_row", "ascending")])
    dtypes = _dtypes(source)
    rejects: list[dict[str, str]] = []
    taken: set[str] = set()
    swept: set[Path] = set()
    written = 0
    for index in track(order.to_pylist(), "export", len(order)):
        clip = clips.slice(index, 1).to_pylist()[0]
        try:
            stem = _stem(clip["clip_id"], taken)
        except Rejected as reject:
            log.warning("rejected %s: %s: %s", printable(clip["clip_id"]), reject.reason, printable(reject.detail))
            rejects.append({"source": clip["clip_id"], "reason": reject.reason, "detail": reject.detail})
            continue
        latent, embed, text = _paths(folder, stem)
        _sweep_once({latent.parent, embed.parent}, swept)
        written += _export(latents, index, dtypes[clip["key"]], latent, embed)
        if captions and clip["caption"] and not text.is_file():
            write_text(text, clip["caption"] + "\n")
    return Exported(folder, len(order), len(order) - len(rejects), len(rejects), written), rejects


def _stem(clip_id: str, taken: set[str]) -> str:
    """A place that no other clip has taken."""
    stem = export_stem(clip_id)
    if stem in taken:
        raise Rejected(Reason.DUPLICATE, f"another row is named {clip_id!r} too, and has its files")
    taken.add(stem)
    return stem


def _export(latents: Latents, index: int, dtype: torch.dtype, latent: Path, embed: Path) -> bool:
    """Write what is missing of a pair: a file has its name once it is whole. Says whether anything was.

    Latents (1, C, F, h, w) in the dtype they are stored in; features (1, L, width) fp32, zero beyond the valid ones.
    """
    missing = [path for path in (latent, embed) if not path.is_file()]
    if latent in missing:
        arrays = (array.to(dtype) for array in latents.posterior([index]))
        _save(latent, dict(zip(("mean", "logvar"), arrays, strict=True)))
    if embed in missing:
        features, mask = latents.text([index])
        _save(embed, {"y_feat": [features], "y_mask": [mask]})
    return bool(missing)


def _dtypes(source: Table) -> dict[str, torch.dtype]:
    """What each row of "latents" is stored in, by its key."""
    stored = source.read("latents", ("key", "dtype"))
    return dict(zip(stored["key"].to_pylist(), map(DTYPES.__getitem__, stored["dtype"].to_pylist()), strict=True))


def _sweep_once(folders: set[Path], swept: set[Path]) -> None:
    for folder in folders - swept:
        remove_partials(folder)
    swept |= folders


def _save(path: Path, value: Mapping[str, Any]) -> None:
    with atomic(path) as partial, partial.open("wb") as file:  # a file has no name, and so the same bytes each time
        torch.save(value, file)


def _paths(folder: Path, stem: str) -> tuple[Path, Path, Path]:
    """A clip's files. A suffix is added, never replaced: ids end in such as `.mp4@0`."""
    videos, captions = f"{VIDEOS}/{stem}", f"{CAPTIONS}/{stem}"
    return folder / (videos + LATENT), folder / (captions + EMBED), folder / (captions + TEXT)


def _require_same(folder: Path, record: Mapping[str, str]) -> None:
    """An export goes on, and never into what is there of another."""
    there = read_json(folder / RECORD)
    content = there.get("content") if isinstance(there, dict) else None
    if content is None and any((folder / name).exists() for name in (VIDEOS, CAPTIONS)):
        raise StageError(f"{folder} has {VIDEOS} or {CAPTIONS} that no export wrote; name another folder")
    if content not in (None, record["content"]):
        raise StageError(f"{folder} holds the export of {there.get('table')}, with other content; name another folder")
