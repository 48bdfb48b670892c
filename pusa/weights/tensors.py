"""Read safetensors headers, and write safetensors files from byte ranges of other files, without torch.

A tensor in C order is split or concatenated along its first dimension by doing so with its bytes, whatever its dtype.
So a whole model is described, renamed, split and written without being loaded into memory.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, Protocol

from pusa.errors import WeightsError
from pusa.system.files import atomic, read_json
from pusa.system.text import join_names, preview, printable

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MAX_DIMENSIONS = 16  # of a tensor
BUFFER = 1 << 24  # bytes
INDEX = ".index.json"  # how the name of an index of shards ends
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SIZES = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""Bits of each dtype, in the safetensors library's order: it writes the last dtype first, and within it by name."""


@dataclass(frozen=True)
class ByteRange:
    """A range of bytes in a file."""

    path: Path
    start: int
    size: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk: safetensors' name of its dtype, its shape, and the byte ranges that make up its content."""

    dtype: str
    shape: tuple[int, ...]
    ranges: tuple[ByteRange, ...]

    @property
    def nbytes(self) -> int:
        """Return the size in bytes."""
        return prod(self.shape) * SIZES[self.dtype] // 8

    def split(self, rows: Sequence[int]) -> list["StoredTensor"]:
        """Split along the first dimension into parts of these numbers of rows, which are all of its rows."""
        assert sum(rows) == self.shape[0], (rows, self.shape)
        left, parts = list(self.ranges), []
        for count in rows:
            missing, own = count * self.nbytes // self.shape[0], []
            while missing:
                span = left.pop(0)
                own.append(ByteRange(span.path, span.start, min(missing, span.size)))
                if missing < span.size:
                    left.insert(0, ByteRange(span.path, span.start + missing, span.size - missing))
                missing -= own[-1].size
            parts.append(StoredTensor(self.dtype, (count, *self.shape[1:]), tuple(own)))
        return parts

    def chunks(self) -> Iterator[bytes]:
        """Yield the content, at most `BUFFER` bytes at a time.

        Raises:
            WeightsError: a file became shorter after its header was read.
        """
        for span in self.ranges:
            with span.path.open("rb") as file:
                file.seek(span.start)
                left = span.size
                while left:
                    chunk = file.read(min(left, BUFFER))
                    if not chunk:
                        raise WeightsError(f"{span.path} became shorter while it was read")
                    left -= len(chunk)
                    yield chunk

    def read(self) -> bytearray:
        """Return the whole content."""
        content = bytearray()
        for chunk in self.chunks():
            content += chunk
        return content


Tensors = dict[str, StoredTensor]


class Content(Protocol):
    """A tensor that can be written: as `StoredTensor`, wherever its bytes are."""

    @property
    def dtype(self) -> str:
        """Return safetensors' name of the dtype."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape."""

    @property
    def nbytes(self) -> int:
        """Return the size in bytes."""

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Yield the bytes in C order, at most `BUFFER` at a time."""


def concatenate(parts: Iterable[StoredTensor]) -> StoredTensor:
    """Concatenate tensors along the first dimension.

    Raises:
        WeightsError: their dtypes or their other dimensions differ.
    """
    parts = list(parts)
    if len({(part.dtype, part.shape[1:]) for part in parts}) != 1 or not all(part.shape for part in parts):
        shapes = ", ".join(f"{part.dtype} {part.shape}" for part in parts)
        raise WeightsError(f"{parts[0].ranges[0].path}: tensors of {shapes} cannot be concatenated")
    rows = sum(part.shape[0] for part in parts)
    return StoredTensor(
        parts[0].dtype, (rows, *parts[0].shape[1:]), tuple(span for part in parts for span in part.ranges)
    )


def read_file(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file. Only the header is read.

    Raises:
        WeightsError: the file is not a safetensors file, or is incomplete.
    """
    try:
        if path.exists() and not path.is_file():  # the opening of a named pipe would wait
            raise ValueError("it is not a regular file")
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, MAX_HEADER):
                raise ValueError(f"its header would have {length} bytes; the file has {size}")
            header = parse_unique(file.read(length))
        metadata = _require_strings(header.pop("__metadata__", {}))
        tensors = {name: _parse_entry(path, 8 + length, entry) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        refuse_pickle(str(path))
        raise WeightsError(f"{path} is not a complete safetensors file: {printable(error)}") from error
    _check_extent(path, tensors, 8 + length, size)
    return tensors, metadata


def parse_unique(text: str | bytes) -> Any:
    """Return the value of a JSON text. Readers differ in which of two values of one key they take.

    Raises:
        ValueError: it is not JSON, or an object has a key twice.
        RecursionError: it is nested too deep.
    """

    def refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"it has {preview(name)} twice")
        return found

    return json.loads(text, object_pairs_hook=refuse_repeated)


def refuse_pickle(name: str) -> None:
    """Refuse a file whose name is that of a pickle, which can run any code when it is read.

    Raises:
        WeightsError: it is.
    """
    if name.endswith(PICKLES):
        raise WeightsError(
            f"{name} is a pickle, which can run code when it is read; expected a safetensors file; `pusa weights "
            "convert FILE FOLDER --to safetensors` makes one of a file here, and runs no code"
        )


def read_sharded(folder: Path) -> tuple[Tensors, dict[str, str]]:
    """Read the tensors and the metadata of a folder with one model: of all files in its index, or of its one file.

    If a bf16 variant lies beside the plain files, the variant is read.

    Raises:
        WeightsError: there are no weights, a shard is missing, or the index and the shards disagree.
    """
    return _read_shards(folder, shards_of(folder), index_of(folder))


