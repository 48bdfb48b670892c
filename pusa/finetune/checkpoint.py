"""Write and read checkpoints: `<step>/` folders, each complete or absent, and the links `last` and `best`.

They are written while training continues. torch.distributed.checkpoint writes the state as safetensors, each process
its shard, and reads it into any number of processes. The first process then adds the weights for use and the list of
all files, and gives the folder its name.
"""

import errno
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed.checkpoint as dcp
from pydantic import BaseModel, Field, StrictInt, ValidationError, field_validator
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from pusa.errors import PusaError, TrainingError
from pusa.finetune.parallel import World, whole
from pusa.finetune.state import Training
from pusa.manifest.models import FinetuneManifest
from pusa.system.files import (
    PARTIAL,
    own_digest,
    publish,
    read_json,
    read_object,
    remove,
    set_link,
    sha256_file,
    write_json,
)
from pusa.system.text import first_line
from pusa.system.threads import DaemonThreadPool
from pusa.weights.load import dtype_of

log = logging.getLogger(__name__)
STATE, RECORD = "state", "checkpoint.json"
LAST, BEST = "last", "best"
COPIED = ".copied"  # set aside, with this after its name: a copy of a checkpoint that was made of a link
Record = Mapping[str, Any]
# Writes the weights for use into a checkpoint's folder: (folder, whole tensors by name).
WriteResult = Callable[[Path, Mapping[str, Tensor]], None]
FindBest = Callable[[Collection[int]], int | None]  # steps -> the best measured one; None: none was measured
FileFacts = dict[str, tuple[int, str]]  # name in the checkpoint -> size, SHA-256
NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}  # what disks without symbolic links answer
FINISH_SECONDS = 1800.0  # how long a training that failed waits for the checkpoint that is being written


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint and its record."""

    path: Path
    record: Record

    @property
    def step(self) -> int:
        """Return the step after which it was made."""
        return int(self.path.name)


class _Record(BaseModel):
    """The part of a checkpoint's record that is needed to resume."""

    step: StrictInt
    recipe: dict[str, Any]
    overrides: list[dict[str, Any]]
    skipped: StrictInt
    files: dict[str, tuple[int, str]] = Field(min_length=1)
    sha256: str | None = None  # of all the rest; checkpoints of earlier versions lack it

    @field_validator("recipe")
    @classmethod
    def _check_old_keys(cls, recipe: dict[str, Any]) -> dict[str, Any]:
        return FinetuneManifest.rename_old_keys(recipe, warn=False)


