"""The gallery is made whatever the sidecars and videos beside it are, and shows their texts as texts."""

import json

import numpy as np
import pytest

from pusa.generate.gallery import write_gallery, write_sheet
from pusa.video.media import read_image, write_video
from tests.helpers.pages import Page

HOSTILE = "</figcaption><script>alert(1)</script><img src=http://a.b/c.png onerror=x>\x1b[2J\u202e\ud800"
DEEP = "[" * 900 + "]" * 900
SIDECARS = {
    "no JSON": b"\x00\xff",
    "a list": b"[1]",
    "a text": b'"done"',
    "other types": b'{"id": [1], "status": ["done"], "error": {"a": 1}, "job": [1]}',
    "a job of other types": b'{"status": "done", "job": {"task": [1], "prompt": {"a": 1}, "seed": 1e999}}',
    "a deep job": f'{{"job": {{"image": {DEEP}, "prompt": {DEEP}}}, "error": {DEEP}}}'.encode(),
    "too deep": b"[" * 100_000,
    "a long error": json.dumps({"error": "x" * 1_000_000}).encode(),
    "hostile": json.dumps(
        {"id": HOSTILE, "error": HOSTILE, "job": dict.fromkeys(("task", "prompt", HOSTILE), HOSTILE)}
    ).encode(),
}


@pytest.mark.parametrize("content", SIDECARS.values(), ids=SIDECARS)
def test_a_sidecar_of_another_shape_is_shown_as_far_as_it_goes(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    text = write_gallery(tmp_path, ["a", "missing"]).read_text(encoding="utf-8")
    page = Page(text)
    assert len(text) < 20_000 and text.isascii()
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert len(page.of("figure")) == 2 and page.text.count("not made") >= 1
    assert read_image(write_sheet(tmp_path, ["a", "missing"])).shape == (1, 1, 1, 3)


def test_a_page_loads_nothing_but_the_videos_beside_it(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"status": "done", "job": {"prompt": HOSTILE}}))
    page = Page(write_gallery(tmp_path, ["a"]).read_text())
    (policy,) = (tag["content"] for tag in page.of("meta") if tag.get("http-equiv") == "Content-Security-Policy")
    assert policy.split("; ")[:2] == ["default-src 'none'", "media-src 'self' file:"]
    assert [video["src"] for video in page.of("video")] == ["a.mp4"]


def test_a_video_that_cannot_be_read_is_left_out_of_the_sheet(tmp_path):
    for name in ("folder", "empty", "good"):
        (tmp_path / f"{name}.json").write_text('{"status": "done"}')
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "empty.mp4").touch()
    write_video(tmp_path / "good.mp4", np.full((9, 64, 96, 3), 200, np.uint8), 8)
    assert read_image(write_sheet(tmp_path, ["folder", "empty", "good"])).shape[1] == 100