def read_indexed(index: Path) -> tuple[Tensors, dict[str, str]]:
    """Read the tensors and the metadata of the shards that one index names.

    Raises:
        WeightsError: a shard is missing, or the index and the shards disagree.
    """
    return _read_shards(index.parent, shards_named_in(index), index)


def _read_shards(folder: Path, files: list[str], index: Path | None) -> tuple[Tensors, dict[str, str]]:
    tensors: Tensors = {}
    metadata: dict[str, str] = {}
    for name in files:
        shard, shard_metadata = read_file(folder / name)
        tensors |= shard
        metadata |= shard_metadata
    named = set(_weight_map(index)) if index else set(tensors)
    if named != set(tensors):
        differ = sorted(named ^ set(tensors))
        raise WeightsError(f"{index} and its shards disagree on {len(differ)} tensors, such as {differ[0]!r}")
    return tensors, metadata


def shards_of(folder: Path) -> list[str]:
    """Return the names of the safetensors files of the model in a folder.

    Raises:
        WeightsError: there are none, there are several without an index, or a file of the index is missing.
    """
    index = index_of(folder)
    if index is None:
        files = sorted(path.name for path in folder.glob("[!.]*.safetensors"))
        variant = [name for name in files if name.endswith(".bf16.safetensors")]
        chosen = variant or [name for name in files if name.count(".") == 1]
        if len(chosen) != 1:
            raise WeightsError(f"{folder} has {files or 'no safetensors files'} and no index; expected one model")
        return chosen
    return shards_named_in(index)


def shards_named_in(index: Path) -> list[str]:
    """Return the names of the files beside an index that it names.

    Raises:
        WeightsError: it is not an index, or a file is missing.
    """
    files = sorted(set(_weight_map(index).values()))
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing or not files:
        raise WeightsError(f"{index} names {len(files)} files; missing: {join_names(missing) or 'all'}")
    return files


def _weight_map(index: Path) -> dict[str, str]:
    """Return tensor name -> the name of the file beside the index that has it."""
    content = read_json(index)
    try:
        names = _require_strings(content.get("weight_map") if isinstance(content, dict) else None)
    except ValueError as error:
        raise WeightsError(f"{index} is not an index of shards: {error}") from error
    outside = [name for name in names.values() if Path(name).name != name]
    if outside:
        raise WeightsError(f"{index} names {outside[0]!r}, which is not a file beside it")
    return names


def _require_strings(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError(f"expected a mapping of names to strings; got {value!r:.80}")
    return value


def index_of(folder: Path) -> Path | None:
    """Return the index of a sharded model, the bf16 variant's if there is one; None without an index."""
    variant, plain = sorted(folder.glob("*.index.bf16.json")), sorted(folder.glob("*.safetensors.index.json"))
    return next(iter(variant + plain), None)


def write_file(path: Path, tensors: Mapping[str, Content], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically, with at most `BUFFER` bytes more in memory.

    Equal tensors and metadata give equal bytes. The layout is that of the safetensors library, which writes the
    metadata in another order each time.
    """
    with atomic(path) as partial, partial.open("wb") as file:
        for chunk in _content(tensors, metadata):
            file.write(chunk)


def is_written(path: Path, tensors: Mapping[str, Content], metadata: Mapping[str, str]) -> bool:
    """Return whether a file has exactly the bytes that `write_file` would write."""
    size = len(_header(tensors, metadata)) + sum(stored.nbytes for stored in tensors.values())
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return all(file.read(len(chunk)) == chunk for chunk in _content(tensors, metadata))


def _header(tensors: Mapping[str, Content], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in _order(tensors):
        stored = tensors[name]
        end = offset + stored.nbytes
        entries[name] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _order(tensors: Mapping[str, Content]) -> list[str]:
    rank = list(SIZES)
    return sorted(tensors, key=lambda name: (-rank.index(tensors[name].dtype), name))


def _content(tensors: Mapping[str, Content], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    yield _header(tensors, metadata)
    for name in _order(tensors):
        yield from tensors[name].chunks()


def _parse_entry(path: Path, start: int, entry: Any) -> StoredTensor:
    dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, first, last)):
        raise ValueError(
            f"shape {preview(shape)} and offsets {preview(first)}, {preview(last)}; expected at most {MAX_DIMENSIONS} "
            "integers of at least 0"
        )
    if dtype not in SIZES:
        raise ValueError(f"dtype {preview(dtype)}; expected one of {', '.join(SIZES)}")
    stored = StoredTensor(dtype, shape, (ByteRange(path, start + first, last - first),))
    if last - first != stored.nbytes:
        raise ValueError(f"{dtype} {shape} needs {stored.nbytes} bytes; the offsets give {last - first}")
    return stored


def _check_extent(path: Path, tensors: Tensors, start: int, size: int) -> None:
    """Check that the tensors fill the file from the header to its end, without gap or overlap."""
    spans = sorted((s.ranges[0].start, s.ranges[0].start + s.nbytes) for s in tensors.values())
    edges = [(start, start), *spans, (size, size)]
    if any(before[1] != after[0] for before, after in pairwise(edges)):
        raise WeightsError(
            f"{path} is incomplete or damaged: its tensors end at byte {edges[-2][1]}, the file has {size} bytes"
        )
