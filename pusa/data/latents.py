"""Read a latents table as tensors: any rows in any order, with one random read for each.

Shapes: B rows, C channels, F latent frames, h, w latent height and width, L text tokens.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from pusa.data.encoding import DTYPES, ENCODINGS, unpack
from pusa.data.reader import Table
from pusa.data.schema import KEY_COLUMNS, PARTS
from pusa.data.shard import Shard, damage_of, read_columns
from pusa.diffusion.latent_spaces import LATENT_SPACES, LatentSpace
from pusa.diffusion.sampler import TextFeatures
from pusa.errors import TableError
from pusa.system.text import join_names, preview

PLACES = {part: (f"{part}_shard", f"{part}_row") for part in ("latents", "texts")}
COLUMNS = ("clip_id", "bucket", "key", "text_key", *PLACES["latents"], *PLACES["texts"])
ARRAY = ("key", "dtype", "encoding", "latent_shape")
TEXT = ("text_key", "dtype", "encoding", "text_shape", "tokens", "text", "pooled")
BUCKET = re.compile(r"[1-9]\d{0,5}x[1-9]\d{0,5}x[1-9]\d{0,5}", re.A)  # WIDTHxHEIGHTxFRAMES
OPEN_SHARDS = 64  # open at a time: each is mapped, and its metadata is in memory
MAX_LOGVAR = 2 * math.log(torch.finfo(torch.float32).max)  # the largest of which the deviation is finite
MAX_TEXT = 2**28  # values of a caption's features; more than any text encoder gives
StoredText = tuple[Tensor, int, Tensor | None]  # features (l, width), valid tokens, and pooled features (width,)


class Latents:
    """The rows of a latents table, for a transformer that works in latent space `space`.

    Only the catalogue is in memory. An instance may be sent to other processes: each opens the shards itself. Rows are
    those that the catalogue names when it is opened: each is compared with the key of what it was made from, and a
    shard that is changed or replaced in the meantime is noticed.

    Raises:
        TableError: the latents are not in the VAE's own space, or the table is damaged.
    """

    def __init__(self, table: Table, space: str = "dit") -> None:
        if (stored := table.fact("stored_space")) != "vae":
            raise TableError(f"{table.folder} holds latents in space {preview(stored)}; expected 'vae'")
        self.table = table
        self._rows = table.read("rows", COLUMNS).combine_chunks()
        self._places = {name: self._rows[name].to_numpy() for places in PLACES.values() for name in places}
        self._require_places()
        self._checked = bytearray(len(self))  # whether the checksum of a row was verified already
        try:
            self.text_tokens, self.text_width = int(table.fact("text_tokens")), int(table.fact("text_width"))
            pooled = table.facts.get("pooled_width")  # tables of other families and of earlier versions lack it
            self.pooled_width = None if pooled is None else int(pooled)
            mean, std = (torch.tensor(value).view(-1, 1, 1, 1) for value in table.fact("statistics"))
            if min(self.text_tokens, self.text_width) < 1 or self.text_tokens * self.text_width > MAX_TEXT:
                raise ValueError(f"text features of {self.text_tokens} tokens and width {self.text_width}")
            if self.pooled_width is not None and not 1 <= self.pooled_width <= MAX_TEXT:
                raise ValueError(f"pooled text features of width {self.pooled_width}")
            if mean.shape != std.shape or not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
                raise ValueError("statistics are not a finite mean and a positive deviation for each channel")
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TableError(f"{table.folder} has invalid facts in its index: {error}; run its stage again") from error
        self.space = LATENT_SPACES[space](mean, std)

    def _require_places(self) -> None:
        """Check that all rows are in shards that the index lists.

        Raises:
            TableError: they are not.
        """
        for part, (shard_column, row_column) in PLACES.items():
            shards, rows = self._places[shard_column], self._places[row_column]
            counts = np.array([entry["rows"] for entry in self.table.shards(part)], np.int64)
            known = (shards >= 0) & (shards < len(counts)) & (rows >= 0)
            if not known.all() or (len(rows) and (rows >= counts[shards]).any()):
                raise TableError(
                    f"{self.table.folder}: rows name {part} that the index does not list; run its stage again"
                )

    def __len__(self) -> int:
        return self._rows.num_rows

    @cached_property
    def buckets(self) -> dict[str, list[int]]:
        """The rows of each bucket (WIDTHxHEIGHTxFRAMES).

        Raises:
            TableError: a bucket is not of this form.
        """
        names = self._rows["bucket"].combine_chunks().dictionary_encode()
        for name in names.dictionary.to_pylist():
            if not BUCKET.fullmatch(name):
                raise TableError(f"{self.table.folder} has a bucket {preview(name)}; expected WIDTHxHEIGHTxFRAMES")
        indices = names.indices.to_numpy()
        return {name: (indices == code).nonzero()[0].tolist() for code, name in enumerate(names.dictionary.to_pylist())}

    def clip_ids(self, indices: Sequence[int]) -> list[str]:
        """Return the clip ids of rows."""
        return [self._rows["clip_id"][int(index)].as_py() for index in indices]

    def posterior(self, indices: Sequence[int], finite: bool = True) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of rows, each (B, C, F, h, w) fp32, in the VAE's space.

        Args:
            indices: the rows.
            finite: refuse values that are not finite.

        Raises:
            TableError: the rows have more than one shape, are not finite, or a shard is missing, damaged or replaced.
        """
        pairs = [self._pair(index) for index in indices]
        shapes = {tuple(mean.shape) for mean, _ in pairs}
        if len(shapes) != 1:
            raise TableError(f"{self.table.folder}: rows {list(indices)} mix the shapes {sorted(shapes)} in one batch")
        mean, logvar = (torch.stack(arrays).float() for arrays in zip(*pairs, strict=True))
        if finite:
            names = self.clip_ids(indices)
            self._require_finite(names, "latents", mean)
            self._require_finite(names, "latents", logvar, MAX_LOGVAR)
        return mean, logvar

    def text(self, indices: Sequence[int]) -> TextFeatures:
        """Return the text features of rows in fp32, padded with zeros to (B, L, width).

        Raises:
            TableError: features are not finite or not those of the index, or a shard is missing, damaged or replaced.
        """
        return self._padded([self._text(index) for index in indices], self.clip_ids(indices))

    def null_text(self) -> TextFeatures:
        """Return the text features of the empty prompt (1, L, width), which every table has, as `text` does.

        Raises:
            TableError: they are missing; or as `text`.
        """
        null_key = self.table.fact("null_key")
        for entry in self.table.shards("texts"):
            path = self.table.folder / entry["name"]
            keys = read_columns(path, ["text_key"], PARTS["texts"], entry)["text_key"].to_pylist()
            if null_key in keys:
                stored = self._stored_text(self._open_shard(entry), keys.index(null_key), null_key)
                return self._padded([stored], ["the empty prompt"])
        raise TableError(f"{self.table.folder} has no features of the empty prompt; run its stage again")

    def _padded(self, texts: Sequence[StoredText], names: Sequence[str]) -> TextFeatures:
        features = torch.zeros(len(texts), self.text_tokens, self.text_width)
        mask = torch.zeros(len(texts), self.text_tokens, dtype=torch.bool)
        for i, (stored, tokens, _) in enumerate(texts):
            features[i, : len(stored)] = stored
            mask[i, :tokens] = True
        self._require_finite(names, "text features", features)
        if self.pooled_width is None:
            return TextFeatures(features, mask)
        pooled = torch.stack([pooled for *_, pooled in texts if pooled is not None]).float()
        self._require_finite(names, "pooled text features", pooled)
        return TextFeatures(features, mask, pooled)

    def _require_finite(
        self, names: Sequence[str], what: str, array: Tensor, largest: float = torch.finfo(torch.float32).max
    ) -> None:
        """Refuse rows, which have these names, with values that are NaN, infinite, or larger than `largest`."""
        low_B, high_B = array.flatten(1).aminmax(dim=1)  # NaN if any is; several times as fast as `isfinite`
        good_B = (low_B >= -torch.finfo(torch.float32).max) & (high_B <= largest)
        if not good_B.all():
            bad = [name for name, good in zip(names, good_B, strict=True) if not good]
            raise TableError(
                f"{self.table.folder}: the {what} of {join_names(bad)} are not finite; remove their shards, then run "
                "the stage that made the table again"
            )

    def _pair(self, index: int) -> tuple[Tensor, Tensor]:
        """Read mean and log-variance of one row in their stored dtype."""
        shard, row = self._shard("latents", index)
        names = ("latent_mean", "latent_logvar")
        if shard.facts.get("encoding") == "raw":
            facts = shard.row(row, ARRAY)
            data = [shard.map_value(row, name, check=not self._checked[index]) for name in names]
        else:
            facts = shard.row(row, (*ARRAY, *names))
            data = [facts[name] for name in names]
        self._require_key(shard, facts, "latents", self._rows["key"][int(index)].as_py())
        mean, logvar = (_unpack(shard, part, facts, facts["latent_shape"], len(self.space.mean)) for part in data)
        self._checked[index] = True
        return mean, logvar

    def _text(self, index: int) -> StoredText:
        return self._stored_text(*self._shard("texts", index), self._rows["text_key"][int(index)].as_py())

    def _stored_text(self, shard: Shard, row: int, key: str) -> StoredText:
        """Read the text of a row of a shard, which must have this key."""
        facts = shard.row(row, TEXT)
        self._require_key(shard, facts, "texts", key)
        features = _unpack(shard, facts["text"], facts, facts["text_shape"])
        length, width = features.shape
        if length > self.text_tokens or width != self.text_width or not 0 <= facts["tokens"] <= length:
            raise TableError(
                f"{shard.path}: row {row} has {facts['tokens']} tokens in features {length}x{width}; the index says "
                f"{self.text_tokens}x{self.text_width}; run the stage that made the table again"
            )
        with damage_of(shard.path):
            pooled = facts["pooled"]
            found = None if pooled is None else len(pooled) / DTYPES[facts["dtype"]].itemsize
            if found != self.pooled_width:
                has = f"{found:g}" if found else "no"
                raise TableError(
                    f"{shard.path}: row {row} has {has} pooled text features; the index says "
                    f"{self.pooled_width or 'none'}; run the stage that made the table again"
                )
            pooled = None if pooled is None else unpack(pooled, facts["dtype"], (-1,), facts["encoding"])
        return features, facts["tokens"], pooled

    def _require_key(self, shard: Shard, facts: Mapping[str, Any], part: str, key: str) -> None:
        """Refuse a row that was made from something else than the catalogue says."""
        if facts[KEY_COLUMNS[part]] != key:
            raise TableError(
                f"{shard.path} does not hold the rows that {self.table.folder} lists: another run may have written it; "
                "run the stage that made the table again"
            )

    def _shard(self, part: str, index: int) -> tuple[Shard, int]:
        """Return the open shard of a part that holds a row of the catalogue, and the row's number in it."""
        shard_column, row_column = PLACES[part]
        entry = self.table.parts[part][self._places[shard_column][index]]
        return self._open_shard(entry), int(self._places[row_column][index])

    def _open_shard(self, entry: Mapping[str, Any]) -> Shard:
        shard = _open(self.table.folder / entry["name"], tuple(entry.items()), os.getpid())
        shard.require_unchanged()
        return shard


