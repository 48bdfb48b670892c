import json
import logging
import os
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pusa.errors import ManifestError
from pusa.ingest.sources import find_sources
from pusa.manifest.models import IngestManifest
from pusa.video.media import VIDEO_SUFFIXES

ROWS = [("b.mp4", 'one, "two"\nthree'), ("in/a.mp4", "vier"), ("../c.mp4", "five")]


def csv(path, rows, columns):
    quoted = [['"' + value.replace('"', '""') + '"' for value in row] for row in [columns, *rows]]
    path.write_text("\n".join(map(",".join, quoted)) + "\n")


def jsonl(path, rows, columns):
    path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))


def parquet(path, rows, columns):
    pq.write_table(pa.table(list(zip(*rows, strict=True)), names=columns), path)


KINDS = {"csv": csv, "jsonl": jsonl, "parquet": parquet}


def find(source, **settings):
    return find_sources(IngestManifest(source=source, **settings))


def described(catalogue):
    """Return (name, caption, origin of the caption) of each source, or the reason of its reject."""
    return [(catalogue.name(s), s.caption, s.caption_from) if s.reject is None else s.reject.reason
            for s in catalogue.sources]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", [("file_name", "text"), ("video", "caption")])
def test_metadata_names_the_videos(tmp_path, kind, names):
    path = tmp_path / f"metadata.{kind}"
    KINDS[kind](path, ROWS, names)
    settings = dict(zip(("file_column", "caption_column"), names, strict=True))
    lines = (2, 4, 5) if kind == "csv" else (1, 2, 3)  # line 1 of CSV is the header, and a caption spans two lines
    expected = [(name, caption, f"metadata.{kind}:{i}") for i, (name, caption) in zip(lines, ROWS, strict=True)]
    for source in (path, tmp_path):
        catalogue = find(source, **settings)
        outside = catalogue.name(catalogue.sources[2])
        assert described(catalogue) == [*expected[:2], (outside, *expected[2][1:])]
        assert re.fullmatch(r"outside-[0-9a-f]{8}/c\.mp4", outside)
        assert [str(s.path) for s in catalogue.sources] == [f"{tmp_path}/{name}" for name, _ in ROWS]
    for column in settings:
        wrong = settings | {column: "nothing"}
        with pytest.raises(ManifestError, match=rf"no column 'nothing'; it has '{names[0]}', '{names[1]}'$"):
            find(path, **wrong)


def test_absolute_paths_are_used_as_they_are(tmp_path):
    (tmp_path / "in").mkdir()
    jsonl(
        tmp_path / "in/clips.jsonl", [(f"{tmp_path}/a.mp4", "a"), (f"{tmp_path}/in/b.mp4", "b")], ["file_name", "text"]
    )
    outside, inside = find(tmp_path / "in/clips.jsonl").sources
    assert (str(outside.path), str(inside.path)) == (f"{tmp_path}/a.mp4", f"{tmp_path}/in/b.mp4")


def test_names_of_sources_in_other_folders_stay_inside_the_export(tmp_path):
    files = [f"{tmp_path}/a.mp4", "../a.mp4", "/other/a.mp4", f"{tmp_path}/in/b.mp4", "x/../b.mp4", "../in2/b.mp4"]
    (tmp_path / "in").mkdir()
    jsonl(tmp_path / "in/clips.jsonl", [(name, "a") for name in files], ["file_name", "text"])
    catalogue = find(tmp_path / "in/clips.jsonl")
    names = [catalogue.name(source) for source in catalogue.sources]
    assert names[0] == names[1] != names[2] and names[3:5] == ["b.mp4", "b.mp4"]
    assert all(re.fullmatch(r"outside-[0-9a-f]{8}/[ab]\.mp4", name) for name in (*names[:3], names[5]))


def test_unusable_rows_and_captions_are_rejects(tmp_path):
    rows = [
        '{"text": "no file"}',
        '{"file_name": 5}',
        "no json",
        "[" * 5000,
        '{"file_name": "a\\u0000.mp4", "text": "a"}',
    ]
    rows += ['{"file_name": "\\ud800.mp4", "text": "a"}', '{"file_name": "a.mp4", "text": "\\ud800"}']
    rows += ['{"file_name": "a.mp4", "text": 5}', '{"file_name": "a.mp4", "text": null}', '{"file_name": "a.mp4"}', ""]
    rows += ['{"file_name": "\\udcff.mp4", "text": "a"}', '{"file_name": "a.mp4", "text": " good "}']
    (tmp_path / "a.mp4").touch()
    (tmp_path / "m.jsonl").write_bytes(b"\xef\xbb\xbf" + "\n".join(rows).encode())
    catalogue = find(tmp_path / "m.jsonl")
    assert described(catalogue) == [
        *["bad_row"] * 6, *["bad_caption"] * 2, *["no_caption"] * 2, "bad_name", ("a.mp4", "good", "m.jsonl:13")
    ]  # fmt: skip
    assert catalogue.sources[0].path_text.endswith("m.jsonl:1") and "no file" in catalogue.sources[0].reject.detail
    assert "not JSON: 'no json'" in catalogue.sources[2].reject.detail


