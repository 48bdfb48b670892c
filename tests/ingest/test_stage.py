import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from pusa.data.reader import Table
from pusa.errors import ManifestError
from pusa.ingest.stage import ingest
from pusa.manifest.models import ClipSettings, IngestManifest
from tests.helpers.media import ffmpeg, sound, variable, video

SHAPE = {"num_frames": 31, "width": 64, "height": 64}
CLIP_SETTINGS = ClipSettings(**SHAPE)


@pytest.fixture
def videos(drawn, tmp_path):
    """Three good clips with captions. Tests add more files."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for path in sorted((drawn / "videos").glob("000[0-2].*")):
        shutil.copy(path, folder)
    return folder


def run(source, folder, clip_settings=CLIP_SETTINGS, **settings):
    """Ingest and check that every source is accounted for. Return the result and the table."""
    result = ingest(IngestManifest(source=source, clips=clip_settings, **settings), folder / "run")
    table = Table.open(result.table)
    facts = table.facts
    assert facts["sources_with_clips"] + result.rejects == result.sources == facts["sources"]
    assert sum(facts["rejects_by_reason"].values()) == result.rejects
    return result, table


def reasons(table):
    return {row["source"].rsplit("/", 1)[1]: row["reason"] for row in table.read("rejects").to_pylist()}


def decoded(caplog):
    """Return how many sources the last run decoded, and clear the log."""
    counts = [int(message.split()[0]) for message in caplog.messages if message.endswith("are to be decoded")]
    caplog.clear()
    return counts[-1]


BAD = {
    "zero.mp4": "empty_file",
    "text.mp4": "not_a_video",
    "torn.mp4": "damaged",
    "sound.mp4": "no_video_stream",
    "one.mp4": "too_short",
    "large.mp4": "too_large",
    "long.mp4": "too_long",
    "picture.png": "not_a_video",
    "orphan.txt": "not_a_video",
    "pipe.mp4": "unreadable",
    "silent.mp4": "no_caption",
    "blank.mp4": "no_caption",
    "talkative.mp4": "bad_caption",
    "latin.mp4": "bad_caption",
    "\\xff.mp4": "bad_name",
    "double.mp4": "duplicate",
}


def add_bad_sources(folder):
    """Add one source of every bad kind to a folder of good videos."""
    whole = (folder / "0000.mp4").read_bytes()
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is not a video")
    (folder / "torn.mp4").write_bytes(whole[: len(whole) // 2])
    sound(folder / "sound.mp4")
    video(folder / "one.mp4", count=1)
    video(folder / "large.mp4", size=(256, 128))
    video(folder / "long.mp4", count=100, fps=10)
    (folder / "picture.png").write_bytes(b"\x89PNG")
    os.mkfifo(folder / "pipe.mp4")
    for seed, name in enumerate(("silent", "blank", "talkative", "latin"), 1):
        video(folder / f"{name}.mp4", seed=seed, caption=None)
    (folder / "blank.txt").write_text(" \n")
    (folder / "talkative.txt").write_text("word " * 20_000)
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    for name in ("zero", "text", "torn", "sound", "pipe", "orphan", "double"):
        (folder / f"{name}.txt").write_text("a caption")
    shutil.copy(folder / "0001.mp4", os.fsencode(folder) + b"/\xff.mp4")
    shutil.copy(folder / "0001.mp4", folder / "double.mp4")


def test_every_source_gives_clips_or_a_reject_with_its_reason(videos, tmp_path):
    add_bad_sources(videos)
    odd = "new\nline \"quoted\" 'twice'; $(rm) %d.MP4"
    shutil.copy(videos / "0002.mp4", videos / odd)
    (videos / odd).with_suffix(".TXT").write_text("an odd name")
    (videos / "0002.mp4").unlink()
    (videos / "0002.txt").unlink()
    (videos / ".partial-1-0001.mp4").write_text("left by a killed run")
    result, table = run(videos, tmp_path, limits={"source_seconds": 5, "source_pixels": 128 * 128})
    assert reasons(table) == BAD
    assert (result.sources, result.clips, result.rejects) == (3 + len(BAD), 3, len(BAD))
    assert table.read("clips")["clip_id"].to_pylist() == ["0000.mp4@0", "0001.mp4@0", f"{odd}@0"]
    assert all(row["detail"] for row in table.read("rejects").to_pylist())


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_files_without_read_permission_are_rejects(videos, tmp_path):
    (videos / "0000.mp4").chmod(0)
    (videos / "0001.txt").chmod(0)
    assert reasons(run(videos, tmp_path)[1]) == {"0000.mp4": "unreadable", "0001.mp4": "bad_caption"}


def test_a_row_describes_the_clip_and_its_source(videos, tmp_path):
    result, table = run(videos, tmp_path)
    clip = table.read("clips").to_pylist()[0]
    assert clip["frames"] == list(range(31)) and clip["bucket"] == "64x64x31"
    assert (clip["box"], clip["fit"], clip["pixel_aspect"]) == ([0, 0, 64, 64], "crop", 1)
    assert (clip["source_width"], clip["source_height"], clip["source_fps"], clip["fps"]) == (64, 64, 24, 24)
    assert clip["caption"] == (videos / "0000.txt").read_text().strip() and clip["caption_from"] == "0000.txt"
    assert result.retimed_frames == 0 and table.facts["decoders"] == {clip["decoder"]: 3}


def test_a_rerun_does_nothing_until_something_changes(videos, tmp_path):
    assert not run(videos, tmp_path)[0].skipped
    assert run(videos, tmp_path)[0].skipped
    assert run(videos, tmp_path, workers=7)[0].skipped
    (videos / "0000.txt").write_text("another caption")
    result, table = run(videos, tmp_path)
    assert not result.skipped and table.read("clips")["caption"][0].as_py() == "another caption"


def test_only_new_and_changed_files_are_decoded(videos, tmp_path, caplog):
    caplog.set_level(logging.INFO, "pusa.ingest.stage")
    run(videos, tmp_path)
    (videos / "0000.txt").write_text("another caption")
    run(videos, tmp_path)
    assert decoded(caplog) == 0
    video(videos / "new.mp4")
    run(videos, tmp_path)
    assert decoded(caplog) == 1
    video(videos / "0001.mp4", seed=5)
    _, table = run(videos, tmp_path)
    assert decoded(caplog) == 1
    run(videos, tmp_path / "afresh")
    afresh = Table.open(tmp_path / "afresh/run/clips")
    assert table.read("clips") == afresh.read("clips")
    run(videos, tmp_path, ClipSettings(**{**SHAPE, "num_frames": 13}))
    run(videos, tmp_path)
    assert decoded(caplog) == 0, "each set of clip settings has its own ledger"


def test_transient_rejects_are_tried_again(videos, tmp_path, caplog):
    caplog.set_level(logging.INFO, "pusa.ingest.stage")
    os.mkfifo(videos / "late.mp4")
    (videos / "late.txt").write_text("not there yet")
    assert reasons(run(videos, tmp_path)[1]) == {"late.mp4": "unreadable"}
    assert not run(videos, tmp_path)[0].skipped
    assert decoded(caplog) == 1
    (videos / "late.mp4").unlink()
    video(videos / "late.mp4")
    assert run(videos, tmp_path)[0].clips == 4
    assert run(videos, tmp_path)[0].skipped


def slow(folder):
    """Add a video that takes a minute to decode. Making it is quick."""
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=640x480:r=30:d=2", "-preset", "ultrafast", folder / "part.mp4")
    ffmpeg("-stream_loop", 900, "-i", folder / "part.mp4", "-c", "copy", folder / "slow.mp4")
    (folder / "part.mp4").unlink()
    (folder / "slow.txt").write_text("a test")


def test_a_decoder_that_exceeds_the_time_limit_is_a_reject(videos, tmp_path):
    slow(videos)
    assert reasons(run(videos, tmp_path, limits={"decoding_seconds": 5})[1]) == {"slow.mp4": "timeout"}


INGEST_IN_CHUNKS = """
import functools, os, signal, sys
from pathlib import Path
from pusa.ingest import stage
from pusa.ingest.verdicts import Ledger
from pusa.manifest.models import ClipSettings, IngestManifest
Ledger.open = functools.partial(Ledger.open, chunk=2, seconds=1e9)
{patch}
clip_settings = ClipSettings(num_frames=31, width=64, height=64)
stage.ingest(IngestManifest(source=sys.argv[1], clips=clip_settings, workers=1), Path(sys.argv[2]))
"""
DIE_AFTER_THE_FIRST_CHUNK = """
write = Ledger._write
def write_and_die(ledger, table):
    write(ledger, table)
    os.kill(os.getpid(), signal.SIGKILL)
