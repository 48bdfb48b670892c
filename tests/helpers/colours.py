"""Make pictures and videos of colours that the standards' formulas give: ICC profiles, PNG chunks, raw planes."""

import re
import struct
import subprocess
import zlib

import imageio_ffmpeg
import numpy as np

from pusa.manifest.models import Limits
from pusa.video.decoders import read_clip
from pusa.video.decoders.choice import DecoderChooser
from pusa.video.survey import survey_video

D50_XYZ = np.array([0.9642, 1, 0.8249])
D65 = (0.3127, 0.3290)
SRGB = (D65, (0.64, 0.33), (0.30, 0.60), (0.15, 0.06))  # white, red, green, blue
ADOBE = (D65, (0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
P3 = (D65, (0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
BT2020 = (D65, (0.708, 0.292), (0.170, 0.797), (0.131, 0.046))
PROPHOTO = ((0.3457, 0.3585), (0.734699, 0.265301), (0.159597, 0.840403), (0.036598, 0.000105))


def to_xyz_d50(space) -> np.ndarray:
    """Return the matrix from linear colours of a space to XYZ, adapted to D50 by Bradford as in an ICC profile."""
    white, *primaries = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in space)
    columns = np.stack(primaries, 1)
    columns = columns * np.linalg.solve(columns, white)
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    return np.linalg.inv(bradford) @ np.diag(bradford @ D50_XYZ / (bradford @ white)) @ bradford @ columns


def decode_srgb(values) -> np.ndarray:
    """Return sRGB values in 0..1 as linear ones."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def as_srgb(codes: np.ndarray, space=SRGB, exponent: float | None = None) -> np.ndarray:
    """Return how uint8 or uint16 code values of a space look in sRGB, as floats in 0..255. None is sRGB's own curve."""
    values = codes / np.iinfo(codes.dtype).max
    linear = decode_srgb(values) if exponent is None else values**exponent
    linear = (linear @ to_xyz_d50(space).T @ np.linalg.inv(to_xyz_d50(SRGB)).T).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def rgb_profile(space, exponent: float, name="Test", more=()) -> bytes:
    """Return an ICC profile of a white, three primaries and an exponent, with more tags of (signature, data)."""
    columns = to_xyz_d50(space).T
    tags = [(f"{c}XYZ".encode(), _xyz(column)) for c, column in zip("rgb", columns, strict=True)]
    return _profile(b"RGB ", b"XYZ ", [*tags, *((f"{c}TRC".encode(), _curve(exponent)) for c in "rgb"), *more], name)


def grey_profile(exponent: float) -> bytes:
    """Return an ICC profile for grey pictures."""
    return _profile(b"GRAY", b"XYZ ", [(b"kTRC", _curve(exponent))])


def cmyk_profile(corners: np.ndarray) -> bytes:
    """Return an ICC profile by which (2, 2, 2, 2, 3) sRGB colours show no or full cyan, magenta, yellow and black."""
    xyz = decode_srgb(corners / 255) @ to_xyz_d50(SRGB).T / D50_XYZ
    x, y, z = np.moveaxis(np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116), -1, 0)
    lab = np.stack([(116 * y - 16) / 100 * 0xFF00, (500 * (x - y) + 128) * 256, (200 * (y - z) + 128) * 256], -1)
    ramps = b"".join(struct.pack(">HH", 0, 0xFFFF) for _ in range(4 + 3))
    matrix = struct.pack(">9i", *(np.eye(3).ravel() * 65536).astype(int).tolist())
    head = b"mft2\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + struct.pack(">HH", 2, 2)
    table = head + ramps[:16] + lab.round().clip(0, 0xFFFF).astype(">u2").tobytes() + ramps[16:]
    return _profile(b"CMYK", b"Lab ", [(b"A2B0", table)], kind=b"prtr")


def png(samples: np.ndarray, chunks=()) -> bytes:
    """Return a PNG of (H, W, C) uint8 or uint16 with these chunks, of (name, data), before the picture."""
    height, width, channels = samples.shape
    head = struct.pack(">IIBBBBB", width, height, samples.itemsize * 8, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = samples.astype(samples.dtype.newbyteorder(">")).reshape(height, -1).view(np.uint8)
    body = zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes())
    parts = [(b"IHDR", head), *chunks, (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )


def iccp(profile: bytes, name=b"Test") -> tuple[bytes, bytes]:
    """Return the chunk of a PNG that holds an ICC profile."""
    return b"iCCP", name + b"\0\0" + zlib.compress(profile)


def gama(gamma: float) -> tuple[bytes, bytes]:
    """Return the chunk of a PNG that states its gamma."""
    return b"gAMA", struct.pack(">I", round(gamma * 100_000))


def chrm(space) -> tuple[bytes, bytes]:
    """Return the chunk of a PNG that states its white and its primaries."""
    return b"cHRM", struct.pack(">8I", *(np.array(space) * 100_000).round().astype(int).ravel().tolist())


def _xyz(values) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(float(value) * 65536) for value in values))


def _curve(exponent: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(exponent * 256))


def _profile(space: bytes, connection: bytes, tags, name="Test", kind=b"mntr") -> bytes:
    text = name.encode() + b"\0"
    description = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78)
    description += bytes(-len(description) % 4)
    tags = [(b"desc", description), (b"cprt", b"text\0\0\0\0none\0\0\0\0"), (b"wtpt", _xyz(D50_XYZ)), *tags]
    at, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for signature, data in tags:
        table += signature + struct.pack(">II", at + len(body), len(data))
        body += data
    size = 128 + len(table) + len(body)
    head = struct.pack(">I4sI", size, b"", 0x02400000) + kind + space + connection + bytes(12) + b"acsp"
    return head.ljust(68, b"\0") + _xyz(D50_XYZ)[8:] + bytes(48) + table + body


