"""Define parts of the ingest manifest: how clips are cut from sources, and the limits on sources. No torch here."""

from typing import Literal, Self

from pydantic import Field, model_validator

from pusa.backbones import find_family
from pusa.system.strict import Strict
from pusa.tasks.base import Colour

_DEFAULT = find_family()  # its values are the defaults of the classes; other families' are applied where they are named

MAX_SECONDS = 1e7  # far more than anyone waits for; beyond, numbers have no meaning


class Bucket(Strict):
    """A shape that clips may have."""

    width: int = Field(ge=8, le=8192)
    height: int = Field(ge=8, le=8192)
    num_frames: int = Field(ge=1, le=10_000)


class ClipSettings(Strict):
    """How clips are cut from a source."""

    num_frames: int = Field(
        _DEFAULT.job.num_frames, ge=1, le=10_000, description="of a clip: the backbone's temporal step * k + 1"
    )
    width: int = Field(_DEFAULT.job.width, ge=8, le=8192, description="pixels, a multiple of the backbone's step")
    height: int = Field(_DEFAULT.job.height, ge=8, le=8192, description="pixels, as the width")
    buckets: tuple[Bucket, ...] = Field(
        (),
        max_length=100,
        description="shapes instead of one: each source gets the one that distorts it least",
    )
    fps: float | None = Field(
        _DEFAULT.job.fps, gt=0, le=240, description="frames per second to retime to; null keeps the source's"
    )
    windows: Literal["first", "all"] = Field("first", description="the first clip of a source, or all that fit")
    scenes: float | None = Field(
        None,
        gt=0,
        le=100,
        description="the score at which ffmpeg's scdet sees a cut, which no clip crosses; 10 is usual",
    )
    longest_frame: float = Field(
        0.25, gt=0, le=3600, description="seconds; a frame that the source shows for longer ends a clip, as a cut does"
    )
    fit: Literal["crop", "pad", "stretch"] = Field("crop", description="how frames are fitted to the size")
    background: Colour = Field("black", description="colour of the bars of `fit: pad`, and behind transparent frames")
    hdr: Literal["tone_map", "reject"] = Field("tone_map", description="make SDR of PQ and HLG, or reject them")
    interlaced: Literal["deinterlace", "reject"] = Field(
        "deinterlace", description="make frames of fields, or reject the source"
    )
    damaged: Literal["use_rest", "reject"] = Field(
        "use_rest", description="use what can be decoded of a damaged source, or reject it"
    )

    @property
    def shapes(self) -> tuple[Bucket, ...]:
        """Return the shapes that clips may have."""
        return self.buckets or (Bucket(width=self.width, height=self.height, num_frames=self.num_frames),)

    @model_validator(mode="after")
    def _check_shapes(self) -> Self:
        own = {name: getattr(self, name) for name in ("num_frames", "width", "height")}
        both = [name for name, value in own.items() if value != type(self).model_fields[name].default]
        if self.buckets and both:
            raise ValueError(f"buckets set the shapes already; remove {', '.join(both)}")
        return self


class Limits(Strict):
    """Limits on sources, so that one cannot hold up the others."""

    source_seconds: float = Field(3600, gt=0, le=MAX_SECONDS, description="longest source")
    source_pixels: int = Field(4096 * 2304, ge=1, le=2**28, description="largest frame of a source, width x height")
    caption_characters: int = Field(10_000, ge=1, le=1_000_000, description="longest caption")
    decoding_seconds: float = Field(
        300, gt=0, le=MAX_SECONDS, description="time to decode one source, after which the decoder is killed"
    )