Ledger._write = write_and_die
"""
REPORT_PROGRESS = """
judge, add = stage.judge, Ledger.add
def report(what, name):  # two threads do; `print` writes the end of a line by itself, so that two lines can mix
    os.write(1, f"{what} {name}\\n".encode())
def judge_and_report(source, *arguments):
    report("begun", source.path.name)
    verdict = judge(source, *arguments)
    report("ended", f"{source.path.name} {verdict['reason']}")
    return verdict
def add_and_report(ledger, verdict):
    add(ledger, verdict)
    report("added", Path(verdict["path"]).name)
stage.judge, Ledger.add = judge_and_report, add_and_report
"""


def start_ingest(videos, tmp_path, patch):
    command = [sys.executable, "-c", INGEST_IN_CHUNKS.format(patch=patch), str(videos), str(tmp_path / "run")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_rerun_after_a_kill_decodes_only_the_rest(videos, tmp_path, caplog):
    caplog.set_level(logging.INFO, "pusa.ingest.stage")
    for seed in range(12):
        video(videos / f"more{seed}.mp4", seed=seed)
    child = start_ingest(videos, tmp_path, DIE_AFTER_THE_FIRST_CHUNK)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert not (tmp_path / "run/clips/index.json").exists()
    assert run(videos, tmp_path)[0].clips == 15
    assert decoded(caplog) == 13
    assert [path.suffix for path in (tmp_path / "run/clips/ledger").glob("*.*[!k]")] == [".parquet"]


def test_an_interrupt_does_not_wait_for_the_decoder_and_keeps_all_verdicts(videos, tmp_path):
    slow(videos)
    child = start_ingest(videos, tmp_path, REPORT_PROGRESS)
    awaited = {"begun slow.mp4", "added 0002.mp4"}
    while awaited:
        line = child.stdout.readline()
        assert line, child.stderr.read()
        awaited.discard(line.strip())
    child.send_signal(signal.SIGINT)
    output, errors = child.communicate()
    # While the interpreter exits it kills the decoders, whose threads may still report that: as a reject.
    assert "KeyboardInterrupt" in errors and "ended slow.mp4 None" not in output
    stored = pq.read_table(next((tmp_path / "run/clips/ledger").glob("*-00000002-*.parquet")))["path"].to_pylist()
    assert stored == [str(videos / "0002.mp4")], "verdicts that were not yet written when the interrupt came"


@pytest.fixture
def full_disk():
    """Limit the size of files, as a full disk does. The value ends the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_error_with_the_file_name_and_a_rerun_resumes(videos, tmp_path, full_disk):
    with pytest.raises(OSError, match=r"run/clips/ledger/.*\.parquet"):
        run(videos, tmp_path)
    assert not list((tmp_path / "run").rglob("*.parquet"))
    full_disk()
    assert run(videos, tmp_path)[0].clips == 3


