"""From rows that are made to a latents table: the catalogue that joins clips, latents and texts, then the index."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from pusa.claims import forget_claims
from pusa.data.reader import Shard, Table
from pusa.data.schema import CUT, REJECTS, ROWS, VERSION
from pusa.data.writer import write_index, write_shard
from pusa.errors import StageError, TableError
from pusa.files import digest
from pusa.model import Model
from pusa.precomputing.plan import Wanted
from pusa.precomputing.rejected import Rejected
from pusa.precomputing.shards import Store, quarantine_damaged

PARTS = ("rows", "latents", "texts", "rejects")
STORED_SPACE = "vae"  # rows are the VAE's own output; training normalises them
CLIP_COLUMNS = ("clip_id", "caption", "caption_from", "source", *(field.name for field in CUT), "source_fps", "fps")


def write_table(
    folder: Path, wanted: Wanted, store: Store, rejects: Sequence[Mapping[str, str]], facts: Mapping[str, Any]
) -> list[Path]:
    """Declare a latents table of all wanted rows that are there; gives the shards it is made of.

    Raises:
        StageError: there is none.
    """
    latents, texts = store.places["latents"], store.places["texts"]
    here = [row for row, key in enumerate(wanted.keys) if key in latents]
    if not here:
        raise StageError(
            f"{folder}: none of {len(wanted.keys)} clips became latents; the first: {rejects[0]['detail']}"
        )
    places = {
        "latents": [latents[wanted.keys[row]] for row in here],
        "texts": [texts[wanted.text_keys[row]] for row in here],
    }
    shards = {part: _used(some) for part, some in places.items()}
    shards["texts"] = _used([*places["texts"], texts[wanted.null_key]])
    rows = _catalogue(wanted, here, places, shards)
    content = digest([[wanted.keys[row], wanted.text_keys[row]] for row in here] + rows["clip_id"].to_pylist())[:16]
    paths = {
        "rows": [folder / f"rows-{digest([content, shards])[:16]}.parquet"],
        **{part: [folder / name for name in names] for part, names in shards.items()},
        "rejects": [folder / f"rejects-{digest(list(rejects))[:16]}.parquet"],
    }
    write_shard(paths["rows"][0], rows, ROWS)
    write_shard(paths["rejects"][0], list(rejects), REJECTS)
    write_index(folder, paths, {**facts, "content": content}, stamped=("latents", "texts"))
    return [path for some in paths.values() for path in some]


def finished(folder: Path, made_from: str) -> Table | None:
    """The table as it is, if it was made from the same and nothing of it was refused, which is tried again."""
    try:
        table = Table.open(folder)
    except TableError:
        return None
    same = table.facts.get("made_from") == made_from and not table.rows("rejects")
    return table if same and table.is_whole() else None


def clear(folder: Path) -> None:
    """Remove shards that the table does not name, and what was noted in making it. Only for who is alone."""
    kept = {shard["name"] for shards in Table.open(folder).parts.values() for shard in shards}
    stale = [path for part in PARTS for path in folder.glob(f"{part}-*.parquet") if path.name not in kept]
    for path in [*stale, *Rejected.files(folder)]:
        path.unlink()
    forget_claims(folder)


def tidy(folder: Path, everything: bool) -> None:
    """Put damaged shards aside, of all or of those that may have changed. Only for who is alone."""
    forget_claims(folder)
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


def _catalogue(
    wanted: Wanted,
    here: Sequence[int],
    places: Mapping[str, Sequence[tuple[str, int]]],
    shards: Mapping[str, list[str]],
) -> pa.Table:
    rows = wanted.clips.select(CLIP_COLUMNS).take(here)
    added: dict[str, Any] = {
        "key": [wanted.keys[row] for row in here],
        "text_key": [wanted.text_keys[row] for row in here],
        "schema_version": [VERSION] * len(here),
    }
    for part, some in places.items():
        number = {name: i for i, name in enumerate(shards[part])}
        added[f"{part}_shard"] = [number[name] for name, _ in some]
        added[f"{part}_row"] = [row for _, row in some]
    for name, values in added.items():
        rows = rows.append_column(ROWS.field(name), pa.array(values, ROWS.field(name).type))
    return rows


def _used(places: Sequence[tuple[str, int]]) -> list[str]:
    return list(dict.fromkeys(name for name, _ in places))
