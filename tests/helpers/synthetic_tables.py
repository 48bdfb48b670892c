"""Write latents tables of random values with the real writers, without videos or models."""

from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from pusa.backbones import find_family
from pusa.data.encoding import ENCODINGS
from pusa.data.schema import CLIPS, TEXTS, latents_schema
from pusa.data.writer import write_hashed_shard
from pusa.precompute.encode import latents_row, text_row
from pusa.precompute.rows import PlannedRows, plan_rows
from pusa.precompute.shards import Store
from pusa.precompute.table import STORED_SPACE, model_facts, write_table
from pusa.video.conversion import Conversion

TOKENS, WIDTH, CHANNELS = 16, 8, 4
FINGERPRINTS = {"vae": "v", "text_encoder": "t", "tokenizer": "k"}
CAPTIONS = ("", "a dog runs", "a cat", "two birds fly over a lake")


@dataclass(frozen=True)
class Row:
    """The content of a row, as it should be read."""

    mean: Tensor
    logvar: Tensor
    features: Tensor
    tokens: int
    pooled: Tensor | None


# How a plain video in the colours of BT.709 is read.
PLAIN = asdict(
    Conversion(
        stream=0, alpha="none", matrix="bt709", primaries="bt709", transfer="bt709", range="limited",
        field_order="progressive", deinterlace="none", tone_map="none", background="black",
    )
)  # fmt: skip


def clips(buckets: dict[str, int]) -> pa.Table:
    """Return the rows of a clips table, "clip 0", "clip 1", ...: for each bucket, this many clips."""
    rows = []
    for bucket, count in buckets.items():
        width, height, frames = map(int, bucket.split("x"))
        for _ in range(count):
            i = len(rows)
            rows.append(
                {
                    "clip_id": f"clip {i}", "source": f"/videos/{i}.mp4", "source_sha256": f"{i:064x}",
                    "frames": list(range(frames)), "decoder": "decord", "start_time": 0.0,
                    "width": width, "height": height,
                    "fit": "crop", "box": [0.0, 0.0, float(width), float(height)], "pixel_aspect": 1.0,
                    "bucket": bucket, **PLAIN, "kinds": [], "damage": "",
                    "source_width": width, "source_height": height,
                    "source_frames": frames, "source_fps": 24.0,
                    "fps": 24.0, "retimed_frames": 0, "caption": CAPTIONS[i % len(CAPTIONS)], "caption_from": "made",
                }
            )  # fmt: skip
    return pa.Table.from_pylist(rows, schema=CLIPS)


def write_synthetic(
    folder: Path, buckets: dict[str, int], compression: str = "zstd", pooled_width: int = 0, texts: pa.Schema = TEXTS
) -> list[Row]:
    """Write a complete table and return the content of its rows.

    Args:
        folder: the table's.
        buckets: how many clips of each shape, WIDTHxHEIGHTxFRAMES.
        compression: as of a manifest.
        pooled_width: of the pooled text features; 0: none.
        texts: the columns of texts.
    """
    planned = plan_rows(clips(buckets), "bfloat16", find_family(), FINGERPRINTS)
    generator = torch.Generator().manual_seed(0)
    encoding = ENCODINGS[compression]
    made = {}
    for segment in planned.segments(shard_rows=3):
        rows = []
        for key in segment.keys:
            if segment.part == "texts":
                tokens = 0 if key == planned.null_key else 1 + len(made)
                kept = torch.randn(tokens or TOKENS, WIDTH, generator=generator).bfloat16()
                pooled = torch.randn(pooled_width, generator=generator).bfloat16() if pooled_width else None
                made[key] = (kept, tokens, pooled)
                rows.append(text_row(key, "", kept, tokens, "bfloat16", encoding, pooled))
            else:
                clip = planned.clips.slice(planned.keys.index(key), 1).to_pylist()[0]
                rows.append(latents_row(key, clip, *_arrays(planned, key), 0, "bfloat16", encoding))
        schema = texts if segment.part == "texts" else latents_schema(len(rows[0]["latent_mean"]))
        stored = {"encoding": encoding, "compression": compression, "dtype": "bfloat16"}
        write_hashed_shard(folder, segment.name, rows, schema, compression, stored)
    store = Store(folder)
    store.refresh()
    statistics = [[0.0] * CHANNELS, [1.0] * CHANNELS]
    facts = {"stored_space": STORED_SPACE, **model_facts(statistics, folder, store, planned.null_key)}
    write_table(folder, planned, store, [], facts)
    keys = zip(planned.keys, planned.text_keys, strict=True)
    return [Row(*_arrays(planned, key), *made[text_key]) for key, text_key in keys]


def _arrays(planned: PlannedRows, key: str) -> tuple[Tensor, Tensor]:
    """Return random mean and log-variance of a clip, which depend on its key only."""
    width, height, frames = map(int, planned.clips["bucket"][planned.keys.index(key)].as_py().split("x"))
    generator = torch.Generator().manual_seed(int(key[:8], 16))
    shape = (CHANNELS, 1 + (frames - 1) // 6, height // 8, width // 8)
    mean, logvar = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
    return mean, logvar