def test_shards_of_a_run_that_died_before_its_index_are_not_used(videos, tmp_path, monkeypatch):
    run(videos, tmp_path)
    caption = (videos / "0000.txt").read_text()
    (videos / "0000.txt").write_text("another caption")
    monkeypatch.setattr("pusa.ingest.stage.write_index", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(videos, tmp_path)
    monkeypatch.undo()
    (videos / "0000.txt").write_text(caption)
    result, table = run(videos, tmp_path)
    assert result.skipped and table.read("clips")["caption"][0].as_py() == caption.strip()


def test_a_truncated_shard_is_written_again(videos, tmp_path):
    _, table = run(videos, tmp_path)
    path = table.folder / table.parts["clips"][0]["name"]
    path.write_bytes(path.read_bytes()[:-100])
    result, table = run(videos, tmp_path)
    assert not result.skipped and table.read("clips").num_rows == 3


def test_many_clips_are_written_as_several_shards(videos, tmp_path, monkeypatch):
    monkeypatch.setattr("pusa.ingest.stage.SHARD_ROWS", 2)
    _, table = run(videos, tmp_path)
    assert [shard["rows"] for shard in table.parts["clips"]] == [2, 1]
    assert table.read("clips")["clip_id"].to_pylist() == ["0000.mp4@0", "0001.mp4@0", "0002.mp4@0"]


def test_a_missing_file_is_unreadable_and_not_without_caption(videos, tmp_path):
    (videos / "0000.txt").unlink()
    (videos / "0000.mp4").unlink()
    (videos / "0000.mp4").symlink_to("nowhere")
    assert reasons(run(videos, tmp_path)[1]) == {"0000.mp4": "unreadable"}


def test_the_manifest_refuses_shapes_that_the_backbone_cannot_use():
    with pytest.raises(ValidationError, match="num_frames 30 is not 6k"):
        IngestManifest(source="videos", clips=ClipSettings(**{**SHAPE, "num_frames": 30}))


def test_missing_captions_are_an_error_or_empty_as_the_manifest_says(videos, tmp_path):
    (videos / "0000.txt").unlink()
    (videos / "0001.txt").write_text(" ")
    with pytest.raises(ManifestError, match=r"2 sources have no caption: '.*0000\.mp4', '.*0001\.mp4'$"):
        run(videos, tmp_path, missing_captions="error")
    _, table = run(videos, tmp_path, missing_captions="empty")
    assert table.read("clips")["caption"].to_pylist()[:2] == ["", ""]
    assert reasons(run(videos, tmp_path)[1]) == {"0000.mp4": "no_caption", "0001.mp4": "no_caption"}


def test_clips_are_retimed_by_time_stamps_and_retimed_frames_are_counted(tmp_path):
    (tmp_path / "v").mkdir()
    variable(tmp_path / "v/a.mp4", [(0.5, 12), (0.5, 24)])
    (tmp_path / "v/a.txt").write_text("a test")
    result, table = run(tmp_path / "v", tmp_path, ClipSettings(num_frames=19, width=64, height=64, fps=24))
    frames = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7, 8, 9, 10, 11, 12]
    assert table.read("clips")["frames"][0].as_py() == frames
    assert result.retimed_frames == 6 and table.facts["retimed_sources"] == 1