def _unpack(
    shard: Shard, data: memoryview, facts: Mapping[str, Any], shape: Sequence[int], channels: int = 0
) -> Tensor:
    """Return stored values as a tensor: text features (l, width), or latents (C, F, h, w) if `channels` is given."""
    with damage_of(shard.path):
        if facts["dtype"] not in DTYPES or facts["encoding"] not in ENCODINGS.values():
            raise ValueError(f"dtype {preview(facts['dtype'])}, encoding {preview(facts['encoding'])}")
        size = math.prod(shape) * DTYPES[facts["dtype"]].itemsize
        if len(shape) != (4 if channels else 2) or min(shape) < 1 or size != len(data):
            raise ValueError(f"{len(data)} bytes of {facts['dtype']} are not an array {preview(list(shape))}")
        if channels and shape[0] != channels:
            raise ValueError(f"latents of {shape[0]} channels; the index has statistics of {channels}")
        return unpack(data, facts["dtype"], shape, facts["encoding"])


def sample_posterior(mean: Tensor, logvar: Tensor, space: LatentSpace, generator: Generator) -> Tensor:
    """Sample the posterior (B, C, F, h, w), given in the VAE's space; return the sample in the transformer's space."""
    noise = torch.randn(mean.shape, generator=generator)
    return space.enter(mean + (0.5 * logvar).exp() * noise)


@lru_cache(maxsize=OPEN_SHARDS)
def _open(path: Path, entry: tuple[tuple[str, Any], ...], process: int) -> Shard:
    """Open a shard: again for another index, and in each process, since forks must not share open files."""
    return Shard(path, dict(entry))