def test_a_comma_without_quotes_is_a_reject_and_not_a_short_caption(tmp_path):
    (tmp_path / "m.csv").write_text("file_name,text\na.mp4,one, two\nb.mp4,three\n")
    catalogue = find(tmp_path / "m.csv")
    assert described(catalogue) == ["bad_row", ("b.mp4", "three", "m.csv:3")]
    assert "more fields than columns" in catalogue.sources[0].reject.detail


def test_a_quote_that_is_never_closed_is_an_error(tmp_path):
    (tmp_path / "m.csv").write_text('file_name,text\na.mp4,"one\nb.mp4,two\n')
    with pytest.raises(ManifestError, match=r"m\.csv cannot be read: line 3: unexpected end of data"):
        find(tmp_path / "m.csv")


def test_only_the_source_with_a_long_caption_is_a_reject(tmp_path):
    for kind, write in KINDS.items():
        write(tmp_path / f"m.{kind}", [("a.mp4", "a" * 200_000), ("b.mp4", "b" * 10_000)], ["file_name", "text"])
        assert described(find(tmp_path / f"m.{kind}")) == [
            "bad_caption",
            ("b.mp4", "b" * 10_000, f"m.{kind}:{2 + (kind == 'csv')}"),
        ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_metadata_file_of_another_kind_is_an_error(tmp_path, kind):
    (tmp_path / f"metadata.{kind}").write_bytes("file_name,text\na.mp4,café\n".encode("latin-1"))
    with pytest.raises(ManifestError, match=rf"metadata\.{kind} (cannot be read|has no column)"):
        find(tmp_path)


def test_a_source_that_is_missing_empty_or_ambiguous_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("a caption")
    with pytest.raises(ManifestError, match=r"neither a folder nor a metadata file \(\.csv, \.jsonl, \.parquet\)"):
        find(tmp_path / "a.txt")
    with pytest.raises(ManifestError, match=r"nowhere does not exist$"):
        find(tmp_path / "nowhere")
    with pytest.raises(ManifestError, match=r"videos does not exist; `pusa demo` draws it$"):
        find(tmp_path / "drawn/videos")
    (tmp_path / "none").mkdir()
    with pytest.raises(ManifestError, match="holds no videos"):
        find(tmp_path / "none")
    for name in ("metadata.csv", "metadata.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(ManifestError, match=r"holds metadata\.csv and metadata\.jsonl; name the file to use"):
        find(tmp_path)


def test_a_folder_is_listed_with_its_subfolders(tmp_path):
    for name in ("b.mp4", "in/deep/a.MOV", "in/deep/notes.md", ".hidden.mp4", ".git/x.mp4", "in/none"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + "é\n".encode())
    (tmp_path / "in/deep/a.TXT").write_text("upper case")
    (tmp_path / "linked").symlink_to(tmp_path / "in/deep/..")
    (tmp_path / "in/loop").symlink_to(tmp_path)
    catalogue = find(tmp_path)
    assert described(catalogue) == [
        ("b.mp4", "é", "b.txt"), "not_a_video", ("in/deep/a.MOV", "upper case", "a.TXT"), "not_a_video"
    ]  # fmt: skip
    assert [s.reject.detail for s in catalogue.sources if s.reject] == [
        f"'{suffix}' is not a video suffix; known suffixes are {', '.join(VIDEO_SUFFIXES)}" for suffix in ("", ".md")
    ]


def test_a_caption_file_that_is_a_pipe_or_huge_is_a_reject(tmp_path):
    for name in ("pipe", "huge"):
        (tmp_path / f"{name}.mp4").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.txt")
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(1 << 40)
    assert described(find(tmp_path)) == ["bad_caption", "bad_caption"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_a_folder_without_read_permission_is_a_reject(tmp_path):
    (tmp_path / "shut").mkdir(mode=0)
    assert described(find(tmp_path)) == ["unreadable"]


def test_unlisted_files_are_counted_if_the_source_is_a_folder(tmp_path, caplog):
    for name in ("a.mp4", "b.mp4", "in/c.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    jsonl(tmp_path / "metadata.jsonl", [("a.mp4", "a"), ("./in/../b.mp4", "b")], ["file_name", "text"])
    caplog.set_level(logging.WARNING, "pusa.ingest.sources")
    assert find(tmp_path).unlisted == 1 and "does not list 1 files" in caplog.text
    assert find(tmp_path / "metadata.jsonl").unlisted == 0
