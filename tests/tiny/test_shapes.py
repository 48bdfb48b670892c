import numpy as np
import pytest

from pusa.evaluate.quality import look
from pusa.tiny.dataset import MEDIA, draw_dataset
from pusa.tiny.shapes import MOTIONS, SHAPES, Scene, draw, random_scene, scenes
from pusa.tiny.text import MAX_TOKENS, new_tokenizer
from pusa.video.compare import psnr, seam
from pusa.video.media import probe, read_frames


def test_a_scene_is_a_pure_function_of_its_seed():
    assert random_scene(5) == random_scene(5)
    assert np.array_equal(draw(random_scene(5)), draw(random_scene(5)))
    assert len({scene.caption for scene in scenes(0, 100)}) > 50


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("motion", MOTIONS)
def test_what_is_drawn_is_what_is_seen(shape, motion):
    for seed in range(3):
        for colour, ground in (("red", "dark"), ("yellow", "light")):
            scene = Scene(((colour, shape),), motion, ground, seed)
            assert all(look(draw(scene)).agrees(scene).values()), (scene, look(draw(scene)))


def test_a_blob_is_no_shape_and_nothing_is_nothing():
    rng = np.random.default_rng(0)
    clip = draw(Scene((("red", "square"),), "left", "dark", 0))
    blob = clip.copy()
    blob[:, rng.random((64, 64)) < 0.5] = clip[0, 0, 0]
    assert look(blob).shape is None
    assert look(np.zeros_like(clip)).colour is None


def test_the_tokenizer_knows_every_word_of_every_caption():
    tokenizer = new_tokenizer()
    for scene in scenes(0, 300):
        ids = tokenizer(scene.caption).input_ids
        assert tokenizer.unk_token_id not in ids and len(ids) <= MAX_TOKENS
    assert tokenizer.unk_token_id in tokenizer("a purple circle").input_ids


def test_the_data_set_is_real_video_and_is_drawn_once(tmp_path):
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
