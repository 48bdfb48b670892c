"""Read the published torch files. They are not trusted: no code in them is run, and all sizes are checked.

Shapes: C channels, F latent frames, h, w latent height and width, L text tokens.
"""

import hashlib
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Collection
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pusa.data.encoding import DTYPES
from pusa.errors import Reason, Rejected
from pusa.system.failures import RUN_ERRNOS
from pusa.system.text import first_line
from pusa.video.ffmpeg import open_regular_file

MAX_OPCODES = 1000  # real files have about 60; this also limits nesting
PUTS = {"BINPUT", "LONG_BINPUT"}
GETS = {"BINGET", "LONG_BINGET"}
NAMES = {"GLOBAL", "BINUNICODE"}
OPCODES = PUTS | GETS | NAMES | {
    "PROTO", "STOP", "MARK", "REDUCE", "BINPERSID", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2",
    "LONG1", "BINFLOAT", "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_TUPLE",
    "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
}  # fmt: skip
GLOBALS = re.compile(r"torch \w+Storage|torch\._utils _rebuild_tensor_v2|collections OrderedDict")


def require_tensors(pickled: bytes) -> None:
    """Check that a pickle holds nothing but a few tensors in mappings and lists.

    torch's restricted unpickler runs no foreign code, but it hashes keys. A key may be a tuple that contains another
    tuple twice, which contains another twice, and so on: a few bytes whose hash takes forever. So only names may be
    used twice; then the result is no larger than the pickle, and its size is limited.

    Raises:
        ValueError: it holds anything else, or is not a pickle.
    """
    names = set()  # memo indices of texts and globals
    last = ""  # the opcode that pushed the last item on the stack
    for count, (opcode, argument, _) in enumerate(pickletools.genops(pickled), 1):
        name = opcode.name
        if count > MAX_OPCODES:
            raise ValueError(f"its pickle has more than {MAX_OPCODES} opcodes")
        if name not in OPCODES or (name == "GLOBAL" and not GLOBALS.fullmatch(str(argument))):
            raise ValueError(f"its pickle has {name} {argument or ''!r:.80}, which plain tensors do not need")
        if name in GETS and argument not in names:
            raise ValueError("its pickle uses something twice, which plain tensors do not need")
        if name not in PUTS:
            last = name
        elif last in NAMES:
            names.add(argument)
        else:
            names.discard(argument)


