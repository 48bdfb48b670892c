"""Encode each prompt, picture and clip once: what the encoders make of them is kept by content, for all jobs and runs.

The files lie in a folder of the user alone, one for each prompt or input. Its name is a hash of everything that decides
the encoding: the content, the weights, the dtype, and the kind of device. A file that is damaged is made again.
"""

import logging
import os
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pusa.diffusion.sampler import TextFeatures
from pusa.errors import MediaError
from pusa.generate.conditions import PixelInput, open_input
from pusa.generate.latents import read_verified, save_verified
from pusa.system.files import PARTIAL, State, digest, sha256_file, state_of
from pusa.system.text import printable
from pusa.tasks.base import Condition, Job
from pusa.weights.load import is_finite
from pusa.weights.model import Model

log = logging.getLogger(__name__)
VERSION = 1  # part of each key; raise it when the same content comes to have another encoding
FOLDER, SUFFIX = "encodings", ".safetensors"
LARGEST_FOLDER = 20 << 30  # bytes, after `prune`
SECONDS_IN_USE = 3600.0  # a file that was used so recently is not removed
MEMORY = 1 << 30  # bytes of encodings that a process keeps in memory

Tensors = dict[str, Tensor]


class FileHashes(Protocol):
    """The hashes of input files, as the ledger keeps them."""

    def hash_of(self, path: Path) -> str:
        """Return the hash of a file.

        Raises:
            MediaError: it cannot be read.
        """


def encodings_folder() -> Path | None:
    """Return where encodings are kept: in `$PUSA_CACHE`, else in `pusa` in the user's cache folder.

    None if `PUSA_CACHE` is empty, which switches it off, or the user has no home.
    """
    if (own := os.environ.get("PUSA_CACHE")) is not None:
        return Path(own).absolute() / FOLDER if own else None
    shared = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "pusa" / FOLDER
    except RuntimeError:  # no home
        return None


