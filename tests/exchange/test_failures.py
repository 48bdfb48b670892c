"""One pair or row that fails is recorded, and all others are made; what was hashed is what was read."""

import errno
import json
import os
import zipfile

import pytest
import torch

from flows.commands import main
from pusa.data.reader import Table
from pusa.errors import PartlyFailed, Rejected, TableError
from pusa.exchange import exporting, importing
from pusa.exchange.exporting import export_latents
from pusa.exchange.layout import Pair
from pusa.exchange.ledger import ImportLedger
from pusa.exchange.reading import read_latents
from tests.helpers.published_pairs import embed, latent, run, save, write_pair


class PanicException(BaseException):
    """What a library in Rust raises."""


@pytest.fixture
def published(tmp_path):
    """Three good pairs, one of which is called `bad`."""
    for seed, name in enumerate(("a", "bad", "c")):
        write_pair(tmp_path / "p", name, seed=seed)
    return tmp_path / "p"


def failing(monkeypatch, module, name, error, pair="bad"):
    """Let a function fail when it works for a pair."""
    function = getattr(module, name)

    def fail(*arguments, **named):
        if any(pair in str(argument) for argument in arguments):
            raise error
        return function(*arguments, **named)

    monkeypatch.setattr(module, name, fail)


def rejects(table):
    rows = Table.open(table).read("rejects").to_pylist()
    return {row["source"].rpartition("/")[2]: (row["reason"], row["detail"]) for row in rows}


STEPS = {
    "read_latents": RuntimeError("DefaultCPUAllocator: can't allocate memory\nand a trace"),
    "read_features": PanicException("called `Option::unwrap()` on a `None` value"),
    "latents_row": OSError(errno.EIO, "Input/output error"),
}


def test_a_pair_that_fails_at_any_step_is_a_reject_and_is_tried_again(published, tmp_path, monkeypatch):
    for seed, (step, error) in enumerate(STEPS.items(), 10):
        write_pair(published, step, seed=seed)
        failing(monkeypatch, importing, step, error, step)
    result = run(published, tmp_path / "table")
    assert (result.found, result.rows, result.failed) == (3 + len(STEPS), 3, len(STEPS)) and result.rejects == len(
        STEPS
    )
    traces = {path.name: path.read_text() for path in (tmp_path / "table/failures").iterdir()}
    for step, (reason, detail) in rejects(tmp_path / "table").items():
        message, _, trace = detail.partition(" (its traceback is in failures/")
        error = STEPS[step.removesuffix(".latent.pt")]
        assert reason == "failed" and message.startswith(type(error).__name__) and "\n" not in detail
        assert "Traceback" in traces.pop(trace[:-1])
    assert not traces
    with pytest.raises(PartlyFailed, match=f"{len(STEPS)} pairs failed"):
        result.require_all()
    monkeypatch.undo()
    result = run(published, tmp_path / "table")
    assert (result.rows, result.failed, result.read) == (3 + len(STEPS), 0, len(STEPS))
    assert not (tmp_path / "table/failures").exists()


