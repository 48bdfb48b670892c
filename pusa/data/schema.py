"""Define the columns of the tables, and the version of their format.

A clips table has the parts "clips" and "rejects". A latents table has four parts: "rows", a small catalogue with one
row for each clip, which names the shards and rows of its latents and its text features; "latents" and "texts", which
hold the large arrays, each under a key that is the hash of what it was made from; and "rejects".
"""

import pyarrow as pa

VERSION = 3


def _text(name: str) -> pa.Field:
    return pa.field(name, pa.string(), nullable=False)


def _number(name: str, kind: pa.DataType | None = None) -> pa.Field:
    return pa.field(name, kind or pa.int32(), nullable=False)


def _numbers(name: str, kind: pa.DataType | None = None) -> pa.Field:
    return pa.field(name, pa.list_(kind or pa.int32()), nullable=False)


# How frames become sRGB: the fields of pusa.video.conversion.Conversion.
CONVERSION = [
    _number("stream"),  # index of the video stream in the container
    _text("alpha"),  # none, straight, or the decoder of WebM's second picture
    _text("matrix"),  # as the source states it, or as players take it; ffmpeg's names of the code points of H.273
    _text("primaries"),
    _text("transfer"),
    _text("range"),  # limited or full
    _text("field_order"),  # progressive, top_first or bottom_first
    _text("deinterlace"),  # none, bwdif, bwdif_turned, or film: 24 frames a second that were spread over fields
    _text("tone_map"),  # none, or the rule by which HDR became SDR
    _text("background"),  # the colour behind transparent frames, and of bars
]

# Where a clip's frames and pixels come from in its source.
CUT = [
    _text("source_sha256"),
    _numbers("frames"),  # for each frame of the clip, the index of the source's frame, in order of time
    _text("decoder"),  # a key of pusa.video.decoders.DECODERS
    _number("start_time", pa.float64()),  # of the first frame, in seconds of the source's clock
    _number("width"),
    _number("height"),
    _text("fit"),  # crop, pad or stretch
    _numbers("box", pa.float64()),  # left, top, right, bottom of the visible part, in decoded pixels (upright)
    _number("pixel_aspect", pa.float64()),  # width / height of a decoded pixel on the screen
    _text("bucket"),  # WIDTHxHEIGHTxFRAMES
    *CONVERSION,
]

CLIPS = pa.schema(
    [
        _text("clip_id"),
        _text("source"),  # absolute path
        *CUT,
        _number("source_width"),  # in decoded pixels, upright
        _number("source_height"),
        _number("source_frames"),
        _number("source_fps", pa.float64()),
        _numbers("kinds", pa.string()),  # keys of pusa.ingest.kinds.KINDS: what was done to the source
        _text("damage"),  # what of the source cannot be used; "" if nothing is lost
        _number("fps", pa.float64()),
        _number("retimed_frames"),  # displayed more than a tenth of a frame away from their time in the source
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
        _text("key"),  # of the latents: the hash of everything they were made from
        _text("text_key"),  # of the text features
        _number("latents_shard"),  # the number of the shard in the index, and the row in that shard
        _number("latents_row"),
        _number("texts_shard"),
        _number("texts_row"),
        _number("schema_version"),
    ]
)


def latents_schema(num_bytes: int) -> pa.Schema:
    """Return the columns of "latents"; a shard holds rows of one bucket.

    Arrays (C, F, h, w) are stored as little-endian bytes of `dtype` in C order, laid out as `encoding` says.

    Args:
        num_bytes: the size of one array. It is equal for all rows of a shard, which fixes the position of each row in
            an uncompressed file.
    """
    return pa.schema(
        [
            _text("key"),
            *CUT,
            _text("dtype"),
            _text("encoding"),  # raw or planes; see pusa.data.encoding
            _numbers("latent_shape"),
            _number("tile"),  # side of the VAE's tiles in pixels if memory was short; 0: none, or the family's own
            pa.field("latent_mean", pa.binary(num_bytes), nullable=False),
            pa.field("latent_logvar", pa.binary(num_bytes), nullable=False),
            _number("schema_version"),
        ]
    )


# Text features (tokens, width) of the valid tokens only, stored like the latents. `pooled` are those of a text as a
# whole, (pooled width,), of families that have them: the fact `pooled_width` of the index says so for all rows.
TEXTS = pa.schema(
    [
        _text("text_key"),
        _text("caption"),
        _text("dtype"),
        _text("encoding"),
        _numbers("text_shape"),
        _number("tokens"),
        pa.field("text", pa.binary(), nullable=False),
        pa.field("pooled", pa.binary()),
        _number("schema_version"),
    ]
)

# What every stage writes, which a table that was made to do harm may break: the least and the largest value of columns,
# and the least and the largest number of values in each row of a list.
SIDE = (1, 2**20)
RATE = (1e-6, 1e6)
RANGES: dict[str, tuple[float, float]] = {
    "frames": (0, 2**31 - 1), "box": (-1e9, 1e9), "start_time": (-1e12, 1e12), "pixel_aspect": RATE, "width": SIDE,
    "height": SIDE, "source_width": SIDE, "source_height": SIDE, "source_frames": (1, 2**31 - 1), "source_fps": RATE,
    "fps": RATE, "retimed_frames": (0, 2**31 - 1), "stream": (0, 2**16),
}  # fmt: skip
LENGTHS = {"frames": (1, 2**31 - 1), "box": (4, 4)}
BUCKET = r"^[0-9]{1,7}x[0-9]{1,7}x[0-9]{1,10}$"

# The parts of tables. The arrays of "latents" have one length in each shard, which differs between shards.
PARTS = {"clips": CLIPS, "rows": ROWS, "texts": TEXTS, "rejects": REJECTS, "latents": latents_schema(1)}
KEY_COLUMNS = {"latents": "key", "texts": "text_key"}  # in the shards of each part, and in the catalogue
OPTIONAL = {"pooled": pa.binary()}  # columns that may be null, and that files of earlier versions lack
