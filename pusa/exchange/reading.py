"""Read the published torch files. They are not trusted: no code in them is run, and all sizes are checked.

Shapes: C channels, F latent frames, h, w latent height and width, L text tokens.
"""

import errno
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pusa.data.encoding import DTYPES
from pusa.errors import MediaError, Reason, Rejected
from pusa.system.files import sha256_file
from pusa.system.text import first_line
from pusa.video.media import require_file

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


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes.

    Raises:
        Rejected: the file does not exist or cannot be opened.
        OSError: the disk fails.
    """
    with _readable(path):
        return sha256_file(path)


def read_latents(path: Path, channels: int) -> tuple[Tensor, Tensor]:
    """Return posterior mean and log-variance, each (C, F, h, w), in their dtype in the file, which stays mapped.

    Raises:
        Rejected: the file does not hold such latents.
    """
    data = _load(path, ("mean", "logvar"))
    mean, logvar = (_tensor(path, name, data[name], 4) for name in ("mean", "logvar"))
    if mean.shape != logvar.shape or mean.dtype != logvar.dtype:
        raise _bad(path, f"mean is {_kind(mean)} and logvar {_kind(logvar)}; expected both to be alike")
    if mean.shape[0] != channels:
        raise _bad(path, f"mean has {mean.shape[0]} channels; the VAE has {channels}")
    return mean, logvar


def read_features(path: Path, tokens: int, width: int) -> tuple[Tensor, int]:
    """Return the features of the n valid tokens (n, width), and n; if no token is valid, all features and 0.

    Raises:
        Rejected: the file does not hold such features, or its valid tokens are not the first ones or not finite.
    """
    data = _load(path, ("y_feat", "y_mask"))
    features = _tensor(path, "y_feat", _only(data["y_feat"]), 2)
    mask = _tensor(path, "y_mask", _only(data["y_mask"]), 1, {"bool": torch.bool})
    if features.shape != (len(mask), width) or len(mask) != tokens:
        shapes = f"y_feat is {tuple(features.shape)} and y_mask {tuple(mask.shape)}"
        raise _bad(path, f"{shapes}; the text encoder gives {tokens} tokens of width {width}")
    valid = int(mask.sum())
    if not mask[:valid].all():
        raise _bad(path, f"the {valid} valid tokens of y_mask are not the first ones")
    kept = features[:valid] if valid else features
    if not_finite := int((~torch.isfinite(kept)).sum()):
        raise Rejected(Reason.NOT_FINITE, f"{path}: {not_finite} of {kept.numel()} features are not finite")
    return kept, valid


def _load(path: Path, keys: Collection[str]) -> dict[str, Any]:
    """Load a torch file that is a mapping with exactly these keys."""
    try:
        with _readable(path):
            _require_plain(path)
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Rejected:
        raise
    except UNPICKLING as error:
        raise _bad(path, f"it cannot be loaded: {first_line(error)}") from error
    if not isinstance(data, dict) or set(data) != set(keys):
        content = type(data).__name__
        if isinstance(data, dict):
            content = ", ".join(key if isinstance(key, str) else type(key).__name__ for key in data) or "nothing"
        raise _bad(path, f"it holds {content:.80}; expected {' and '.join(keys)}")
    return data


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Check that a path is a file, and turn errors of opening it into `Rejected`."""
    try:
        require_file(path)
        yield
    except Rejected:
        raise
    except (MediaError, PermissionError, FileNotFoundError) as error:
        raise Rejected(Reason.UNREADABLE, str(error)) from error


def _require_plain(path: Path) -> None:
    """Check a file before torch loads it: its size, its checksums, no compression, and the pickle in it."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise _bad(path, f"it has {size} bytes; at most {MAX_BYTES} are allowed")
    if not zipfile.is_zipfile(path):
        raise _bad(path, "it was not written by torch.save, or its end is missing")
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise _bad(path, "it is compressed; torch.save never compresses")
        try:
            damaged = archive.testzip()  # torch itself does not verify checksums
        except OSError as error:
            if error.errno != errno.EINVAL:  # a damaged directory leads to a negative offset in the file
                raise
            damaged = "its directory"
        if damaged is not None:
            raise _bad(path, f"the checksum of {damaged} is wrong")
    # This is torch's own reader, because two readers may see different records in one archive.
    reader = torch._C.PyTorchFileReader(str(path))
    if reader.get_record_size(PICKLE) > MAX_PICKLE_BYTES:
        raise _bad(path, f"its pickle is larger than the {MAX_PICKLE_BYTES} bytes that are allowed")
    require_tensors(reader.get_record(PICKLE))


def _tensor(path: Path, name: str, value: Any, dimensions: int, dtypes: dict[str, torch.dtype] = DTYPES) -> Tensor:
    """Check that a value is a plain tensor, and return it with `dimensions` dimensions, without a batch of one."""
    if type(value) is not Tensor or value.layout != torch.strided or value.device.type != "cpu":
        raise _bad(path, f"{name} is {type(value).__name__}; expected a plain tensor")
    if value.dtype not in dtypes.values():
        raise _bad(path, f"{name} is {_kind(value)}; allowed are {', '.join(dtypes)}")
    if value.numel() * value.element_size() > path.stat().st_size:  # an expanded view
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
