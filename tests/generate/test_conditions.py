"""From an input file to given latents: which frames, upright, opaque, fitted; and `exact`, which puts pixels back."""

import os
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pusa.backbones import find_family
from pusa.errors import ConditionError, MediaError
from pusa.generate.check import check_jobs, describe_inputs
from pusa.generate.conditions import open_input, place_latents
from pusa.generate.decode import decode_job
from pusa.generate.given import read_pinned
from pusa.generate.sampling import sample_job
from pusa.generate.stage import generate
from pusa.manifest.models import GenerateManifest, ModelSpec
from pusa.tasks.base import Condition
from pusa.tasks.completion import Completion
from pusa.tasks.extension import Extension
from pusa.tasks.image_to_video import ImageToVideo
from pusa.tasks.loop import Loop
from pusa.tasks.transition import Transition
from pusa.video.media import read_frames, read_image, write_image, write_video
from pusa.weights.model import Model

GEOMETRY = find_family().geometry
PUSA = ModelSpec(weights="builtin:tiny-pusa")
SMALL = {"id": "x", "width": 64, "height": 64, "num_frames": 31}


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(PUSA)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """A folder with clips of 100 frames at 24, 48 and 23.976 fps. Each frame shows its number as stripes."""
    folder = tmp_path_factory.mktemp("numbered")
    bits = np.arange(100)[:, None] >> np.arange(8) & 1
    stripes = np.repeat(bits * 255, 8, 1).astype(np.uint8)
    frames = np.broadcast_to(stripes[:, None, :, None], (100, 64, 64, 3))
    for fps in (24, 48, 23.976):
        write_video(folder / f"{fps}.mp4", frames, fps)
    return folder


def numbers(frames: np.ndarray) -> list[int]:
    stripes = frames.reshape(len(frames), 64, 8, 8, 3).mean((1, 3, 4)) > 127
    return (stripes << np.arange(8)).sum(1).tolist()


def read(job) -> list[int]:
    return numbers(np.concatenate([open_input(c, job, GEOMETRY).pixels() for c in job.passes(GEOMETRY)[-1].conditions]))


def test_a_clip_is_read_from_first_frame_and_only_as_far_as_needed(numbered):
    clip = numbered / "24.mp4"
    assert read(Extension(video=clip, **SMALL)) == list(range(19))
    assert read(Extension(video=clip, first_frame=40, given=[0, 1], **SMALL)) == list(range(40, 47))
    assert read(Extension(video=clip, first_frame=-25, **SMALL)) == list(range(75, 94))
    assert read(Extension(video=clip, direction="backwards", **{**SMALL, "num_frames": 19})) == list(range(25))
    assert read(Completion(video=clip, given=[-1], **SMALL)) == list(range(31))
    assert read(Transition(start=clip, end=clip, **SMALL)) == [0, *range(69, 100)]
    assert read(Transition(start=clip, end=clip, encoding="joint", **SMALL)) == [*range(16), *range(15)]


def test_a_clip_of_another_rate_is_read_at_the_jobs_rate_and_described_so(numbered):
    job = Extension(video=numbered / "48.mp4", given=[0, 1], **SMALL)
    assert read(job) == list(range(0, 14, 2))
    (condition,) = job.conditions()
    assert str(open_input(condition, job, GEOMETRY)) == "48.mp4 frames 0..12 of 100, 48 fps read at 24 fps"
    job = Extension(video=numbered / "23.976.mp4", **SMALL)
    assert str(open_input(job.conditions()[0], job, GEOMETRY)) == "23.976.mp4 frames 0..18 of 100"
    assert len(read(Completion(video=numbered / "48.mp4", given=[-1], **SMALL))) == 31


def test_a_joint_encoding_divides_the_frames_as_published(numbered):
    job = Transition(
        start=numbered / "24.mp4", end=numbered / "48.mp4", encoding="joint", **{**SMALL, "num_frames": 163}
    )
    first, second = open_input(job.conditions()[0], job, GEOMETRY).ranges
    assert (len(first.frames), len(second.frames)) == (49, 48)  # 50 frames of the second at 24 a second; 97 is 6k + 1


