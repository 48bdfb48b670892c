"""Read the published torch files. They come from strangers: nothing in them is run, and no size is taken on trust.

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

MAX_OPCODES = 1000  # a real one has about 60; nesting can be no deeper than this
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
    """Refuse a pickle that is more than a few tensors in mappings and lists.

    torch's restricted unpickler runs no foreign code, but it hashes keys, and a key may be a tuple that holds another
    twice, which holds another twice: few bytes, and a hash that never ends. So nothing but names may be used twice;
    then what is built is no larger than what is said, and that is short.

    Raises:
        ValueError: it is more, or no pickle.
    """
    names = set()  # places of the memo that hold a text or a global
    last = ""  # the opcode that put the stack's last item there
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


MAX_BYTES = 2**30  # of a file: eighty times a clip of 163 frames at 848x480
PICKLE = "data.pkl"  # the part that says what the tensors are
MAX_PICKLE_BYTES = 2**20  # of it; a real one has under 1 KiB
# What torch's own restricted unpickler raises on files that are damaged, or made to mislead.
UNPICKLING = (
    pickle.UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError,
    OverflowError, EOFError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes.

    Raises:
        Rejected: there is no such file, or the system refuses it. An outage of the disk is neither.
    """
    with _readable(path):
        return sha256_file(path)


def read_latents(path: Path, channels: int) -> tuple[Tensor, Tensor]:
    """Posterior mean and log-variance, each (C, F, h, w), in the dtype they have in the file, which stays mapped.

    Raises:
        Rejected: the file is not that.
    """
    data = _load(path, ("mean", "logvar"))
    mean, logvar = (_tensor(path, name, data[name], 4) for name in ("mean", "logvar"))
    if mean.shape != logvar.shape or mean.dtype != logvar.dtype:
        raise _bad(path, f"mean is {_kind(mean)} and logvar {_kind(logvar)}; both must be alike")
    if mean.shape[0] != channels:
        raise _bad(path, f"mean has {mean.shape[0]} channels; the VAE has {channels}")
    return mean, logvar


def read_features(path: Path, tokens: int, width: int) -> tuple[Tensor, int]:
    """Features of the valid tokens (n, width), and n. Where none is valid: all of them (L, width), and 0.

    Raises:
        Rejected: the file is not that, or its valid tokens are not the first ones, or not finite.
    """
    data = _load(path, ("y_feat", "y_mask"))
    features = _tensor(path, "y_feat", _only(data["y_feat"]), 2)
    mask = _tensor(path, "y_mask", _only(data["y_mask"]), 1, {"bool": torch.bool})
    if features.shape != (len(mask), width) or len(mask) != tokens:
        found = f"y_feat is {tuple(features.shape)} and y_mask {tuple(mask.shape)}"
        raise _bad(path, f"{found}; the text encoder gives {tokens} tokens of width {width}")
    valid = int(mask.sum())
    if not mask[:valid].all():
        raise _bad(path, f"the {valid} valid tokens of y_mask are not the first ones")
    kept = features[:valid] if valid else features
    if wrong := int((~torch.isfinite(kept)).sum()):
        raise Rejected(Reason.NOT_FINITE, f"{path}: {wrong} of {kept.numel()} values of the features are not finite")
    return kept, valid


def _load(path: Path, keys: Collection[str]) -> dict[str, Any]:
    """The mapping of a torch file that has just these keys."""
    try:
        with _readable(path):
            _require_plain(path)
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Rejected:
        raise
    except UNPICKLING as error:
        raise _bad(path, f"it cannot be loaded: {first_line(error)}") from error
    if not isinstance(data, dict) or set(data) != set(keys):
        raise _bad(path, f"it holds {_held(data):.80}; wanted are {' and '.join(keys)}")
    return data


def _held(data: Any) -> str:
    """What a file holds: its keys by name, those that are texts; of anything else the type alone."""
    if not isinstance(data, dict):
        return type(data).__name__
    return ", ".join(key if isinstance(key, str) else type(key).__name__ for key in data) or "nothing"


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        require_file(path)
        yield
    except Rejected:
        raise
    except (MediaError, PermissionError, FileNotFoundError) as error:
        raise Rejected(Reason.UNREADABLE, str(error)) from error


def _require_plain(path: Path) -> None:
    """Refuse what torch would unpack, or build, to more than there is in the file."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise _bad(path, f"it has {size} bytes; allowed are {MAX_BYTES}")
    if not zipfile.is_zipfile(path):
        raise _bad(path, "it is not what torch.save writes, or its end is missing")
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise _bad(path, "it is compressed, as torch.save makes none")
        _require_checksums(path, archive)
    reader = torch._C.PyTorchFileReader(str(path))  # what torch will read: of one archive, two readers may see two
    if reader.get_record_size(PICKLE) > MAX_PICKLE_BYTES:
        raise _bad(path, f"its pickle is larger than {MAX_PICKLE_BYTES} bytes")
    require_tensors(reader.get_record(PICKLE))


def _require_checksums(path: Path, archive: zipfile.ZipFile) -> None:
    """torch itself does not look at them."""
    try:
        damaged = archive.testzip()
    except OSError as error:
        if error.errno != errno.EINVAL:  # which is a place before the file's beginning, by a directory that is damaged
            raise
        damaged = "its directory"
    if damaged is not None:
        raise _bad(path, f"the checksum of {damaged} is wrong")


def _tensor(path: Path, name: str, value: Any, dimensions: int, dtypes: dict[str, torch.dtype] = DTYPES) -> Tensor:
    """A plain tensor of so many dimensions, not counting a batch of one before them."""
    if type(value) is not Tensor or value.layout != torch.strided or value.device.type != "cpu":
        raise _bad(path, f"{name} is {type(value).__name__}; wanted is a plain tensor")
    if value.dtype not in dtypes.values():
        raise _bad(path, f"{name} is {_kind(value)}; allowed are {', '.join(dtypes)}")
    if value.numel() * value.element_size() > path.stat().st_size:  # a view that repeats what is there
        raise _bad(path, f"{name} is {_kind(value)}, more than the file holds")
    inner = value[0] if value.ndim == dimensions + 1 and len(value) == 1 else value
    if inner.ndim != dimensions or not inner.numel():
        raise _bad(path, f"{name} is {_kind(value)}; wanted are {dimensions} dimensions, or one more for a batch of 1")
    return inner.detach()


def _only(value: Any) -> Any:
    """The item of a list of one."""
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _bad(path: Path, detail: str) -> Rejected:
    return Rejected(Reason.BAD_PAIR, f"{path}: {detail}")
