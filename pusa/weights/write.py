"""Write a transformer in diffusers' layout, with its fine-tune's record; and what a pickle has, as safetensors."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pusa.errors import WeightsError
from pusa.system.failures import Failure, attempt
from pusa.system.files import write_json
from pusa.system.text import preview, printable
from pusa.weights.convert import NAME, SHARD_BYTES, diffusers_config, output_folder
from pusa.weights.load import DTYPES
from pusa.weights.stored import RECORD
from pusa.weights.tensors import BUFFER, is_written, write_file

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Loaded:
    """A tensor in memory, as `write_file` takes it."""

    tensor: Tensor

    @property
    def dtype(self) -> str:
        """Return safetensors' name of the dtype."""
        return NAMES[self.tensor.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape."""
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        """Return the size in bytes."""
        return self.tensor.nbytes

    def chunks(self) -> Iterator[memoryview]:
        """Yield the content, at most `BUFFER` bytes at a time."""
        content = self.tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        return (content[start : start + BUFFER] for start in range(0, len(content), BUFFER))


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors of floats as a safetensors file, atomically. Equal tensors and metadata give equal bytes."""
    write_file(path, {name: Loaded(tensor) for name, tensor in tensors.items()}, metadata)


def convert_pickle(path: Path, folder: Path) -> Path:
    """Write the tensors of a file of `torch.save` as a safetensors file of the same name; return it.

    torch's restricted reader runs no code of the file, and reads a tensor when it is written.

    Args:
        path: the file: a mapping of names to tensors, perhaps in a mapping of one entry such as "state_dict".
        folder: the output folder.

    Raises:
        WeightsError: the file cannot be read, has anything but tensors of floats, or another file has its place.
        StageError: the folder holds files of somebody else, or another process is writing into it.
    """
    if not path.is_file():
        raise WeightsError(f"{path} is not a file; expected one of torch.save, such as pusa_v1.pt")
    loaded: Any = attempt(lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=True), None)
    if isinstance(loaded, Failure):
        raise WeightsError(f"{path} cannot be read as tensors alone: {printable(loaded.message)}")
    while isinstance(loaded, dict) and len(loaded) == 1 and isinstance(inner := next(iter(loaded.values())), dict):
        loaded = inner
    if not isinstance(loaded, dict) or not loaded:
        raise WeightsError(f"{path} is {type(loaded).__name__}, or empty; expected a mapping of names to tensors")
    for name, value in loaded.items():
        plain = isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided
        if not plain or value.dtype not in NAMES or value.nbytes > path.stat().st_size:  # an expanded view
            raise WeightsError(f"{path} has {preview(name)}, which is no plain tensor of floats")
    target, content = folder / f"{path.stem}.safetensors", {name: Loaded(tensor) for name, tensor in loaded.items()}
    with output_folder(folder):
        if not target.exists():
            write_file(target, content, {})
        elif not is_written(target, content, {}):
            raise WeightsError(f"{target} exists already and is another file; name another folder, or remove it")
    return target


def config_of(transformer: Any) -> dict[str, Any]:
    """Return a transformer's configuration as diffusers writes it, with the name of diffusers' class."""
    return diffusers_config(json.loads(transformer.to_json_string()))


def file_metadata(record: Mapping[str, Any]) -> dict[str, str]:
    """Return a file's metadata: the format of its tensors and the record of the fine-tune."""
    return {"format": "pt", RECORD: json.dumps(record, sort_keys=True)}


def write_transformer(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    record: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a transformer into `folder`.

    Args:
        folder: a scratch folder, which the caller publishes; created if it does not exist.
        tensors: the weights by diffusers' names. They are read one by one, and at most a shard of them is in memory.
        config: the result of `config_of`.
        record: the fine-tune's record (step, recipe, versions), kept in every file.
        dtype: the dtype of the files; None keeps that of each tensor.
        shard_bytes: the largest size of a file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names: dict[str, int] = {}
    size = count = 0
    for count, shard in enumerate(_shards(tensors, dtype, shard_bytes), 1):
        save_tensors(folder / f"{count}.safetensors", shard, file_metadata(record))
        names |= dict.fromkeys(shard, count)
        size += sum(tensor.nbytes for tensor in shard.values())
    files = {i: _file(i, count) for i in range(1, count + 1)}  # the count is known only now
    for i, file in files.items():
        (folder / f"{i}.safetensors").rename(folder / file)
    if count > 1:
        index = {"metadata": {"total_size": size}, "weight_map": {name: files[i] for name, i in names.items()}}
        write_json(folder / f"{NAME}.safetensors.index.json", index)
    write_json(folder / "config.json", diffusers_config(config))


def _file(number: int, count: int) -> str:
    return f"{NAME}.safetensors" if count == 1 else f"{NAME}-{number:05}-of-{count:05}.safetensors"


def _shards(tensors: Mapping[str, Tensor], dtype: torch.dtype | None, limit: int) -> Iterator[dict[str, Tensor]]:
    """Yield tensors on the CPU in their order, as many per shard as stay below the limit, at least one."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        ready = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        if shard and size + ready.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = ready
        size += ready.nbytes
    yield shard
