"""Write a latents table from rows that were made: the catalogue that joins clips, latents and texts, then the index.

Also: find a finished table, clean up before a run, and remove unused shards after it.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from time import time
from typing import Any

import pyarrow as pa

from pusa.data.encoding import DTYPES
from pusa.data.reader import Table
from pusa.data.schema import CUT, REJECTS, ROWS, VERSION
from pusa.data.shard import Shard
from pusa.data.writer import write_index, write_shard
from pusa.errors import StageError, TableError
from pusa.precompute.rows import PlannedRows
from pusa.precompute.shards import SHARD_NAME, UNUSED, RejectFiles, Store, quarantine_damaged, read_unused
from pusa.system.failures import FAILURES
from pusa.system.files import digest, remove, write_json
from pusa.system.locks import remove_work_locks

log = logging.getLogger(__name__)
ROWS_PER_SHARD = 8192  # of the catalogue
SECONDS_PER_DAY = 24 * 3600.0
REWRITTEN_NAME = re.compile(r"(rows-[0-9a-f]{16}-\d{5}|rejects-[0-9a-f]{16})\.parquet")  # parts that each run writes
STORED_SPACE = "vae"  # rows are the VAE's own output; training normalises them
CLIP_COLUMNS = ("clip_id", "caption", "caption_from", "source", *(field.name for field in CUT), "source_fps", "fps")
ENCODER_PACKAGES = ("pusa", "torch", "diffusers", "transformers", "decord", "imageio-ffmpeg")


def write_table(
    folder: Path, planned: PlannedRows, store: Store, rejects: Sequence[Mapping[str, str]], facts: Mapping[str, Any]
) -> None:
    """Write the catalogue, the rejects and the index of a latents table, of all planned rows that exist.

    Raises:
        StageError: no row exists.
    """
    both = enumerate(zip(planned.keys, planned.text_keys, strict=True))
    made = [row for row, (key, text) in both if key in store.locations["latents"] and text in store.locations["texts"]]
    if not made:
        raise StageError(
            f"{folder}: none of {len(planned.keys)} clips became latents; the first: {rejects[0]['detail']}"
        )
    keys = {
        "latents": [planned.keys[row] for row in made],
        "texts": [*(planned.text_keys[row] for row in made), planned.null_key],
    }
    used = {  # part -> its shards, in the order of their first use
        part: list(dict.fromkeys(store.locations[part][key][0] for key in keys[part])) for part in keys
    }
    ids = planned.clips["clip_id"].take(pa.array(made, pa.int64())).to_pylist()
    content = digest([[planned.keys[row], planned.text_keys[row], id] for row, id in zip(made, ids, strict=True)])[:16]
    rejects_path = folder / f"rejects-{digest(list(rejects))[:16]}.parquet"
    paths = {
        "rows": _write_catalogue(folder, digest([content, used])[:16], planned, made, store, used),
        **{part: [folder / name for name in names] for part, names in used.items()},
        "rejects": [rejects_path],
    }
    write_shard(rejects_path, list(rejects), REJECTS)
    # Shards of earlier runs stay as they are, so the latents may be stored in several ways.
    latents_facts = [Shard(path).facts for path in paths["latents"]]
    stored = {
        name: "+".join(sorted({str(facts.get(name)) for facts in latents_facts})) for name in ("compression", "dtype")
    }
    write_index(folder, paths, {**facts, **stored, "content": content}, hashed=tuple(used))


def _write_catalogue(
    folder: Path,
    name: str,
    planned: PlannedRows,
    made: Sequence[int],
    store: Store,
    used: Mapping[str, list[str]],
) -> list[Path]:
    """Write "rows" in files of `ROWS_PER_SHARD` rows: built as one, it would be in memory several times."""
    shard_numbers = {part: {name: number for number, name in enumerate(names)} for part, names in used.items()}
    paths = []
    for start in range(0, len(made), ROWS_PER_SHARD):
        rows = made[start : start + ROWS_PER_SHARD]
        clips = planned.clips.select(CLIP_COLUMNS).take(pa.array(rows, pa.int64()))
        keys = {"latents": [planned.keys[row] for row in rows], "texts": [planned.text_keys[row] for row in rows]}
        added: dict[str, Any] = {"key": keys["latents"], "text_key": keys["texts"]}
        for part, part_keys in keys.items():
            locations = [store.locations[part][key] for key in part_keys]
            added[f"{part}_shard"] = [shard_numbers[part][shard] for shard, _ in locations]
            added[f"{part}_row"] = [row for _, row in locations]
        added["schema_version"] = [VERSION] * len(rows)
        columns = [pa.array(added[f.name], f.type) if f.name in added else clips[f.name] for f in ROWS]
        paths.append(folder / f"rows-{name}-{start // ROWS_PER_SHARD:05d}.parquet")
        write_shard(paths[-1], pa.table(columns, schema=ROWS), ROWS)
    return paths


def open_finished(folder: Path, made_from: str) -> Table | None:
    """Return the table in a folder if there is nothing left to do.

    That is: it was made from the same sources and settings, its shards are intact, and it has no rejects, which would
    be tried again.
    """
    try:
        table = Table.open(folder)
    except TableError:
        return None
    empty = {part: not table.parts.get(part) or not table.rows(part) for part in ("rows", "rejects")}
    same = table.facts.get("made_from") == made_from and empty == {"rows": False, "rejects": True}
    return table if same and table.is_intact() else None


def clean_up(folder: Path, verify_all: bool) -> None:
    """Remove what earlier runs left, and move damaged shards to quarantine. Call it only while alone."""
    remove_work_locks(folder)
    remove(folder / FAILURES)
    quarantine_damaged(folder, verify_all)


def remove_unused(folder: Path, unused_days: float = 30) -> None:
    """Remove files that the table does not list, and work files. Call it only while alone.

    Earlier catalogues are removed at once. Latents and texts may have taken days to make, so they stay for
    `unused_days` days after they were last used: a disk with clips may be away today and back tomorrow.
    """
    listed = {shard["name"] for shards in Table.open(folder).parts.values() for shard in shards}
    noted, now, unused = read_unused(folder), time(), {}
    for path in sorted(folder.glob("*.parquet")):
        if path.name in listed:
            continue
        if REWRITTEN_NAME.fullmatch(path.name):
            remove(path)
        elif SHARD_NAME.fullmatch(path.name):
            stat = path.stat()
            entry = noted.get(path.name) or {"since": now, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
            if now - entry["since"] >= unused_days * SECONDS_PER_DAY:
                remove(path)
            else:
                unused[path.name] = entry
    if unused != noted:
        write_json(folder / UNUSED, unused)
        gib = sum(entry["bytes"] for entry in unused.values()) / 2**30
        log.info("%d shards (%.1f GiB) are not used by any clip now; kept for %g days", len(unused), gib, unused_days)
    for path in RejectFiles.paths(folder):
        remove(path)
    remove_work_locks(folder)


def model_facts(statistics: list[list[float]], folder: Path, store: Store, null_key: str) -> dict[str, Any]:
    """Return the facts that training needs about the encoders: latent statistics, length and width of text features."""
    name, row = store.locations["texts"][null_key]
    null = Shard(folder / name).row(row, ("text_shape", "dtype", "pooled"))
    tokens, width = null["text_shape"]
    facts = {"statistics": statistics, "text_tokens": tokens, "text_width": width, "null_key": null_key}
    if null["pooled"] is not None:
        facts["pooled_width"] = len(null["pooled"]) // DTYPES[null["dtype"]].itemsize
    return facts


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that affect latents."""
    return {name: version(name) for name in ENCODER_PACKAGES}
