"""Decide how the pictures of a video become sRGB frames: colours, HDR, fields and alpha; and write ffmpeg's filters."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from pusa.errors import Reason, Rejected
from pusa.video.header import UNSPECIFIED, Header

# Players take untagged video for BT.709 from this size on, and for BT.601 below.
HD_WIDTH, HD_HEIGHT = 1280, 720
# Pictures of these are shown as they are: their curves and primaries are so near to sRGB's that players do the same.
SDR_TRANSFERS = (UNSPECIFIED, "bt709", "bt470m", "bt470bg", "smpte170m", "smpte240m", "iec61966-2-1", "iec61966-2-4",
                 "bt1361e", "bt2020-10", "bt2020-12")  # fmt: skip
NEAR_PRIMARIES = (UNSPECIFIED, "bt709", "bt470bg", "smpte170m", "smpte240m", "jedec-p22")
# These are converted by zscale: wide gamuts keep their own transfer curve, and the others become sRGB.
WIDE_PRIMARIES = ("bt2020", "smpte431", "smpte432", "bt470m", "film")
HDR_TRANSFERS = {"smpte2084": "PQ", "arib-std-b67": "HLG"}
SWSCALE_MATRICES = ("bt709", "bt470bg", "smpte170m", "smpte240m", "fcc", "bt2020nc")
ZSCALE_MATRICES = (*SWSCALE_MATRICES, "ycgco", "bt2020c", "chroma-derived-nc", "chroma-derived-c", "ictcp", "gbr")
# Linear light 1.0 is reference white, 203 nits in PQ and HLG (BT.2408). Mobius leaves everything below 0.7 as it is,
# and compresses what is brighter, up to 1000 nits. Without `agamma=0`, zscale would give each colour of HLG a gamma of
# its own, by which saturated colours are wrong by up to 38 levels. A rule never changes: tables name the one that made
# their pixels.
TONE_MAPS = {"mobius203": "zscale=transfer=linear:npl=203:agamma=0,format={linear},zscale=primaries=bt709,"
             "tonemap=mobius:param=0.7:peak=4.926:desat=0,zscale=transfer=iec61966-2-1:range=full"}  # fmt: skip
TONE_MAP = "mobius203"
NONE = "none"
THUMBNAIL_SIDE = 8  # pixels
_SMALL = f"scale={THUMBNAIL_SIDE}:{THUMBNAIL_SIDE}:flags=area"
_SMALL_ENOUGH = "scale=64:64:flags=area"  # converting the colours of whole frames with zscale would take too long
FIELD_NAMES = {"top_first": "tff", "bottom_first": "bff"}
TRANSPOSE = "transpose=cclock_flip"  # rows become columns; twice is the picture itself
# Fields of two times become one frame (bwdif). ffmpeg turns frames upright first, so that the fields of one that lay on
# its side are columns ("turned"). "film" has 24 frames a second that were spread over 60 fields: its fields are
# matched, and then one of five frames is a repetition.
_BWDIF = "setfield={order},bwdif=mode=send_frame:parity={order}:deint=all"
DEINTERLACERS = {
    "bwdif": _BWDIF,
    "bwdif_turned": f"{TRANSPOSE},{_BWDIF},{TRANSPOSE}",
    "film": "setfield={order},fieldmatch=order={order}:combmatch=full,bwdif=mode=send_frame:deint=interlaced,decimate",
}


@dataclass(frozen=True)
class Conversion:
    """How frames of a source are converted. All fields are plain values, which tables and JSON store."""

    stream: int  # index of the video stream in the container
    alpha: str  # "none", "straight", or the decoder that decodes the second picture of WebM's alpha
    matrix: str  # one of ZSCALE_MATRICES, or "gray"
    primaries: str
    transfer: str
    range: str  # "limited" or "full"
    field_order: str  # "progressive", "top_first" or "bottom_first"
    deinterlace: str  # "none" or a key of DEINTERLACERS
    tone_map: str  # "none" or a key of TONE_MAPS
    background: str  # colour that shows through where a frame is transparent

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Self:
        """Return the conversion of a table's row, which has a column for each field.

        Raises:
            Rejected: DAMAGED: a value is unknown, so that it could not become part of a filter.
        """
        conversion = cls(**{field.name: row[field.name] for field in fields(cls)})
        allowed = {
            "alpha": (NONE, "straight", "libvpx", "libvpx-vp9"),
            "matrix": (*ZSCALE_MATRICES, "gray"),
            "primaries": (*NEAR_PRIMARIES, *WIDE_PRIMARIES),
            "transfer": (*SDR_TRANSFERS, *HDR_TRANSFERS),
            "range": ("limited", "full"),
            "field_order": ("progressive", *FIELD_NAMES),
            "deinterlace": (NONE, *DEINTERLACERS),
            "tone_map": (NONE, *TONE_MAPS),
        }
        for name, values in allowed.items():
            if row[name] not in values:
                detail = f"{row['source']}: its row has {name} {row[name]!r:.80}; allowed are {', '.join(values)}"
                raise Rejected(Reason.DAMAGED, detail)
        return conversion

    @property
    def has_alpha(self) -> bool:
        """Return whether frames are decoded with alpha."""
        return self.alpha != NONE

    @property
    def pixel_format(self) -> str:
        """Return ffmpeg's name for the format of decoded frames."""
        return "rgba" if self.has_alpha else "rgb24"

    @property
    def keeps_frames(self) -> bool:
        """Return whether each decoded frame is one frame of the result."""
        return self.deinterlace != "film"

    @property
    def changes_colours(self) -> bool:
        """Return whether more than a matrix is applied."""
        needs_zscale = self.matrix not in (*SWSCALE_MATRICES, "gbr", "gray")
        needs_zscale |= self.matrix == "gray" and self.range == "limited"  # swscale takes all gray for full range
        return needs_zscale or self.tone_map != NONE or self.primaries in WIDE_PRIMARIES

    @property
    def input_options(self) -> tuple[str, ...]:
        """Return ffmpeg's options before the input."""
        return ("-c:v", self.alpha) if self.alpha not in (NONE, "straight") else ()

    def first_filters(self) -> list[str]:
        """Return the filters that come first. They tag frames, and make frames of fields, for which they need all."""
        # Later filters would convert what a file states by the way, and refuse what it leaves out or states wrong.
        if self.changes_colours:
            primaries, transfer = _known(self.primaries), _known(self.transfer)
        else:  # otherwise swscale would have to convert these too
            primaries, transfer = "unknown", "unknown"
        grey = self.matrix == "gray"
        matrix, colour_range = ("unknown", "full") if grey else (self.matrix, self.range)
        tags = f"colorspace={matrix}:color_primaries={primaries}:color_trc={transfer}:range={colour_range}"
        if self.deinterlace == NONE:
            return [f"setparams={tags}"]
        return [f"setparams={tags}", DEINTERLACERS[self.deinterlace].format(order=FIELD_NAMES[self.field_order])]

    def thumbnail_filters(self) -> list[str]:
        """Return the filters that make a thumbnail of a frame."""
        # First convert to the RGB pixels that a reader gets. Scaling YUV and then converting would be off by more than
        # the difference to the next frame.
        return [*([_SMALL_ENOUGH] if self.changes_colours else []), *self.colour_filters(), _SMALL]

    def colour_filters(self) -> list[str]:
        """Return the filters that convert a frame to sRGB. The last one sets the format `pixel_format`."""
        if not self.changes_colours:
            return [f"format={self.pixel_format}"]
        a = "a" if self.has_alpha else ""
        planar = []  # zscale takes only planes
        if self.matrix == "gbr":
            planar = [f"format=gbr{a}p16le"]
        elif self.matrix == "gray":  # the same code values, now as luma of the real range
            planar = [f"format=yuv{a}444p16le", f"setparams=colorspace=bt709:range={self.range}"]
        if self.tone_map != NONE:
            convert = TONE_MAPS[self.tone_map].format(linear=f"gbr{a}pf32le")
        else:
            convert = "zscale=matrix=gbr:primaries=bt709:range=full"
        return [*planar, convert, f"format=gbr{a}p", f"format={self.pixel_format}"]