class Checkpoints:
    """The folder of a run's checkpoints, of which the last `keep` stay, and the one that the link `best` names.

    `find_best` says which that is; without it, a link of an earlier call stays, and so does its checkpoint.

    All processes call the same methods in the same order.
    """

    def __init__(self, folder: Path, world: World, keep: int, find_best: FindBest | None = None) -> None:
        self.folder, self.world, self.keep, self.find_best = folder, world, keep, find_best
        self._writer = DaemonThreadPool(1)
        self._pending: Future[None] | None = None

    def last(self) -> Checkpoint | None:
        """Return the newest complete checkpoint, or None. Damaged ones are renamed to `<step>.torn`.

        The links are made again, in case a kill came before that, or they were copied as folders.
        """
        if self.world.is_first:
            for link in (LAST, BEST) if self.find_best else (LAST,):  # else a folder of this name is somebody's own
                self._set_copy_aside(self.folder / link)
        for name in self.world.broadcast(lambda: [path.name for path in reversed(self._paths())]):
            path = self.folder / name
            damage = self._find_damage(path)
            if not damage:
                if self.world.is_first:
                    self._point(LAST, name)
                    self._point_best()
                return Checkpoint(path, read_json(path / RECORD))
            if self.world.is_first:
                log.warning("checkpoint %s is damaged and is skipped: %s", path, damage)
                remove(path.with_name(f"{name}.torn"))
                path.rename(path.with_name(f"{name}.torn"))
        return None

    def at(self, step: int) -> Path:
        """Return the checkpoint of an earlier step.

        Raises:
            TrainingError: it was not kept.
        """
        path = self.folder / f"{step:08d}"
        if not path.is_dir():
            steps = ", ".join(str(int(path.name)) for path in self._paths())
            raise TrainingError(f"{self.folder} is past step {step} and kept no checkpoint of it; it has {steps}")
        return path

    def save(self, training: Training, record: Record, dtype: torch.dtype, write_result: WriteResult) -> None:
        """Start to write `<step>/`, with the weights for use in `dtype`, after the checkpoint before is written.

        Training may continue as soon as this returns.

        Raises:
            OSError: the checkpoint before could not be written.
        """
        self.wait()
        path = self.folder / f"{training.step:08d}"
        partial = path.with_name(f"{PARTIAL}{path.name}")
        result = {}  # copies in the first process's memory
        for name, tensor in training.result.items():
            full = whole(tensor)  # all processes take part
            if self.world.is_first:
                result[name] = full.to("cpu", dtype_of(training.transformer, name, dtype), copy=True)
        saved: Any = dcp.async_save(
            training.tensors(),
            storage_writer=HuggingFaceStorageWriter(str(partial / STATE), save_distributed=True),
            process_group=self.world.files,
        )

        def finish() -> None:
            # Processes exchange their errors and fail together: one that succeeded alone would wait forever.
            try:
                saved.result()
            except CheckpointException as error:  # not a subclass of Exception
                self._give_up(partial)
                raise OSError(f"{partial} could not be written: {_reasons(error)}") from error
            shares = self.world.all_gather(self._read_share(partial))
            problem = "; ".join(share for share in shares if isinstance(share, str))
            state = {name: facts for share in shares if isinstance(share, dict) for name, facts in share.items()}
            if not problem:
                problem = self.world.broadcast(
                    lambda: self._complete(partial, path, record, state, write_result, result)
                )
            if problem:
                self._give_up(partial)
                raise OSError(problem)

        self._pending = self._writer.submit(finish)

    def wait(self) -> None:
        """Wait until the checkpoint that was started is written, and every process knows it.

        Raises:
            OSError: it could not be written.
        """
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def raise_if_failed(self) -> None:
        """Raise the error of a checkpoint that failed, so that training does not continue for hours on a full disk.

        Raises:
            OSError: it could not be written.
        """
        if self._pending is not None and self._pending.done():
            self._pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Finish the checkpoint that was started, however the training ended."""
        if kind is None:
            self.wait()
        elif self._pending is not None and not self._pending.done():
            log.warning("the training ended with %s; finishing the checkpoint that was started", kind.__name__)
            try:
                self._pending.result(timeout=FINISH_SECONDS)
            except (OSError, RuntimeError, TimeoutError) as failure:  # RuntimeError: the other processes are gone
                log.warning("the checkpoint could not be finished: %s", first_line(failure))

    def restore(self, checkpoint: Checkpoint, training: Training) -> None:
        """Bring `training` to the state that was saved, on any number of processes.

        Raises:
            TrainingError: the saved state is of another kind of run.
        """
        try:
            reader = HuggingFaceStorageReader(str(checkpoint.path / STATE))
            dcp.load(training.tensors(), storage_reader=reader, process_group=self.world.files)
        except CheckpointException as error:
            raise TrainingError(f"{checkpoint.path} cannot be resumed: {_reasons(error)}") from error
        training.step, training.skipped = checkpoint.step, checkpoint.record["skipped"]

    def _give_up(self, partial: Path) -> None:
        """Remove what was written of a checkpoint: a full disk has little room for the rest of the run."""
        if self.world.is_first:
            with suppress(OSError):  # the next run removes it
                remove(partial)

    def _read_share(self, folder: Path) -> FileFacts | str:
        """Return the facts of this process's share of the state's files, or the reason why they cannot be read."""
        try:
            files = sorted((folder / STATE).iterdir())[self.world.rank :: self.world.size]
            return {str(file.relative_to(folder)): _facts(file) for file in files}
        except OSError as error:
            return f"{folder} cannot be read back: {error}"

    def _complete(
        self,
        partial: Path,
        path: Path,
        record: Record,
        state: FileFacts,
        write_result: WriteResult,
        result: Mapping[str, Tensor],
    ) -> str:
        """Add the weights for use and the record, name the folder, and remove old checkpoints.

        Returns:
            The reason why that failed, or "".
        """
        try:
            write_result(partial, result)
            others = {str(f.relative_to(partial)): _facts(f) for f in _files(partial) if f.parent.name != STATE}
            whole_record = {**record, "files": {**state, **others}}
            write_json(partial / RECORD, {**whole_record, "sha256": own_digest(whole_record)})
            publish(partial, path)
            self._point(LAST, path.name)
            best = self._point_best()
            for old in self._paths()[: -self.keep]:
                if old.name == best:
                    continue
                removed = old.with_name(f"{PARTIAL}old-{old.name}")  # so that a kill leaves no part of it by its name
                old.rename(removed)
                remove(removed)
        except (OSError, PusaError, SafetensorError) as error:  # SafetensorError: a full disk, for one
            return f"{path} could not be written: {error}"
        return ""

    def _point_best(self) -> str | None:
        """Point `best` at the checkpoint that was measured best, and return its name; None where there is none.

        Where none was measured with the present settings, or the manifest asks for none any more, `best` stays.
        """
        link = self.folder / BEST
        best = self.find_best([int(path.name) for path in self._paths()]) if self.find_best else None
        if best is None:
            return os.readlink(link) if link.is_symlink() else None
        self._point(BEST, f"{best:08d}")
        return f"{best:08d}"

    def _point(self, link: str, name: str) -> None:
        """Point a link at a checkpoint. On a disk without links (FAT, some network disks) there are none."""
        try:
            set_link(self.folder / link, name)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            log.warning("%s cannot be a link on this disk; name the checkpoint itself, %s", self.folder / link, name)

    def _set_copy_aside(self, link: Path) -> None:
        """Free the name of a link, where a copy of the run has a folder in place of it.

        If it is the copy of a checkpoint that is not here under its own name, it gets that name.
        """
        if link.is_symlink() or not link.exists():
            return
        step = read_object(link / RECORD).get("step")
        own = self.folder / f"{step:08d}" if type(step) is int and 0 <= step < 10**8 else None
        place = link.with_name(f"{link.name}{COPIED}") if own is None or os.path.lexists(own) else own
        log.warning("%s is a copy instead of a link; renamed it to %s", link, place.name)
        remove(place)
        link.rename(place)

    def _paths(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if re.fullmatch(r"\d{8}", path.name))

    def _find_damage(self, path: Path) -> str:
        """Describe the damage of a checkpoint, or return "". Each process hashes a share of its files."""
        if problem := self.world.broadcast(lambda: find_missing(path)):
            return problem
        files = read_object(path / RECORD)["files"]
        share = sorted(files)[self.world.rank :: self.world.size]
        differing = [name for name in share if sha256_file(path / name) != files[name][1]]
        damaged = [name for names in self.world.all_gather(differing) for name in names]
        return f"{', '.join(damaged)} not as written" if damaged else ""


def find_missing(path: Path) -> str:
    """Describe the damage of a checkpoint that its record, or names and sizes of its files show, or return ""."""
    content = read_json(path / RECORD)
    try:
        record = _Record.model_validate(content)
    except ValidationError:
        return f"its {RECORD} is missing or torn"
    if record.sha256 is not None and record.sha256 != own_digest(content):
        return f"its {RECORD} is not as written"
    if record.step != int(path.name):
        return f"its {RECORD} is that of step {record.step}"
    files = record.files
    sizes = {str(file.relative_to(path)): file.stat().st_size for file in _files(path)}
    wrong = [name for name, (size, _) in files.items() if sizes.get(name) != size]
    # Any other file in the state's folder would be loaded too.
    wrong += [name for name in sizes if Path(name).parent.name == STATE and name not in files]
    return f"{', '.join(wrong)} missing, of another size, or not part of it" if wrong else ""


def _facts(file: Path) -> tuple[int, str]:
    return file.stat().st_size, sha256_file(file)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _reasons(error: CheckpointException) -> str:
    return "; ".join(sorted({first_line(failure) for failure, _ in error.failures.values()}))
