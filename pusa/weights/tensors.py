"""Tensors as bytes on disk: read safetensors headers, and write files that are made of byte ranges of others.

A tensor in C order is cut or joined along its first dimension by cutting or joining its bytes, whatever its dtype. So a
whole model is described, renamed, split and written without any of it being in memory. No torch here.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from pusa.errors import WeightsError
from pusa.system.files import atomic, read_json

MAX_HEADER = 100_000_000  # what the safetensors library allows too
BUFFER = 1 << 24
SIZES = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""Bits of each dtype, in the order in which the library lays tensors out (last first, then by name)."""


@dataclass(frozen=True)
class ByteRange:
    """Bytes of a file."""

    path: Path
    start: int
    size: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor: its dtype by safetensors' name, its shape, and the byte ranges that, joined, are its content."""

    dtype: str
    shape: tuple[int, ...]
    ranges: tuple[ByteRange, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * SIZES[self.dtype] // 8

    def split(self, count: int) -> list["StoredTensor"]:
        """`count` equal parts along the first dimension. Only of a tensor that lies in one piece.

        Raises:
            WeightsError: its rows cannot be shared out.
        """
        (whole,) = self.ranges
        if not self.shape or self.shape[0] % count:
            raise WeightsError(f"{whole.path}: a tensor of shape {self.shape} cannot be cut in {count}")
        rows, size = self.shape[0] // count, whole.size // count
        starts = (whole.start + part * size for part in range(count))
        return [StoredTensor(self.dtype, (rows, *self.shape[1:]), (ByteRange(whole.path, at, size),)) for at in starts]

    def chunks(self) -> Iterator[bytes]:
        """The content, a buffer at a time.

        Raises:
            WeightsError: a file has become shorter.
        """
        for piece in self.ranges:
            with piece.path.open("rb") as file:
                file.seek(piece.start)
                yield from _exactly(file, piece)

    def read(self) -> bytearray:
        """The content, whole."""
        content = bytearray()
        for chunk in self.chunks():
            content += chunk
        return content


Tensors = dict[str, StoredTensor]


def concatenate(parts: Iterable[StoredTensor]) -> StoredTensor:
    """One tensor of several, along the first dimension.

    Raises:
        WeightsError: their dtypes, or their other dimensions, differ.
    """
    parts = list(parts)
    if len({(part.dtype, part.shape[1:]) for part in parts}) != 1 or not all(part.shape for part in parts):
        shapes = ", ".join(f"{part.dtype} {part.shape}" for part in parts)
        raise WeightsError(f"{parts[0].ranges[0].path}: tensors of {shapes} cannot be joined")
    rows = sum(part.shape[0] for part in parts)
    return StoredTensor(
        parts[0].dtype, (rows, *parts[0].shape[1:]), tuple(piece for part in parts for piece in part.ranges)
    )


def read_file(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a safetensors file, and its metadata; of the file only the header is read.

    Raises:
        WeightsError: it is none, or it is torn.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, MAX_HEADER):
                raise ValueError(f"its header should have {length} bytes, of {size} in all")
            header = json.loads(file.read(length))
        metadata = _texts(header.pop("__metadata__", {}))
        tensors = {name: _stored(path, 8 + length, entry) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path} is no safetensors file, or a torn one: {error}") from error
    _check_extent(path, tensors, 8 + length, size)
    return tensors, metadata


def read_sharded(folder: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a folder that holds one model: all that its index names, or those of its one file.

    Where there is a bf16 variant beside the plain files, the variant is meant.

    Raises:
        WeightsError: there is nothing, a shard is missing, or the index and the shards do not agree.
    """
    files = shards_of(folder)
    tensors: Tensors = {}
    metadata: dict[str, str] = {}
    for name in files:
        found, facts = read_file(folder / name)
        tensors |= found
        metadata |= facts
    index = index_of(folder)
    named = set(_weight_map(index)) if index else set(tensors)
    if named != set(tensors):
        differ = sorted(named ^ set(tensors))
        raise WeightsError(f"{index} and its shards do not agree on {len(differ)} tensors, {differ[0]!r} among them")
    return tensors, metadata


def shards_of(folder: Path) -> list[str]:
    """The names of the files that hold the model of a folder.

    Raises:
        WeightsError: there are none, or several with no index, or one that the index names is missing.
    """
    index = index_of(folder)
    if index is None:
        files = sorted(path.name for path in folder.glob("[!.]*.safetensors"))
        variant = [name for name in files if name.endswith(".bf16.safetensors")]
        chosen = variant or [name for name in files if name.count(".") == 1]
        if len(chosen) != 1:
            raise WeightsError(f"{folder} holds {files or 'no safetensors files'} and no index; wanted is one model")
        return chosen
    files = sorted(set(_weight_map(index).values()))
    missing = [name for name in files if not (folder / name).is_file()]
    if missing or not files:
        raise WeightsError(f"{index} names {len(files)} files; missing are {', '.join(missing) or 'all'}")
    return files


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> the file beside the index that has it."""
    found = read_json(index)
    names = found.get("weight_map") if isinstance(found, dict) else None
    try:
        names = _texts(names)
    except ValueError as error:
        raise WeightsError(f"{index} is no index of shards: {error}") from error
    outside = [name for name in names.values() if Path(name).name != name]
    if outside:
        raise WeightsError(f"{index} names {outside[0]!r}, which does not lie beside it")
    return names


def _texts(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError(f"wanted is a mapping of names to texts, found {value!r:.80}")
    return value


def index_of(folder: Path) -> Path | None:
    """The index of a sharded model: the bf16 variant's where there is one."""
    variant, plain = sorted(folder.glob("*.index.bf16.json")), sorted(folder.glob("*.safetensors.index.json"))
    return next(iter(variant + plain), None)


def write_file(path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, atomically, holding one buffer in memory.

    The layout is that of the safetensors library, so that what went in order comes back in order.
    """
    with atomic(path) as partial, partial.open("wb") as file:
        for chunk in _content(tensors, metadata):
            file.write(chunk)


def is_written(path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> bool:
    """Whether a file has just the bytes that `write_file` would give it."""
    size = len(_header(tensors, metadata)) + sum(stored.nbytes for stored in tensors.values())
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return all(file.read(len(chunk)) == chunk for chunk in _content(tensors, metadata))


def _header(tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in _order(tensors):
        stored = tensors[name]
        end = offset + stored.nbytes
        entries[name] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _order(tensors: Mapping[str, StoredTensor]) -> list[str]:
    rank = list(SIZES)
    return sorted(tensors, key=lambda name: (-rank.index(tensors[name].dtype), name))


def _content(tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> Iterator[bytes]:
    yield _header(tensors, metadata)
    for name in _order(tensors):
        yield from tensors[name].chunks()


def _stored(path: Path, start: int, entry: Any) -> StoredTensor:
    dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
        raise ValueError(f"shape {shape} and offsets {first}, {last}; allowed are whole numbers from 0")
    if dtype not in SIZES:
        raise ValueError(f"dtype {dtype!r}; allowed are {', '.join(SIZES)}")
    stored = StoredTensor(dtype, shape, (ByteRange(path, start + first, last - first),))
    if last - first != stored.nbytes:
        raise ValueError(f"{dtype} {shape} has {stored.nbytes} bytes, not {last - first}")
    return stored


def _check_extent(path: Path, tensors: Tensors, start: int, size: int) -> None:
    """The tensors must fill the file from the header to its end, without a gap or an overlap."""
    spans = sorted((s.ranges[0].start, s.ranges[0].start + s.nbytes) for s in tensors.values())
    edges = [(start, start), *spans, (size, size)]
    if any(before[1] != after[0] for before, after in pairwise(edges)):
        raise WeightsError(f"{path} is torn: its tensors end at byte {edges[-2][1]}, the file has {size}")


def _exactly(file: BinaryIO, piece: ByteRange) -> Iterator[bytes]:
    left = piece.size
    while left:
        chunk = file.read(min(left, BUFFER))
        if not chunk:
            raise WeightsError(f"{piece.path} has become shorter while it was read")
        left -= len(chunk)
        yield chunk