def test_what_is_everybodys_fault_ends_the_import(published, tmp_path, monkeypatch):
    failing(monkeypatch, importing, "read_features", OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        run(published, tmp_path / "table")


def test_a_table_in_a_folder_that_is_not_utf8_is_refused_in_a_sentence(published, tmp_path, capsys):
    table = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    assert main(["import-latents", str(published), "--to", table, "--weights", "builtin:tiny"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pusa: ")]
    assert "is not UTF-8" in line and "name another folder" in line


def test_the_commands_end_with_3_once_all_else_is_done(published, tmp_path, monkeypatch, capsys):
    failing(monkeypatch, importing, "read_features", MemoryError())
    table = str(tmp_path / "table")
    command = ["import-latents", str(published), "--to", table, "--weights", "builtin:tiny"]
    assert main(command) == 3
    shown = capsys.readouterr()
    assert "rows: 2" in shown.out and "1 pairs failed with unexpected errors" in shown.err
    monkeypatch.undo()
    assert main(command) == 0
    failing(monkeypatch, exporting, "_export_clip", MemoryError())
    assert main(["export-latents", table, str(tmp_path / "out")]) == 3
    shown = capsys.readouterr()
    assert "clips: 2" in shown.out and "1 rows failed" in shown.err


@pytest.mark.parametrize("error", [RuntimeError("x"), PanicException("x"), TableError("x"), IsADirectoryError(21, "x")])
def test_a_row_that_fails_is_recorded_and_written_by_the_next_run(published, tmp_path, monkeypatch, error):
    run(published, tmp_path / "table")
    failing(monkeypatch, exporting, "_export_clip", error)
    exported = export_latents(tmp_path / "table", tmp_path / "out", captions=True)
    assert (exported.rows, exported.clips, exported.rejects, exported.failed) == (3, 2, 1, 1)
    (record,) = json.loads((tmp_path / "out/export.json").read_text())["rejects"]
    assert (record["source"], record["reason"]) == ("bad", "failed")
    assert (tmp_path / "out/failures").exists() == (not isinstance(error, TableError))
    monkeypatch.undo()
    exported = export_latents(tmp_path / "table", tmp_path / "out")
    assert (exported.clips, exported.written, exported.failed) == (3, 1, 0)
    assert json.loads((tmp_path / "out/export.json").read_text())["rejects"] == []
    assert not (tmp_path / "out/failures").exists()


def test_what_is_everybodys_fault_ends_the_export(published, tmp_path, monkeypatch):
    run(published, tmp_path / "table")
    failing(monkeypatch, exporting, "_export_clip", OSError(errno.EROFS, "Read-only file system"))
    with pytest.raises(OSError, match="Read-only"):
        export_latents(tmp_path / "table", tmp_path / "out")


def test_rows_of_a_damaged_shard_are_recorded_and_all_others_exported(tmp_path):
    for seed, name in enumerate(("a", "b")):
        write_pair(tmp_path / "p", name, seed=seed)
    write_pair(tmp_path / "p", "long", latent(7, (1, 12, 3, 2, 4)), embed(7, 16))
    run(tmp_path / "p", tmp_path / "table", compression="none")
    table = Table.open(tmp_path / "table")
    (path,) = [table.folder / shard["name"] for shard in table.parts["latents"] if shard["rows"] == 2]
    data = bytearray(path.read_bytes())
    value = latent(0)["mean"].contiguous().view(torch.uint8).numpy().tobytes()
    data[data.index(value) + 1] ^= 1
    path.write_bytes(data)
    exported = export_latents(tmp_path / "table", tmp_path / "out")
    # Both rows of the shard are in one row group, which has one checksum.
    assert (exported.clips, exported.failed) == (1, 2)
    assert [file.name for file in (tmp_path / "out/videos").iterdir()] == ["long.latent.pt"]


def replace(path, value):
    """Replace a torch file by one of equal size and time, as `cp -p` or rsync may do."""
    stat = path.stat()
    new = save(path.parent / ".new" / path.name, value)  # torch stores the name
    os.utime(new, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    new.replace(path)
    assert path.stat()[6:9:2] == stat[6:9:2]


def test_a_pair_of_equal_size_and_time_is_read_again(published, tmp_path):
    run(published, tmp_path / "table")
    before = Table.open(tmp_path / "table").read("rows")["key"].to_pylist()
    replace(published / "videos/bad.latent.pt", latent(9))
    assert run(published, tmp_path / "table").read == 1
    after = Table.open(tmp_path / "table").read("rows")["key"].to_pylist()
    assert before[::2] == after[::2] and before[1] != after[1]


def test_a_pair_that_is_replaced_while_it_is_read_is_changed(published, tmp_path, monkeypatch):
    read = importing.read_features

    def replace_first(path, *given):
        if path.name == "bad.embed.pt":
            replace(published / "videos/bad.latent.pt", latent(9))
        return read(path, *given)

    monkeypatch.setattr(importing, "read_features", replace_first)
    result = run(published, tmp_path / "table")
    assert rejects(tmp_path / "table")["bad.latent.pt"][0] == "changed" and result.failed == 0
    monkeypatch.undo()
    assert run(published, tmp_path / "table").rows == 3


def test_a_caption_that_is_a_named_pipe_is_a_reject(published, tmp_path):
    os.mkfifo(published / "captions/bad.txt")
    assert run(published, tmp_path / "table").rows == 2
    assert rejects(tmp_path / "table")["bad.latent.pt"][0] == "bad_caption"
    stray = tmp_path / "stray"
    os.mkfifo(stray)
    with pytest.raises(Rejected, match="is not a regular file"):
        read_latents(stray, 12)
    with pytest.raises(Rejected, match="is not a regular file"):
        Pair("x", stray, stray, stray).caption()


def test_records_that_overlap_are_refused(tmp_path):
    """Else a small file would take any amount of memory: each of its records may be a large part of it."""
    path, count = tmp_path / "x.pt", 40
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\2}.")
        archive.writestr("x/data/0", bytes(100_000))
        (first,) = [member for member in archive.infolist() if member.filename == "x/data/0"]
        for number in range(1, count):
            other = zipfile.ZipInfo(f"x/data/{number}")
            for name in ("header_offset", "CRC", "file_size", "compress_size"):
                setattr(other, name, getattr(first, name))
            archive.filelist.append(other)
    assert path.stat().st_size < 2 * 100_000
    with pytest.raises(Rejected, match="its records overlap"):
        read_latents(path, 12)


def test_no_changed_bit_of_the_ledger_of_an_import_is_believed(published, tmp_path):
    run(published, tmp_path / "table")
    (path,) = (tmp_path / "table").glob("pairs-*.parquet")
    data = path.read_bytes()
    for place in [*range(0, len(data), max(1, len(data) // 60)), *range(len(data) - 30, len(data))]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        ledger = ImportLedger(tmp_path / "table")
        ledger.refresh()
        assert ledger.row_keys == {}
    assert run(published, tmp_path / "table").rows == 3


def test_names_that_differ_by_case_are_one_file_where_the_file_system_says_so(tmp_path):
    for seed, name in enumerate(("Straße", "a", "A")):
        write_pair(tmp_path / "p", name, seed=seed)
    run(tmp_path / "p", tmp_path / "table")
    exported = export_latents(tmp_path / "table", tmp_path / "out")
    assert (exported.clips, exported.rejects) == (3, 0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/.lock").touch()
    (tmp_path / "other/EXPORT.JSON").touch()  # as a file system that ignores case shows the record
    exported = export_latents(tmp_path / "table", tmp_path / "other")
    assert (exported.clips, exported.rejects, exported.failed) == (2, 1, 0)
