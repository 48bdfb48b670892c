"""Compare ways to make a loop from a prompt, with the built-in fine-tune: the reasons for the method of `pusa.tasks.loop`.

python tests/benchmarks/loop_methods.py [--clips 12] [--sheet loops.png]
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pusa.backbones.family import Geometry
from pusa.diffusion.windows import Timeline
from pusa.evaluate.pixels import largest_change, motion_range, share_as_captioned, wrap_jerk
from pusa.evaluate.unseen import job_settings, unseen_scenes
from pusa.generate.decode import decode_job
from pusa.generate.sampling import sample_job
from pusa.manifest.models import ModelSpec
from pusa.system.progress import track
from pusa.tasks.base import Job, Pass
from pusa.tasks.loop import Loop
from pusa.tasks.text_to_video import TextToVideo
from pusa.video.compare import seam
from pusa.video.media import write_image
from pusa.weights.model import Model


class Closed(Loop):
    """Keep the clip unchanged, and make a segment from its last latent frames to its first, with both ends given."""

    def passes(self, geometry: Geometry) -> list[Pass]:
        """Return a run for the clip, and one whose window shows the free frames between given ones."""
        clip, ring = super().passes(geometry)
        frames, kept = len(ring.timeline.starts), len(ring.conditions[0].take)
        tail = geometry.latent_frames(self.window or self.num_frames) - 2 - (frames - kept)
        window = (None, *range(kept - tail, frames), 0)
        condition = replace(ring.conditions[0], multipliers=(0.0,) * kept)
        return [clip, Pass([condition], Timeline(ring.timeline.starts, lambda step: [window]))]


METHODS: dict[str, tuple[type[Job], dict[str, Any]]] = {
    "a clip, repeated": (TextToVideo, {}),
    "clip, then a segment with both ends given": (Closed, {}),
    "ring alone": (Loop, {"multipliers": 1.0}),
    "clip kept, ring closed": (Loop, {"multipliers": 0.0}),
    "clip noised again, ring closed (pusa.tasks.loop)": (Loop, {}),
}
COLUMNS = ("last to first", "worst clip", "jerk", "largest", "motion", "as prompted")


def main() -> None:
    """Make the loops and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("--sheet", type=Path, help="also write strips of all loops, as this picture")
    options = parser.parse_args()
    model = Model(ModelSpec(weights="builtin:tiny-pusa"))
    rows = []
    print(f"{'':56}" + "".join(f"{column:>15}" for column in COLUMNS))
    for num_frames in (31, 49):
        for name, (kind, keys) in METHODS.items():
            size = {
                **job_settings(model.backbone.family),
                **({} if kind is TextToVideo else {"num_frames": num_frames, "window": 31}),
                **keys,
            }
            videos = [
                _video(kind(id="loop", prompt=scene.caption, seed=scene.seed, **size), model)
                for scene in track(unseen_scenes(options.clips), name, options.clips)
            ]
            rows += [_strip(video) for video in videos[:4]]
            print(f"{num_frames - 1} frames: {name:45}" + "".join(f"{n:>15.2f}" for n in _numbers(videos)), flush=True)
    if options.sheet:
        write_image(options.sheet, np.concatenate(rows))


def _video(job: Job, model: Model) -> np.ndarray:
    video = decode_job(job, model, sample_job(job, model))
    return video if job.cyclic else video[:-1]


def _numbers(videos: list[np.ndarray]) -> list[float]:
    wraps = [seam(video, -1, cyclic=True) for video in videos]
    scenes = unseen_scenes(len(videos))
    as_prompted = [share_as_captioned(video, scene) for video, scene in zip(videos, scenes, strict=True)]
    means = [
        float(np.mean([metric(video) for video in videos])) for metric in (wrap_jerk, _largest_change, motion_range)
    ]
    return [float(np.mean(wraps)), max(wraps), *means, float(np.mean(as_prompted))]


def _largest_change(video: np.ndarray) -> float:
    return largest_change(video, cyclic=True)


def _strip(video: np.ndarray) -> np.ndarray:
    closed = np.concatenate([video, video[:1]])
    return np.concatenate(list(closed[np.linspace(0, len(video), 11).round().astype(int)]), 1)


if __name__ == "__main__":
    main()
