"""The metrics of the quality report on clips with known answers, and the report as a whole."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import pusa.evaluate.measure as module
from pusa.backbones import find_family
from pusa.errors import ManifestError, PartlyFailed
from pusa.evaluate.cases import quality_cases
from pusa.evaluate.measure import match_given_frames, measure
from pusa.evaluate.metrics import RING_JOIN, Result
from pusa.evaluate.pixels import (
    colour_drift,
    ground_flicker,
    largest_change,
    motion_range,
    recognize,
    share_as_captioned,
    sharpness,
    wrap_jerk,
)
from pusa.evaluate.unseen import RoundTrip, unseen_scenes, write_unseen_clip
from pusa.manifest.models import ModelSpec
from pusa.tasks.base import resolve_positions
from pusa.tiny.shapes import Scene, clip_length, draw
from pusa.video.compare import seam

FAMILY = find_family()
GEOMETRY = FAMILY.geometry
CASES = quality_cases(FAMILY)
SCENE = Scene((("red", "circle"),), "left", "dark", seed=3)
CLIP = draw(SCENE)
REFERENCE, PICTURE = CASES[0], next(case for case in CASES if case.name == "image_to_video")
LOOP = next(case for case in CASES if case.name == "loop")


def circling(frames: int = 30, size: int = 64) -> np.ndarray:
    """A soft blob that moves once round a circle: a perfect loop."""
    angle = 2 * np.pi * np.arange(frames)[:, None, None] / frames
    x, y = np.meshgrid(np.arange(size), np.arange(size))
    distance = np.hypot(x - size / 2 - 12 * np.cos(angle), y - size / 2 - 12 * np.sin(angle))
    grey = 220 / (1 + np.exp(distance - 10))
    return np.repeat(grey[..., None], 3, -1).round().astype(np.uint8)


def test_a_perfect_loop_has_seam_and_jerk_1_at_the_wrap_and_at_the_join_of_the_ring():
    loop = circling()
    assert seam(loop, -1, cyclic=True) == pytest.approx(1, abs=0.05)
    assert wrap_jerk(loop) == pytest.approx(1, abs=0.1)
    assert largest_change(loop, cyclic=True) < 1.1
    assert RING_JOIN.measure(Result(loop, None, None, GEOMETRY, cyclic=True)) == pytest.approx(1, abs=0.05)


def test_a_jump_is_measured_at_its_frame():
    half = circling()[:15]
    assert seam(half, -1, cyclic=True) > 3
    assert wrap_jerk(half) > 3
    cut = np.concatenate([CLIP[:10], CLIP[20:]])
    assert seam(cut, 9) > 3 and seam(cut, 5) < 1
    assert largest_change(cut) > 3 > largest_change(CLIP)


def test_jerk_tells_a_loop_that_reverses_from_one_that_continues():
    forward = circling()[:16]
    reversing = np.concatenate([forward, forward[-2:0:-1]])
    assert seam(reversing, -1, cyclic=True) == pytest.approx(1, abs=0.2)
    assert wrap_jerk(reversing) > 1.4


def test_several_seams_are_averaged_and_can_be_compared_with_chosen_frames():
    frames = np.zeros((6, 4, 4, 3), np.uint8) + np.array([0, 1, 2, 6, 7, 11], np.uint8)[:, None, None, None]
    assert seam(frames, 2, 4) == pytest.approx(4)
    assert seam(frames, 2, among=[4]) == pytest.approx(1)


def test_flicker_is_the_mean_change_of_ground_and_ignores_a_moving_shape():
    assert ground_flicker(CLIP) == 0
    sign = np.where(np.arange(len(CLIP)) % 2, 2, -2)[:, None, None, None]
    assert ground_flicker((CLIP.astype(int) + sign).clip(0, 255).astype(np.uint8)) == pytest.approx(4, abs=0.01)


def test_the_range_of_motion_is_that_of_the_drawing():
    assert 0.36 <= motion_range(CLIP) <= 0.44
    assert motion_range(np.repeat(CLIP[:1], 9, 0)) == 0
    assert motion_range(np.zeros_like(CLIP)) == 0


def test_drift_is_the_difference_of_colours_and_0_for_a_repeated_clip():
    assert colour_drift(CLIP, CLIP) == (0, 0)
    ground, shape = colour_drift(CLIP, CLIP + np.uint8(6))
    assert ground == shape == pytest.approx(6)
    gone = np.broadcast_to(CLIP[0, 0, 0], CLIP.shape)
    assert colour_drift(CLIP, gone)[1] > 50


def test_blur_is_less_sharp():
    blurred = np.mean([np.roll(CLIP, shift, (1, 2)) for shift in range(4)], 0)
    assert sharpness(blurred) < 0.8 * sharpness(CLIP)


def test_each_frame_counts_by_itself():
    assert share_as_captioned(CLIP, SCENE) == 1
    other = draw(replace(SCENE, things=(("blue", "square"),)))
    assert share_as_captioned(np.concatenate([CLIP, other]), SCENE) == 0.5
    assert share_as_captioned(np.concatenate([CLIP, np.broadcast_to(CLIP[0, 0, 0], CLIP.shape)]), SCENE) == 0.5
    assert all(recognize(CLIP).matches(SCENE).values())


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_unseen_clip(unseen_scenes(1)[0], tmp_path_factory.mktemp("clip") / "0")


@pytest.mark.parametrize("case", [case for case in CASES if case.job], ids=lambda case: case.name)
def test_the_given_frames_of_a_case_are_those_of_its_job(case, clip):
    job = case.job(clip)
    run = job.passes(GEOMETRY)[-1]
    inputs = [condition for condition in run.conditions if condition.source is not None]
    latents = resolve_positions([p for condition in inputs for p in condition.place], len(run.timeline.starts), "place")
    unchanged = RoundTrip(clip.frames, clip.frames[:1], clip.frames[-1:], clip.other_frames)
    given, expected = match_given_frames(job, clip, unchanged, GEOMETRY)
    if job.cyclic:
        assert latents == tuple(range(len(latents)))
        count = (job.num_frames - 1) // GEOMETRY.temporal
        assert given == tuple(frame for latent in latents for frame in GEOMETRY.frames_of_ring(latent, count))
    else:
        assert given == tuple(frame for latent in latents for frame in GEOMETRY.frames_of(latent))
    assert len(expected) == (0 if "joint" in case.name else len(given))


START, END = tuple(range(7)), tuple(range(19, 31))
GIVEN = {
    "text_to_video": ((), ()),
    "image_to_video": ((0,), (0,)),
    "keyframes": ((0, *range(25, 31)), (0, *[30] * 6)),
    "extension": (tuple(range(13)), tuple(range(13))),
    "extension, preset mochi": (tuple(range(19)), tuple(range(19))),
    "extension backwards": (tuple(range(13, 31)), tuple(range(1, 19))),
    "completion": (START + END, START + END),
    "loop": ((), ()),
    "loop from a picture": (tuple(GEOMETRY.frames_of_ring(0, 5)), (0,) * 6),
    "loop from a clip": (
        tuple(frame for latent in range(3) for frame in GEOMETRY.frames_of_ring(latent, 5)),
        tuple(range(1, 19)),
    ),
    "long_video": ((), ()),
}


@pytest.mark.parametrize("name", GIVEN)
def test_given_frames_are_compared_with_the_frames_that_they_were_made_from(name, clip):
    case = next(case for case in CASES if case.name == name)
    unchanged = RoundTrip(clip.frames, clip.frames[:1], clip.frames[-1:], clip.other_frames)
    given, expected = match_given_frames(case.job(clip), clip, unchanged, GEOMETRY)
    frames, sources = GIVEN[name]
    assert given == frames and np.array_equal(expected, clip.frames[list(sources)])


def test_a_transition_is_compared_with_both_of_its_clips(clip):
    case = next(case for case in CASES if case.name == "transition")
    unchanged = RoundTrip(clip.frames, clip.frames[:1], clip.frames[-1:], clip.other_frames)
    given, expected = match_given_frames(case.job(clip), clip, unchanged, GEOMETRY)
    assert given == START + END
    assert np.array_equal(expected, np.concatenate([clip.frames[list(START)], clip.other_frames[list(END)]]))


@pytest.mark.parametrize("temporal", [3, 4])
def test_the_cases_fit_families_of_other_temporal_steps(temporal, clip, tmp_path):
    family = replace(FAMILY, geometry=replace(GEOMETRY, temporal=temporal))
    other = write_unseen_clip(clip.scene, tmp_path / "0", clip_length(family.geometry))
    unchanged = RoundTrip(other.frames, other.frames[:1], other.frames[-1:], other.other_frames)
    for case in quality_cases(family):
        if case.job:
            job = case.job(other)
            family.geometry.check(job.width, job.height, job.num_frames)
            match_given_frames(job, other, unchanged, family.geometry)


def test_models_of_different_backbones_are_not_compared():
    base, pusa = ModelSpec(weights="builtin:tiny"), ModelSpec(weights="builtin:tiny-pusa")
    with pytest.raises(ManifestError, match="base has backbone mochi, pusa has other; expected the same"):
        measure(base, pusa.model_copy(update={"backbone": "other"}))


def test_a_video_that_cannot_be_made_or_measured_costs_only_its_own_numbers(monkeypatch):
    base, pusa = (ModelSpec(weights=f"builtin:{name}") for name in ("tiny", "tiny-pusa"))
    decode = module.decode_job

    def fail(job, model, z_CFhw):
        if model.spec == pusa and job.cyclic:
            raise RuntimeError("no memory")
        return decode(job, model, z_CFhw)

    monkeypatch.setattr(module, "decode_job", fail)
    report = measure(base, pusa, count=2, steps=1, cases=(PICTURE, LOOP))
    assert all(values[1] == "-" != values[0] for _, *values in report.rows["loop"])
    assert not any("-" in values for _, *values in report.rows["image_to_video"])
    assert [line.split(":")[0] for line in report.failed] == ["pusa, loop, clip 0", "pusa, loop, clip 1"]
    with pytest.raises(PartlyFailed, match="2 videos failed"):
        report.require_all()


def test_the_page_has_the_same_numbers_as_the_printed_table(tmp_path):
    base, pusa = (ModelSpec(weights=f"builtin:{name}") for name in ("tiny", "tiny-pusa"))
    report = measure(base, pusa, count=2, steps=1, cases=(REFERENCE, PICTURE, LOOP))
    page, picture = report.write(tmp_path)
    assert Image.open(picture).size[0] > 600 and picture.stat().st_size < 350_000
    for name, *values in report.rows["image_to_video"]:
        assert all(value in line for line in report.text().splitlines() if line.strip() == name for value in values)
        assert f"| {name} | {' | '.join(values)} |" in page.read_text()
    assert ("first picture, dB", "99.00", "99.00") in report.rows["image_to_video"]
    assert report.rows["the clips themselves"][1] == ("colour as prompted", "2/2", "2/2")
