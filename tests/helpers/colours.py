"""Make pictures whose colours are known from the standards' formulas: small ICC profiles, and PNGs of any chunks."""

import struct
import zlib

import numpy as np

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
