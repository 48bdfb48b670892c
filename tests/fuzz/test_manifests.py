"""Random manifests and metadata files: only errors of ours come out, and a bad row is one reject."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pusa.errors import ManifestError
from pusa.ingest.sources import find_sources
from pusa.manifest.loading import load_manifest, read_manifest
from pusa.manifest.models import KINDS, IngestManifest
from pusa.registry import find
from pusa.tasks import TASKS
from tests.fuzz import examples

MODELS = [*KINDS.values(), *(find(TASKS, name, "task") for name in TASKS)]
KEYS = sorted({name for model in MODELS for name in model.model_fields} | {"sweep", "prompt_file", "weights", "method"})
WORDS = (*KINDS, *TASKS, "builtin:tiny", "hf:a/b", "RUN/x", "*.png", "**/[a-", "mochi", "lora", "0..1", "ptss(0.2)")
SCALARS = st.sampled_from(
    [*WORDS, "", "a", -1, 0, 1, 1e300, float("nan"), 2**64, True, None, "\ud83d\ude00", "\x1b[2J"]
)
VALUES = st.recursive(
    SCALARS | st.text(max_size=8) | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), inner),
    max_leaves=12,
)
JOBS = st.fixed_dictionaries(
    {"id": st.sampled_from("abc"), "task": st.sampled_from([*TASKS])},
    optional={key: VALUES for key in KEYS if key not in ("id", "task")},
)
MANIFESTS = st.fixed_dictionaries(
    {"kind": st.sampled_from([*KINDS])}, optional={key: VALUES for key in KEYS if key != "kind"}
) | st.builds(
    lambda jobs, defaults: {
        "kind": "generate",
        "model": {"weights": "builtin:tiny"},
        "jobs": jobs,
        "defaults": defaults,
    },
    st.lists(JOBS | VALUES, max_size=4),
    VALUES,
)
YAML = (
    "&a",
    "*a",
    "!!int",
    "!!python/object:os.system",
    "!!timestamp",
    "<<",
    "---",
    "...",
    "%YAML 1.1",
    "? ",
    "| ",
    ">-",
)
PIECES = st.sampled_from([*YAML, *"{}[]:,-\n\t\"'#", ": ", "\n  - ", "\n  ", "kind: generate\n", *KEYS, *WORDS, "1e9"])
fuzzed = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def load(folder, data: bytes) -> None:
    (folder / "m.yaml").write_bytes(data)
    for read in (load_manifest, read_manifest):
        try:
            read(folder / "m.yaml", folder / "run")
        except ManifestError as error:
            assert str(error).startswith(str(folder))


@settings(fuzzed, max_examples=examples(20))
@given(MANIFESTS)
def test_manifests_of_any_content_are_valid_or_refused(tmp_path, manifest):
    load(tmp_path, json.dumps(manifest).encode())


@settings(fuzzed, max_examples=examples(60))
@given(st.lists(PIECES | st.text(max_size=3), max_size=30).map("".join).map(lambda text: text.encode(errors="replace"))
       | st.binary(max_size=60))  # fmt: skip
@example(b"kind: !!bool maybe")
@example(b"kind: !!timestamp 2001-99-99")
def test_manifests_of_any_text_are_valid_or_refused(tmp_path, data):
    load(tmp_path, data)


def list_sources(folder, suffix: str, data: bytes) -> None:
    (folder / f"m.{suffix}").write_bytes(data)
    try:
        catalogue = find_sources(IngestManifest(source=str(folder / f"m.{suffix}")))
    except ManifestError as error:
        assert len(str(error)) < 10_000
        return
    assert catalogue.sources
    for source in catalogue.sources:
        assert (source.reject is None) == isinstance(source.caption, str) or source.reject is not None
        assert source.reject is None or len(source.reject.detail) < 10_000
        catalogue.name(source)


ROWS = st.lists(st.fixed_dictionaries({}, optional={"file_name": VALUES, "text": VALUES, "other": VALUES}), max_size=5)
CELLS = st.sampled_from([*'",\n\r\t\0', "file_name", "text", "a.mp4", '""', "x" * 5000, "\ufeff", "\u0301", "\ud800"])


@settings(fuzzed, max_examples=examples(60))
@given(ROWS, st.lists(CELLS | st.text(max_size=3), max_size=12))
def test_metadata_in_text_of_any_content_is_listed_or_refused(tmp_path, rows, cells):
    lines = [json.dumps(row) for row in rows]
    list_sources(tmp_path, "jsonl", "\n".join([*lines, "".join(cells)]).encode(errors="replace"))
    head = "file_name,text\n" * (len(rows) % 2)
    list_sources(tmp_path, "csv", (head + "".join(cells)).encode(errors="replace"))


TYPES = (pa.string(), pa.large_string(), pa.binary(), pa.int64(), pa.float16(), pa.bool_(), pa.null(),
         pa.timestamp("us"), pa.date32(), pa.decimal128(9, 2), pa.list_(pa.string()), pa.struct([("a", pa.int8())]),
         pa.json_(), pa.dictionary(pa.int8(), pa.string()), pa.duration("s"), pa.month_day_nano_interval())  # fmt: skip


def parquet_bytes(kind: pa.DataType, other: pa.DataType) -> bytes:
    """Return a table with a column of each type, of values that its bytes happen to be, and nulls."""
    columns = []
    for column_type in (kind, other):
        if pa.types.is_primitive(column_type) and not pa.types.is_null(column_type):
            column = pa.Array.from_buffers(column_type, 2, [pa.py_buffer(b"\1"), pa.py_buffer(b"\x7f" * 64)])
        else:
            column = pa.nulls(2, column_type) if column_type != pa.string() else pa.array(["a.mp4", "b\0"])
        columns.append(column)
    sink = io.BytesIO()
    try:
        pq.write_table(pa.table(dict(zip(("file_name", "text"), columns, strict=True))), sink)
    except pa.ArrowException:  # Parquet has no such type
        return b""
    return sink.getvalue()


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_columns_of_any_type_are_rejected_value_by_value(tmp_path, kind):
    for pair in ((kind, pa.string()), (pa.string(), kind)):
        list_sources(tmp_path, "parquet", parquet_bytes(*pair))
