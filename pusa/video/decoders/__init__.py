"""Videos decoded so that neither a broken nor a hostile file stops or fools us: name -> "module:function".

Every decoder is a function of (path, frames, seconds, placement, start_time), as `with_decord.read` is.
To add one: its file, and one line here.
"""

DECODERS = {
    "decord": "pusa.video.decoders.with_decord:read",
    "ffmpeg_seek": "pusa.video.decoders.with_ffmpeg_seek:read",
    "ffmpeg": "pusa.video.decoders.with_ffmpeg:read",
}
