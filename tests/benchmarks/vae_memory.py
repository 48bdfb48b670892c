"""Compare the ways a VAE can work: whole clips, chunks of latent frames, tiles. PSNR, memory and time.

    python tests/benchmarks/vae_memory.py                  # a drawn clip and picture, the built-in tiny VAE (Mochi's)
    python tests/benchmarks/vae_memory.py --wan            # a Wan VAE of random weights, a third of the real width
    python tests/benchmarks/vae_memory.py CLIP IMAGE       # a video and a picture of yours
    python tests/benchmarks/vae_memory.py --vae FOLDER     # another VAE, in diffusers layout

PSNR and ratios are against the first method: Mochi's whole clip, or one latent frame at a time, as diffusers runs Wan's; latents are compared as pixels, decoded by it. Beside it
is the largest difference. Memory is the peak of the resident set (VmHWM) above its size when the VAE and its input were
loaded, in a process that returns freed memory at once; `ru_maxrss` cannot be reset, and includes a parent's memory. Time
is CPU time, the smaller of two runs in another process. Linux only.
"""

import argparse
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import numpy as np
import torch

from pusa.backbones.mochi.vae import PusaAutoencoderKLMochi
from pusa.backbones.wan.vae import PusaAutoencoderKLWan
from pusa.tiny.shapes import draw, random_scene
from pusa.video.fit import fit_frames
from pusa.video.media import probe, read_frames, read_image

TINY = Path(__file__).parents[2] / "pusa/builtin/tiny/vae"
TILE, STRIDE = 128, 96
ALL = 1_000_000  # latent frames: more than any clip has
Method = Callable[[Any], None]


def at_once(count: int) -> Method:
    """Return what sets a VAE to chunks of this many latent frames."""
    return lambda vae: setattr(vae, "latent_frames_at_once", count)


TILES: dict[str, Method] = {
    f"tiles of {TILE}, stride {STRIDE}": lambda vae: vae.enable_tiling(TILE, TILE, STRIDE, STRIDE)
}
MOCHI: dict[str, Method] = {
    "whole": lambda vae: None,
    "1 latent frame at once": at_once(1),
    "2 latent frames at once": at_once(2),
    **TILES,
}
WAN: dict[str, Method] = {
    "1 latent frame at once": at_once(1),
    "2 latent frames at once": at_once(2),
    "4 latent frames at once": at_once(4),
    "8 latent frames at once": at_once(8),
    "all but the first": at_once(ALL),
    **TILES,
}


def kind(folder: Path) -> tuple[Any, dict[str, Method]]:
    """Return the class of a VAE, and the methods that it is tried with; the first is what others are compared with."""
    name = json.loads((folder / "config.json").read_text())["_class_name"]
    return (PusaAutoencoderKLWan, WAN) if "Wan" in name else (PusaAutoencoderKLMochi, MOCHI)


def load(folder: Path, method: str) -> Any:
    """Return the VAE, set to a method."""
    vae_class, methods = kind(folder)
    vae = vae_class.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)
    methods[method](vae)
    return vae


@torch.no_grad()
def run(vae: Any, part: str, given: torch.Tensor) -> torch.Tensor:
    """Encode pixels (1, 3, T, H, W) to the posterior's mean (1, C, F, h, w), or decode latents."""
    return vae.encode(given).latent_dist.mean if part == "encode" else vae.decode(given).sample


def resident_mib(field: str) -> float:
    """Return VmRSS (the current memory) or VmHWM (the peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak_mib(folder: Path, method: str, part: str, given: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the result, and the peak of memory that it needed."""
    vae, x = load(folder, method), torch.from_numpy(given)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_mib("VmRSS")
    result = run(vae, part, x)
    return result.numpy(), resident_mib("VmHWM") - before


def seconds(folder: Path, method: str, part: str, given: np.ndarray) -> float:
    """Return the CPU time, without a first run."""
    vae, x = load(folder, method), torch.from_numpy(given)
    times = []
    for _ in range(3):
        began = process_time()
        run(vae, part, x)
        times.append(process_time() - began)
    return min(times[1:])


