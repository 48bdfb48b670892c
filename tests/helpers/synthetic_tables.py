"""Latents tables of random values, without videos or models, through the writers of the real ones."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from pusa.data.encoding import ENCODINGS
from pusa.data.schema import CLIPS, TEXTS, latents_schema
from pusa.data.writer import write_stamped
from pusa.precompute.encode import latents_row, text_row
from pusa.precompute.rows import Wanted, want
from pusa.precompute.shards import Store
from pusa.precompute.table import STORED_SPACE, write_table

TOKENS, WIDTH, CHANNELS = 16, 8, 4
PRINTS = {"vae": "v", "text_encoder": "t", "tokenizer": "k"}
CAPTIONS = ("", "a dog runs", "a cat", "two birds fly over a lake")


@dataclass(frozen=True)
class Row:
    """What a row should give back."""

    mean: Tensor
    logvar: Tensor
    features: Tensor
    tokens: int


def clips(buckets: dict[str, int]) -> pa.Table:
    """A clips table's rows: "clip 0", "clip 1", ... of these shapes."""
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
                    "bucket": bucket, "source_width": width, "source_height": height,
                    "source_frames": frames, "source_fps": 24.0,
                    "fps": 24.0, "retimed_frames": 0, "caption": CAPTIONS[i % len(CAPTIONS)], "caption_from": "made",
                }
            )  # fmt: skip
    return pa.Table.from_pylist(rows, schema=CLIPS)


def write_synthetic(folder: Path, buckets: dict[str, int], compression: str = "zstd") -> list[Row]:
    """A whole table; gives what its rows hold."""
    wanted = want(clips(buckets), "bfloat16", PRINTS)
    dice = torch.Generator().manual_seed(0)
    encoding = ENCODINGS[compression]
    texts = {}
    for piece in wanted.pieces(shard_rows=3):
        rows = []
        for key in piece.keys:
            if piece.part == "texts":
                tokens = 0 if key == wanted.null_key else 1 + len(texts)
                kept = torch.randn(tokens or TOKENS, WIDTH, generator=dice).bfloat16()
                texts[key] = (kept, tokens)
                rows.append(text_row(key, "", kept, tokens, "bfloat16", encoding))
            else:
                rows.append(_latents_row(wanted, key, encoding))
        schema = TEXTS if piece.part == "texts" else latents_schema(len(rows[0]["latent_mean"]))
        write_stamped(
            folder,
            piece.name,
            rows,
            schema,
            compression,
            {"encoding": encoding, "compression": compression, "dtype": "bfloat16"},
        )
    store = Store(folder)
    store.look()
    facts = {"stored_space": STORED_SPACE, "statistics": [[0.0] * CHANNELS, [1.0] * CHANNELS]}
    write_table(folder, wanted, store, [], {**facts, "text_tokens": TOKENS, "text_width": WIDTH})
    return [Row(*_arrays(wanted, key), *texts[text]) for key, text in zip(wanted.keys, wanted.text_keys, strict=True)]


def _latents_row(wanted: Wanted, key: str, encoding: str):
    clip = wanted.clips.slice(wanted.keys.index(key), 1).to_pylist()[0]
    return latents_row(key, clip, *_arrays(wanted, key), 0, "bfloat16", encoding)


def _arrays(wanted: Wanted, key: str) -> tuple[Tensor, Tensor]:
    width, height, frames = map(int, wanted.clips["bucket"][wanted.keys.index(key)].as_py().split("x"))
    dice = torch.Generator().manual_seed(int(key[:8], 16))
    shape = (CHANNELS, 1 + (frames - 1) // 6, height // 8, width // 8)
    mean, logvar = (torch.randn(shape, generator=dice).bfloat16() for _ in range(2))
    return mean, logvar
