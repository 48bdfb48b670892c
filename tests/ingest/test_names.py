"""Columns that are there twice, and files in another Unicode normal form than where they are named."""

import json
import logging
import unicodedata

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pusa.errors import ManifestError
from tests.ingest.test_sources import KINDS, described, find
from tests.manifest.conftest import FREE_NAMES

NFC, NFD = (unicodedata.normalize(form, "été 한") for form in ("NFC", "NFD"))
THIRD = NFD[:2] + NFC[1:]  # the first é in NFD, the other characters in NFC
FORMS = [(NFC, NFD), (NFD, NFC)]
COLUMNS = ["file_name", "text"]


# Columns.


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("repeated", ["text", "file_name", "score", "légende"])
def test_a_column_that_is_there_twice_is_an_error_that_names_it(tmp_path, kind, repeated):
    names = [*COLUMNS, "score", "légende", unicodedata.normalize("NFD", repeated)]
    row = ["a.mp4", "one", "1", "un", "two"]
    if kind == "csv":
        (tmp_path / "m.csv").write_text(",".join(names) + "\n" + ",".join(row) + "\n")
    else:
        pq.write_table(pa.Table.from_arrays([pa.array([value]) for value in row], names=names), tmp_path / "m.parquet")
    with pytest.raises(ManifestError, match=rf"m\.{kind} cannot be read: it has the column '{repeated}' twice"):
        find(tmp_path / f"m.{kind}")


def test_columns_without_a_name_may_be_many(tmp_path):
    (tmp_path / "m.csv").write_text("file_name,text,,\na.mp4,one,,\n")
    (tmp_path / "a.mp4").touch()
    assert described(find(tmp_path / "m.csv")) == [("a.mp4", "one", "m.csv:2")]


def test_an_object_with_a_key_twice_is_a_reject_that_names_it(tmp_path):
    rows = ['{"file_name": "a.mp4", "text": "one", "text": "two"}', '{"file_name": "a.mp4", "text": "three"}']
    rows += ['{"text": "four", "file_name": "a.mp4", "more": {"x": 1, "x": 2}}']
    (tmp_path / "m.jsonl").write_text("\n".join(rows))
    (tmp_path / "a.mp4").touch()
    catalogue = find(tmp_path / "m.jsonl")
    assert described(catalogue) == ["bad_row", ("a.mp4", "three", "m.jsonl:2"), "bad_row"]
    assert "m.jsonl:1 has no usable file name: the object has the column 'text' twice" in str(
        catalogue.sources[0].reject
    )
    assert "has the column 'x' twice" in str(catalogue.sources[2].reject)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given, there", FORMS)
def test_a_column_is_found_in_another_form(tmp_path, kind, given, there):
    KINDS[kind](tmp_path / f"m.{kind}", [("a.mp4", "one")], [f"file {there}", there])
    (catalogue,) = described(find(tmp_path / f"m.{kind}", file_column=f"file {given}", caption_column=given))
    assert catalogue[:2] == ("a.mp4", "one")


# Files.


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"caption in {name!a}")


@FREE_NAMES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given, there", FORMS)
def test_a_row_finds_its_file_in_another_form_and_is_noted(tmp_path, caplog, kind, given, there):
    touch(tmp_path, f"{there}/{there}.mp4", f"{there}/{NFC} other.mp4", "plain.mp4")
    KINDS[kind](tmp_path / f"metadata.{kind}", [(f"{given}/{given}.mp4", "one"), ("plain.mp4", "two")], COLUMNS)
    with caplog.at_level(logging.WARNING):
        catalogue = find(tmp_path)
    assert [source[:2] for source in described(catalogue)] == [(f"{there}/{there}.mp4", "one"), ("plain.mp4", "two")]
    assert catalogue.sources[0].path.is_file() and catalogue.unlisted == 1
    noted = [line for line in caplog.messages if "Unicode form" in line]
    assert len(noted) == 1 and "1 names differ from those of their files" in noted[0]


