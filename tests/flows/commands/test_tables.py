import json
import os
import shutil

import pytest

from flows.commands import main
from tests.helpers.inspected_tables import make_run, make_videos


@pytest.fixture(scope="module")
def run(drawn, tmp_path_factory):
    """The folder of a run."""
    return make_run(make_videos(drawn, tmp_path_factory.mktemp("videos")), tmp_path_factory.mktemp("tables") / "run")


def test_inspect_prints_the_numbers_and_the_path_of_its_page(run, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["inspect", str(run / "clips"), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "3 with clips, 2 rejected" in out and out.splitlines()[-1] == str(page) and page.is_file()
    assert main(["inspect", str(run / "clips"), "--limit", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(run / "clips/inspect.html")
    assert (run / "clips/inspect.html").read_text().count("<article>") == 1


def test_only_a_page_is_replaced_by_a_page(run, tmp_path, capsys):
    page = tmp_path / "page.html"
    for content in (b"", b"<!doctype html>\n<html><p>my homepage", b"\xff"):
        page.write_bytes(content)
        assert main(["inspect", str(run / "clips"), "--html", str(page)]) == 1
        assert "page.html exists and is not a page of `pusa inspect`" in capsys.readouterr().err
        assert page.read_bytes() == content
    page.unlink()
    os.mkfifo(page)  # as /dev/null, which the superuser could replace
    assert main(["inspect", str(run / "clips"), "--html", str(page)]) == 1 and page.is_fifo()
    page.unlink()
    for _ in range(2):
        assert main(["inspect", str(run / "clips"), "--html", str(page)]) == 0


@pytest.mark.parametrize("command", [
    "quality --folder", "make-tiny", "export-latents {run}/latents", "import-latents {run} --weights builtin:tiny --to",
])  # fmt: skip
def test_results_are_not_mixed_with_files_of_somebody_else(run, tmp_path, capsys, command):
    (tmp_path / "thesis.tex").touch()
    assert main([*command.format(run=run).split(), str(tmp_path)]) == 1
    assert "is not empty, and Pusa did not write it: it has 'thesis.tex'" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("name, rows", [("clips", "clips"), ("latents", "rows")])
def test_json_is_one_object_and_nothing_is_written(run, capsys, name, rows):
    before = sorted(os.listdir(run / name))
    assert main(["inspect", str(run / name), "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    expected = {"sources", rows, "rejects", "rejects_by_reason", "retimed_frames", "duplicates", "near_duplicates"}
    assert expected <= set(numbers) and numbers[rows] == 3 and sorted(os.listdir(run / name)) == before


def test_a_damaged_table_is_shown_in_part_and_ends_with_exit_code_3(run, tmp_path, capsys):
    table = shutil.copytree(run / "clips", tmp_path / "clips")
    (path,) = table.glob("clips-*.parquet")
    path.write_bytes(b"")
    assert main(["inspect", str(table), "--json"]) == 3
    out, err = capsys.readouterr()
    assert json.loads(out)["rejects"] == 2 and str(path) in err and "is damaged" in err


def test_a_page_that_cannot_be_written_is_reported_with_what_else_can_be_done(run, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["inspect", str(run / "clips"), "--html", str(tmp_path / "file/page.html")]) == 1
    assert "page.html cannot be written (File exists); name another file with --html" in capsys.readouterr().err


def test_decoded_rows_are_in_the_json(run, capsys):
    assert main(["inspect", str(run / "latents"), "--json", "--decode", "1"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["decoded"]
    assert row["psnr"] > 25 and row["flags"] == []


def test_what_cannot_be_inspected_is_reported_in_a_sentence(run, capsys):
    assert main(["inspect", str(run)]) == 1
    assert f"inspect {run}/clips or {run}/latents" in capsys.readouterr().err
    assert main(["inspect", str(run / "latents"), "--weights", "builtin:tiny"]) == 1
    assert "add --decode ROWS" in capsys.readouterr().err
    assert main(["inspect", str(run / "clips"), "--decode", "0"]) == 2
    assert "0 is not a whole number above 0" in capsys.readouterr().err
