"""How like a video the previews of its latents are, and what they and the fit of their map cost beside a step and a decode.

python -m tests.benchmarks.preview_cost [--steps 30] [--threads 1]
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from pusa.generate.previews import fit_colours, mean_colours, picture
from pusa.generate.sampling import sample_job
from pusa.manifest.models import GenerateManifest
from pusa.video.media import write_image
from pusa.weights.model import Model

WAN = {"backbone": "wan2.1", "weights": "builtin:tiny-wan", "lora": "builtin:tiny-wan-pusa"}
MODELS = {
    "tiny Pusa": ({"weights": "builtin:tiny-pusa"}, {"num_frames": 31}),
    "tiny Wan Pusa": (WAN, {"num_frames": 33}),
}
PROMPTS = (
    "a red circle moves left on a dark background",
    "a yellow square grows on a light background",
    "a blue triangle moves up on a dark background",
    "a green square bounces on a light background",
)
LARGE = (12, 28, 60, 106)  # latents of 163 frames of 848x480


def timed(call: Callable[[], Any], rounds: int = 1) -> tuple[float, Any]:
    """Return the seconds of one call, and what it returns."""
    started = time.perf_counter()
    for _ in range(rounds):
        result = call()
    return (time.perf_counter() - started) / rounds, result


def likeness(shown: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Return the PSNR in dB, and the share of the variance that is explained (R^2)."""
    wrong = (shown.clamp(0, 1) - wanted).square().mean()
    spread = (wanted - wanted.flatten(0, -2).mean(0)).square().mean()
    return float(-10 * wrong.log10()), float(1 - wrong / spread)


def main() -> None:
    """Print a line for each tiny model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, (spec, size) in MODELS.items():
        jobs = [
            {"id": f"job{i}", "task": "text_to_video", "prompt": prompt, "seed": i, "steps": options.steps}
            | {"width": 64, "height": 64, **size}
            for i, prompt in enumerate(PROMPTS)
        ]
        manifest = GenerateManifest.model_validate({"model": spec, "jobs": jobs})
        model = Model(manifest.model, "cpu")
        model.encode(torch.zeros(1, 64, 64, 3, dtype=torch.uint8).numpy())  # it is loaded now
        fit, map_C1c = timed(lambda model=model: fit_colours(model))
        report(name, model, manifest, fit, map_C1c)


def report(name: str, model: Model, manifest: GenerateManifest, fit: float, map_C1c: Tensor) -> None:
    """Sample and decode the jobs, and print what was measured."""
    shown, wanted, steps, decodes = [], [], 0.0, 0.0
    for job in manifest.jobs:
        seconds, z_CFhw = timed(lambda job=job: sample_job(job, model))
        steps += seconds / job.steps / len(PROMPTS)
        seconds, frames = timed(lambda z_CFhw=z_CFhw: model.decode(z_CFhw))
        decodes += seconds / len(PROMPTS)
        shown.append(torch.einsum("cfhw,cd->fhwd", z_CFhw, map_C1c[:-1]) + map_C1c[-1])
        wanted.append(mean_colours(frames[None], model.backbone.geometry)[0].float())
    psnr, share = likeness(torch.stack(shown), torch.stack(wanted))

    def preview(z_CFhw: Tensor) -> float:
        with TemporaryDirectory() as folder:
            path = Path(folder, "a.jpg")
            return timed(lambda: write_image(path, picture(map_C1c, z_CFhw, [True] * z_CFhw.shape[1])), 20)[0]

    small, large = preview(z_CFhw), preview(torch.randn(z_CFhw.shape[0], *LARGE[1:]))
    print(
        f"{name}: {psnr:.1f} dB, R^2 {share:.2f}; a preview / a step {small / steps:.2f}, / a decode "
        f"{small / decodes:.3f}; the fit / a decode {fit / decodes:.1f}, {fit:.1f} s; a preview {small * 1000:.1f} ms, "
        f"of 848x480 and 163 frames {large * 1000:.1f} ms"
    )


if __name__ == "__main__":
    main()