# Videos of eight flat patches. Their planes are computed here by the standards' formulas, and no filter converts them.

PATCHES = np.array(
    [(200, 30, 30), (30, 160, 40), (40, 50, 210), (230, 200, 40), (128, 128, 128), (16, 16, 16), (235, 235, 235),
     (190, 60, 180)]
)  # fmt: skip
RGB = PATCHES / 255
RED = (255, 0, 0)
GREY = np.repeat(np.array([0, 20, 60, 100, 128, 180, 220, 255])[:, None], 3, 1)
ALPHA = np.array([255, 0, 128, 64, 200, 30, 255, 128])
RED_BLUE_WEIGHTS = {  # of luma: BT.601, BT.709, BT.2020, FCC and SMPTE 240M, by ffmpeg's names of the matrices
    "smpte170m": (0.299, 0.114), "bt470bg": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020nc": (0.2627, 0.0593),
    "fcc": (0.30, 0.11), "smpte240m": (0.212, 0.087),
}  # fmt: skip
PQ_M1, PQ_M2, PQ_C1, PQ_C2, PQ_C3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
HLG_A, HLG_B, HLG_C = 0.17883277, 0.28466892, 0.55991073
WHITE, PEAK = 203, 1000  # nits
TO_BT709 = np.linalg.inv(to_xyz_d50(SRGB)) @ to_xyz_d50(BT2020)
# Arguments of encoders that keep colours.
X264 = ("-c:v", "libx264", "-qp", 1, "-preset", "ultrafast")
X265 = ("-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=none:qp=1")
VP9 = ("-c:v", "libvpx-vp9", "-crf", 4, "-b:v", 0, "-deadline", "realtime", "-cpu-used", 8)
AV1 = ("-c:v", "libsvtav1", "-preset", 12, "-crf", 4)
PRORES = ("-c:v", "prores_ks", "-profile:v", 4)
FFV1 = ("-c:v", "ffv1")


def ycbcr(values, matrix: str, full=False, bits=8) -> np.ndarray:
    """Return the codes (N, 3) of R'G'B' values (N, 3) in 0..1."""
    red, blue = RED_BLUE_WEIGHTS[matrix]
    r, g, b = np.asarray(values, float).T
    y = red * r + (1 - red - blue) * g + blue * b
    chroma = np.stack([(b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red)])
    low, luma, colour = _levels(full, bits)
    codes = np.stack([low + luma * y, *(2 ** (bits - 1) + colour * chroma)], -1)
    return codes.round().clip(0, 2**bits - 1).astype(int)


def from_ycbcr(codes, matrix: str, full=False, bits=8) -> np.ndarray:
    """Return the R'G'B' values (N, 3) of codes (N, 3). 0..1, or more where no colour has such codes."""
    red, blue = RED_BLUE_WEIGHTS[matrix]
    low, luma, colour = _levels(full, bits)
    y = (codes[:, 0] - low) / luma
    cb, cr = (codes[:, 1:].T - 2 ** (bits - 1)) / colour
    r, b = y + (2 - 2 * red) * cr, y + (2 - 2 * blue) * cb
    return np.stack([r, (y - red * r - blue * b) / (1 - red - blue), b], -1)


def encode_srgb(linear) -> np.ndarray:
    """Return linear colours as sRGB values, both in 0..1."""
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def pq(nits) -> np.ndarray:
    """Return the values in 0..1 by which PQ (SMPTE ST 2084) shows a brightness."""
    power = (np.clip(nits, 0, None) / 10_000) ** PQ_M1
    return ((PQ_C1 + PQ_C2 * power) / (1 + PQ_C3 * power)) ** PQ_M2


def from_pq(values) -> np.ndarray:
    """Return the nits that values of PQ show."""
    power = np.clip(values, 0, 1) ** (1 / PQ_M2)
    return 10_000 * ((power - PQ_C1).clip(0) / (PQ_C2 - PQ_C3 * power)) ** (1 / PQ_M1)


