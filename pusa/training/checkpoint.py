"""Checkpoints: `<step>/` folders, each whole or not there, written while training goes on; and `last`.

torch.distributed.checkpoint writes the state as safetensors, each process its part, and reads it into any number of
processes. The first process then adds what is for use and the list of all files, and gives the folder its name.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from pusa.daemons import Daemons
from pusa.errors import TrainingError
from pusa.files import PARTIAL, point, publish, read_json, remove, sha256_file, write_json
from pusa.training.parallel import World, whole
from pusa.training.state import Training

log = logging.getLogger(__name__)
STATE, RECORD = "state", "checkpoint.json"
Record = Mapping[str, Any]
# Writes what is for use into a checkpoint's folder: (folder, whole tensors by name).
WriteResult = Callable[[Path, Mapping[str, Tensor]], None]


@dataclass(frozen=True)
class Checkpoint:
    """A whole one, and what it says of itself."""

    path: Path
    record: Record

    @property
    def step(self) -> int:
        """After which it was made."""
        return int(self.path.name)


class Checkpoints:
    """A folder of checkpoints of one run, of which the last `keep` stay. All processes call the same, in order."""

    def __init__(self, folder: Path, world: World, keep: int) -> None:
        self.folder, self.world, self.keep = folder, world, keep
        self._writer = Daemons(1)
        self._pending: Future[None] | None = None

    def last(self) -> Checkpoint | None:
        """The newest whole one, if there is one; torn ones are set aside, by name.

        `last` is mended where a kill kept it from following.
        """
        for name in self.world.told(lambda: [path.name for path in reversed(self._all())]):
            path = self.folder / name
            if not (wrong := self._damage(path)):
                if self.world.is_first:
                    point(self.folder / "last", name)
                return Checkpoint(path, read_json(path / RECORD))
            if self.world.is_first:
                log.warning("checkpoint %s is torn and is skipped: %s", path, wrong)
                remove(path.with_name(f"{name}.torn"))
                path.rename(path.with_name(f"{name}.torn"))
        return None

    def at(self, step: int) -> Path:
        """The checkpoint of a step that lies behind.

        Raises:
            TrainingError: none was kept there.
        """
        path = self.folder / f"{step:08d}"
        if not path.is_dir():
            there = ", ".join(str(int(path.name)) for path in self._all())
            raise TrainingError(f"{self.folder} is past step {step} and kept none there; it has {there}")
        return path

    def save(self, training: Training, record: Record, dtype: torch.dtype, write_result: WriteResult) -> None:
        """Begin to write `<step>/`, its result in `dtype`; training may go on at once. The one before is waited for.

        Raises:
            OSError: the one before could not be written.
        """
        self.wait()
        path = self.folder / f"{training.step:08d}"
        partial = path.with_name(f"{PARTIAL}{path.name}")
        result = self._whole(training.result, dtype)
        saved = dcp.async_save(
            training.tensors(),
            storage_writer=HuggingFaceStorageWriter(str(partial / STATE), save_distributed=True),
            process_group=self.world.files,
        )

        def finish() -> None:
            _require_written(saved, partial)
            if self.world.is_first:
                _write(write_result, partial, result)
                files = {str(file.relative_to(partial)): _facts(file) for file in _files(partial)}
                write_json(partial / RECORD, {**record, "files": files})
                publish(partial, path)
                point(self.folder / "last", path.name)
                self._rotate()

        self._pending = self._writer.submit(finish)

    def wait(self) -> None:
        """Until what was begun is written, and every process may know it.

        Raises:
            OSError: it could not be.
        """
        if self._pending is not None:
            self._pending.result()
            self.world.told(lambda: None)
            self._pending = None

    def raise_if_failed(self) -> None:
        """So that nobody trains on for hours beside a full disk.

        Raises:
            OSError: what was begun could not be written.
        """
        if self._pending is not None and self._pending.done():
            self._pending.result()

    def restore(self, checkpoint: Checkpoint, training: Training) -> None:
        """Bring `training` to where it was saved, whatever the number of processes was."""
        tensors = training.tensors()
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint.path / STATE)))
        training.step, training.skipped = checkpoint.step, checkpoint.record["skipped"]

    def _whole(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Copies in the first process's memory; all take part."""
        found = {}
        for name, tensor in tensors.items():
            full = whole(tensor)
            if self.world.is_first:
                found[name] = full.to("cpu", dtype, copy=True)
        return found

    def _all(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if re.fullmatch(r"\d{8}", path.name))

    def _rotate(self) -> None:
        """Away with the oldest, by another name first, so that a kill leaves none that looks whole."""
        for path in self._all()[: -self.keep]:
            gone = path.with_name(f"{PARTIAL}old-{path.name}")
            path.rename(gone)
            remove(gone)

    def _damage(self, path: Path) -> str:
        """What is wrong with a checkpoint, or "". The processes share its files out to hash them."""
        if wrong := self.world.told(lambda: _missing(path)):
            return wrong
        files = read_json(path / RECORD)["files"]
        mine = sorted(files)[self.world.rank :: self.world.size]
        other = [name for name in mine if sha256_file(path / name) != files[name][1]]
        damaged = [name for names in self.world.gathered(other) for name in names]
        return f"{', '.join(damaged)} not as written" if damaged else ""


def _write(write_result: WriteResult, folder: Path, result: Mapping[str, Tensor]) -> None:
    try:
        write_result(folder, result)
    except SafetensorError as error:  # its name for a full disk, among others
        raise OSError(f"{folder} could not be written: {error}") from error


def _missing(path: Path) -> str:
    """What can be told without reading the files."""
    record = read_json(path / RECORD)
    files = record.get("files") if isinstance(record, dict) else None
    if not isinstance(files, dict) or not files:
        return f"its {RECORD} is missing or torn"
    wrong = [
        name for name, (size, _) in files.items() if not (path / name).is_file() or (path / name).stat().st_size != size
    ]
    return f"{', '.join(wrong)} missing or of another size" if wrong else ""


def _facts(file: Path) -> tuple[int, str]:
    return file.stat().st_size, sha256_file(file)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _require_written(saved: Any, folder: Path) -> None:
    """Torch's exception for it is not even an Exception."""
    try:
        saved.result()
    except CheckpointException as error:
        reasons = {str(failure) for failure, _ in error.failures.values()}
        raise OSError(f"{folder} could not be written: {'; '.join(sorted(reasons))}") from error
