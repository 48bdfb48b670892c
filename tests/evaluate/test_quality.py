"""The numbers of the quality report: on clips whose answer is known, and the report as a whole."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pusa.evaluate.cases import CASES, _frames_of, _in_loop
from pusa.evaluate.measure import measure
from pusa.evaluate.metrics import GEOMETRY, RING_JOIN, Result
from pusa.evaluate.quality import drift, flicker, jerk, largest, look, sharpness, shown, travel
from pusa.evaluate.unseen import store, unseen_scenes
from pusa.manifest.models import ModelSpec
from pusa.tasks.base import resolve_positions
from pusa.tiny.shapes import Scene, draw
from pusa.video.compare import seam

SCENE = Scene((("red", "circle"),), "left", "dark", seed=3)
CLIP = draw(SCENE)
REFERENCE, PICTURE = CASES[0], next(case for case in CASES if case.name == "image_to_video")
LOOP = next(case for case in CASES if case.name == "loop")


def circling(frames: int = 30, size: int = 64) -> np.ndarray:
    """A soft blob that goes round once: a perfect loop."""
    angle = 2 * np.pi * np.arange(frames)[:, None, None] / frames
    x, y = np.meshgrid(np.arange(size), np.arange(size))
    distance = np.hypot(x - size / 2 - 12 * np.cos(angle), y - size / 2 - 12 * np.sin(angle))
    grey = 220 / (1 + np.exp(distance - 10))
    return np.repeat(grey[..., None], 3, -1).round().astype(np.uint8)


def test_a_perfect_loop_has_seam_and_jerk_1_at_the_wrap_and_at_the_join_of_the_ring():
    loop = circling()
    assert seam(loop, -1, cyclic=True) == pytest.approx(1, abs=0.05)
    assert jerk(loop) == pytest.approx(1, abs=0.1)
    assert largest(loop, cyclic=True) < 1.1
    assert RING_JOIN.of(Result(loop, None, None, cyclic=True)) == pytest.approx(1, abs=0.05)


def test_a_jump_is_seen_where_it_is():
    half = circling()[:15]
    assert seam(half, -1, cyclic=True) > 3
    assert jerk(half) > 3
    cut = np.concatenate([CLIP[:10], CLIP[20:]])
    assert seam(cut, 9) > 3 and seam(cut, 5) < 1
    assert largest(cut) > 3 > largest(CLIP)


def test_a_loop_that_swings_back_is_told_from_one_that_goes_on():
    there = circling()[:16]
    there_and_back = np.concatenate([there, there[-2:0:-1]])
    assert seam(there_and_back, -1, cyclic=True) == pytest.approx(1, abs=0.2)
    assert jerk(there_and_back) > 1.4


def test_several_seams_are_the_mean_and_can_be_held_against_chosen_places():
    frames = np.zeros((6, 4, 4, 3), np.uint8) + np.array([0, 1, 2, 6, 7, 11], np.uint8)[:, None, None, None]
    assert seam(frames, 2, 4) == pytest.approx(4)
    assert seam(frames, 2, among=[4]) == pytest.approx(1)


def test_the_flicker_of_noisy_ground_is_its_mean_change_and_a_moving_shape_does_not_count():
    assert flicker(CLIP) == 0
    sign = np.where(np.arange(len(CLIP)) % 2, 2, -2)[:, None, None, None]
    assert flicker((CLIP.astype(int) + sign).clip(0, 255).astype(np.uint8)) == pytest.approx(4, abs=0.01)


def test_travel_is_what_was_drawn():
    assert 0.36 <= travel(CLIP) <= 0.44
    assert travel(np.repeat(CLIP[:1], 9, 0)) == 0
    assert travel(np.zeros_like(CLIP)) == 0


def test_drift_is_none_of_a_repeated_clip_and_the_difference_of_colours_otherwise():
    assert drift(CLIP, CLIP) == (0, 0)
    ground, shape = drift(CLIP, CLIP + np.uint8(6))
    assert ground == shape == pytest.approx(6)
    gone = np.broadcast_to(CLIP[0, 0, 0], CLIP.shape)
    assert drift(CLIP, gone)[1] > 50


def test_blur_is_less_sharp():
    blurred = np.mean([np.roll(CLIP, shift, (1, 2)) for shift in range(4)], 0)
    assert sharpness(blurred) < 0.8 * sharpness(CLIP)


def test_each_frame_is_looked_at():
    assert shown(CLIP, SCENE) == 1
    other = draw(replace(SCENE, things=(("blue", "square"),)))
    assert shown(np.concatenate([CLIP, other]), SCENE) == 0.5
    assert shown(np.concatenate([CLIP, np.broadcast_to(CLIP[0, 0, 0], CLIP.shape)]), SCENE) == 0.5
    assert all(look(CLIP).agrees(SCENE).values())


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return store(unseen_scenes(1)[0], tmp_path_factory.mktemp("clip") / "0")


@pytest.mark.parametrize("case", [case for case in CASES if case.job], ids=lambda case: case.name)
def test_the_given_frames_of_a_case_are_those_of_its_job(case, clip):
    job = case.job(clip)
    run = job.passes(GEOMETRY)[-1]
    given = [condition for condition in run.conditions if condition.source is not None]
    latents = resolve_positions([p for condition in given for p in condition.place], len(run.timeline.starts), "place")
    if job.cyclic:
        assert latents == tuple(range(len(latents)))
        assert case.given == _in_loop(len(latents), job.num_frames - 1)
    else:
        assert case.given == _frames_of(*latents)


def test_the_report_is_written_with_the_same_numbers_as_it_prints(tmp_path):
    base, pusa = (ModelSpec(weights=f"builtin:{name}") for name in ("tiny", "tiny-pusa"))
    report = measure(base, pusa, count=2, steps=1, cases=(REFERENCE, PICTURE, LOOP))
    page, picture = report.write(tmp_path)
    assert Image.open(picture).size[0] > 600 and picture.stat().st_size < 350_000
    for name, *values in report.rows["image_to_video"]:
        assert all(value in line for line in report.text().splitlines() if line.strip() == name for value in values)
        assert f"| {name} | {' | '.join(values)} |" in page.read_text()
    assert ("first picture, dB", "99.00", "99.00") in report.rows["image_to_video"]
    assert report.rows["the clips themselves"][1] == ("colour as prompted", "2/2", "2/2")
