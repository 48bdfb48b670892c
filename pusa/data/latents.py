"""A latents table as tensors: any rows, in any order, one random read each.

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
OPEN_SHARDS = 64  # each is mapped, and its metadata kept


class Latents:
    """The rows of a latents table, for a transformer that works in latent space `space`.

    The catalogue alone is in memory. An instance may be handed to other processes: each opens shards of its own.

    Raises:
        TableError: the latents are not in the VAE's own space, or the table is damaged.
    """

    def __init__(self, table: Table, space: str = "dit") -> None:
        if (stored := table.fact("stored_space")) != "vae":
            raise TableError(f"{table.folder} holds latents in space {stored!r}; wanted is 'vae'")
        self.table = table
        self._rows = table.read("rows", COLUMNS).combine_chunks()
        self._places = {name: self._rows[name].to_numpy() for name in COLUMNS[2:]}
        self._checked = bytearray(len(self))  # which rows were found to be as they were written
        try:
            self.text_tokens, self.text_width = int(table.fact("text_tokens")), int(table.fact("text_width"))
            mean, std = (torch.tensor(value).view(-1, 1, 1, 1) for value in table.fact("statistics"))
        except (TypeError, ValueError, RuntimeError) as error:
            raise TableError(f"{table.folder} says of itself what cannot be: {error}; run its stage again") from error
        self.space = LATENT_SPACES[space](mean, std)

    def __len__(self) -> int:
        return self._rows.num_rows

    @cached_property
    def buckets(self) -> dict[str, list[int]]:
        """The rows of each shape that clips have, by its name."""
        names = self._rows["bucket"].combine_chunks().dictionary_encode()
        indices = names.indices.to_numpy()
        return {name: (indices == code).nonzero()[0].tolist() for code, name in enumerate(names.dictionary.to_pylist())}

    def clip_ids(self, indices: Sequence[int]) -> list[str]:
        """The names of these rows' clips."""
        return [self._rows["clip_id"][int(index)].as_py() for index in indices]

    def posterior(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of these rows, each (B, C, F, h, w) fp32, in the VAE's space.

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
        """Text features (B, L, width) fp32, zero beyond what is stored, and the mask of valid tokens (B, L).

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
        """Mean and log-variance of one row, in the dtype they are stored in."""
        shard, row = self._shard("latents", index)
        names = ("latent_mean", "latent_logvar")
        if shard.facts["encoding"] == "raw":
            facts = shard.row(row, ARRAY)
            data = [shard.mapped(row, name, check=not self._checked[index]) for name in names]
            self._checked[index] = True
        else:
            facts = shard.row(row, (*ARRAY, *names))
            data = [facts[name] for name in names]
        mean, logvar = (unpack(part, facts["dtype"], facts["latent_shape"], facts["encoding"]) for part in data)
        return mean, logvar

    def _text(self, index: int) -> tuple[Tensor, int]:
        """Features (l, width) as they are stored, and how many tokens are valid."""
        shard, row = self._shard("texts", index)
        facts = shard.row(row, ("dtype", "encoding", "text_shape", "tokens", "text"))
        return unpack(facts["text"], facts["dtype"], facts["text_shape"], facts["encoding"]), facts["tokens"]

    def _shard(self, part: str, index: int) -> tuple[Shard, int]:
        number = self._places[f"{part}_shard"][index]
        entry = self.table.parts[part][number]
        return _open(self.table.folder / entry["name"], entry["mtime_ns"], os.getpid()), int(
            self._places[f"{part}_row"][index]
        )


def sample_posterior(mean: Tensor, logvar: Tensor, space: LatentSpace, generator: Generator) -> Tensor:
    """A sample of the posterior (B, C, F, h, w) in the VAE's space, in the transformer's."""
    noise = torch.randn(mean.shape, generator=generator)
    return space.enter(mean + (0.5 * logvar).exp() * noise)


@lru_cache(maxsize=OPEN_SHARDS)
def _open(path: Path, mtime_ns: int, process: int) -> Shard:
    """Another one where the file was made again, and for each process: none shares open files with its parent."""
    return Shard(path)
