"""VBench finds each video with its whole prompt, under a name that leads nowhere else."""

import json
import os
import re

import pytest

from pusa.errors import MediaError, StageError
from pusa.evaluate.runs import read_run
from pusa.evaluate.vbench import name_videos, write_vbench
from tests.helpers.evaluated_runs import done, failed, put_run

PROMPTS = {
    "a": "a boat",
    "b": "A boat",
    "c": "../../etc/passwd",
    "d": "",
    "e": "x" * 9_000,
    "f": "été\x00\n\ud800 / \u202e",
    "g": "...",
    "h": "a boat-1",
    "i": "木" * 500,
}


def read_as_vbench_does(folder):
    """Return each video's prompt as `VBench.build_full_info_json` pairs them for a folder and a file of prompts."""
    prompts = json.loads((folder / "prompts.json").read_bytes())
    joined = {os.path.abspath(os.path.join(folder / "vbench", name)): prompt for name, prompt in prompts.items()}
    names = [name for name in os.listdir(folder / "vbench") if name.lower().endswith((".mp4", ".gif", ".jpg", ".png"))]
    videos = [os.path.abspath(folder / "vbench" / name) for name in names]
    assert len(prompts) >= len(videos)
    return {video: joined[video] for video in videos}


def test_each_name_is_safe_and_of_one_video_and_begins_with_the_prompt():
    names = name_videos(PROMPTS)
    assert list(names) == list(PROMPTS) and len({name.casefold() for name in names.values()}) == len(PROMPTS)
    for name in names.values():
        assert os.path.basename(name) == name and not name.startswith(".") and name.isprintable()
        assert len(name.encode()) <= 200 and re.search(r"-\d+\.mp4$", name)
    assert names["a"] == "a boat-0.mp4" and names["b"] == "A boat-1.mp4" and names["h"] == "a boat-1-0.mp4"
    assert names["d"] == "d-0.mp4" and names["g"] == "g-0.mp4" and names["c"] == "_.._etc_passwd-0.mp4"


def test_vbench_finds_the_videos_with_their_whole_prompts(tmp_path, small_video):
    jobs = {id: done(small_video, {}, prompt=prompt) for id, prompt in PROMPTS.items()}
    run = put_run(tmp_path / "run", {**jobs, "bad": failed()})
    rows = read_run(run)
    page = write_vbench(rows.values(), tmp_path / "out")
    found = read_as_vbench_does(tmp_path / "out")
    assert page.name == "prompts.json" and sorted(found.values()) == sorted(PROMPTS.values())
    for video in found:
        assert os.path.samefile(video, small_video)  # a hard link
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"vbench", "prompts.json", ".lock"}
    before = {path: path.read_bytes() for path in (run / "videos").glob("*.[jm]*")}
    (tmp_path / "out/vbench/old-0.mp4").touch()
    (tmp_path / "out/prompts.json").unlink()  # it was killed
    write_vbench([rows["a"]], tmp_path / "out")
    assert list(read_as_vbench_does(tmp_path / "out").values()) == ["a boat"]
    assert before == {path: path.read_bytes() for path in (run / "videos").glob("*.[jm]*")}


def test_a_video_is_copied_where_no_link_can_be_made(tmp_path, small_video, monkeypatch):
    def refuse(*paths):
        raise OSError(18, "another file system")

    monkeypatch.setattr(os, "link", refuse)
    run = put_run(tmp_path / "run", {"a": done(None, {})})
    (run / "videos/a.mp4").write_bytes(small_video.read_bytes())
    write_vbench(read_run(run).values(), tmp_path / "out")
    (copy,) = read_as_vbench_does(tmp_path / "out")
    assert not os.path.samefile(copy, run / "videos/a.mp4") and os.path.getsize(copy) == small_video.stat().st_size


def test_nothing_is_written_into_other_folders_or_without_a_video(tmp_path, small_video):
    rows = read_run(put_run(tmp_path / "run", {"a": done(small_video, {}), "b": failed()}))
    with pytest.raises(MediaError, match="no job has a video"):
        write_vbench([rows["b"]], tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    with pytest.raises(StageError, match=r"Pusa did not write it: it has 'thesis\.txt'"):
        write_vbench([rows["a"]], tmp_path / "mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.lock").touch()
    (tmp_path / "out/vbench").symlink_to(tmp_path / "mine")
    with pytest.raises(StageError, match="is a link"):
        write_vbench([rows["a"]], tmp_path / "out")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_another_run_that_is_named_as_the_folder_keeps_all_its_files(tmp_path, small_video):
    rows = read_run(put_run(tmp_path / "run", {"a": done(small_video, {})}))
    other = put_run(tmp_path / "other", {"a": done(small_video, {}), "b-0": done(small_video, {})})
    (other / ".lock").touch()  # as a run that Pusa made has
    before = {path: path.read_bytes() for path in (other / "videos").rglob("*") if path.is_file()}
    write_vbench(rows.values(), other)
    assert before == {path: path.read_bytes() for path in (other / "videos").rglob("*") if path.is_file()}