def test_errors_about_short_clips_and_wrong_first_frames_name_the_numbers(numbered):
    clip = numbered / "24.mp4"
    for job, message in (
        (
            Extension(video=clip, first_frame=90, **SMALL),
            r"24.mp4 \(10 frames to read\): latent frame 2 is outside the 2",
        ),
        (Extension(video=clip, first_frame=100, **SMALL), r"first_frame 100 is outside 24.mp4; allowed are -100\.\.99"),
        (Loop(video=clip, first_frame=-7, **SMALL), "latent frame 2 is outside the 2 latent frames"),
    ):
        with pytest.raises(ConditionError, match=message):
            open_input(job.passes(GEOMETRY)[-1].conditions[0], job, GEOMETRY)


def test_frames_after_the_given_ones_do_not_change_their_latents(drawn, model):
    clip = drawn / "videos/0000.mp4"
    job = Completion(video=clip, given=[0, 2], **SMALL)
    condition = job.passes(GEOMETRY)[0].conditions[0]
    given = place_latents(condition, open_input(condition, job, GEOMETRY).latents(model), 6)
    torch.testing.assert_close(given.latents, model.encode(read_frames(clip, range(31)))[:, [0, 2]], atol=1e-4, rtol=0)


def test_exact_puts_the_given_pixels_back_where_the_multiplier_is_0(drawn, model):
    clip = drawn / "videos/0000.mp4"
    keys = {**SMALL, "video": clip, "given": [0, 2, 5], "multipliers": (0.0, 0.5, 0.0), "steps": 1, "guidance": 1}
    frames = read_frames(clip, range(31))
    plain, exact = (Completion(**keys, exact=exact) for exact in (False, True))
    z_CFhw = sample_job(plain, model)
    made, pasted = decode_job(plain, model, z_CFhw), decode_job(exact, model, z_CFhw)
    given = [0, *range(25, 31)]
    assert np.array_equal(pasted[given], frames[given])
    others = [i for i in range(31) if i not in given]
    assert np.array_equal(pasted[others], made[others]) and not np.array_equal(made[given], frames[given])


def test_exact_puts_pictures_and_loop_frames_back_at_their_places(drawn, tmp_path):
    frames = read_frames(drawn / "videos/0000.mp4", range(31))
    write_image(tmp_path / "a.png", frames[0])
    picture = ImageToVideo(image=tmp_path / "a.png", position=2, **SMALL)
    given = read_pinned(picture, GEOMETRY)
    assert sorted(given) == [*range(7, 13)] and all(np.array_equal(frame, frames[0]) for frame in given.values())
    loop = Loop(video=drawn / "videos/0000.mp4", multipliers=0.0, **SMALL)
    given = read_pinned(loop, GEOMETRY)
    assert sorted(given) == [*range(15), 27, 28, 29]
    assert all(np.array_equal(frame, frames[1 + (i + 3) % 30]) for i, frame in given.items())


def test_of_six_frames_that_become_the_first_one_exact_puts_the_last_back(drawn):
    class Moved(Extension):
        """Latent frame 1 of the clip, which is six frames, becomes latent frame 0 of the video, which is one."""

        def conditions(self):
            return [Condition(self.video, (1,), (0,), (0.0,))]

    frames = read_frames(drawn / "videos/0000.mp4", range(31))
    job = Moved(video=drawn / "videos/0000.mp4", **SMALL)
    assert np.array_equal(read_pinned(job, GEOMETRY)[0], frames[6])


@pytest.fixture
def save_latents(tmp_path):
    """A function that writes latents as generation saves them."""

    def write(latents, name="a", **facts):
        path = tmp_path / f"{name}.latents.safetensors"
        stated = {"latent_space": "dit", **facts}
        save_file({"latents": latents}, path, metadata={key: value for key, value in stated.items() if value})
        return path

    return write


def manifest(*jobs) -> GenerateManifest:
    return GenerateManifest.model_validate(
        {"model": PUSA, "jobs": [{**SMALL, "steps": 1, "guidance": 1} | j for j in jobs]}
    )


def test_saved_latents_are_given_unchanged(model, save_latents, tmp_path):
    latents = torch.randn(12, 6, 8, 8)
    job = {"id": "a", "task": "extension", "video": save_latents(latents), "given": [0, 1], "preset": "exact"}
    loaded = manifest(job)
    assert check_jobs(loaded) == {}
    assert describe_inputs(loaded.jobs[0], GEOMETRY) == [
        "a.latents.safetensors (6 latent frames): latent frames 0, 1, multipliers 0, 0"
    ]
    assert generate(loaded, tmp_path).made == ["a"]
    assert torch.equal(load_file(tmp_path / "videos/a.latents.safetensors")["latents"][:, :2], latents[:, :2])


