"""Decide how the pictures of a video become sRGB frames: colours, HDR, fields and alpha; and write ffmpeg's filters."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from PIL import ImageColor

from pusa.errors import Reason, Rejected
from pusa.video.header import UNSPECIFIED, Header

# Players take untagged video for BT.709 from this size on, and for BT.601 below.
HD_WIDTH, HD_HEIGHT = 1280, 720
LIMITED_BY_DEFAULT = ("h264", "hevc", "vvc")  # their standards say that a range that is not stated is limited
# Pictures of these are shown as they are: their curves and primaries are so near to sRGB's that players do the same.
SDR_TRANSFERS = (UNSPECIFIED, "bt709", "bt470m", "bt470bg", "smpte170m", "smpte240m", "iec61966-2-1", "iec61966-2-4",
                 "bt1361e", "bt2020-10", "bt2020-12")  # fmt: skip
NEAR_PRIMARIES = (UNSPECIFIED, "bt709", "bt470bg", "smpte170m", "smpte240m", "jedec-p22")
# These are converted by zscale: wide gamuts keep their own transfer curve, and the others become sRGB.
WIDE_PRIMARIES = ("bt2020", "smpte431", "smpte432", "bt470m", "film")
HDR_TRANSFERS = {"smpte2084": "PQ", "arib-std-b67": "HLG"}
SWSCALE_MATRICES = ("bt709", "bt470bg", "smpte170m", "smpte240m", "fcc", "bt2020nc")
# BT.2020's constant luminance is defined for its own curve, which these share.
CONSTANT_LUMINANCE_TRANSFERS = (UNSPECIFIED, "bt709", "smpte170m", "smpte240m", "bt2020-10", "bt2020-12")
ZSCALE_MATRICES = (*SWSCALE_MATRICES, "ycgco", "bt2020c", "chroma-derived-nc", "chroma-derived-c", "ictcp", "gbr")
# Linear light 1.0 is reference white, 203 nits in PQ and HLG (BT.2408). Mobius leaves everything below 0.7 as it is,
# and compresses what is brighter, up to 1000 nits. Without `agamma=0`, zscale would give each colour of HLG a gamma of
# its own, by which saturated colours are wrong by up to 38 levels. A rule never changes: tables name the one that made
# their pixels.
TONE_MAPS = {"mobius203": "zscale=transfer=linear:npl=203:agamma=0,format=gbrpf32le,zscale=primaries=bt709,"
             "tonemap=mobius:param=0.7:peak=4.926:desat=0,zscale=transfer=iec61966-2-1:range=full"}  # fmt: skip
TONE_MAP = "mobius203"
NONE = "none"
UNKNOWN = "unknown"  # ffmpeg's name, in options of filters, for what is not specified
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
        try:
            ImageColor.getrgb(conversion.background)
        except ValueError as error:
            detail = f"{row['source']}: its row has the background {conversion.background!r:.80}; expected a colour"
            raise Rejected(Reason.DAMAGED, detail) from error
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
        # ffmpeg may scale frames before they are converted, and refuses those with tags that swscale does not know.
        matrix = self.matrix if self.matrix in (*SWSCALE_MATRICES, "gbr") else UNKNOWN
        tags = _tags(matrix, UNKNOWN, UNKNOWN, "full" if self.matrix == "gray" else self.range)
        if self.deinterlace == NONE:
            return [tags]
        return [tags, DEINTERLACERS[self.deinterlace].format(order=FIELD_NAMES[self.field_order])]

    def thumbnail_filters(self) -> list[str]:
        """Return the filters that make a thumbnail of a frame."""
        # First convert to the RGB pixels that a reader gets. Scaling YUV and then converting would be off by more than
        # the difference to the next frame.
        *convert, pixel_format = self.colour_filters()
        planes = "format=gbrap" if self.has_alpha else "format=gbrp"  # which are scaled faster, with the same result
        return [*([_SMALL_ENOUGH] if self.changes_colours else []), *convert, planes, _SMALL, pixel_format]

    def colour_filters(self) -> list[str]:
        """Return the filters that convert a frame to sRGB. The last one sets the format `pixel_format`."""
        if not self.changes_colours:
            return [_convert_to(self.pixel_format)]
        # zscale takes only planes. Gray keeps its code values, which become luma of their real range.
        planar, with_alpha = ("gbrp16le", "rgba64le") if self.matrix == "gbr" else ("yuv444p16le", "yuva444p16le")
        planes = [_convert_to(planar)] if self.matrix in ("gbr", "gray") or self.has_alpha else []
        matrix = "bt709" if self.matrix == "gray" else self.matrix
        tags = _tags(matrix, _known(self.primaries), _known(self.transfer), self.range)
        convert = TONE_MAPS.get(self.tone_map, "zscale=matrix=gbr:primaries=bt709:range=full")
        opaque = ",".join([*planes, tags, convert, "format=gbrp"])
        if not self.has_alpha:
            return [opaque, "format=rgb24"]
        # zscale would multiply the values of HDR by alpha, and divide linear light by it.
        split = f"{_convert_to(with_alpha)},split[colours][whole];[whole]alphaextract[alpha];"
        return [f"{split}[colours]{opaque}[opaque];[opaque][alpha]alphamerge", "format=rgba"]


def _convert_to(pixel_format: str) -> str:
    # Without `scale`, ffmpeg might convert at any place before, even before the right tags are set.
    return f"scale,format={pixel_format}"


def _tags(matrix: str, primaries: str, transfer: str, colour_range: str) -> str:
    return f"setparams=colorspace={matrix}:color_primaries={primaries}:color_trc={transfer}:range={colour_range}"


def _known(name: str) -> str:
    return "bt709" if name in (UNSPECIFIED, "bt1361e") else name  # from 0 to 1, the curves of these two are the same


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
    matrix = _choose_matrix(header)
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
    if (matrix == "ictcp" and not (kind and primaries == "bt2020")) or (
        matrix == "bt2020c" and header.transfer not in CONSTANT_LUMINANCE_TRANSFERS
    ):
        detail = f"the matrix {matrix} with primaries {primaries} and the transfer curve {header.transfer}"
        raise Rejected(Reason.UNKNOWN_COLOURS, f"{path} has colours of {detail}, which no filter can convert")
    return Conversion(
        stream=header.stream,
        alpha=(header.decoder or "straight") if header.has_alpha else NONE,
        matrix=matrix,
        primaries=primaries,
        transfer=header.transfer,
        range=_choose_range(header),
        field_order=header.field_order,
        deinterlace=NONE,
        tone_map=TONE_MAP if kind else NONE,
        background=background,
    )


def _choose_matrix(header: Header) -> str:
    if header.colour_model != "yuv":
        return {"rgb": "gbr", "gray": "gray"}[header.colour_model]
    if header.matrix != UNSPECIFIED:
        return header.matrix
    if header.primaries == "bt2020" or header.transfer in HDR_TRANSFERS:
        return "bt2020nc"
    # Players judge the coded picture, before it is turned.
    width, height = (header.height, header.width) if header.is_turned else (header.width, header.height)
    return "bt709" if width >= HD_WIDTH or height >= HD_HEIGHT else "smpte170m"


def _choose_range(header: Header) -> str:
    if header.colour_model == "rgb":  # it is shown as full range whatever it states
        return "full"
    if header.range in ("limited", "full"):
        return header.range
    is_full_gray = header.colour_model == "gray" and header.codec not in LIMITED_BY_DEFAULT
    return "full" if is_full_gray or header.pixel_format.startswith("yuvj") else "limited"
