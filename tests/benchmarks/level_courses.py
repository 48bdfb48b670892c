"""Compare courses of levels with constant multipliers, with the built-in fine-tunes: the table of manifests/README.md.

python tests/benchmarks/level_courses.py [--weights tiny-pusa] [--clips 6] [--sheet courses.png]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pusa.evaluate.pixels import motion_range, share_as_captioned
from pusa.evaluate.unseen import UnseenClip, job_settings, unseen_scenes, write_unseen_clip
from pusa.generate.decode import decode_job
from pusa.generate.encodings import Encodings
from pusa.generate.ledger import InputHashes
from pusa.generate.sampling import prepare, sample_together
from pusa.manifest.models import ModelSpec
from pusa.tasks.image_to_video import ImageToVideo
from pusa.tasks.text_to_video import TextToVideo
from pusa.tiny.shapes import clip_length
from pusa.video.compare import psnr, seam
from pusa.video.media import write_image
from pusa.weights.model import Model

BACKBONES = {
    f"{name}{end}": backbone
    for name, backbone in {"tiny": "mochi", "tiny-wan": "wan2.1", "tiny-hunyuan": "hunyuan_video"}.items()
    for end in ("", "-pusa")
}
GIVEN: dict[str, dict[str, Any]] = {f"multiplier {m:g}": {"multiplier": m} for m in (0.0, 0.1, 0.2, 0.4)} | {
    f"release({a}, {b})": {"multiplier": 0.0, "levels": f"release({a}, {b})"} for a in (0.4, 0.8) for b in (0.3, 0.6, 1)
}
FREE: dict[str, dict[str, Any]] = {name: {"levels": name} for name in ("schedule", "staircase(1)", "staircase(2)")}
COLUMNS = ("first frame, dB", "seam", "motion", "as captioned")


def main() -> None:
    """Make the videos and print the table; motion is relative to that of text to video with the same seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", choices=BACKBONES, default="tiny-pusa")
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--sheet", type=Path, help="also write strips of all videos of two clips, as this picture")
    options = parser.parse_args()
    model = Model(ModelSpec(backbone=BACKBONES[options.weights], weights=f"builtin:{options.weights}"), "cpu")
    geometry, strips = model.backbone.geometry, []
    print(f"{options.weights:28}" + "".join(f"{column:>17}" for column in COLUMNS))
    with TemporaryDirectory() as folder:
        scenes = enumerate(unseen_scenes(options.clips))
        clips = [write_unseen_clip(scene, Path(folder, str(i)), clip_length(geometry)) for i, scene in scenes]
        pictures = [model.decode(model.encode(clip.frames[:1]))[0] for clip in clips]
        usual = 0.0
        for name, keys in (FREE | GIVEN).items():
            videos = _videos(model, clips, keys)
            motion = float(np.mean([motion_range(video) for video in videos]))
            usual = usual or motion
            numbers = [
                np.mean([psnr(video[0], picture) for video, picture in zip(videos, pictures, strict=True)]),
                np.mean([seam(video, 0) for video in videos]),
                motion / usual,
                np.mean([share_as_captioned(video, clip.scene) for video, clip in zip(videos, clips, strict=True)]),
            ]
            is_free = name in FREE  # which has no given frame
            shown = ["-" if is_free and i < 2 else f"{number:.2f}" for i, number in enumerate(numbers)]
            print(f"{name:28}" + "".join(f"{number:>17}" for number in shown), flush=True)
            strips += [np.concatenate(video[:: geometry.temporal], 1) for video in videos[:2]]
    if options.sheet:
        write_image(options.sheet, np.concatenate(strips))


def _videos(model: Model, clips: Sequence[UnseenClip], keys: dict[str, Any]) -> list[np.ndarray]:
    """Return the videos of all clips, which are sampled as one batch."""
    kind, settings = (ImageToVideo if "multiplier" in keys else TextToVideo), job_settings(model.backbone.family)
    encodings, hashes = Encodings(model, None), InputHashes()
    jobs = [
        kind.model_validate(
            {"id": "x", "prompt": clip.scene.caption, "seed": clip.scene.seed, **settings, **keys}
            | ({"image": clip.first} if kind is ImageToVideo else {})
        )
        for clip in clips
    ]
    made = sample_together([prepare(job, model, encodings, hashes) for job in jobs], model)
    videos = []
    for job, z_CFhw in zip(jobs, made, strict=True):
        if isinstance(z_CFhw, Exception):
            raise z_CFhw
        videos.append(decode_job(job, model, z_CFhw))
    return videos


if __name__ == "__main__":
    main()
