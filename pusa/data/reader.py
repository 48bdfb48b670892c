"""Read tables: refuse what is not whole, then hand out rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pusa.data.schema import VERSION
from pusa.data.writer import INDEX
from pusa.errors import TableError
from pusa.files import digest, read_json
from pusa.latent_spaces import LATENT_SPACES


@dataclass(frozen=True)
class Table:
    """A complete table: a folder whose index names every shard."""

    folder: Path
    parts: dict[str, list[dict[str, Any]]]
    facts: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "Table":
        """Read the index.

        Raises:
            TableError: there is no index (the stage before was not run to its end), or it has another version.
        """
        index = read_json(folder / INDEX)
        if index is None:
            raise TableError(f"{folder} has no {INDEX}: the stage that writes this table has not finished")
        if index.get("version") != VERSION:
            raise TableError(f"{folder} has schema version {index.get('version')!r}; this Pusa reads {VERSION}")
        return cls(folder, index["parts"], index["facts"])

    def rows(self, part: str) -> int:
        """How many rows a part has."""
        return sum(shard["rows"] for shard in self.parts[part])

    def read(self, part: str) -> pa.Table:
        """A whole part, in memory.

        Raises:
            TableError: a shard is missing, damaged (its pages carry checksums), or has other rows than the index says.
        """
        return pa.concat_tables([self._shard(shard) for shard in self.parts[part]])

    @property
    def fingerprint(self) -> str:
        """The hash of the shards' hashes."""
        return digest(self.parts)[:16]

    def is_whole(self) -> bool:
        """Whether every shard is there with the bytes the index says."""
        shards = [shard for part in self.parts.values() for shard in part]
        paths = [self.folder / shard["name"] for shard in shards]
        return all(p.is_file() and p.stat().st_size == shard["bytes"] for p, shard in zip(paths, shards, strict=True))

    def _shard(self, shard: dict[str, Any]) -> pa.Table:
        path = self.folder / shard["name"]
        try:
            table = pq.read_table(path, page_checksum_verification=True)
        except (OSError, pa.ArrowInvalid) as error:
            raise TableError(f"{path} cannot be read: {error}") from error
        if table.num_rows != shard["rows"]:
            raise TableError(f"{path} has {table.num_rows} rows; the index says {shard['rows']}")
        return table


class Latents:
    """The rows of a latents table as tensors, for a transformer that works in latent space `space`.

    Raises:
        TableError: the latents are not in the VAE's own space.
    """

    def __init__(self, table: Table, space: str = "dit") -> None:
        self.table = table
        self._rows = table.read("latents")
        self.text_tokens = int(table.facts["text_tokens"])
        if table.facts["stored_space"] != "vae":
            raise TableError(f"{table.folder} holds latents in space {table.facts['stored_space']!r}; wanted is 'vae'")
        mean, std = (torch.tensor(value).view(-1, 1, 1, 1) for value in table.facts["statistics"])
        self.space = LATENT_SPACES[space](mean, std)

    def __len__(self) -> int:
        return self._rows.num_rows

    def draw(self, indices: Sequence[int], generator: torch.Generator) -> Tensor:
        """A fresh sample of each row's posterior, (B, C, F, h, w) fp32, in the transformer's space."""
        mean, logvar = self.posterior(indices)
        noise = torch.randn(mean.shape, generator=generator)
        return self.space.enter(mean + (0.5 * logvar).exp() * noise)

    def clip_ids(self, indices: Sequence[int]) -> list[str]:
        """The names of these rows' clips."""
        return [row["clip_id"] for row in self._take(indices, "clip_id")]

    def posterior(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of these rows, each (B, C, F, h, w) fp32, in the VAE's space.

        Raises:
            TableError: the rows have more than one shape.
        """
        rows = self._take(indices, "dtype", "latent_shape", "latent_mean", "latent_logvar")
        shapes = {tuple(row["latent_shape"]) for row in rows}
        if len(shapes) != 1:
            raise TableError(f"{self.table.folder}: rows {list(indices)} mix the shapes {sorted(shapes)} in one batch")
        mean, logvar = (
            torch.stack([_tensor(row[name], row["dtype"], row["latent_shape"]) for row in rows])
            for name in ("latent_mean", "latent_logvar")
        )
        return mean, logvar

    def text(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Text features (B, L, width) fp32, zero beyond the valid tokens, and the mask (B, L)."""
        rows = self._take(indices, "dtype", "text_shape", "text")
        features = torch.zeros(len(rows), self.text_tokens, rows[0]["text_shape"][1])
        mask = torch.zeros(len(rows), self.text_tokens, dtype=torch.bool)
        for sample, row in enumerate(rows):
            valid = _tensor(row["text"], row["dtype"], row["text_shape"])
            features[sample, : len(valid)] = valid
            mask[sample, : len(valid)] = True
        return features, mask

    def _take(self, indices: Sequence[int], *columns: str) -> list[dict[str, Any]]:
        # Not pyarrow's take(): it joins a column's chunks first, and binary columns end at 2 GiB.
        rows = self._rows.select(columns)
        return [rows.slice(index, 1).to_pylist()[0] for index in indices]


def to_bytes(array: Tensor, dtype: str) -> bytes:
    """What a latents table stores for a tensor."""
    return array.cpu().numpy().astype(np.dtype(dtype).newbyteorder("<")).tobytes()


def _tensor(data: bytes, dtype: str, shape: Sequence[int]) -> Tensor:
    array = np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).reshape(shape)
    return torch.from_numpy(array.astype(np.float32))