def _known(name: str) -> str:
    return "bt709" if name == UNSPECIFIED else name


def choose_conversion(path: Path, header: Header, background: str, hdr: str) -> Conversion:
    """Return how the frames of a source are converted, from what its header states; fields are left as they are.

    Args:
        path: the source, for messages.
        header: of the source.
        background: the colour behind transparent frames.
        hdr: "tone_map" or "reject".

    Raises:
        Rejected: HDR: it is HDR and `hdr` is "reject". UNKNOWN_COLOURS: no filter can convert its colours.
    """
    kind = HDR_TRANSFERS.get(header.transfer)
    if header.dolby_vision_only:
        detail = "is Dolby Vision without a picture that other players can show (profile 5)"
        raise Rejected(Reason.UNKNOWN_COLOURS, f"{path} {detail}; export it as HDR10, HLG or SDR")
    if kind and hdr == "reject":
        raise Rejected(Reason.HDR, f"{path} is HDR ({kind}, {header.transfer}); the clips setting `hdr` is reject")
    if header.colour_model == "gray":
        matrix = "gray"
    elif header.colour_model == "rgb":
        matrix = "gbr"
    elif header.matrix == UNSPECIFIED:
        # Players judge the coded picture, before it is turned.
        width, height = (header.height, header.width) if header.is_turned else (header.width, header.height)
        is_hd = width >= HD_WIDTH or height >= HD_HEIGHT
        wide = header.primaries == "bt2020" or kind is not None
        matrix = "bt2020nc" if wide else "bt709" if is_hd else "smpte170m"
    else:
        matrix = header.matrix
    stated = {
        "matrix": (matrix, (*ZSCALE_MATRICES, "gray")),
        "primaries": (header.primaries, (*NEAR_PRIMARIES, *WIDE_PRIMARIES)),
        "transfer curve": (header.transfer, (*SDR_TRANSFERS, *HDR_TRANSFERS)),
    }
    for what, (value, allowed) in stated.items():
        if value not in allowed:
            detail = f"{path} has colours of the {what} {value}; allowed are {', '.join(allowed)}"
            raise Rejected(Reason.UNKNOWN_COLOURS, detail)
    primaries = "bt2020" if kind and header.primaries == UNSPECIFIED else header.primaries
    # ffmpeg and its encoders take gray without a range for full range. RGB is shown as full range whatever it states.
    full_by_default = matrix == "gray" or header.pixel_format.startswith("yuvj")
    is_full = matrix == "gbr" or header.range == "full" or (header.range == UNSPECIFIED and full_by_default)
    return Conversion(
        stream=header.stream,
        alpha=(header.decoder or "straight") if header.has_alpha else NONE,
        matrix=matrix,
        primaries=primaries,
        transfer=header.transfer,
        range="full" if is_full else "limited",
        field_order=header.field_order,
        deinterlace=NONE,
        tone_map=TONE_MAP if kind else NONE,
        background=background,
    )
