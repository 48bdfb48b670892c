"""What ingest writes to its folder, removes from it, and repairs in it."""

import json
import logging
import os
import shutil

import pytest

from flows.commands import main
from pusa.data.reader import Table
from pusa.errors import ManifestError, StageError, TableError
from pusa.exchange.layout import export_stem
from pusa.ingest.stage import ingest
from pusa.manifest.models import ClipSettings, IngestManifest, ModelSpec, PrecomputeManifest
from pusa.precompute.stage import precompute
from pusa.system.locks import sole_writer
from tests.helpers.indexes import edit_index
from tests.helpers.media import video

CLIP_SETTINGS = ClipSettings(num_frames=31, width=64, height=64)
STALE = "clips-0123456789abcdef-00000.parquet"


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for seed in (0, 1):
        video(folder / f"{seed}.mp4", seed=seed)
    return folder


def run(source, run_dir):
    return ingest(IngestManifest(source=source, clips=CLIP_SETTINGS), run_dir)


def names(folder):
    return {path.name for path in folder.iterdir() if not path.name.startswith(".lock")}


def test_files_of_others_stay(videos, tmp_path):
    table = tmp_path / "run/clips"
    table.mkdir(parents=True)
    (table / ".lock").touch()  # what a killed run left
    others = {"metadata.parquet", "clips-of-mine.parquet", "clips-0123.parquet", "embeddings-0123456789abcdef.parquet"}
    for name in others | {STALE}:
        (table / name).write_text("data")
    run(videos, tmp_path / "run")
    (videos / "0.txt").write_text("another caption")
    run(videos, tmp_path / "run")
    parts = Table.open(table).parts.values()
    assert names(table) == {*others, "ledger", "index.json"} | {shard["name"] for part in parts for shard in part}
    assert all((table / name).read_text() == "data" for name in others)


def test_a_table_that_would_mix_with_its_sources_is_refused(videos, tmp_path):
    def assert_refused(source, run_dir):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ManifestError, match="use another --run-dir"):
            run(source, run_dir)
        assert sorted(tmp_path.rglob("*")) == before, "nothing is written"

    videos.rename(tmp_path / "clips")
    assert_refused(tmp_path / "clips", tmp_path)
    assert_refused(tmp_path, tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "clips")
    assert_refused(tmp_path / "link", tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "clips").rename(tmp_path / "deep/inner")
    (tmp_path / "run/clips").mkdir(parents=True)
    (tmp_path / "deep/inner").rename(tmp_path / "run/clips/inner")
    row = {"file_name": "run/clips/inner/0.mp4", "text": "a"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert_refused(tmp_path / "run/clips/inner", tmp_path / "run")
    assert_refused(tmp_path / "rows.jsonl", tmp_path / "run")


@pytest.mark.parametrize("text", ["{}", "[1]", '{"version": 2, "parts": {"rows": []}, "facts": {}}', "not JSON"])
def test_an_index_of_another_kind_is_not_overwritten(videos, tmp_path, text):
    index = tmp_path / "run/clips/index.json"
    index.parent.mkdir(parents=True)
    index.write_text(text)
    with pytest.raises(ManifestError, match=r"clips holds an index\.json of another kind; use another --run-dir"):
        run(videos, tmp_path / "run")
    assert index.read_text() == text
    (index.parent / "ledger").mkdir()
    (index.parent / ".lock").touch()
    assert run(videos, tmp_path / "run").clips == 2, "with a ledger beside it, the index is our own, and damaged"


def test_a_folder_whose_metadata_names_the_videos_may_hold_the_run(videos, tmp_path):
    (videos / "metadata.jsonl").write_text(json.dumps({"file_name": "0.mp4", "text": "a"}))
    assert run(videos, videos / "run").clips == 1
    assert run(videos, videos / "run").skipped


@pytest.mark.parametrize("part", ["clips", "rejects"])
def test_a_shard_with_a_flipped_byte_is_written_again(videos, tmp_path, part, caplog):
    video(videos / "2.mp4", seed=2, caption=None)
    run(videos, tmp_path / "run")
    table = Table.open(tmp_path / "run/clips")
    path = table.folder / table.parts[part][0]["name"]
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    caplog.set_level(logging.INFO, "pusa.ingest.stage")
    assert not run(videos, tmp_path / "run").skipped
    assert path.read_bytes() == whole and "0 of 3 sources are to be decoded" in caplog.messages


def test_a_copied_table_is_not_made_again(videos, tmp_path):
    run(videos, tmp_path / "run")
    for path in (tmp_path / "run/clips").glob("*.parquet"):
        os.utime(path, (1, 1))
    assert run(videos, tmp_path / "run").skipped


def test_an_index_that_lacks_a_fact_is_written_again(videos, tmp_path):
    run(videos, tmp_path / "run")
    edit_index(tmp_path / "run/clips", lambda index: index["facts"].pop("retimed_frames"))
    assert run(videos, tmp_path / "run").clips == 2


def add_leftovers(table):
    """Add files as killed runs leave them, and return their paths."""
    leftovers = [table / ".partial-0123-clips.parquet", table / STALE, table / "ledger/.partial-0123-x.parquet"]
    for path in leftovers:
        path.write_text("torn")
    return leftovers


def test_leftovers_are_removed_even_if_there_is_nothing_to_do(videos, tmp_path):
    run(videos, tmp_path / "run")
    leftovers = add_leftovers(tmp_path / "run/clips")
    assert run(videos, tmp_path / "run").skipped
    assert not any(path.exists() for path in leftovers)
    assert Table.open(tmp_path / "run/clips").read("clips").num_rows == 2


def test_files_that_another_process_writes_are_not_removed(videos, tmp_path):
    run(videos, tmp_path / "run")
    leftovers = add_leftovers(tmp_path / "run/clips")
    with sole_writer(tmp_path / "run/clips"):
        for path in leftovers:
            path.write_text("being written")
        assert run(videos, tmp_path / "run").skipped
        assert all(path.exists() for path in leftovers)


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everything")
def test_a_finished_table_may_be_in_a_read_only_folder(videos, tmp_path):
    run(videos, tmp_path / "run")
    table = tmp_path / "run/clips"
    for path in (table / ".lock", table / "ledger/.lock", table, table / "ledger"):
        path.chmod(0o555)
    assert run(videos, tmp_path / "run").skipped
    for path in (table, table / "ledger"):
        path.chmod(0o755)


def test_control_characters_of_file_names_do_not_reach_the_terminal(videos, tmp_path, caplog):
    (videos / "\x1b[2Jcleared\n.mp4").write_bytes(b"")
    (videos / "\x1b[2Jcleared\n.txt").write_text("a caption")
    (videos / "sub\x1b[2J").symlink_to(videos)
    run(videos, tmp_path / "run")
    logged = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("pusa"))
    assert "cleared" in logged and "sub" in logged and "\x1b" not in logged
    assert all("\n" not in record.getMessage() for record in caplog.records)


