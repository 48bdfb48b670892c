"""From rows that are made to a latents table: the catalogue that joins clips, latents and texts, then the index."""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from time import time
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pusa.data.reader import Shard, Table
from pusa.data.schema import CUT, REJECTS, ROWS, VERSION
from pusa.data.writer import write_index, write_shard
from pusa.errors import StageError, TableError
from pusa.precompute.rows import Wanted
from pusa.precompute.shards import SHARD_NAME, UNUSED, Refusals, Store, quarantine_damaged, size_and_time, unused_in
from pusa.system.files import digest, write_json
from pusa.system.locks import remove_work_locks
from pusa.weights.model import Model

log = logging.getLogger(__name__)
ROWS_PER_SHARD = 8192  # of the catalogue
DAY = 24 * 3600.0  # seconds
_LIGHT = re.compile(r"(rows-[0-9a-f]{16}-\d{5}|rejects-[0-9a-f]{16})\.parquet")  # what is written anew each time
STORED_SPACE = "vae"  # rows are the VAE's own output; training normalises them
CLIP_COLUMNS = ("clip_id", "caption", "caption_from", "source", *(field.name for field in CUT), "source_fps", "fps")


def write_table(
    folder: Path, wanted: Wanted, store: Store, rejects: Sequence[Mapping[str, str]], facts: Mapping[str, Any]
) -> None:
    """Declare a latents table of all wanted rows that are there.

    Raises:
        StageError: there is none.
    """
    here = [row for row, key in enumerate(wanted.keys) if key in store.places["latents"]]
    if not here:
        raise StageError(
            f"{folder}: none of {len(wanted.keys)} clips became latents; the first: {rejects[0]['detail']}"
        )
    used = {
        "latents": _used(store, "latents", [wanted.keys[row] for row in here]),
        "texts": _used(store, "texts", [*(wanted.text_keys[row] for row in here), wanted.null_key]),
    }
    content = _content(wanted, here)
    paths = {
        "rows": list(_write_rows(folder, digest([content, used])[:16], wanted, here, store, used)),
        **{part: [folder / name for name in names] for part, names in used.items()},
        "rejects": [folder / f"rejects-{digest(list(rejects))[:16]}.parquet"],
    }
    write_shard(paths["rejects"][0], list(rejects), REJECTS)
    stored = _stored(paths["latents"])
    write_index(folder, paths, {**facts, **stored, "content": content}, stamped=tuple(used))


def finished(folder: Path, made_from: str) -> Table | None:
    """The table as it is, if it was made from the same and nothing of it was refused, which is tried again."""
    try:
        table = Table.open(folder)
    except TableError:
        return None
    same = table.facts.get("made_from") == made_from and not table.rows("rejects")
    return table if same and table.is_whole() else None


def clear(folder: Path, unused_days: float = 30) -> None:
    """Remove what the table does not name. Only for who is alone.

    Catalogues of before go at once. Latents and texts, which may have cost days, stay for so many days after they were
    last wanted: a disk may be missing today, and its clips come back tomorrow.
    """
    kept = {shard["name"] for shards in Table.open(folder).parts.values() for shard in shards}
    left = [path for path in sorted(folder.glob("*.parquet")) if path.name not in kept]
    noted, now, unused = unused_in(folder), time(), {}
    for path in left:
        entry = noted.get(path.name) or {"since": now, **size_and_time(path)}
        if _LIGHT.fullmatch(path.name) or (
            SHARD_NAME.fullmatch(path.name) and now - entry["since"] >= unused_days * DAY
        ):
            path.unlink()
        elif SHARD_NAME.fullmatch(path.name):
            unused[path.name] = entry
    if unused != noted:
        write_json(folder / UNUSED, unused)
        size = sum(entry["bytes"] for entry in unused.values()) / 2**30
        log.info("%d shards (%.1f GiB) hold what no clip wants now; kept for %g days", len(unused), size, unused_days)
    for path in Refusals.files(folder):
        path.unlink()
    remove_work_locks(folder)


def tidy(folder: Path, everything: bool) -> None:
    """Put damaged shards aside, of all or of those that may have changed. Only for who is alone."""
    remove_work_locks(folder)
    quarantine_damaged(folder, everything)


def facts_of(model: Model, folder: Path, store: Store, null_key: str) -> dict[str, Any]:
    """What training needs to know of the encoders: the VAE's statistics, and how long and wide text features are."""
    name, row = store.places["texts"][null_key]
    tokens, width = Shard(folder / name).row(row, ("text_shape",))["text_shape"]
    statistics = [value.flatten().tolist() for value in model.backbone.latent_statistics(model.vae)]
    return {"statistics": statistics, "text_tokens": tokens, "text_width": width, "null_key": null_key}


def packages() -> dict[str, str]:
    """The versions of what makes latents."""
    return {name: version(name) for name in ("pusa", "torch", "diffusers", "transformers", "decord", "imageio-ffmpeg")}


def _content(wanted: Wanted, here: Sequence[int]) -> str:
    """What names the rows and their order, however they were made and sharded."""
    ids = wanted.clips["clip_id"].take(pa.array(here, pa.int64())).to_pylist()
    return digest([[wanted.keys[row], wanted.text_keys[row], id] for row, id in zip(here, ids, strict=True)])[:16]


def _stored(shards: Sequence[Path]) -> dict[str, str]:
    """How latents are stored, by what the shards say of themselves: those of earlier runs stay as they are."""
    told = [json.loads(pq.read_schema(path).metadata[b"pusa"]) for path in shards]
    return {name: "+".join(sorted({facts[name] for facts in told})) for name in ("compression", "dtype")}


def _used(store: Store, part: str, keys: Sequence[str]) -> list[str]:
    """The shards that hold these rows, in the order of their first use."""
    return list(dict.fromkeys(store.places[part][key][0] for key in keys))


def _write_rows(
    folder: Path, name: str, wanted: Wanted, here: Sequence[int], store: Store, used: Mapping[str, list[str]]
) -> Iterator[Path]:
    """The catalogue, so many rows a file: all of them at once would be in memory several times."""
    numbers = {part: {name: i for i, name in enumerate(names)} for part, names in used.items()}
    for start in range(0, len(here), ROWS_PER_SHARD):
        path = folder / f"rows-{name}-{start // ROWS_PER_SHARD:05d}.parquet"
        write_shard(path, _rows(wanted, here[start : start + ROWS_PER_SHARD], store, numbers), ROWS)
        yield path


def _rows(wanted: Wanted, here: Sequence[int], store: Store, numbers: Mapping[str, dict[str, int]]) -> pa.Table:
    clips = wanted.clips.select(CLIP_COLUMNS).take(pa.array(here, pa.int64()))
    keys = {"latents": [wanted.keys[row] for row in here], "texts": [wanted.text_keys[row] for row in here]}
    added: dict[str, Any] = {"key": keys["latents"], "text_key": keys["texts"]}
    for part, some in keys.items():
        places = [store.places[part][key] for key in some]
        added[f"{part}_shard"] = [numbers[part][name] for name, _ in places]
        added[f"{part}_row"] = [row for _, row in places]
    added["schema_version"] = [VERSION] * len(here)
    columns = [pa.array(added[f.name], f.type) if f.name in added else clips[f.name] for f in ROWS]
    return pa.table(columns, schema=ROWS)
