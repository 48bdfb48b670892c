"""Metadata files of absurd size: bounded memory and time, one sentence, or a reject where only a row is bad."""

import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pusa.errors import ManifestError
from pusa.ingest import metadata
from pusa.ingest.metadata import MAX_COLUMNS, MAX_ROW_CHARACTERS, MAX_ROWS, MAX_TEXT_BYTES, read_rows

ENDLESS = "x" * (5 * MAX_ROW_CHARACTERS)


def read(path):
    """Return (number, file, caption or its description) of each row, and the previews of rows without a file."""
    rows = list(read_rows(path, "file_name", "text"))
    files = [row.file if isinstance(row.file, str) else None for row in rows]
    captions = [(row.number, file, row.caption) for row, file in zip(rows, files, strict=True)]
    return captions, [row.preview for row in rows if row.preview]


def parquet(path, files, texts, **options):
    pq.write_table(pa.table({"file_name": files, "text": texts}), path, **options)
    return path


def repeated(text, count):
    return pa.DictionaryArray.from_arrays(pa.array([0] * count), pa.array([text]))


def test_a_line_of_json_that_is_too_long_is_one_reject(tmp_path):
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in (("a", "b"), ("c", ENDLESS), ("e", "f"))]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    del lines
    tracemalloc.start()
    rows, previews = read(tmp_path / "m.jsonl")
    assert tracemalloc.get_traced_memory()[1] < 4 * MAX_ROW_CHARACTERS
    tracemalloc.stop()
    assert rows == [(1, "a", "b"), (2, None, None), (3, "e", "f")]
    assert previews[0].startswith("""more than 16,777,216 characters: '{"file_name": "c", "text": "xxx""")


@pytest.mark.parametrize(
    "text",
    [f"a.mp4,{ENDLESS}\n", f'a.mp4,"{ENDLESS[:99]}\n{ENDLESS}', 'a.mp4,"' + ("x" * 99_999 + "\n") * 200],
    ids=["a line", "a field", "many lines"],
)
def test_a_row_of_csv_that_is_too_long_is_named(tmp_path, text):
    (tmp_path / "m.csv").write_text(f"file_name,text\nfirst.mp4,one\n{text}")
    with pytest.raises(ManifestError, match=r"m\.csv cannot be read: line \d+: .*(16,777,216|field limit)"):
        read(tmp_path / "m.csv")


def test_a_header_with_too_many_columns_is_refused(tmp_path):
    names = [f"c{i}" for i in range(MAX_COLUMNS + 1)]
    (tmp_path / "m.csv").write_text(",".join(names) + "\n1\n")
    pq.write_table(pa.table({name: [1] for name in names}), tmp_path / "m.parquet")
    for name in ("m.csv", "m.parquet"):
        with pytest.raises(ManifestError, match=r"10,001 columns; allowed are .*10,000"):
            read(tmp_path / name)


def test_a_file_that_states_too_many_rows_is_refused_at_once(tmp_path):
    nothing = pa.nulls(MAX_ROWS + 1, pa.string())
    path = parquet(tmp_path / "m.parquet", nothing, nothing)
    assert path.stat().st_size < 100_000
    with pytest.raises(ManifestError, match=r"it states 10,000,001 rows and 2 columns; allowed are 10,000,000 and"):
        read(path)


def test_texts_that_a_dictionary_repeats_are_kept_once(tmp_path):
    long, usual = "x" * (MAX_TEXT_BYTES + 1), "y" * MAX_TEXT_BYTES
    path = parquet(tmp_path / "m.parquet", repeated("a.mp4", 9000), repeated(usual, 9000))  # 36 GiB in 3 KiB
    tracemalloc.start()
    assert all(len(row.caption) == len(usual) for row in read_rows(path, "file_name", "text"))
    assert tracemalloc.get_traced_memory()[1] < 200_000_000
    tracemalloc.stop()
    rows, _ = read(parquet(path, pa.array(["a", None, "c"]), pa.array([long, "b", None])))
    assert repr(rows[0][2]) == "of type text of 4,194,305 bytes" and rows[1:] == [(2, None, "b"), (3, "c", None)]


def test_a_column_that_becomes_gigabytes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(metadata, "MAX_COLUMN_BYTES", 1_000_000)  # a real one needs seconds to be written
    texts = pa.array(["x" * 30_000] * 40)
    path = parquet(tmp_path / "m.parquet", pa.array(["a"] * 40), texts, use_dictionary=False, compression="zstd")
    assert path.stat().st_size < 5000
    with pytest.raises(
        ManifestError, match=r"its column 'text' has 1,20\d,\d{3} bytes in a row group; allowed are 1,000,"
    ):
        read(path)


@pytest.mark.parametrize(
    "texts",
    [
        pa.array([2**62], pa.timestamp("ms")), pa.array([2**62], pa.timestamp("us", "No/where")),
        pa.array([2**31 - 1], pa.date32()), pa.array([2**62], pa.duration("s")), pa.array([b"\xff"]),
        pa.array([[1] * 3_000_000], pa.list_(pa.int8())), pa.array([{"a": 1}]),
        pa.array([[("a", 1)]], pa.map_("string", "int8")),
        pa.array([b"x" * 2**20], pa.binary(2**20)), pa.array([10**70], pa.decimal256(76)),
        pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")),
    ],
    ids=lambda texts: str(texts.type),
)  # fmt: skip
def test_values_that_are_not_text_are_described_by_their_type(tmp_path, texts):
    ((_, file, caption),), _ = read(parquet(tmp_path / "m.parquet", pa.array(["a.mp4"]), texts))
    assert file == "a.mp4" and repr(caption).startswith("of type ")
    ((_, file, _),), (preview,) = read(parquet(tmp_path / "m.parquet", texts, pa.array(["a caption"])))
    assert file is None and "of type" in preview and len(preview) <= 200


def test_json_that_is_deep_or_names_an_endless_path_is_a_reject(tmp_path):
    deep = [f'{{"file_name": {"[" * n}{"]" * n}, "text": "a"}}' for n in (3, 900, 990, 999, 5000)]
    row = json.dumps({"file_name": "a/" * 3000, "text": 10**400})
    (tmp_path / "m.jsonl").write_text("\n".join([*deep, row, "[1]", '{"file_name": "b", "text": 1e999}']))
    rows, previews = read(tmp_path / "m.jsonl")
    assert [file for _, file, _ in rows] == [None] * 7 + ["b"] and all(len(preview) < 250 for preview in previews)
    assert previews[5].startswith("it names a file by 6,000 characters: 'a/a/")
    assert previews[6] == "not an object: '[1]'"
