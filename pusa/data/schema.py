"""The columns of the tables, and the version they have."""

from enum import StrEnum

import pyarrow as pa

VERSION = 1


class Reason(StrEnum):
    """Why a source gave no clip, or a clip no latents: a closed list."""

    UNREADABLE = "unreadable"
    TOO_SHORT = "too_short"
    NO_CAPTION = "no_caption"
    BAD_CAPTION = "bad_caption"
    BAD_NAME = "bad_name"
    BAD_ROW = "bad_row"
    CHANGED = "changed"


CLIPS = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),  # absolute path
        pa.field("source_sha256", pa.string(), nullable=False),
        pa.field("frames", pa.list_(pa.int32()), nullable=False),  # indices into the source, in order
        pa.field("source_fps", pa.float64(), nullable=False),
        pa.field("fps", pa.float64(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("caption_from", pa.string(), nullable=False),
    ]
)

REJECTS = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)

# Arrays are little-endian bytes of `dtype` in C order: latents (C, F, h, w), text (valid tokens, width).
LATENTS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),  # hash of everything the row was made from
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("source_sha256", pa.string(), nullable=False),
        pa.field("fps", pa.float64(), nullable=False),
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("latent_shape", pa.list_(pa.int32()), nullable=False),
        pa.field("latent_mean", pa.binary(), nullable=False),
        pa.field("latent_logvar", pa.binary(), nullable=False),
        pa.field("text_shape", pa.list_(pa.int32()), nullable=False),
        pa.field("text", pa.binary(), nullable=False),
    ]
)
