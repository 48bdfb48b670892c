import json
import os
import shutil

import numpy as np
import pytest

from pusa.data.reader import Table
from pusa.errors import ManifestError, StageError
from pusa.ingest import frame_windows, ingest
from pusa.manifest import ClipRule, IngestManifest
from pusa.video import write_video

RULE = ClipRule(num_frames=31, width=64, height=64, fps=24)


@pytest.fixture
def videos(drawn, tmp_path):
    """Three good clips, to be added to."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for path in sorted((drawn / "videos").glob("000[0-2].*")):
        shutil.copy(path, folder)
    return folder


def run(source, folder, rule=RULE):
    result = ingest(IngestManifest(source=source, clips=rule), folder / "run")
    return result, Table.open(result.table)


def test_every_source_is_a_clip_or_a_reject_with_its_reason(videos, tmp_path):
    (videos / "empty.mp4").write_bytes(b"")
    (videos / "text.mp4").write_text("this is no video")
    whole = (videos / "0000.mp4").read_bytes()
    (videos / "torn.mp4").write_bytes(whole[: len(whole) // 3])
    for name in ("empty", "text", "torn"):
        (videos / f"{name}.txt").write_text("a caption")
    shutil.copy(videos / "0001.mp4", videos / "silent.mp4")
    write_video(videos / "short.mp4", np.zeros((5, 64, 64, 3), np.uint8), 24)
    (videos / "short.txt").write_text("five frames")
    result, table = run(videos, tmp_path)
    assert (result.sources, result.clips, result.rejects) == (8, 3, 5)
    reasons = {row["source"].rsplit("/", 1)[1]: row["reason"] for row in table.read("rejects").to_pylist()}
    assert reasons == {
        "empty.mp4": "unreadable",
        "text.mp4": "unreadable",
        "torn.mp4": "unreadable",
        "silent.mp4": "no_caption",
        "short.mp4": "too_short",
    }
    clip = table.read("clips").to_pylist()[0]
    assert clip["clip_id"] == "0000.mp4@0" and clip["frames"] == list(range(31))
    assert clip["caption"] == (videos / "0000.txt").read_text().strip()


def test_again_it_does_nothing_until_something_changed(videos, tmp_path):
    assert not run(videos, tmp_path)[0].skipped
    assert run(videos, tmp_path)[0].skipped
    (videos / "0000.txt").write_text("another caption")
    result, table = run(videos, tmp_path)
    assert not result.skipped and table.read("clips")["caption"][0].as_py() == "another caption"


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_names_the_videos(videos, tmp_path, kind):
    rows = [{"file_name": "0000.mp4", "text": "one, two"}, {"file_name": "gone.mp4", "text": "not there"}]
    if kind == "csv":
        (videos / "metadata.csv").write_text('file_name,text\n0000.mp4,"one, two"\ngone.mp4,not there\n')
    else:
        (videos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result, table = run(videos, tmp_path)
    assert (result.clips, result.rejects) == (1, 1)
    clip = table.read("clips").to_pylist()[0]
    assert (clip["caption"], clip["caption_from"]) == ("one, two", f"metadata.{kind}:1")


def test_bad_rows_and_bad_captions_are_rejects_and_the_rest_goes_on(videos, tmp_path):
    rows = ['{"text": "no file"}', '{"file_name": 5}', "no json", '{"file_name": "0000.mp4", "text": 5}']
    rows += ['{"file_name": "0001.mp4", "text": "good"}', '{"file_name": "0001.mp4", "text": "again"}', ""]
    (videos / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + "\n".join(rows).encode())
    result, table = run(videos, tmp_path)
    assert (result.sources, result.clips, result.rejects) == (6, 1, 5)
    reasons = table.read("rejects")["reason"].to_pylist()
    assert reasons == ["bad_row", "bad_row", "bad_row", "bad_caption", "bad_row"]
    assert table.read("clips")["caption"].to_pylist() == ["good"]


def test_captions_and_names_that_are_not_utf8(videos, tmp_path):
    (videos / "0000.txt").write_bytes("caf\u00e9".encode("latin-1"))
    shutil.copy(videos / "0001.mp4", os.fsencode(videos) + b"/\xff.mp4")
    (videos / ".partial-1-0001.mp4").write_text("what a killed run left")
    result, table = run(videos, tmp_path)
    assert (result.clips, result.rejects) == (2, 2)
    rejects = {row["source"].rsplit("/", 1)[1]: row["reason"] for row in table.read("rejects").to_pylist()}
    assert rejects == {"0000.mp4": "bad_caption", "\\xff.mp4": "bad_name"}


def test_metadata_that_cannot_be_read_and_a_missing_source_are_named(videos, tmp_path):
    (videos / "metadata.csv").write_bytes("file_name,text\n0000.mp4,caf\u00e9\n".encode("latin-1"))
    with pytest.raises(ManifestError, match=r"metadata\.csv cannot be read"):
        run(videos, tmp_path)
    with pytest.raises(ManifestError, match="neither a folder nor"):
        run(tmp_path / "nowhere", tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(ManifestError, match="holds no videos"):
        run(tmp_path / "none", tmp_path)


def test_killed_between_shard_and_index_nothing_mixes(videos, tmp_path, monkeypatch):
    run(videos, tmp_path)
    caption = (videos / "0000.txt").read_text()
    stat = (videos / "0000.txt").stat()
    (videos / "0000.txt").write_text("another caption")
    monkeypatch.setattr("pusa.ingest.write_index", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(videos, tmp_path)
    monkeypatch.undo()
    (videos / "0000.txt").write_text(caption)
    os.utime(videos / "0000.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    result, table = run(videos, tmp_path)
    assert result.skipped and table.read("clips")["caption"][0].as_py() == caption.strip()


def test_a_torn_shard_is_made_again(videos, tmp_path):
    _, table = run(videos, tmp_path)
    path = table.folder / table.parts["clips"][0]["name"]
    path.write_bytes(path.read_bytes()[:-100])
    result, table = run(videos, tmp_path)
    assert not result.skipped and table.read("clips").num_rows == 3


def test_no_clip_at_all_is_an_error(tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "v/a.mp4").write_text("x")
    with pytest.raises(StageError, match="no_caption"):
        run(tmp_path / "v", tmp_path)


def test_retiming_takes_the_nearest_frame_and_is_counted(videos, tmp_path):
    result, table = run(videos, tmp_path, ClipRule(num_frames=13, width=64, height=64, fps=12))
    assert result.retimed_sources == 3
    assert table.read("clips")["frames"][0].as_py() == list(range(0, 26, 2))


def test_windows():
    rule = ClipRule(num_frames=7, fps=None, windows="all")
    assert frame_windows(22, 30, rule) == [list(range(s, s + 7)) for s in (0, 7, 14)]
    assert frame_windows(6, 30, rule) == []
    slow = frame_windows(4, 12, ClipRule(num_frames=7, fps=24))
    assert slow == [[0, 0, 1, 1, 2, 2, 3]]
