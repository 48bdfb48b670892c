"""The tables of import and export: which are replaced, and what is recorded of rejects."""

import json

import pytest

from flows.commands import main
from pusa.backbones import find_family
from pusa.data.reader import Table
from pusa.data.schema import CLIPS, ROWS
from pusa.data.writer import write_index, write_shard
from pusa.errors import StageError, TableError
from pusa.exchange.exporting import export_latents
from pusa.exchange.importing import make_segments, pair_key
from pusa.exchange.layout import find_pairs
from pusa.precompute.shards import RejectFiles
from pusa.weights.model import Model
from tests.helpers.indexes import list_again
from tests.helpers.published_pairs import TINY, embed, run, write_pair

BAD = embed(width=32)  # of another text encoder


@pytest.mark.parametrize("index", ["[]", "{}", '{"version": 1, "facts": {}}', "torn"])
def test_a_damaged_index_is_refused_in_one_sentence(tmp_path, capsys, index):
    write_pair(tmp_path / "p", "a")
    (tmp_path / "table").mkdir()
    (tmp_path / "table/index.json").write_text(index)
    folder, table = str(tmp_path / "p"), str(tmp_path / "table")
    assert main(["import-latents", folder, "--to", table, "--weights", "builtin:tiny"]) == 1
    assert "name another folder" in capsys.readouterr().err
    assert main(["export-latents", table, str(tmp_path / "out")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (tmp_path / "out").exists()
    assert (tmp_path / "table/index.json").read_text() == index


def test_an_imported_table_of_another_version_is_made_again(tmp_path):
    write_pair(tmp_path / "p", "a")
    run(tmp_path / "p", tmp_path / "table")
    index = json.loads((tmp_path / "table/index.json").read_text())
    (tmp_path / "table/index.json").write_text(json.dumps({**index, "version": 1}))
    assert run(tmp_path / "p", tmp_path / "table").rows == 1


def test_a_clips_table_is_not_exported(tmp_path):
    write_shard(tmp_path / "table/clips.parquet", [], CLIPS)
    write_index(tmp_path / "table", {"clips": [tmp_path / "table/clips.parquet"]}, {})
    with pytest.raises(TableError, match="expected a table with rows"):
        export_latents(tmp_path / "table", tmp_path / "out")


def test_the_rejects_of_a_process_that_died_are_kept(tmp_path, monkeypatch):
    for name in ("a", "b"):
        write_pair(tmp_path / "p", name, features=BAD)
    write_pair(tmp_path / "p", "good")
    at_start = RejectFiles.at_start

    def with_another_process(folder):
        """Another process shares the segment, and records its first reject after this run has started."""
        reject_files = at_start(folder)
        pairs, fingerprints = find_pairs(tmp_path / "p").pairs, Model(TINY).fingerprints(*find_family().encoders)
        (segment,) = make_segments({pair_key(pair, 24, fingerprints): pair for pair in pairs}, 32)
        first = pair_key(pairs[0], 24, fingerprints)
        reject_files.add(segment, [{"key": first, "reason": "bad_pair", "detail": "recorded by another process"}])
        return reject_files

    monkeypatch.setattr(RejectFiles, "at_start", with_another_process)
    assert run(tmp_path / "p", tmp_path / "table").rejects == 2
    details = {
        item["source"][-11:-10]: item["detail"] for item in Table.open(tmp_path / "table").read("rejects").to_pylist()
    }
    assert details["a"] == "recorded by another process" and "of width 64" in details["b"]


def test_a_pair_that_is_neither_a_row_nor_a_reject_is_an_error(tmp_path, monkeypatch):
    write_pair(tmp_path / "p", "good")
    write_pair(tmp_path / "p", "b", features=BAD)
    monkeypatch.setattr(RejectFiles, "add", lambda *given: None)
    with pytest.raises(StageError, match=r"1 pairs .* are missing, such as .*b\.latent\.pt"):
        run(tmp_path / "p", tmp_path / "table")


def test_names_with_control_codes_are_escaped_in_logs(tmp_path, caplog):
    write_pair(tmp_path / "p", "good")
    write_pair(tmp_path / "p", "\x1b[2J", features=BAD)
    write_pair(tmp_path / "p", "\x1b[31m" + "x" * 195, seed=1)
    with caplog.at_level("WARNING", "pusa"):
        run(tmp_path / "p", tmp_path / "table")
        table = Table.open(tmp_path / "table")
        rows = [{**row, "clip_id": f"\x1b[31m/../{row['clip_id']}"} for row in table.read("rows").to_pylist()]
        write_shard(table.folder / table.parts["rows"][0]["name"], rows, ROWS)
        list_again(table)
        assert export_latents(table.folder, tmp_path / "out").rejects == 2
    assert len(caplog.messages) >= 3 and not any("\x1b" in message for message in caplog.messages)
    assert "rejected \\x1b[2J" in caplog.text and "rejected \\x1b[31m/../" in caplog.text
