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
from typing import Any, Self

import torch
import torch.distributed.checkpoint as dcp
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from pusa.errors import PusaError, TrainingError
from pusa.finetune.parallel import World, whole
from pusa.finetune.state import Training
from pusa.system.files import PARTIAL, publish, read_json, remove, set_link, sha256_file, write_json
from pusa.system.text import first_line
from pusa.system.threads import DaemonThreadPool

log = logging.getLogger(__name__)
STATE, RECORD = "state", "checkpoint.json"
Record = Mapping[str, Any]
# Writes what is for use into a checkpoint's folder: (folder, whole tensors by name).
WriteResult = Callable[[Path, Mapping[str, Tensor]], None]
Facts = dict[str, tuple[int, str]]  # of files, by their names in a checkpoint: size, SHA-256
SECONDS_TO_FINISH = 1800.0


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
        self._writer = DaemonThreadPool(1)
        self._pending: Future[None] | None = None

    def last(self) -> Checkpoint | None:
        """The newest whole one, if there is one; torn ones are set aside, by name.

        `last` is mended where a kill kept it from following.
        """
        for name in self.world.broadcast(lambda: [path.name for path in reversed(self._all())]):
            path = self.folder / name
            if not (wrong := self._damage(path)):
                if self.world.is_first:
                    set_link(self.folder / "last", name)
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
            """All processes come to the same end, or those that go well would wait for ever."""
            _require_written(saved, partial)
            shares = self.world.all_gather(self._facts_of_share(partial))
            wrong = "; ".join(share for share in shares if isinstance(share, str))
            files = {name: facts for share in shares if isinstance(share, dict) for name, facts in share.items()}
            if wrong := wrong or self.world.broadcast(
                lambda: self._publish(partial, path, record, files, write_result, result)
            ):
                raise OSError(wrong)

        self._pending = self._writer.submit(finish)

    def wait(self) -> None:
        """Until what was begun is written, and every process knows it.

        Raises:
            OSError: it could not be.
        """
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def raise_if_failed(self) -> None:
        """So that nobody trains on for hours beside a full disk.

        Raises:
            OSError: what was begun could not be written.
        """
        if self._pending is not None and self._pending.done():
            self._pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """What was begun is finished, whatever has ended the training."""
        if kind is None:
            self.wait()
        elif self._pending is not None and not self._pending.done():
            log.warning("the training has ended (%s); the checkpoint that was begun is finished first", kind.__name__)
            try:
                self._pending.result(timeout=SECONDS_TO_FINISH)
            except (OSError, RuntimeError, TimeoutError) as failure:  # also where the other processes are gone
                log.warning("it could not be: %s", first_line(failure))

    def restore(self, checkpoint: Checkpoint, training: Training) -> None:
        """Bring `training` to where it was saved, whatever the number of processes was.

        Raises:
            TrainingError: the state is not that of such a run.
        """
        try:
            reader = HuggingFaceStorageReader(str(checkpoint.path / STATE))
            dcp.load(training.tensors(), storage_reader=reader, process_group=self.world.files)
        except CheckpointException as error:
            raise TrainingError(f"{checkpoint.path} cannot be gone on from: {_reasons(error)}") from error
        training.step, training.skipped = checkpoint.step, checkpoint.record["skipped"]

    def _whole(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Copies in the first process's memory; all take part."""
        found = {}
        for name, tensor in tensors.items():
            full = whole(tensor)
            if self.world.is_first:
                found[name] = full.to("cpu", dtype, copy=True)
        return found

    def _facts_of_share(self, folder: Path) -> Facts | str:
        """Of this process's share of the state's files; or why they cannot be read."""
        try:
            files = sorted((folder / STATE).iterdir())[self.world.rank :: self.world.size]
            return {str(file.relative_to(folder)): _facts(file) for file in files}
        except OSError as error:
            return f"{folder} cannot be read back: {error}"

    def _publish(
        self,
        partial: Path,
        path: Path,
        record: Record,
        state: Facts,
        write_result: WriteResult,
        result: Mapping[str, Tensor],
    ) -> str:
        """Complete a folder and give it its name; why that failed, or ""."""
        try:
            write_result(partial, result)
            others = {str(f.relative_to(partial)): _facts(f) for f in _files(partial) if f.parent.name != STATE}
            write_json(partial / RECORD, {**record, "files": {**state, **others}})
            publish(partial, path)
            set_link(self.folder / "last", path.name)
            self._rotate()
        except (OSError, PusaError, SafetensorError) as error:  # the last is its name for a full disk, among others
            return f"{path} could not be written: {error}"
        return ""

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
        if wrong := self.world.broadcast(lambda: _missing(path)):
            return wrong
        files = read_json(path / RECORD)["files"]
        mine = sorted(files)[self.world.rank :: self.world.size]
        other = [name for name in mine if sha256_file(path / name) != files[name][1]]
        damaged = [name for names in self.world.all_gather(other) for name in names]
        return f"{', '.join(damaged)} not as written" if damaged else ""


def _missing(path: Path) -> str:
    """What can be told without reading the files."""
    try:
        files = _Record.model_validate(read_json(path / RECORD)).files
    except ValidationError:
        return f"its {RECORD} is missing or torn"
    there = {str(file.relative_to(path)): file.stat().st_size for file in _files(path)}
    wrong = [name for name, (size, _) in files.items() if there.get(name) != size]
    wrong += [name for name in there if Path(name).parent.name == STATE and name not in files]  # it would be read too
    return f"{', '.join(wrong)} missing, of another size, or not of it" if wrong else ""


class _Record(BaseModel):
    """What a checkpoint must say of itself to be gone on from."""

    step: int
    recipe: dict[str, Any]
    overrides: list[dict[str, Any]]
    skipped: int
    files: dict[str, tuple[int, str]] = Field(min_length=1)


def _facts(file: Path) -> tuple[int, str]:
    return file.stat().st_size, sha256_file(file)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _require_written(saved: Any, folder: Path) -> None:
    """Torch's exception for it is not even an Exception."""
    try:
        saved.result()
    except CheckpointException as error:
        raise OSError(f"{folder} could not be written: {_reasons(error)}") from error


def _reasons(error: CheckpointException) -> str:
    return "; ".join(sorted({first_line(failure) for failure, _ in error.failures.values()}))
