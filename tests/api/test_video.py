"""What a video gives to Python code: exact pixels, other formats, a line of text, and a part of a page."""

import doctest
import re

import numpy as np
import pytest
from PIL import Image

import pusa.api
from pusa.api import video as video_module
from pusa.api.models import LoadedModel
from pusa.api.video import Video
from pusa.errors import MediaError
from pusa.video.media import probe, read_frames
from tests.helpers.stub_model import SIZE, TINY, StubModel


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Video:
    return LoadedModel(StubModel(TINY), tmp_path_factory.mktemp("run"), SIZE).generate(prompt="<b>", fps=12)


def test_the_example_of_the_documentation_runs():
    result = doctest.testmod(pusa.api)
    assert result.attempted > 10 and not result.failed


def test_frames_are_the_pixels_that_the_model_decodes(video):
    expected = np.concatenate(list(StubModel(TINY).decode_chunks(video.latents)))
    assert np.array_equal(video.frames, expected) and video.frames is video.frames
    decoded = read_frames(video.path, range(len(expected)))
    assert decoded.shape == expected.shape and np.abs(decoded.astype(int) - expected).mean() < 8
    assert (video.fps, video.seconds) == (12, len(expected) / 12)


def test_a_video_is_saved_in_each_format(video, tmp_path):
    saved = {name: video.save(tmp_path / "new" / name) for name in ("a.mp4", "a.webm", "a.GIF", "a.mkv", "frames")}
    assert saved["a.mp4"].read_bytes() == video.path.read_bytes()
    assert np.array_equal(read_frames(saved["a.mkv"], range(7)), video.frames)
    pictures = [np.array(Image.open(path)) for path in sorted(saved["frames"].iterdir())]
    assert np.array_equal(pictures, video.frames)
    assert probe(saved["a.webm"]).num_frames == 7 and Image.open(saved["a.GIF"]).n_frames >= 1
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.GIF", "a.mkv", "a.mp4", "a.webm", "frames"]
    assert video.save(str(tmp_path / "new/a.gif")).exists() and video.save(tmp_path / "new/a.gif").exists()  # again


@pytest.mark.parametrize(
    ("name", "message"), [("a.avi", "expected a name that ends in .mp4, .webm"), ("full", "full is not empty")]
)
def test_other_formats_and_full_folders_are_refused(video, tmp_path, name, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").touch()
    with pytest.raises(MediaError, match=message):
        video.save(tmp_path / name)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine.txt"]


def test_a_gif_of_too_many_frames_per_second_is_refused(tmp_path):
    fast = LoadedModel(StubModel(TINY), tmp_path / "run", SIZE).generate(fps=60)
    with pytest.raises(MediaError, match=r"60 frames per second, and a gif 50 at most"):
        fast.save(tmp_path / "a.gif")


def test_a_notebook_shows_the_video_itself_or_where_a_large_one_is(video, monkeypatch):
    assert re.fullmatch(r"<Video text_to_video-\w{8}: 32x32, 12 fps, seed 0, /.*\.mp4>", repr(video))
    page = video._repr_html_()
    assert "<video controls loop" in page and "data:video/mp4;base64,AAAA" in page
    monkeypatch.setattr(video_module, "LARGEST_SHOWN", 10)
    page = video._repr_html_()
    assert "too many for this page" in page and "video/mp4" not in page and video.path.as_uri() in page
    assert '<img src="data:image/jpeg;base64,/9j/' in page


def test_what_is_gone_is_reported(tmp_path):
    video = LoadedModel(StubModel(TINY), tmp_path, SIZE).generate()
    video.path.with_name(f"{video.id}.latents.safetensors").unlink()
    with pytest.raises(MediaError, match="latents"):
        video.frames  # noqa: B018
