"""The columns of the tables, and the version they have.

A clips table has the parts "clips" and "rejects". A latents table has four: "rows", a light catalogue with a row for
each clip, which says in which shard and row its latents and its text are; "latents" and "texts", which are heavy, and
which know nothing of captions' clips and names: a row there is named by what it was made from; and "rejects".
"""

import pyarrow as pa

VERSION = 2


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
    _text("decoder"),  # a name of pusa.video.decoders.DECODERS
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
