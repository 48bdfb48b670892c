"""Measure the tiny family: VAE, prompt following, and what the vectorized fine-tune adds to each conditioned task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from pusa.generate import sample_job
from pusa.manifest import ModelSpec
from pusa.model import Model
from pusa.progress import track
from pusa.tasks.base import Job
from pusa.tasks.extension import Extension
from pusa.tasks.image_to_video import ImageToVideo
from pusa.tasks.keyframes import Keyframe, Keyframes
from pusa.tasks.text_to_video import TextToVideo
from pusa.tiny.quality import look, psnr, seam
from pusa.tiny.shapes import FPS, NUM_FRAMES, SIZE, Scene, draw, random_scene
from pusa.tiny.vae import reconstruction_psnr
from pusa.video import read_frames, write_image, write_video

FIRST_SEED = 2_000_000  # unseen: training used seeds far below
SETTINGS = {"width": SIZE, "height": SIZE, "num_frames": NUM_FRAMES, "steps": 20, "guidance": 1.5}
GIVEN = 3  # latent frames that the extension is given


@dataclass(frozen=True)
class Unseen:
    """A clip that no training saw, on disk, as it decodes from there."""

    scene: Scene
    video: Path
    first: Path
    last: Path
    frames: np.ndarray


def unseen_scenes(count: int) -> list[Scene]:
    """Scenes of one shape each, from unseen seeds."""
    found = (random_scene(seed) for seed in range(FIRST_SEED, FIRST_SEED + 10 * count))
    return [scene for scene in found if len(scene.things) == 1][:count]


def measure(folder: Path, count: int = 24) -> str:
    """A table of the family's quality over `count` unseen clips: the base beside the Pusa fine-tuned from it."""
    base = Model(ModelSpec(weights=str(folder / "tiny")))
    pusa = Model(ModelSpec(weights=str(folder / "tiny-pusa")))
    with TemporaryDirectory() as scratch:
        clips = [_store(scene, Path(scratch) / str(i)) for i, scene in enumerate(unseen_scenes(count))]
        true_seam = np.mean([seam(clip.frames, 0) for clip in clips])
        lines = [
            f"VAE round trip, {count} unseen clips: {reconstruction_psnr(base.vae, [c.frames for c in clips]):.1f} dB",
            f"image-to-video seam of the clips themselves: {true_seam:.2f}",
            "",
            f"{'':44}{'base':>8}{'pusa':>8}",
        ]
        columns = [measure_model(model, clips) for model in (base, pusa)]
    lines += [f"{name:44}{columns[0][name]:>8}{columns[1][name]:>8}" for name in columns[0]]
    return "\n".join(lines)


def measure_model(model: Model, clips: Sequence[Unseen]) -> dict[str, str]:
    """Quality by name, as text."""

    def run(label: str, job: Callable[[Unseen], Job]) -> list[np.ndarray]:
        return [model.decode(sample_job(job(clip), model)) for clip in track(clips, label, len(clips))]

    text = run("text-to-video", lambda c: TextToVideo(id="t", prompt=c.scene.caption, seed=c.scene.seed, **SETTINGS))
    image = run("image-to-video", lambda c: _image_job(c, c.scene.caption))
    silent = run("image-to-video, no prompt", lambda c: _image_job(c, ""))
    keys = run("keyframes", _keyframes_job)
    more = run("extension", _extension_job)
    verdicts = [look(video).agrees(clip.scene) for video, clip in zip(text, clips, strict=True)]
    new = model.backbone.geometry.num_frames(GIVEN)
    middle = NUM_FRAMES // 2
    stills = [model.decode(model.encode(clip.frames[:1]))[0] for clip in clips]
    return {
        **{
            f"text-to-video: {what} as prompted": f"{sum(v[what] for v in verdicts)}/{len(clips)}"
            for what in ("colour", "ground", "shape", "motion")
        },
        "image-to-video: given frame, dB": _mean(psnr(v[0], s) for v, s in zip(image, stills, strict=True)),
        "image-to-video: seam": _mean(seam(video, 0) for video in image),
        "image-to-video, no prompt: seam": _mean(seam(video, 0) for video in silent),
        "keyframes: middle frame, dB": _mean(
            psnr(v[middle], c.frames[middle]) for v, c in zip(keys, clips, strict=True)
        ),
        "extension: first new frame, dB": _mean(psnr(v[new], c.frames[new]) for v, c in zip(more, clips, strict=True)),
    }


def _image_job(clip: Unseen, prompt: str) -> Job:
    return ImageToVideo(id="i", prompt=prompt, image=clip.first, seed=clip.scene.seed, **SETTINGS)


def _keyframes_job(clip: Unseen) -> Job:
    ends = {0: Keyframe(image=clip.first), -1: Keyframe(image=clip.last)}
    return Keyframes(id="k", prompt=clip.scene.caption, frames=ends, seed=clip.scene.seed, **SETTINGS)


def _extension_job(clip: Unseen) -> Job:
    given = tuple(range(GIVEN))
    return Extension(
        id="e",
        prompt=clip.scene.caption,
        video=clip.video,
        given=given,
        multipliers=0.0,
        seed=clip.scene.seed,
        **SETTINGS,
    )


def _mean(values: object) -> str:
    return f"{np.mean(list(values)):.2f}"  # type: ignore[call-overload]


def _store(scene: Scene, stem: Path) -> Unseen:
    video, first, last = stem.with_suffix(".mp4"), stem.with_suffix(".first.png"), stem.with_suffix(".last.png")
    write_video(video, draw(scene), FPS)
    frames = read_frames(video, range(NUM_FRAMES))
    write_image(first, frames[0])
    write_image(last, frames[-1])
    return Unseen(scene, video, first, last, frames)
