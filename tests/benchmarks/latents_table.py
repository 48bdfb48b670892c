"""Measure size and reading speed of a latents table at 848x480, 163 frames, and of published pairs and webdataset.

The latents are made by the tiny VAE from a video (drawn, or --video), with other statistics than Mochi's, or are normal
noise, which is the worst case: only its exponents repeat. Text features are 256 x 4096, with 77 valid tokens.

    .venv/bin/python tests/benchmarks/latents_table.py [--video FILE] [--rows 24] [--rounds 5]

webdataset is left out if it is not installed (pip install webdataset).
"""

import argparse
import io
import os
import random
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import torch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from pusa.backbones import find_family  # noqa: E402
from pusa.data.encoding import ENCODINGS, pack, unpack  # noqa: E402
from pusa.data.latents import Latents, _open  # noqa: E402
from pusa.data.reader import Table  # noqa: E402
from pusa.data.schema import TEXTS, latents_schema  # noqa: E402
from pusa.data.writer import write_hashed_shard  # noqa: E402
from pusa.precompute.encode import latents_row, text_row  # noqa: E402
from pusa.precompute.rows import plan_rows  # noqa: E402
from pusa.precompute.shards import Store  # noqa: E402
from pusa.precompute.table import write_table  # noqa: E402
from tests.helpers.synthetic_tables import FINGERPRINTS, clips  # noqa: E402

SHAPE, TOKENS, WIDTH, VALID = (12, 28, 60, 106), 256, 4096, 77
MIB = 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", type=Path, help="a video of at least 163 frames; default: a drawn one")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(2)
    rows_by_name = {"normal noise": noise(), "tiny VAE of a video": encoded(options.video)}
    sizes(rows_by_name)
    with tempfile.TemporaryDirectory() as folder:
        speeds(rows_by_name["tiny VAE of a video"], Path(folder), options.rows, options.rounds)


def noise():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(SHAPE, generator=generator)
    logvar = torch.randn(SHAPE, generator=generator) - 9
    text = torch.randn(VALID, WIDTH, generator=generator) * 0.2
    return mean.bfloat16(), logvar.bfloat16(), text.bfloat16()


def encoded(video):
    from pusa.manifest.models import ModelSpec
    from pusa.video.fit import fit_frames
    from pusa.video.media import read_frames
    from pusa.weights.model import Model

    frames = fit_frames(read_frames(video, range(163)) if video else drawn_video(), 848, 480)
    mean, logvar = Model(ModelSpec(weights="builtin:tiny")).posterior(frames[None])
    return mean[0].bfloat16(), logvar[0].bfloat16(), noise()[2]


def drawn_video():
    from pusa.tiny.shapes import draw, random_scene

    return draw(random_scene(0), size=512, num_frames=163)


def pair_files(mean, logvar, text):
    """Return the bytes of the published .latent.pt and .embed.pt."""
    features = torch.zeros(1, TOKENS, WIDTH)
    features[0, : len(text)] = text.float()
    mask = (torch.arange(TOKENS) < len(text))[None]
    files = []
    for value in ({"mean": mean[None], "logvar": logvar[None]}, {"y_feat": [features], "y_mask": [mask]}):
        file = io.BytesIO()
        torch.save(value, file)
        files.append(file.getvalue())
    return files


def sizes(rows_by_name):
    """Print for each layout of a row: MiB, the ratio to the published pair, and the time to decode its tensors."""
    print("a row                                   MiB   of the pair   decode, ms (median of 9)")
    for name, tensors in rows_by_name.items():
        pair = sum(map(len, pair_files(*tensors)))
        print(f"{name}: published pair           {pair / MIB:6.2f}")
        ways = [("raw", None, None), ("raw", "zstd", 3), ("raw", "lz4", None)]
        ways += [
            ("planes", "lz4", None),
            *(("planes", "zstd", level) for level in (1, 3, 9)),
            ("planes", "brotli", None),
        ]
        for encoding, codec, level in ways:
            total, milliseconds = laid_out(tensors, encoding, codec, level)
            label = f"{encoding} {codec or ''} {level or ''}"
            print(f"  {label:<36} {total / MIB:6.2f} {total / pair:10.3f} {milliseconds:12.1f}")


def laid_out(tensors, encoding, codec, level):
    codec = pa.Codec(codec, compression_level=level) if codec else None
    packed = [pack(tensor, "bfloat16", encoding) for tensor in tensors]
    stored = [codec.compress(data, asbytes=True) if codec else data for data in packed]
    times = []
    for _ in range(9):
        start = time.perf_counter()
        for data, plain, tensor in zip(stored, packed, tensors, strict=True):
            again = codec.decompress(data, decompressed_size=len(plain), asbytes=True) if codec else data
            unpack(memoryview(bytearray(again) if codec is None else again), "bfloat16", tensor.shape, encoding)
        times.append(time.perf_counter() - start)
    return sum(map(len, stored)), 1000 * statistics.median(times)


