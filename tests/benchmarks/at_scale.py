"""Measure catalogue, plan, index and loader at 100,000 clips of 163 frames, without videos and without models.

The ledger of ingest and the shards of precompute are filled with made-up rows by their own writers, as if a run had
been killed just before its end. Then the stages resume, and run again with nothing to do. Latents have as many frames
as Mochi's but one value a frame, so the shards are smaller than real ones.

Each phase runs in its own process, so that its peak memory is measured alone.

    .venv/bin/python tests/benchmarks/at_scale.py [--rows 100000] [--folder DIR]
"""

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
BUCKET = (848, 480, 163)
FACTS = {"encoding": "planes", "compression": "zstd", "dtype": "bfloat16"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--phase", choices=PHASES)
    options = parser.parse_args()
    if options.phase:
        return run(options.phase, options.rows, options.folder)
    folder = options.folder or Path(tempfile.mkdtemp())
    try:
        for phase in PHASES:
            command = [sys.executable, __file__, "--rows", str(options.rows), "--folder", str(folder)]
            subprocess.run([*command, "--phase", phase], check=True)
    finally:
        if options.folder is None:
            shutil.rmtree(folder)


def run(phase, rows, folder):
    start = time.monotonic()
    result = PHASES[phase](rows, folder)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"{phase:<28} {seconds:7.1f} s  {peak:6.0f} MiB  {result}", flush=True)


def manifests(folder):
    from pusa.manifest.models import IngestManifest, ModelSpec, PrecomputeManifest

    tiny = ModelSpec(weights="builtin:tiny")
    return IngestManifest(source=str(folder / "metadata.csv")), PrecomputeManifest(model=tiny, shard_rows=256)


def fill_ledger(rows, folder):
    """Write a metadata file, an empty video for each row, and a ledger in which each of them was accepted."""
    import numpy as np

    from pusa.ingest.sources import find_sources
    from pusa.ingest.verdicts import Ledger, key_of
    from tests.helpers.synthetic_tables import PLAIN

    (folder / "videos").mkdir(parents=True)
    with (folder / "metadata.csv").open("w") as file:
        file.write("file_name,text\n")
        for i in range(rows):
            (folder / f"videos/{i:06d}.mp4").touch()
            file.write(
                f'videos/{i:06d}.mp4,"clip {i}: a caption of the length that captions have, a sentence or two"\n'
            )
    manifest, _ = manifests(folder)
    width, height, frames = BUCKET
    generator = np.random.default_rng(0)
    clip = {
        "frames": list(range(frames)), "decoder": "decord", "start_time": 0.0, "width": width, "height": height, "fit": "crop", "box": [0.0, 0.0, 848.0, 480.0],
        "bucket": "848x480x163", "fps": 24.0, "retimed_frames": 0,
    }  # fmt: skip
    with Ledger.open(folder / "run/clips/ledger", key_of(manifest.clips, manifest.limits)) as ledger:
        for i, source in enumerate(find_sources(manifest).sources):
            size, mtime_ns, ctime_ns = source.stamp
            ledger.add(
                {
                    "path": str(source.path), "size": size, "mtime_ns": mtime_ns, "ctime_ns": ctime_ns, "reason": None, "detail": None,
                    "source_sha256": f"{i:064x}", "pixel_aspect": 1.0, "source_width": 848,
                    "source_height": 480, "source_frames": frames, "source_fps": 24.0, "signature": signature(generator),
                    "kinds": [], "damage": "", **PLAIN, "clips": [clip],
                }
            )  # fmt: skip
            ledger.flush_if_due()
    return f"{rows} sources"


def signature(generator):
    """Return a signature of three pictures of four colours each, with some noise: as different as those of videos."""
    import numpy as np

    colours = generator.integers(10, 240, (3, 2, 1, 2, 1, 3)) + generator.integers(0, 15, (3, 2, 4, 2, 4, 3))
    return colours.astype(np.uint8).tobytes()


def ingest(rows, folder):
    from pusa.ingest.stage import ingest

    return ingest(manifests(folder)[0], folder / "run")


def fill_shards(rows, folder):
    """Write the shards that precompute would make of these clips."""
    import torch

    from pusa.backbones import find_family
    from pusa.data.reader import Table
    from pusa.data.schema import TEXTS, latents_schema
    from pusa.data.writer import write_hashed_shard
    from pusa.precompute.encode import latents_row, text_row
    from pusa.precompute.rows import plan_rows
    from pusa.weights.model import Model

    manifest = manifests(folder)[1]
    clips = Table.open(folder / "run/clips").read("clips")
    planned = plan_rows(
        clips, manifest.dtype, find_family(), Model(manifest.model).fingerprints(*find_family().encoders)
    )
    latents, texts = torch.zeros(12, 28, 1, 1), torch.zeros(20, 32)
    (clip,) = clips.slice(0, 1).to_pylist()
    for segment in planned.segments(manifest.shard_rows):
        if segment.part == "texts":
            made, schema = [text_row(key, "", texts, 20, manifest.dtype, "planes") for key in segment.keys], TEXTS
        else:
            made = [latents_row(key, clip, latents, latents, 0, manifest.dtype, "planes") for key in segment.keys]
            schema = latents_schema(len(made[0]["latent_mean"]))
        write_hashed_shard(folder / "run/latents", segment.name, made, schema, "zstd", FACTS)
    return f"{len(planned.segments(manifest.shard_rows))} shards"


def precompute(rows, folder):
    from pusa.precompute.stage import precompute

    return precompute(manifests(folder)[1], folder / "run")


def load(rows, folder):
    """Read 100 steps from the middle of the third epoch on two ranks."""
    from pusa.data.latents import Latents
    from pusa.data.loader import load
    from pusa.data.order import Order
    from pusa.data.reader import Table

    times = [time.monotonic()]
    latents = Latents(Table.open(folder / "run/latents"))
    order = Order(latents.buckets, 32, seed=0)
    times.append(time.monotonic())
    start = 5 * rows // 2 // 32
    first = order.rows(start)
    times.append(time.monotonic())
    shares = [list(load(latents, order, range(start, start + 100), rank, 2)) for rank in (0, 1)]
    times.append(time.monotonic())
    assert shares[0][0].indices + shares[1][0].indices == first
    opening, shuffling, reading = (end - begin for begin, end in pairwise(times))
    return f"opened in {opening:.2f} s, an epoch shuffled in {shuffling:.3f} s, {3200 / reading:.0f} small rows/s"


PHASES = {
    "fill the ledger": fill_ledger,
    "ingest": ingest,
    "ingest again": ingest,
    "fill the shards": fill_shards,
    "precompute": precompute,
    "precompute again": precompute,
    "load": load,
}

if __name__ == "__main__":
    main()