def process(**environment: str) -> ProcessPoolExecutor:
    """Start a process with these environment variables, and return it as a pool of one."""
    pool = ProcessPoolExecutor(1, get_context("spawn"))
    before = dict(os.environ)
    os.environ.update(environment)  # a spawned process inherits them when it starts, not later
    try:
        pool.submit(os.getpid).result()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return pool


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the PSNR in dB of pixels in [-1, 1]."""
    error = np.square(a.clip(-1, 1).astype(float) - b.clip(-1, 1)).mean()
    return 10 * math.log10(4 / error) if error else math.inf


def compare(folder: Path, name: str, pixels: np.ndarray) -> None:
    """Print a row for each part and method."""
    methods = list(kind(folder)[1])
    whole = load(folder, methods[0])
    decode: Callable[[np.ndarray], np.ndarray] = lambda z: run(whole, "decode", torch.from_numpy(z)).numpy()  # noqa: E731
    given = pixels
    frugal, plain = process(MALLOC_MMAP_THRESHOLD_="65536"), process()
    for part in ("encode", "decode"):
        as_pixels = decode if part == "encode" else (lambda y: y)
        for method in methods:
            task = folder, method, part, given
            result, peak = frugal.submit(peak_mib, *task).result()
            time = plain.submit(seconds, *task).result()
            if method == methods[0]:
                expected, reference, whole_peak, whole_time = result, as_pixels(result), peak, time
            score = f"{psnr(as_pixels(result), reference):.1f} dB"
            print(f"{name:<18} {part}  {method:<24} {score:>9} {np.abs(result - expected).max():>8.1e} "
                  f"{peak:>7.0f} MiB {peak / whole_peak:>5.0%} {time:>7.2f} s {time / whole_time:>5.2f}x", flush=True)  # fmt: skip
        given = expected


def to_pixels(frames: np.ndarray) -> np.ndarray:
    """Return frames (T, H, W, 3) uint8 as (1, 3, T, H, W) float in [-1, 1]."""
    return np.ascontiguousarray(np.moveaxis(frames, -1, 0)[None].astype(np.float32) / 127.5 - 1)


def media(options: argparse.Namespace) -> dict[str, np.ndarray]:
    """Return the clip and the picture, given or drawn, cropped to size, by a label."""
    (width, height, frames), (image_width, image_height) = options.clip_size, options.image_size
    if options.clip:
        clip = read_frames(options.clip, range(min(frames, probe(options.clip).num_frames)))
    else:
        clip = draw(random_scene(1), max(width, height), frames)
    image = read_image(options.image) if options.image else draw(random_scene(2), max(image_width, image_height), 1)
    pictures = fit_frames(clip, width, height), fit_frames(image, image_width, image_height)
    return {f"{x.shape[2]}x{x.shape[1]}, {len(x)} frames": to_pixels(x) for x in pictures}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", type=Path, nargs="?")
    parser.add_argument("image", type=Path, nargs="?")
    parser.add_argument("--vae", type=Path, default=TINY)
    parser.add_argument("--wan", action="store_true", help="a Wan VAE of random weights")
    parser.add_argument("--clip-size", type=int, nargs=3, default=[256, 256, 61], metavar=("W", "H", "T"))
    parser.add_argument("--image-size", type=int, nargs=2, default=[512, 384], metavar=("W", "H"))
    options = parser.parse_args()
    print(f"{'':<18} {'':<6}  {'':<24} {'PSNR':>9} {'largest':>8} {'peak memory':>17} {'CPU time':>16}")
    with TemporaryDirectory() as scratch:
        if options.wan:
            torch.manual_seed(0)
            options.vae = Path(scratch)
            PusaAutoencoderKLWan(base_dim=32).save_pretrained(options.vae)
        for name, pixels in media(options).items():
            compare(options.vae, name, pixels)


if __name__ == "__main__":
    main()