@FREE_NAMES
def test_a_row_means_the_equal_name_and_nothing_if_two_others_are_as_near(tmp_path):
    KINDS["jsonl"](tmp_path / "m.jsonl", [(f"{NFC}.mp4", "one"), (f"{NFC}?.mp4", "two")], COLUMNS)
    touch(tmp_path, f"{NFD}.mp4", f"{THIRD}.mp4")
    ambiguous, missing = find(tmp_path / "m.jsonl").sources
    assert ambiguous.reject.reason == "bad_row" and missing.path.name == f"{NFC}?.mp4"
    assert all(ascii(name)[1:-1] in ambiguous.reject.detail for name in (NFC, NFD, THIRD))
    touch(tmp_path, f"{NFC}.mp4")
    assert find(tmp_path / "m.jsonl").sources[0].path.name == f"{NFC}.mp4"


@FREE_NAMES
@pytest.mark.parametrize("given, there", FORMS)
def test_a_caption_file_is_found_in_another_form_and_is_noted(tmp_path, caplog, given, there):
    touch(tmp_path, f"{there}.mp4", f"{there}.mov", f"{given}.TXT", "plain.mp4", "plain.txt")
    with caplog.at_level(logging.WARNING):
        found = {name: caption for name, *caption in described(find(tmp_path))}
    text = f"caption in {f'{given}.TXT'!a}"
    assert found == {
        "plain.mp4": ["caption in 'plain.txt'", "plain.txt"],
        f"{there}.mp4": [text, f"{given}.TXT"],
        f"{there}.mov": [text, f"{given}.TXT"],
    }
    assert "2 names differ from those of their files only by their Unicode form" in caplog.text


@FREE_NAMES
def test_a_caption_file_belongs_to_the_video_of_its_very_name(tmp_path):
    touch(tmp_path, f"{NFC}.mp4", f"{NFD}.mp4", f"{NFC}.txt")
    sources = {source.path.name: source for source in find(tmp_path).sources}
    assert sources[f"{NFC}.mp4"].caption and sources[f"{NFD}.mp4"].reject.reason == "no_caption"
    touch(tmp_path, f"{NFD}.txt")
    assert [source.caption for source in find(tmp_path).sources] == [
        f"caption in {name!a}" for name in sorted((f"{NFC}.txt", f"{NFD}.txt"))
    ]


@FREE_NAMES
def test_two_caption_files_that_are_as_near_are_a_reject_that_names_both(tmp_path):
    touch(tmp_path, f"{NFC}.mp4", f"{NFD}.txt", f"{THIRD}.txt")
    (source,) = find(tmp_path).sources
    assert source.reject.reason == "bad_caption"
    assert all(ascii(name) in source.reject.detail for name in (NFC, NFD, THIRD))


@FREE_NAMES
def test_a_caption_file_that_is_as_near_to_two_videos_belongs_to_neither(tmp_path):
    touch(tmp_path, f"{NFC}.mp4", f"{NFD}.txt", f"{THIRD}.mp4")
    assert described(find(tmp_path)) == ["bad_caption"] * 2
    for source in find(tmp_path).sources:
        assert all(ascii(name) in source.reject.detail for name in (NFC, NFD, THIRD))


@FREE_NAMES
@pytest.mark.parametrize("given, there", FORMS)
def test_the_source_itself_is_found_in_another_form(tmp_path, given, there):
    touch(tmp_path, f"{there}/a.mp4", f"{there}/a.txt")
    (tmp_path / there / "m.jsonl").write_text(json.dumps({"file_name": f"{tmp_path}/{given}/a.mp4", "text": "one"}))
    assert described(find(tmp_path / given))[0][0] == "a.mp4"
    assert described(find(tmp_path / given / "m.jsonl")) == [("a.mp4", "one", "m.jsonl:1")]
