"""Every task with the built-in fine-tune: the length of its video, its given frames, and its seams."""

import numpy as np
import pytest
import torch

from pusa.evaluate.unseen import job_settings, unseen_scenes
from pusa.generate.check import check_jobs, describe_inputs
from pusa.generate.decode import decode_job
from pusa.generate.sampling import sample_job, total_steps
from pusa.manifest.models import GenerateManifest, ModelSpec
from pusa.tasks import TASKS
from pusa.tasks.extension import Extension
from pusa.tasks.long_video import LongVideo
from pusa.tasks.loop import Loop
from pusa.tasks.text_to_video import TextToVideo
from pusa.video.media import read_frames
from pusa.weights.model import Model

PUSA = ModelSpec(weights="builtin:tiny-pusa")
QUICK = {"width": 64, "height": 64, "num_frames": 31, "steps": 2, "guidance": 1}


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(PUSA)


def example(name: str, drawn) -> dict:
    picture, clip = drawn / "media/ball-first.png", drawn / "media/ball.mp4"
    return {
        "text_to_video": {},
        "image_to_video": {"image": picture},
        "keyframes": {"frames": {0: {"image": picture}, -1: {"image": picture}}},
        "transition": {"start": clip, "end": drawn / "media/box.mp4", "encoding": "joint", "end_frames": [-1]},
        "extension": {"video": clip, "num_frames": 61, "window": 31, "overlap": 2, "direction": "backwards"},
        "completion": {"video": clip, "made": [2]},
        "loop": {"prompt": "a red circle bounces on a dark background", "num_frames": 49, "window": 31},
        "long_video": {"image": picture, "num_frames": 61, "window": 31, "stagger": 1},
    }[name]


@pytest.mark.parametrize("name", TASKS)
def test_every_task_makes_a_video_of_its_length(name, drawn, model):
    job = {**QUICK, "id": "a", "task": name, **example(name, drawn)}
    manifest = GenerateManifest.model_validate({"model": PUSA, "jobs": [job]})
    (job,) = manifest.jobs
    assert check_jobs(manifest) == {}
    steps: list[int] = []
    video = decode_job(job, model, sample_job(job, model, lambda step, x0: steps.append(step)))
    assert video.shape == (job.num_frames - job.cyclic, 64, 64, 3)
    assert len(steps) == total_steps(job, model.backbone.geometry)


def test_inputs_are_described_by_frames_places_and_multipliers(drawn, model):
    job = Extension(id="a", **QUICK, **{k: v for k, v in example("extension", drawn).items() if k != "num_frames"})
    assert describe_inputs(job, model.backbone.geometry) == [
        "ball.mp4 frames 0..24 of 31: latent frames 1, 2, 3, 4 at -4, -3, -2, -1, multipliers 0.4, 0.3, 0.2, 0.1"
    ]


def test_a_ring_has_no_beginning(model):
    z_CFhw = sample_job(Loop(id="a", prompt="a red circle bounces on a dark background", **QUICK), model)
    frames, turned = (model.decode_ring(z).astype(int) for z in (z_CFhw, z_CFhw.roll(2, 1)))
    assert len(frames) == 30
    # But for how far back the decoder remembers, more than once round.
    assert np.abs(np.roll(frames, 12, 0) - turned).mean() < 0.3
    assert np.abs(model.decode(z_CFhw)[-24:].astype(int) - np.roll(frames, 3, 0)[-24:]).mean() > 0.3


def test_later_segments_do_not_change_finished_latents(model):
    seen: list[torch.Tensor] = []
    job = LongVideo(id="a", window=31, overlap=2, **{**QUICK, "num_frames": 67})
    made = sample_job(job, model, lambda step, x0: seen.append(x0[0]))
    starts = job.passes(model.backbone.geometry)[0].timeline.starts
    assert len(seen) == 2 * 3 and len(starts) == 12
    for frame, start in enumerate(starts):
        for x0 in seen[start + job.steps - 1 :]:
            assert torch.equal(x0[:, frame], made[:, frame])


@pytest.mark.parametrize("stagger", [None, 1])
def test_an_extension_backwards_keeps_the_clip_exactly_at_the_end(drawn, model, stagger):
    keys = {**QUICK, **example("extension", drawn), "preset": "exact", "stagger": stagger}
    made = sample_job(Extension(id="a", **keys), model)
    clip = model.encode(read_frames(drawn / "media/ball.mp4", range(25)))
    assert torch.equal(made[:, -4:], clip[:, 1:])


def wrap(video: np.ndarray) -> float:
    """The change from the last frame to the first, over the mean change between neighbours."""
    changes = np.abs(np.diff(np.concatenate([video, video[:1]]).astype(float), axis=0)).mean((1, 2, 3))
    return float(changes[-1] / changes[:-1].mean())


def test_a_loops_last_frame_leads_into_its_first(model):
    settings = {**job_settings(model.backbone.family), "steps": 10}
    loops, clips = (
        [
            decode_job(job, model, sample_job(job, model))
            for job in (task(id="a", prompt=s.caption, seed=s.seed, **settings) for s in unseen_scenes(count))
        ]
        for task, count in ((Loop, 6), (TextToVideo, 2))
    )
    assert np.mean([wrap(video) for video in loops]) < 1.2
    assert np.mean([np.ptp(video.astype(float), axis=0).max() for video in loops]) > 60, "nothing moves"
    assert min(wrap(video) for video in clips) > 3, "the measure does not see that a plain clip is not a loop"