LATENTS = {
    "of another size": (torch.zeros(12, 6, 8, 10), {}, {}, r"8, 10\); expected \(12, frames, 8, 8\) of floats"),
    "of one number": (torch.zeros(()), {}, {}, r"latents of shape \(\); expected"),
    "of whole numbers": (torch.zeros(12, 6, 8, 8, dtype=torch.int32), {}, {}, "integer latents of shape .* of floats"),
    "too few": (torch.zeros(12, 2, 8, 8), {}, {}, "latent frame 2 is outside the 2 latent frames"),
    "no numbers": (torch.full((12, 6, 8, 8), torch.nan), {}, {}, "not finite"),
    "of another space": (torch.zeros(12, 6, 8, 8), {"latent_space": "vae"}, {}, "latent space 'vae'; expected 'dit'"),
    "without a space": (torch.zeros(12, 6, 8, 8), {"latent_space": ""}, {}, "does not record its latent space"),
    "of a loop": (torch.zeros(12, 6, 8, 8), {"cyclic": "true"}, {}, "holds the latents of a loop"),
    "exact": (torch.zeros(12, 6, 8, 8), {}, {"exact": True, "preset": "exact"}, "`exact` needs pixels"),
    "with first_frame": (torch.zeros(12, 6, 8, 8), {}, {"first_frame": 7}, "holds latents, which have no first_frame"),
    "joined": (torch.zeros(12, 6, 8, 8), {}, {"task": "transition", "encoding": "joint"}, "needs two clips"),
}  # fmt: skip


@pytest.mark.parametrize("latents, facts, keys, message", LATENTS.values(), ids=LATENTS.keys())
def test_latents_that_cannot_be_used_are_refused_before_anything_starts(save_latents, latents, facts, keys, message):
    path = save_latents(latents, **facts)
    sources = {"start": path, "end": path} if keys.get("task") == "transition" else {"video": path}
    problems = check_jobs(manifest({"id": "a", "task": "extension", **sources, **keys}))
    assert re.search(message, problems["a"])


def test_latents_of_another_space_and_damaged_files_are_refused(model, save_latents, tmp_path):
    job = Extension(video=save_latents(torch.zeros(12, 6, 8, 8), latent_space="vae"), **SMALL)
    with pytest.raises(ConditionError, match="latent space 'vae'; expected 'dit'"):
        open_input(job.conditions()[0], job, GEOMETRY).latents(model)
    job.video.write_bytes(b"no")
    with pytest.raises(MediaError, match="cannot be read as latents"):
        open_input(job.conditions()[0], job, GEOMETRY)


IRREGULAR = "is not a regular file"


def test_pipes_and_folders_are_refused_without_waiting_for_them(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for name, message in (("pipe.png", IRREGULAR), ("", IRREGULAR), ("x" * 300 + ".png", "File name too long")):
        problems = check_jobs(manifest(
            {"id": "a", "task": "image_to_video", "image": tmp_path / name},
            {"id": "b", "task": "extension", "video": tmp_path / name},
        ))  # fmt: skip
        assert message in problems["a"] and message in problems["b"]


def test_the_first_picture_of_an_animation_is_used_and_described_so(tmp_path):
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "green")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    job = ImageToVideo(image=tmp_path / "a.webp", **SMALL)
    assert describe_inputs(job, GEOMETRY) == ["a.webp (the first of 3 pictures): latent frame 0, multiplier 0"]
    assert (read_image(job.image)[0, 0, 0] == (255, 0, 0)).all()


def test_a_picture_that_many_jobs_share_is_decoded_once_to_check_it(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    read: list[object] = []
    monkeypatch.setattr("pusa.generate.conditions.read_image", lambda *given: read.append(given))
    jobs = [{"id": f"a{i}", "task": "image_to_video", "image": tmp_path / "a.png", "seed": i} for i in range(9)]
    assert check_jobs(manifest(*jobs)) == {} and len(read) == 1


def test_exact_decodes_again_without_sampling(drawn, tmp_path):
    class NoTransformer(Model):
        @property
        def transformer(self):
            raise AssertionError("the job was sampled again")

    job = {"id": "a", "task": "completion", "video": drawn / "videos/0000.mp4", "given": [0]}
    assert generate(manifest(job), tmp_path).made == ["a"]
    assert generate(manifest({**job, "exact": True}), tmp_path, NoTransformer).made == ["a"]