def speeds(tensors, folder, rows, rounds):
    """Print rows a second of each reader, all rows in random order, as fp32 tensors; from memory and from disk."""
    table_of(tensors, folder / "zstd", rows, "zstd")
    table_of(tensors, folder / "none", rows, "none")
    for i in range(rows):
        latent, embed = pair_files(*tensors)
        (folder / f"{i}.latent.pt").write_bytes(latent)
        (folder / f"{i}.embed.pt").write_bytes(embed)
    compressed, plain = Latents(Table.open(folder / "zstd")), Latents(Table.open(folder / "none"))
    list(read_table(plain, range(rows)))  # the first epoch verifies checksums
    readers = {
        "torch.load of pairs": lambda order: load_pairs(folder, order),
        "latents table, zstd": lambda order: read_table(compressed, order),
        "latents table, none": lambda order: read_table(plain, order),
    }
    if (tar := tar_of(folder, rows)) is not None:
        readers["webdataset, in file order"] = lambda order: read_tar(tar)
    os.sync()
    for title, forget in (("files in memory", False), ("files on disk", True)):
        rates = {name: [] for name in readers}
        for round_ in range(rounds):
            for name, read in readers.items():
                rates[name].append(rate(read, random.Random(round_).sample(range(rows), rows), folder, forget))
        report(f"{rows} rows, {rounds} rounds, {title}", rates)


def rate(read, order, folder, forget):
    _open.cache_clear()
    for path in folder.rglob("*") if forget else ():
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    count = sum(1 for _ in read(order))
    assert count == len(order)
    return count / (time.perf_counter() - start)


def report(title, rates):
    base = statistics.median(rates["torch.load of pairs"])
    print(f"\n{title:<44} rows/s (range)        of torch.load")
    for name, measured in rates.items():
        middle = statistics.median(measured)
        print(f"{name:<44} {middle:6.1f} ({min(measured):.1f}-{max(measured):.1f}) {middle / base:12.2f}")


def table_of(tensors, folder, rows, compression):
    mean, logvar, text = tensors
    planned = plan_rows(clips({"848x480x163": rows}), "bfloat16", find_family(), FINGERPRINTS)
    encoding = ENCODINGS[compression]
    for segment in planned.segments(shard_rows=8):
        if segment.part == "texts":
            made = [text_row(key, "", text, VALID, "bfloat16", encoding) for key in segment.keys]
        else:
            clip = planned.clips.slice(0, 1).to_pylist()[0]
            made = [latents_row(key, clip, mean, logvar, 0, "bfloat16", encoding) for key in segment.keys]
        schema = TEXTS if segment.part == "texts" else latents_schema(len(made[0]["latent_mean"]))
        write_hashed_shard(folder, segment.name, made, schema, compression, facts_of(compression))
    store = Store(folder)
    store.refresh()
    facts = {"stored_space": "vae", "statistics": [[0.0] * 12, [1.0] * 12], "text_tokens": TOKENS, "text_width": WIDTH}
    write_table(folder, planned, store, [], facts)


def facts_of(compression):
    return {"encoding": ENCODINGS[compression], "compression": compression, "dtype": "bfloat16"}


def read_table(latents, order):
    for row in order:
        yield *latents.posterior([row]), latents.text([row])


def load_pairs(folder, order):
    for row in order:
        latent = torch.load(folder / f"{row}.latent.pt", weights_only=True)
        embed = torch.load(folder / f"{row}.embed.pt", weights_only=True)
        yield latent["mean"].float(), latent["logvar"].float(), embed["y_feat"][0], embed["y_mask"][0]


def tar_of(folder, rows):
    try:
        import webdataset  # noqa: F401
    except ImportError:
        return None
    with tarfile.open(folder / "rows.tar", "w") as tar:
        for i in range(rows):
            for kind in ("latent", "embed"):
                tar.add(folder / f"{i}.{kind}.pt", f"{i}.{kind}.pth")
    return folder / "rows.tar"


def read_tar(tar):
    import webdataset

    def decode(key, data):
        return torch.load(io.BytesIO(data), weights_only=True) if key.endswith(".pth") else None

    for item in webdataset.WebDataset(str(tar), shardshuffle=False).decode(decode):
        latent, embed = item["latent.pth"], item["embed.pth"]
        yield latent["mean"].float(), latent["logvar"].float(), embed["y_feat"][0], embed["y_mask"][0]


if __name__ == "__main__":
    main()
