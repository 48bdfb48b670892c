"""The drawn world: scenes, clips, captions, and the data set on disk."""

import numpy as np
import pytest

from pusa.backbones import DEFAULT_BACKBONE, find_family
from pusa.backbones.family import Geometry
from pusa.backbones.tiny_recipe import find_tiny_recipe
from pusa.evaluate.pixels import recognize
from pusa.tiny.dataset import MEDIA, draw_dataset
from pusa.tiny.shapes import MOTIONS, SHAPES, Scene, clip_length, draw, random_scene, scenes
from pusa.tiny.training import new_tokenizer
from pusa.video.compare import psnr, seam
from pusa.video.media import probe, read_frames


def test_a_scene_and_its_drawing_depend_on_the_seed_alone():
    assert random_scene(5) == random_scene(5)
    assert np.array_equal(draw(random_scene(5)), draw(random_scene(5)))
    assert len({scene.caption for scene in scenes(0, 100)}) > 50


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("motion", MOTIONS)
def test_every_drawn_scene_is_recognized(shape, motion):
    for seed in range(3):
        for colour, ground in (("red", "dark"), ("yellow", "light")):
            scene = Scene(((colour, shape),), motion, ground, seed)
            assert all(recognize(draw(scene)).matches(scene).values()), (scene, recognize(draw(scene)))


def test_a_blob_has_no_shape_and_an_empty_clip_no_colour():
    rng = np.random.default_rng(0)
    clip = draw(Scene((("red", "square"),), "left", "dark", 0))
    blob = clip.copy()
    blob[:, rng.random((64, 64)) < 0.5] = clip[0, 0, 0]
    assert recognize(blob).shape is None
    assert recognize(np.zeros_like(clip)).colour is None


def test_the_tokenizer_knows_every_word_of_every_caption():
    max_tokens = find_tiny_recipe(DEFAULT_BACKBONE).max_tokens["tokenizer"]
    tokenizer = new_tokenizer(max_tokens)
    for scene in scenes(0, 300):
        ids = tokenizer(scene.caption).input_ids
        assert tokenizer.unk_token_id not in ids and len(ids) <= max_tokens
    assert tokenizer.unk_token_id in tokenizer("a purple circle").input_ids


def test_the_data_set_is_written_as_video_once(tmp_path):
    draw_dataset(tmp_path, 2)
    path = tmp_path / "videos/0001.mp4"
    facts = probe(path)
    assert (facts.num_frames, facts.fps, facts.width, facts.height) == (31, 24, 64, 64)
    made = path.stat().st_mtime_ns
    draw_dataset(tmp_path, 2)
    assert path.stat().st_mtime_ns == made
    scene = MEDIA["ball"]
    assert psnr(read_frames(tmp_path / "media/ball.mp4", range(31)), draw(scene)) > 30


def test_the_seam_of_a_cut_is_large_and_of_motion_about_1():
    a, b = (draw(Scene(((colour, "circle"),), "left", "dark", 0)) for colour in ("red", "blue"))
    assert seam(a, 10) == pytest.approx(1, abs=0.3)
    assert seam(np.concatenate([a[:11], b[11:]]), 10) > 5


def test_clips_have_the_longest_length_that_a_geometry_allows():
    assert clip_length(find_family().geometry) == 31
    assert clip_length(Geometry(spatial=8, temporal=4, patch=2, channels=16)) == 29