def hlg(scene) -> np.ndarray:
    """Return the values in 0..1 by which HLG (BT.2100) stores the light of a scene in 0..1."""
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), HLG_A * np.log((12 * scene - HLG_B).clip(1e-9)) + HLG_C)


def from_hlg(values) -> np.ndarray:
    """Return the nits (N, 3) that HLG values of BT.2020 show on a screen of `PEAK` nits, with its gamma of 1.2."""
    values = np.clip(values, 0, 1)
    scene = np.where(values <= 0.5, values**2 / 3, (np.exp((values - HLG_C) / HLG_A) + HLG_B) / 12)
    return PEAK * scene * (scene @ (0.2627, 0.6780, 0.0593))[:, None] ** 0.2


def tone_map(nits, to_bt709=TO_BT709) -> np.ndarray:
    """Return sRGB (N, 3) in 0..255 of HDR (N, 3): `WHITE` is 1, and mobius compresses from 0.7 on, up to `PEAK`."""
    linear = np.asarray(nits) / WHITE @ to_bt709.T
    knee, peak = 0.7, PEAK / WHITE
    a = -(knee**2) * (peak - 1) / (knee**2 - 2 * knee + peak)
    b = (knee**2 - 2 * knee * peak + peak) / (peak - 1)
    brightest = linear.max(-1, keepdims=True).clip(1e-6)
    mapped = (b**2 + 2 * b * knee + knee**2) / (b - a) * (brightest + a) / (brightest + b)
    return 255 * encode_srgb(linear * np.where(brightest <= knee, 1, mapped / brightest))


def patch_video(path, codes, pixels: str, *words, tags="", size=(64, 32), count=6):
    """Write a video of eight patches with these codes (8, C), encoded with these words of ffmpeg; return its path.

    Args:
        path: the file.
        codes: of each patch, in the order Y, Cb, Cr or R, G, B, and then alpha.
        pixels: ffmpeg's name of the pixel format. Nothing converts from it unless the words ask for it.
        words: the encoder and its options.
        tags: options of ffmpeg's setparams, which the encoder then states.
        size: width and height of the picture.
        count: of frames, which are all the same.
    """
    raw = _raw_frame(np.asarray(codes), pixels, size)
    source = ("-f", "rawvideo", "-pix_fmt", pixels, "-s", f"{size[0]}x{size[1]}", "-r", 24, "-i", "-")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *source]
    command += [*(("-vf", f"setparams={tags}") if tags else ()), *words, path]
    subprocess.run([str(word) for word in command], input=raw * count, check=True)
    return path


def patch_means(frames: np.ndarray) -> np.ndarray:
    """Return the mean colours (8, 3) of the middle of each patch in frames (T, H, W, 3)."""
    _, height, width, _ = frames.shape
    patches = frames.reshape(-1, 2, height // 2, 4, width // 4, 3).transpose(1, 3, 0, 2, 4, 5)
    top, left = height // 6, width // 12
    return patches[:, :, :, top : height // 2 - top, left : width // 4 - left].mean((2, 3, 4)).reshape(8, 3)


def over(colours, alpha, background) -> np.ndarray:
    """Return colours (8, 3) over a background colour, by their alpha (8,) in 0..255."""
    share = np.asarray(alpha)[:, None] / 255
    return colours * share + np.array(background) * (1 - share)


def assert_shows(path, colours, tolerance=4, background="black"):
    """Check that a clip of a video shows these colours (8, 3) of patches; return the survey and the chosen decoder."""
    survey = survey_video(path, Limits(), background=background)
    decoder = DecoderChooser(path, survey, 30).choose([1, 2, 3])
    frames = read_clip(path, [1, 2, 3], decoder, 30, conversion=survey.conversion)
    np.testing.assert_allclose(patch_means(frames), colours, atol=tolerance)
    return survey, decoder


def _levels(full: bool, bits: int) -> tuple[float, float, float]:
    """Return the code of black, and how many codes luma and chroma span."""
    top, scale = 2**bits - 1, 2 ** (bits - 8)
    return (0, top, top) if full else (16 * scale, 219 * scale, 224 * scale)


def _raw_frame(codes: np.ndarray, pixels: str, size) -> bytes:
    width, height = size
    picture = codes.reshape(2, 4, -1).repeat(height // 2, 0).repeat(width // 4, 1)
    picture = picture.astype("<u2" if re.search(r"1[0-6]le$", pixels) else np.uint8)
    if packed := re.fullmatch(r"([rgba]+)(24)?", pixels):
        return picture[..., ["rgba".index(letter) for letter in packed[1]]].tobytes()
    if pixels == "ya8":
        return picture.tobytes()
    if pixels.startswith("gbr"):
        picture = picture[..., [1, 2, 0, 3][: picture.shape[-1]]]
    planes = list(np.moveaxis(picture, -1, 0))
    if "420" in pixels or "422" in pixels:
        planes[1:3] = [plane[:: 2 if "420" in pixels else 1, ::2] for plane in planes[1:3]]
    return b"".join(plane.tobytes() for plane in planes)