MAX_BYTES = 2**30  # of a file: eighty times that of a clip of 163 frames at 848x480
PICKLE = "data.pkl"  # the record that describes the tensors
MAX_PICKLE_BYTES = 2**20  # of this record; real ones have less than 1 KiB
# What torch's restricted unpickler raises for files that are damaged or malicious.
UNPICKLING = (
    pickle.UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError,
    OverflowError, EOFError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


def read_latents(path: Path, channels: int) -> tuple[Tensor, Tensor, str]:
    """Return posterior mean and log-variance, each (C, F, h, w) in its dtype in the file, and the file's SHA-256.

    Raises:
        Rejected: the file does not hold such latents.
    """
    content = _read(path)
    data = _load(path, content, ("mean", "logvar"))
    mean, logvar = (_tensor(path, name, data[name], 4, len(content)) for name in ("mean", "logvar"))
    if mean.shape != logvar.shape or mean.dtype != logvar.dtype:
        raise _bad(path, f"mean is {_kind(mean)} and logvar {_kind(logvar)}; expected both to be alike")
    if mean.shape[0] != channels:
        raise _bad(path, f"mean has {mean.shape[0]} channels; the VAE has {channels}")
    return mean, logvar, hashlib.sha256(content).hexdigest()


def read_features(path: Path, tokens: int, width: int) -> tuple[Tensor, int]:
    """Return the features of the n valid tokens (n, width), and n; if no token is valid, all features and 0.

    Raises:
        Rejected: the file does not hold such features, or its valid tokens are not the first ones or not finite.
    """
    content = _read(path)
    data = _load(path, content, ("y_feat", "y_mask"))
    features = _tensor(path, "y_feat", _only(data["y_feat"]), 2, len(content))
    mask = _tensor(path, "y_mask", _only(data["y_mask"]), 1, len(content), {"bool": torch.bool})
    if features.shape != (len(mask), width) or len(mask) != tokens:
        shapes = f"y_feat is {tuple(features.shape)} and y_mask {tuple(mask.shape)}"
        raise _bad(path, f"{shapes}; the text encoder gives {tokens} tokens of width {width}")
    valid = int(mask.sum())
    if not mask[:valid].all():
        raise _bad(path, f"the {valid} valid tokens of y_mask are not the first ones")
    return _finite(path, features[:valid] if valid else features), valid


def read_tensors(path: Path, channels: int, tokens: int, width: int) -> tuple[Tensor, Tensor, int, str]:
    """Read a file of V1.0's layout, which has latents and text features in one.

    Returns:
        The latents z (C, F, h, w), which are the mean of the VAE's posterior, normalised; the features of the n valid
        tokens (n, width), which are those up to the last row that is not zero (if all are, all of them); n; and the
        file's SHA-256.

    Raises:
        Rejected: the file does not hold these, or its features are not finite.
    """
    content = _read(path)
    data = _load(path, content, ("latents", "prompt_emb", "image_emb"))
    prompt, image = data["prompt_emb"], data["image_emb"]
    if not isinstance(prompt, dict) or set(prompt) != {"context"}:
        raise _bad(path, f"prompt_emb holds {_names(prompt):.80}; expected context")
    if not isinstance(image, dict) or image:
        raise _bad(
            path, f"image_emb holds {_names(image):.80}; it is for a model with image inputs, so expected nothing"
        )
    z = _tensor(path, "latents", data["latents"], 4, len(content))
    if z.shape[0] != channels:
        raise _bad(path, f"latents have {z.shape[0]} channels; the VAE has {channels}")
    features = _tensor(path, "context", prompt["context"], 2, len(content))
    if features.shape != (tokens, width):
        shape = tuple(features.shape)
        raise _bad(path, f"context is {shape}; the text encoder gives {tokens} tokens of width {width}")
    used = (features != 0).any(1).nonzero()
    valid = int(used[-1]) + 1 if len(used) else 0
    return z, _finite(path, features[:valid] if valid else features), valid, hashlib.sha256(content).hexdigest()


def _finite(path: Path, features: Tensor) -> Tensor:
    """Return features if all are finite.

    Raises:
        Rejected: some are not.
    """
    if not_finite := int((~torch.isfinite(features)).sum()):
        raise Rejected(Reason.NOT_FINITE, f"{path}: {not_finite} of {features.numel()} features are not finite")
    return features


def _read(path: Path) -> bytes:
    """Return a file's bytes. They are read once, so that what is hashed and checked is what is loaded.

    Raises:
        Rejected: the file is missing, cannot be read, or is too large.
    """
    try:
        with open_regular_file(path) as handle, open(handle, "rb", closefd=False) as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        if error.errno in RUN_ERRNOS:
            raise
        raise Rejected(Reason.UNREADABLE, f"{path} cannot be read: {error}") from error
    if len(content) > MAX_BYTES:
        raise _bad(path, f"it has more than the {MAX_BYTES} bytes that are allowed")
    return content


def _load(path: Path, content: bytes, keys: Collection[str]) -> dict[str, Any]:
    """Load a torch file that is a mapping with exactly these keys."""
    try:
        _require_plain(path, content)
        data = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    except Rejected:
        raise
    except UNPICKLING as error:
        raise _bad(path, f"it cannot be loaded: {first_line(error)}") from error
    if not isinstance(data, dict) or set(data) != set(keys):
        raise _bad(path, f"it holds {_names(data):.80}; expected {' and '.join(keys)}")
    return data


def _names(value: Any) -> str:
    """Return the keys of a mapping, or the type of another value or key, which may be too deep to be printed."""
    if not isinstance(value, dict):
        return type(value).__name__
    return ", ".join(key if isinstance(key, str) else type(key).__name__ for key in value) or "nothing"


def _require_plain(path: Path, content: bytes) -> None:
    """Check a file before torch loads it: its records, their checksums, no compression, and the pickle in it."""
    if not zipfile.is_zipfile(BytesIO(content)):
        raise _bad(path, "it was not written by torch.save, or its end is missing")
    with zipfile.ZipFile(BytesIO(content)) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise _bad(path, "it is compressed; torch.save never compresses")
        if sum(member.file_size for member in archive.infolist()) > len(content):  # they would all be in memory
            raise _bad(path, "its records overlap; those of torch.save never do")
        damaged = archive.testzip()  # torch itself does not verify checksums
        if damaged is not None:
            raise _bad(path, f"the checksum of {damaged} is wrong")
    # This is torch's own reader, because two readers may see different records in one archive.
    reader = torch._C.PyTorchFileReader(BytesIO(content))
    if sum(reader.get_record_size(name) for name in reader.get_all_records()) > len(content):
        raise _bad(path, "its records overlap; those of torch.save never do")
    if reader.get_record_size(PICKLE) > MAX_PICKLE_BYTES:
        raise _bad(path, f"its pickle is larger than the {MAX_PICKLE_BYTES} bytes that are allowed")
    require_tensors(reader.get_record(PICKLE))


def _tensor(
    path: Path, name: str, value: Any, dimensions: int, size: int, dtypes: dict[str, torch.dtype] = DTYPES
) -> Tensor:
    """Check that a value is a plain tensor, and return it with `dimensions` dimensions, without a batch of one."""
    if type(value) is not Tensor or value.layout != torch.strided or value.device.type != "cpu":
        raise _bad(path, f"{name} is {type(value).__name__}; expected a plain tensor")
    if value.dtype not in dtypes.values():
        raise _bad(path, f"{name} is {_kind(value)}; allowed are {', '.join(dtypes)}")
    if value.numel() * value.element_size() > size:  # of the file: an expanded view
        raise _bad(path, f"{name} is {_kind(value)}, more than the file holds")
    inner = value[0] if value.ndim == dimensions + 1 and len(value) == 1 else value
    if inner.ndim != dimensions or not inner.numel():
        raise _bad(path, f"{name} is {_kind(value)}; expected {dimensions} dimensions, or one more for a batch of 1")
    return inner.detach()


def _only(value: Any) -> Any:
    """Return the item of a list of one; anything else unchanged."""
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _bad(path: Path, detail: str) -> Rejected:
    return Rejected(Reason.BAD_PAIR, f"{path}: {detail}")