def test_half_the_frame_rate_is_every_other_frame(videos, tmp_path):
    result, table = run(videos, tmp_path, ClipSettings(num_frames=13, width=64, height=64, fps=12))
    assert table.read("clips")["frames"][0].as_py() == list(range(0, 26, 2))
    assert result.retimed_frames == 0


def test_each_source_has_the_bucket_that_fits_it_best(tmp_path):
    (tmp_path / "v").mkdir()
    video(tmp_path / "v/wide.mp4", size=(128, 64), seed=1)
    video(tmp_path / "v/tall.mp4", size=(64, 128), seed=2)
    video(tmp_path / "v/brief.mp4", size=(128, 64), seed=3, count=14)
    shapes = [(128, 64, 31), (64, 128, 13), (64, 64, 7)]
    buckets = [{"width": w, "height": h, "num_frames": n} for w, h, n in shapes]
    _, table = run(tmp_path / "v", tmp_path, ClipSettings(buckets=buckets))
    got = {row["clip_id"]: (row["bucket"], len(row["frames"])) for row in table.read("clips").to_pylist()}
    assert got == {"brief.mp4@0": ("64x64x7", 7), "tall.mp4@0": ("64x128x13", 13), "wide.mp4@0": ("128x64x31", 31)}


def test_no_clip_crosses_a_scene_start(tmp_path):
    (tmp_path / "v").mkdir()
    parts = [video(tmp_path / f"{seed}.mp4", count=count, seed=seed) for seed, count in ((1, 10), (2, 20))]
    (tmp_path / "list").write_text("".join(f"file '{part}'\n" for part in parts))
    ffmpeg("-f", "concat", "-safe", 0, "-i", tmp_path / "list", tmp_path / "v/cut.mp4")
    (tmp_path / "v/cut.txt").write_text("two scenes")
    shape = {"num_frames": 7, "width": 64, "height": 64, "windows": "all"}
    starts = {
        scenes: [frames[0] for frames in run(tmp_path / "v", tmp_path, ClipSettings(**shape, scenes=scenes))[1]
                 .read("clips")["frames"].to_pylist()]
        for scenes in (None, 10)
    }  # fmt: skip
    assert starts == {None: [0, 7, 14, 21], 10: [0, 10, 17]}