def test_clips_of_sources_outside_the_metadatas_folder_can_be_exported(videos, tmp_path):
    (tmp_path / "meta").mkdir()
    shutil.copy(videos / "0.mp4", tmp_path / "meta/in.mp4")
    files = [f"{videos}/0.mp4", "../videos/1.mp4", f"{tmp_path}/meta/in.mp4", "../meta/in.mp4"]
    rows = tmp_path / "meta/metadata.jsonl"
    rows.write_text("\n".join(json.dumps({"file_name": name, "text": "a"}) for name in files))
    ingest(IngestManifest(source=rows, clips=CLIP_SETTINGS, duplicates="keep"), tmp_path / "run")
    ids = Table.open(tmp_path / "run/clips").read("clips")["clip_id"].to_pylist()
    folder, _, name = ids[0].partition("/")
    assert folder.startswith("outside-") and name == "0.mp4@0"
    assert ids[1:] == [f"{folder}/1.mp4@0", "in.mp4@0", "in.mp4@0~2"]
    assert [export_stem(id) for id in ids] == ids


def test_no_clip_at_all_is_an_error_and_the_rejects_are_written(videos, tmp_path):
    run(videos, tmp_path / "run")
    for path in videos.glob("*.txt"):
        path.unlink()
    for _ in range(2):
        with pytest.raises(StageError, match=r"none of 2 sources gave a clip.*no_caption"):
            run(videos, tmp_path / "run")
        table = Table.open(tmp_path / "run/clips")
        assert (table.read("clips").num_rows, table.read("rejects")["reason"].to_pylist()) == (0, ["no_caption"] * 2)
    with pytest.raises(TableError, match="holds no clips"):
        precompute(PrecomputeManifest(model=ModelSpec(weights="builtin:tiny")), tmp_path / "run")
    assert main(["inspect", str(tmp_path / "run/clips")]) == 0


def test_an_outage_does_not_replace_the_table(videos, tmp_path):
    rows = [{"file_name": f"videos/{i}.mp4", "text": "a clip"} for i in range(2)]
    listed = tmp_path / "m.jsonl"
    listed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = Table.open(run(listed, tmp_path / "run").table).read("clips")
    videos.rename(tmp_path / "away")
    with pytest.raises(StageError, match=r"none of 2 sources can be used now.*the table of the previous run is kept"):
        run(listed, tmp_path / "run")
    assert Table.open(tmp_path / "run/clips").read("clips") == before
    (tmp_path / "away").rename(videos)
    assert run(listed, tmp_path / "run").skipped
