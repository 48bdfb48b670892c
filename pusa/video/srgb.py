"""Convert still pictures to sRGB, from the colour space that the file states. Colours are (H, W, C), 8 or 16 bits each.

A PNG states it in chunks (cICP, else iCCP, else sRGB, else gAMA and cHRM), a JPEG or WebP in an ICC profile, else in
Exif. A picture that states nothing is sRGB.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageFile

from pusa.errors import MediaError

log = logging.getLogger(__name__)

# What makes Pillow read the bytes of a PNG of 16 bits as they are, instead of the upper eight bits of each value.
RAW_MODES = {
    "I;16B": ("I;16B",),
    "LA;16B": ("RGBA",),  # both bytes of the grey, and both of the alpha
    "RGB;16B": ("RGB;16B", "RGB;16L"),  # the upper bytes, the lower bytes
    "RGBA;16B": ("RGBA;16B", "RGBA;16L"),
}
PROFILE_MODES = {"GRAY": "L", "RGB ": "RGB", "CMYK": "CMYK"}  # colour spaces of ICC profiles
HDR_NAME = re.compile(r"(?<![A-Za-z0-9])(PQ|HLG|2084)(?![A-Za-z0-9])")  # in names and descriptions of ICC profiles
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}  # numbers of ITU-T H.273
STRIP = 2**20  # values that are converted at a time

Chromaticities = tuple[tuple[float, float], ...]  # x and y of white, red, green and blue
D65 = (0.3127, 0.3290)
SRGB = (D65, (0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
ADOBE_RGB = (D65, (0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
PRIMARIES = {  # by their numbers in ITU-T H.273; 2 is unspecified
    1: SRGB,
    2: SRGB,
    4: ((0.310, 0.316), (0.67, 0.33), (0.21, 0.71), (0.14, 0.08)),
    5: (D65, (0.64, 0.33), (0.29, 0.60), (0.15, 0.06)),
    6: (D65, (0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    7: (D65, (0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    9: (D65, (0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    11: ((0.314, 0.351), (0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
    12: (D65, (0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
# The exponents of transfers by their numbers in H.273. None is the curve of sRGB, which also serves for those of video,
# as in clips.
EXPONENTS = {1: None, 2: None, 4: 2.2, 5: 2.8, 6: None, 8: 1.0, 13: None, 14: None, 15: None}
# What ffmpeg before version 9 writes into each picture that it takes from a BT.709 video.
FFMPEG_VIDEO_GAMMA = 1 / 1.961
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


@dataclass(frozen=True)
class Space:
    """A colour space in numbers: x and y of white and the primaries, and an exponent, or None for sRGB's curve."""

    chromaticities: Chromaticities = SRGB
    exponent: float | None = None


def to_srgb(image: ImageFile.ImageFile, path: Path) -> Image.Image:
    """Return an opened picture in RGB, or RGBA if it has transparent pixels, with eight bits a value.

    Raises:
        MediaError: what the file states about its colours is damaged, unknown or HDR.
    """
    raw = image.tile[0][3] if image.tile else None
    deep = RAW_MODES.get(raw) if image.format == "PNG" and isinstance(raw, str) else None
    image.load()
    stated = _stated_space(image, path)
    colours, alpha = _deep_values(image, path, deep) if deep else _values(image)
    if isinstance(stated, bytes):
        rgb = _from_profile(colours, stated, path)
    elif colours.shape[2] == 4:
        log.warning("%s is CMYK without a colour profile; its colours are approximate", path)
        rgb = None
    else:
        rgb = _from_numbers(colours, stated, path)
    if rgb is None:
        rgb = _unconverted(colours)
    picture = Image.fromarray(rgb)
    if alpha is not None:
        picture.putalpha(alpha)
    return picture


def _values(image: Image.Image) -> tuple[np.ndarray, Image.Image | None]:
    """Return the colours, (H, W, 1), (H, W, 3) or (H, W, 4) for CMYK, and the alpha."""
    alpha = None
    mode = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    colours = np.asarray(image.convert(mode))
    return colours.reshape(*colours.shape[:2], -1), alpha


def _deep_values(
    image: ImageFile.ImageFile, path: Path, raw_modes: tuple[str, ...]
) -> tuple[np.ndarray, Image.Image | None]:
    """Return the colours of a PNG of 16 bits, (H, W, 1) or (H, W, 3), and the alpha in eight bits."""
    parts = []
    for raw in raw_modes:
        with Image.open(path, formats=("PNG",)) as part:
            part.tile = [part.tile[0]._replace(args=raw)]
            parts.append(np.asarray(part))
    if len(parts) == 2:
        values = parts[0].astype(np.uint16) << 8 | parts[1]
    else:
        values = parts[0].view(">u2").astype(np.uint16) if parts[0].ndim == 3 else parts[0][..., None]
    colours, alpha = (values[..., :-1], values[..., -1] >> 8) if values.shape[2] in (2, 4) else (values, None)
    if (transparent := image.info.get("transparency")) is not None:
        alpha = np.where((colours == transparent).all(-1), 0, 255)
    return colours, None if alpha is None else Image.fromarray(alpha.astype(np.uint8))