class Encodings:
    """The encodings of prompts and inputs with the encoders of a model.

    Args:
        model: the model.
        folder: keeps them; many processes may use it at once. None keeps them in memory only, and so does a folder that
            cannot be used or that others may write.
    """

    def __init__(self, model: Model, folder: Path | None) -> None:
        self.model = model
        self._folder = folder
        if folder is not None and (problem := _find_problem(folder)):
            log.warning("encodings are kept in memory only: %s (PUSA_CACHE names another folder)", problem)
            self._folder = None
        self._memory: OrderedDict[str, Tensors] = OrderedDict()  # the last used at the end
        self._in_memory = 0  # bytes
        self._may_store = True

    def text(self, prompt: str) -> TextFeatures:
        """Return the features of one prompt (1, L, width), on the CPU. All blank prompts are the null prompt.

        A prompt is encoded alone: its features do not depend on the prompts beside it. They may not be finite.
        """
        prompt = prompt if prompt.strip() else ""

        def make() -> tuple[Tensors, bool]:
            text = self.model.encode_text([prompt])
            made = {"features": text.features.cpu(), "mask": text.mask.to("cpu", text.features.dtype)}
            return made if text.pooled is None else made | {"pooled": text.pooled.cpu()}, True

        made = self._get(self.model.dtype, ["text", self._text_weights, prompt], make)
        return TextFeatures(made["features"], made["mask"].bool(), made.get("pooled"))

    def given(self, condition: Condition, job: Job, hashes: FileHashes) -> Tensor:
        """Return the latents (C, F, h, w) of the source of a condition, on the CPU. They may not be finite.

        Raises:
            MediaError: a file cannot be read, or was changed while it was read.
            ConditionError: it does not fit the job.
        """
        paths = [path for path in (condition.source, condition.joined) if path is not None]
        before = [_look(path, hashes.hash_of) for path in paths]
        opened = open_input(condition, job, self.model.backbone.geometry)

        def make() -> tuple[Tensors, bool]:
            latents = opened.latents(self.model).cpu()
            for path, was in zip(paths, before, strict=True):
                # Two changes within a tick of the file system's clock leave the same times: hence the content as well.
                if _look(path, sha256_file) != was:
                    raise MediaError(f"{path} was changed while it was read; run again")
            # Tiles show slightly: only this process had so little memory.
            return {"latents": latents}, not self.model.encoding_tile(job.width, job.height)

        if not isinstance(opened, PixelInput):
            return make()[0]["latents"]
        known = {path: content for path, (_, content) in zip(paths, before, strict=True)}
        identity = opened.identity(known.__getitem__)
        return self.of_vae("input", identity, make)["latents"]

    def of_vae(self, kind: str, content: Any, make: Callable[[], tuple[Tensors, bool]]) -> Tensors:
        """Return what the VAE makes of some content, in the latent space in use, of its dtype and kind of device.

        Args:
            kind: what is made.
            content: identifies the content; JSON.
            make: makes it; also returns whether it may be kept for other runs.
        """
        dtype = self.model.dtype_of(self.model.backbone.family.vaes[0])
        return self._get(dtype, [kind, self._vae_weights, self.model.space_name, content], make)

    @cached_property
    def _text_weights(self) -> dict[str, str]:
        return self.model.fingerprints(*self.model.backbone.family.text_parts)

    @cached_property
    def _vae_weights(self) -> dict[str, str | int]:
        """Return what decides latents: the VAE's weights, and settings of it that are not part of them."""
        family = self.model.backbone.family
        return {**self.model.fingerprints(*family.vaes), **family.latent_settings}

    def _get(self, dtype: torch.dtype, content: Sequence[Any], make: Callable[[], tuple[Tensors, bool]]) -> Tensors:
        """Return the encoding of some content in a dtype of the encoder: from memory, from the folder, or made.

        `make` returns it, and whether it may be kept for other runs.
        """
        key = digest([VERSION, str(dtype), self.model.device.type, *content])
        if (found := self._memory.get(key)) is None and (found := self._load(key)) is None:
            found, lasting = make()
            if lasting and all(map(is_finite, found.values())):
                self._store(key, found)
        if key not in self._memory:
            self._memory[key] = found
            self._in_memory += _nbytes(found)
        self._memory.move_to_end(key)
        while len(self._memory) > 1 and self._in_memory > MEMORY:
            self._in_memory -= _nbytes(self._memory.popitem(last=False)[1])
        return found

    def _load(self, key: str) -> Tensors | None:
        if self._folder is None or not os.path.isfile(path := self._folder / f"{key}{SUFFIX}"):
            return None
        try:
            tensors, facts = read_verified(path)
            if facts.get("key") != key:
                raise MediaError(f"{path} was another file")
        except MediaError as error:
            log.warning("an encoding is made again: %s", error)
            return None
        with suppress(OSError):
            os.utime(path)  # `prune` removes those that were not used for the longest time
        return tensors

    def _store(self, key: str, tensors: Tensors) -> None:
        if self._folder is None or not self._may_store:
            return
        try:
            save_verified(self._folder / f"{key}{SUFFIX}", tensors, {"key": key})
        except OSError as error:  # a full disk: it costs time later, but nothing else
            self._may_store = False
            log.warning("encodings are kept in memory only from now on: %s", error)


def prune(folder: Path | None, largest: int = LARGEST_FOLDER, now: float | None = None) -> None:
    """Remove the encodings that were not used for the longest time, until the others have at most `largest` bytes.

    Those that were used in the last hour stay. Other processes may use the folder meanwhile.

    Args:
        folder: as for `Encodings`.
        largest: bytes.
        now: seconds since 1970; default: now.
    """
    if folder is None or not os.path.isdir(folder) or _find_problem(folder):
        return
    files = []
    for entry in os.scandir(folder):
        if entry.name.endswith(SUFFIX):  # unfinished files of killed processes, too
            with suppress(FileNotFoundError):
                facts = entry.stat(follow_symlinks=False)
                files.append((not entry.name.startswith(PARTIAL), facts.st_mtime, facts.st_size, entry.path))
    total, old = sum(size for _, _, size, _ in files), (time.time() if now is None else now) - SECONDS_IN_USE
    for finished, used, size, path in sorted(files):
        if used < old and (total > largest or not finished):
            with suppress(OSError):
                os.unlink(path)
                total -= size


def _find_problem(folder: Path) -> str:
    """Return why a folder, created if needed, cannot be used; "" if it is the user's and nobody else may write it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = os.lstat(folder)
    except OSError as error:
        return printable(error)
    if not stat.S_ISDIR(facts.st_mode):
        return f"{folder} is a link; expected a folder"
    if facts.st_uid != os.geteuid() or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{folder} belongs to somebody else, or others may write into it; expected a folder of mode 0700"
    return ""


def _nbytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _look(path: Path, hash_of: Callable[[Path], str]) -> tuple[State, str]:
    """Return the state and the hash of a file."""
    try:
        return state_of(path), hash_of(path)
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error.strerror}") from error
