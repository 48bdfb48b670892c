"""Read a latents table as tensors: any rows in any order, with one random read for each.

Shapes: B rows, C channels, F latent frames, h, w latent height and width, L text tokens.
"""

import os
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Generator, Tensor

from pusa.data.encoding import unpack
from pusa.data.reader import Shard, Table
from pusa.diffusion.latent_spaces import LATENT_SPACES, LatentSpace
from pusa.errors import TableError

COLUMNS = ("clip_id", "bucket", "latents_shard", "latents_row", "texts_shard", "texts_row")
ARRAY = ("dtype", "encoding", "latent_shape")
OPEN_SHARDS = 64  # open at a time: each is mapped, and its metadata is in memory


class Latents:
    """The rows of a latents table, for a transformer that works in latent space `space`.

    Only the catalogue is in memory. An instance may be sent to other processes: each opens the shards itself.

    Raises:
        TableError: the latents are not in the VAE's own space, or the table is damaged.
    """

    def __init__(self, table: Table, space: str = "dit") -> None:
        if (stored := table.fact("stored_space")) != "vae":
            raise TableError(f"{table.folder} holds latents in space {stored!r}; expected 'vae'")
        self.table = table
        self._rows = table.read("rows", COLUMNS).combine_chunks()
        self._places = {name: self._rows[name].to_numpy() for name in COLUMNS[2:]}
        self._checked = bytearray(len(self))  # whether the checksum of a row was verified already
        try:
            self.text_tokens, self.text_width = int(table.fact("text_tokens")), int(table.fact("text_width"))
            mean, std = (torch.tensor(value).view(-1, 1, 1, 1) for value in table.fact("statistics"))
        except (TypeError, ValueError, RuntimeError) as error:
            raise TableError(f"{table.folder} has invalid facts in its index: {error}; run its stage again") from error
        self.space = LATENT_SPACES[space](mean, std)

    def __len__(self) -> int:
        return self._rows.num_rows

    @cached_property
    def buckets(self) -> dict[str, list[int]]:
        """The rows of each bucket (WIDTHxHEIGHTxFRAMES)."""
        names = self._rows["bucket"].combine_chunks().dictionary_encode()
        indices = names.indices.to_numpy()
        return {name: (indices == code).nonzero()[0].tolist() for code, name in enumerate(names.dictionary.to_pylist())}

    def clip_ids(self, indices: Sequence[int]) -> list[str]:
        """Return the clip ids of rows."""
        return [self._rows["clip_id"][int(index)].as_py() for index in indices]

    def posterior(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of rows, each (B, C, F, h, w) fp32, in the VAE's space.

        Raises:
            TableError: the rows have more than one shape, or a shard is missing or damaged.
        """
        pairs = [self._pair(index) for index in indices]
        shapes = {tuple(mean.shape) for mean, _ in pairs}
        if len(shapes) != 1:
            raise TableError(f"{self.table.folder}: rows {list(indices)} mix the shapes {sorted(shapes)} in one batch")
        means, logvars = zip(*pairs, strict=True)
        return torch.stack(means).float(), torch.stack(logvars).float()

    def text(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return text features (B, L, width) fp32, padded with zeros, and the mask of valid tokens (B, L).

        Raises:
            TableError: a shard is missing or damaged.
        """
        features = torch.zeros(len(indices), self.text_tokens, self.text_width)
        mask = torch.zeros(len(indices), self.text_tokens, dtype=torch.bool)
        for i, index in enumerate(indices):
            stored, tokens = self._text(index)
            features[i, : len(stored)] = stored
            mask[i, :tokens] = True
        return features, mask

    def _pair(self, index: int) -> tuple[Tensor, Tensor]:
        """Read mean and log-variance of one row in their stored dtype."""
        shard, row = self._shard("latents", index)
        names = ("latent_mean", "latent_logvar")
        if shard.facts["encoding"] == "raw":
            facts = shard.row(row, ARRAY)
            data = [shard.map_value(row, name, check=not self._checked[index]) for name in names]
            self._checked[index] = True
        else:
            facts = shard.row(row, (*ARRAY, *names))
            data = [facts[name] for name in names]
        mean, logvar = (unpack(part, facts["dtype"], facts["latent_shape"], facts["encoding"]) for part in data)
        return mean, logvar

    def _text(self, index: int) -> tuple[Tensor, int]:
        """Read the stored features (l, width) of one row, and the number of valid tokens."""
        shard, row = self._shard("texts", index)
        facts = shard.row(row, ("dtype", "encoding", "text_shape", "tokens", "text"))
        return unpack(facts["text"], facts["dtype"], facts["text_shape"], facts["encoding"]), facts["tokens"]

    def _shard(self, part: str, index: int) -> tuple[Shard, int]:
        """Return the open shard of a part that holds a row of the catalogue, and the row's number in it."""
        entry = self.table.parts[part][self._places[f"{part}_shard"][index]]
        shard = _open(self.table.folder / entry["name"], entry["mtime_ns"], os.getpid())
        return shard, int(self._places[f"{part}_row"][index])


def sample_posterior(mean: Tensor, logvar: Tensor, space: LatentSpace, generator: Generator) -> Tensor:
    """Sample the posterior (B, C, F, h, w), given in the VAE's space; return the sample in the transformer's space."""
    noise = torch.randn(mean.shape, generator=generator)
    return space.enter(mean + (0.5 * logvar).exp() * noise)


@lru_cache(maxsize=OPEN_SHARDS)
def _open(path: Path, mtime_ns: int, process: int) -> Shard:
    """Open a shard: again if the file was made again, and in each process, since forks must not share open files."""
    return Shard(path)