def _unconverted(colours: np.ndarray) -> np.ndarray:
    """Return colours that are sRGB, or taken for it, as (H, W, 3) uint8."""
    if colours.dtype == np.uint16:
        colours = (colours >> 8).astype(np.uint8)
    if colours.shape[2] == 4:
        return np.array(_picture(colours, "CMYK").convert("RGB"))
    return np.repeat(colours, 3, 2) if colours.shape[2] == 1 else colours


def _picture(colours: np.ndarray, mode: str) -> Image.Image:
    return Image.frombytes(mode, colours.shape[1::-1], colours.tobytes())


# What a file states.


def _stated_space(image: ImageFile.ImageFile, path: Path) -> Space | bytes:
    """Return the colour space that a picture states, or its ICC profile."""
    info = image.info
    chunks = _png_chunks(path) if image.format == "PNG" else {}
    if "cICP" in chunks:
        return _from_code_points(chunks["cICP"], path)
    segments = [data for kind, data in getattr(image, "applist", []) if kind == "APP2" and data[:11] == b"ICC_PROFILE"]
    if "iCCP" in chunks or segments or info.get("icc_profile"):
        profile = info.get("icc_profile")
        if not profile:
            raise MediaError(f"{path} has a colour profile that is damaged or incomplete; save the picture as sRGB")
        if hdr := HDR_NAME.search(chunks.get("iCCP", b"").split(b"\0")[0].decode("latin-1")):
            raise _hdr_error(path, hdr[0], "colour profile's name")
        return profile
    if "srgb" in info:
        return Space()
    if "gamma" in info or "chromaticity" in info:
        numbers = info.get("chromaticity")
        white_and_primaries = tuple(zip(numbers[::2], numbers[1::2], strict=True)) if numbers else SRGB
        return Space(white_and_primaries, _exponent(info.get("gamma"), path))
    exif = image.getexif()
    space = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ColorSpace)
    try:
        index = str(exif.get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex))
    except KeyError:  # of Pillow 11 and 12.0, if the picture has no such part
        index = ""
    adobe = space == 2 or (space != 1 and index.startswith("R03"))  # 1 is sRGB, 2 is in use though not in the standard
    return Space(ADOBE_RGB, 563 / 256) if adobe else Space()


def _png_chunks(path: Path) -> dict[str, bytes]:
    """Return what Pillow does not keep of a PNG: its cICP chunk, and the name of its ICC profile."""
    found = {}
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] not in (b"IDAT", b"IEND"):
            end = file.tell() + int.from_bytes(head[:4]) + 4
            if head[4:] in (b"cICP", b"iCCP"):
                found[head[4:].decode()] = file.read(min(int.from_bytes(head[:4]), 80))
            file.seek(end)
    return found


def _hdr_error(path: Path, transfer: str, where: str) -> MediaError:
    return MediaError(f"{path} is HDR ({transfer}, by its {where}); expected a picture in SDR, such as sRGB")


def _from_code_points(chunk: bytes, path: Path) -> Space:
    """Return the space of a cICP chunk: the numbers of primaries and transfer, 0 for RGB, and 1 for full range."""
    if len(chunk) < 4:
        raise MediaError(f"{path} has a cICP chunk of {len(chunk)} bytes; expected 4")
    primaries, transfer, matrix, full_range = chunk[:4]
    if transfer in HDR_TRANSFERS:
        raise _hdr_error(path, HDR_TRANSFERS[transfer], "cICP chunk")
    if primaries not in PRIMARIES or transfer not in EXPONENTS or matrix or full_range != 1:
        given = "/".join(map(str, chunk[:4]))
        raise MediaError(f"{path} has colours of an unknown kind, {given} by its cICP chunk; save the picture as sRGB")
    return Space(PRIMARIES[primaries], EXPONENTS[transfer])


def _exponent(gamma: float | None, path: Path) -> float | None:
    """Return the exponent of a gAMA chunk; None if it is sRGB's within 5 %, where libpng does not convert either."""
    if gamma is None or abs(2.2 * gamma - 1) <= 0.05 or abs(gamma - FFMPEG_VIDEO_GAMMA) < 1e-4:
        return None
    if not 0.1 <= gamma <= 10:
        raise MediaError(f"{path} has a gAMA chunk of {gamma}; expected 0.1 to 10")
    return 1 / gamma


# Conversion. Each returns (H, W, 3) uint8, or None if the colours are to be taken as they are.


