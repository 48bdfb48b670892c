"""The columns of the tables, and the version they have.

A clips table has the parts "clips" and "rejects". A latents table has four: "rows", a light catalogue with a row for
each clip, which says in which shard and row its latents and its text are; "latents" and "texts", which are heavy, and
which know nothing of captions' clips and names: a row there is named by what it was made from; and "rejects".
"""

from enum import StrEnum

import pyarrow as pa

VERSION = 2


class Reason(StrEnum):
    """Why a source gave no clip, or a clip no latents: a closed list."""

    EMPTY_FILE = "empty_file"  # zero bytes
    UNREADABLE = "unreadable"  # the system refuses it: gone, no permission, no regular file
    BAD_NAME = "bad_name"  # not UTF-8
    BAD_ROW = "bad_row"  # a line of a metadata file that names no video
    NOT_A_VIDEO = "not_a_video"  # nothing in it that a decoder knows, or a suffix that is no video's
    NO_VIDEO_STREAM = "no_video_stream"  # sound alone
    DAMAGED = "damaged"  # fewer frames than promised, frames that cannot be decoded, times that go back
    TOO_SHORT = "too_short"  # for one clip of any allowed shape
    TOO_LONG = "too_long"  # beyond limits.source_seconds
    TOO_LARGE = "too_large"  # beyond limits.source_pixels
    TIMEOUT = "timeout"  # the decoder was killed
    CRASHED = "crashed"  # the decoder died
    NO_CAPTION = "no_caption"
    BAD_CAPTION = "bad_caption"  # no text, not UTF-8, too long
    DUPLICATE = "duplicate"  # the same bytes as another source
    NEAR_DUPLICATE = "near_duplicate"  # looks like another source
    CHANGED = "changed"  # not the file that was ingested, or gone since
    NOT_FINITE = "not_finite"  # NaN or infinite latents
    BAD_PAIR = "bad_pair"  # of imported files: a half is missing, or not what it should be


def _text(name: str) -> pa.Field:
    return pa.field(name, pa.string(), nullable=False)


def _number(name: str, kind: pa.DataType | None = None) -> pa.Field:
    return pa.field(name, kind or pa.int32(), nullable=False)


def _numbers(name: str, kind: pa.DataType | None = None) -> pa.Field:
    return pa.field(name, pa.list_(kind or pa.int32()), nullable=False)


# How a clip lies in its source.
CUT = [
    _text("source_sha256"),
    _numbers("frames"),  # indices into the source's frames in the order of their times, one for each frame of the clip
    _text("decoder"),  # a name of pusa.decoding.DECODERS
    _number("start_time", pa.float64()),  # of the first frame, in seconds of the source's own clock
    _number("width"),
    _number("height"),
    _text("fit"),  # crop, pad or stretch
    _numbers("box", pa.float64()),  # left, top, right, bottom of what is shown, in decoded pixels (upright)
    _number("pixel_aspect", pa.float64()),  # width / height of a decoded pixel as it is to be shown
    _text("bucket"),  # WIDTHxHEIGHTxFRAMES
]

CLIPS = pa.schema(
    [
        _text("clip_id"),
        _text("source"),  # absolute path
        *CUT,
        _number("source_width"),  # decoded, upright
        _number("source_height"),
        _number("source_frames"),
        _number("source_fps", pa.float64()),
        _number("fps", pa.float64()),
        _number("retimed_frames"),  # shown more than a tenth of a frame away from their time in the source
        _text("caption"),
        _text("caption_from"),
    ]
)

REJECTS = pa.schema([_text("source"), _text("reason"), _text("detail")])

ROWS = pa.schema(
    [
        _text("clip_id"),
        _text("caption"),
        _text("caption_from"),
        _text("source"),
        *CUT,
        _number("source_fps", pa.float64()),
        _number("fps", pa.float64()),
        _text("key"),  # of the latents: the hash of all they were made from
        _text("text_key"),  # of the text features
        _number("latents_shard"),  # which shard of "latents", in the index's order, and which row of it
        _number("latents_row"),
        _number("texts_shard"),
        _number("texts_row"),
        _number("schema_version"),
    ]
)


def latents_schema(num_bytes: int) -> pa.Schema:
    """Rows of one bucket. Arrays (C, F, h, w) are little-endian bytes of `dtype` in C order, as `encoding` lays them.

    Args:
        num_bytes: of one array; all in a shard are alike, so that a row's place in an uncompressed file is known.
    """
    return pa.schema(
        [
            _text("key"),
            *CUT,
            _text("dtype"),
            _text("encoding"),  # raw, or planes: all low bytes first
            _numbers("latent_shape"),
            _number("tile"),  # pixels of the VAE's tiles where memory was short; 0 is none
            pa.field("latent_mean", pa.binary(num_bytes), nullable=False),
            pa.field("latent_logvar", pa.binary(num_bytes), nullable=False),
            _number("schema_version"),
        ]
    )


# Text features (tokens, width) of the valid tokens alone, as the arrays above.
TEXTS = pa.schema(
    [
        _text("text_key"),
        _text("caption"),
        _text("dtype"),
        _text("encoding"),
        _numbers("text_shape"),
        _number("tokens"),
        pa.field("text", pa.binary(), nullable=False),
        _number("schema_version"),
    ]
)