def test_duplicates_are_dropped_or_kept_and_counted(videos, tmp_path):
    rows = ["0000.mp4", "0001.mp4", "copy.mp4", "0000.mp4"]
    shutil.copy(videos / "0001.mp4", videos / "copy.mp4")
    (videos / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": n, "text": "a"}) for n in rows))
    result, table = run(videos, tmp_path)
    assert (result.clips, result.duplicates) == (2, 2) and result.near_duplicates == 0
    assert reasons(table) == {"copy.mp4": "duplicate", "0000.mp4": "duplicate"}
    assert table.read("rejects")["detail"][0].as_py().endswith("0001.mp4")
    result, table = run(videos, tmp_path, duplicates="keep")
    assert (result.clips, result.duplicates) == (4, 2)
    assert table.read("clips")["clip_id"].to_pylist() == ["0000.mp4@0", "0001.mp4@0", "copy.mp4@0", "0000.mp4@0~2"]


def test_a_source_without_clips_has_no_duplicates(videos, tmp_path):
    shutil.copy(videos / "0001.mp4", videos / "00.mp4")
    result, table = run(videos, tmp_path)
    assert result.clips == 3 and reasons(table) == {"00.mp4": "no_caption"}


def test_near_duplicates_are_listed_and_dropped_on_request(videos, tmp_path):
    ffmpeg("-i", videos / "0001.mp4", "-vf", "scale=96:96", "-crf", 30, videos / "again.mp4")
    (videos / "again.txt").write_text("encoded again")
    result, table = run(videos, tmp_path)
    assert (result.clips, result.near_duplicates, result.duplicates) == (4, 1, 0)
    assert table.facts["near_pairs"] == [[str(videos / "again.mp4"), str(videos / "0001.mp4")]]
    result, table = run(videos, tmp_path, near_duplicates="drop")
    assert (result.clips, result.near_duplicates) == (3, 1) and reasons(table) == {"again.mp4": "near_duplicate"}


def test_files_that_the_metadata_does_not_list_are_counted(videos, tmp_path):
    rows = pa.table({"file_name": ["0000.mp4"], "text": ["one"]})
    pq.write_table(rows, videos / "metadata.parquet")
    result, table = run(videos, tmp_path)
    assert result.sources == 1 and table.facts["unlisted"] == 5