def _from_numbers(colours: np.ndarray, space: Space, path: Path) -> np.ndarray | None:
    matrix = _matrix_to_srgb(space, path)
    if space.exponent is None and np.allclose(matrix, np.eye(3), atol=0.002):
        return None
    top = np.iinfo(colours.dtype).max
    encoded = np.arange(top + 1) / top
    if space.exponent is None:
        table = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    else:
        table = encoded**space.exponent

    def convert(strip: np.ndarray) -> np.ndarray:
        linear = (table.astype(np.float32)[strip] + np.zeros(3, np.float32)) @ matrix.T.astype(np.float32)
        linear = linear.clip(0, 1)
        shown = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
        return (shown * 255 + 0.5).astype(np.uint8)

    return _in_strips(colours, convert)


def _matrix_to_srgb(space: Space, path: Path) -> np.ndarray:
    """Return the matrix from linear colours of a space to linear sRGB. White stays white."""

    def to_xyz(chromaticities: Chromaticities) -> tuple[np.ndarray, np.ndarray]:
        white, *primaries = ((x / y, 1, (1 - x - y) / y) for x, y in chromaticities)
        columns = np.stack(primaries, 1)
        return columns * np.linalg.solve(columns, white), np.array(white)

    try:
        (source, white), (target, target_white) = to_xyz(space.chromaticities), to_xyz(SRGB)
        adaptation = np.linalg.solve(BRADFORD, np.diag((BRADFORD @ target_white) / (BRADFORD @ white)) @ BRADFORD)
        return np.linalg.solve(target, adaptation @ source)
    except (ZeroDivisionError, np.linalg.LinAlgError) as error:
        raise MediaError(f"{path} has a cHRM chunk that gives no colours: {space.chromaticities}") from error


def _from_profile(colours: np.ndarray, profile: bytes, path: Path) -> np.ndarray | None:
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if hdr := _hdr_transfer(profile, source.profile.profile_description or ""):
            raise _hdr_error(path, hdr, "colour profile")
        mode = PROFILE_MODES.get(source.profile.xcolor_space)
        if mode == "RGB" and colours.shape[2] == 1:
            colours = np.repeat(colours, 3, 2)
        if mode is None or len(Image.new(mode, (1, 1)).getbands()) != colours.shape[2]:
            kind = source.profile.xcolor_space.strip()
            log.warning("%s has a colour profile for %s, which is not what it holds: it is ignored", path, kind)
            return None
        transform = ImageCms.buildTransform(
            source, ImageCms.createProfile("sRGB"), mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION | (ImageCms.Flags.NOOPTIMIZE if mode == "L" else 0),
        )  # fmt: skip
    except (OSError, ImageCms.PyCMSError) as error:
        raise MediaError(f"{path} has a colour profile that cannot be used; save the picture as sRGB") from error

    def convert(strip: np.ndarray) -> np.ndarray:
        return np.asarray(transform.apply(_picture(strip, mode)))

    if mode != "CMYK":
        levels = np.arange(0, 256, 15, dtype=np.uint8)
        grid = np.stack(np.meshgrid(*[levels] * colours.shape[2]), -1).reshape(len(levels), -1, colours.shape[2])
        if np.abs(convert(grid).astype(int) - grid).max() <= 1:  # the profile is sRGB's own
            return None
    return _in_strips(colours, _interpolate(convert) if colours.dtype == np.uint16 else convert)


def _hdr_transfer(profile: bytes, description: str) -> str | None:
    """Return the HDR transfer that an ICC profile states in its cicp tag or its description; None if it has none."""
    count = int.from_bytes(profile[128:132])
    for at in range(132, min(132 + 12 * count, len(profile)), 12):
        if profile[at : at + 4] == b"cicp":
            transfer = int.from_bytes(profile[at + 4 : at + 8]) + 9  # after a signature, four zeros and the primaries
            return HDR_TRANSFERS.get(int.from_bytes(profile[transfer : transfer + 1]))
    named = HDR_NAME.search(description)
    return named and named[0]


def _interpolate(convert: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """Return a conversion from 16 bits by one from 8 bits, which is all that Pillow offers.

    Between the eight-bit colours it interpolates in tetrahedra: from a corner of a cube to the opposite one, along the
    channels in the order of their fractions. The weights are all positive, so rounding errors do not add up.
    """

    def converted(strip: np.ndarray) -> np.ndarray:
        scaled = strip / np.float32(257)
        corner = scaled.clip(0, 254).astype(np.uint8)
        fraction = scaled - corner
        channels = np.argsort(-fraction, -1)
        result, left = np.zeros((*strip.shape[:2], 3), np.float32), np.ones((*strip.shape[:2], 1), np.float32)
        for place in range(strip.shape[2]):
            channel = channels[..., place : place + 1]
            share = np.take_along_axis(fraction, channel, -1)
            result += (left - share) * convert(corner)
            corner, left = corner + (channel == np.arange(strip.shape[2])).astype(np.uint8), share
        return (result + left * convert(corner) + 0.5).astype(np.uint8)

    return converted


def _in_strips(colours: np.ndarray, convert: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Convert some rows at a time, to need little memory."""
    count = min(len(colours), -(-colours.size // STRIP))
    return np.concatenate([convert(rows) for rows in np.array_split(colours, count)])
