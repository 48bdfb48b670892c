"""Clips tables, ledgers and folders to import, of hostile content: only errors of ours come out."""

import json
import os
import random
import shutil
import zipfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pusa.data.reader import Table
from pusa.data.schema import CLIPS
from pusa.data.writer import write_hashed_shard, write_index, write_shard
from pusa.errors import PusaError, Rejected, TableError
from pusa.exchange.layout import EMBED, LATENT, TEXT, Pair, find_pairs
from pusa.exchange.ledger import READ, ImportLedger
from pusa.exchange.reading import read_features, read_latents
from pusa.ingest.stage import _read_finished, ingest
from pusa.ingest.verdicts import VERDICTS, Ledger
from pusa.inspect.inspection import inspect
from pusa.manifest.models import ClipSettings, IngestManifest, ModelSpec, PrecomputeManifest
from pusa.precompute.frames import decode_clip
from pusa.precompute.stage import precompute
from pusa.system.failures import attempt
from tests.fuzz import examples
from tests.helpers.indexes import edit_index, list_again
from tests.helpers.media import video
from tests.helpers.published_pairs import TOKENS, WIDTH, embed, latent, save

KEY = "0" * 16
WORDS = (
    "",
    "x",
    "64x64x7",
    "0x0x0",
    "1e9x1x1",
    "-1x2x3",
    "../x",
    "\x1b[2J",
    "<b>",
    "\u202e",
    "ffmpeg",
    "unknown",
    "\0",
)
numbers = st.sampled_from([0, 1, -1, 2**31 - 1, -(2**31), 1e308, -1e308, 0.1]) | st.integers(-100, 100)
scalars = st.none() | st.booleans() | numbers | st.floats() | st.sampled_from(WORDS) | st.text(max_size=8)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def of_type(kind: pa.DataType) -> st.SearchStrategy:
    """Return values that a column can hold, and that nobody would write."""
    if pa.types.is_list(kind):
        return st.lists(of_type(kind.value_type), max_size=4)
    if pa.types.is_integer(kind):
        return st.sampled_from([0, 1, -1, 2**31 - 1, -(2**31)]) | st.integers(-100, 100)
    if pa.types.is_floating(kind):
        return st.floats(allow_subnormal=False) | st.sampled_from([0.0, -1.0, 1e300])
    return st.sampled_from(WORDS) | st.text(max_size=8)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run's folder with a clips table of one video."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "videos").mkdir()
    video(folder / "videos/a.mp4", count=8)
    (folder / "videos/text.mp4").write_text("not a video")
    ingest(IngestManifest(source=folder / "videos", clips=ClipSettings(num_frames=7, width=64, height=64)), folder)
    shutil.rmtree(folder / "clips/ledger")
    return folder


@pytest.fixture(scope="module")
def copy(made, tmp_path_factory):
    """Return a function that gives a fresh copy of the table in an empty run's folder."""
    folder = tmp_path_factory.mktemp("copies") / "run"

    def fresh() -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(made / "clips", folder / "clips"))

    return fresh


def read_all(folder: Path, decode: bool = True) -> None:
    """Do all that is done with a clips table, except for the encoding. Only errors of ours may come out."""
    _read_finished(folder, "a key")
    with suppress(TableError):
        _read_finished(folder, Table.open(folder).facts.get("key", ""))
    with suppress(PusaError):
        inspection = inspect(folder)
        inspection.text()
        json.dumps(inspection.json(), allow_nan=False)
        inspection.write(folder / "inspect.html", 3)
    with suppress(TableError):
        for clip in Table.open(folder, "clips").read("clips").to_pylist() if decode else ():
            attempt(lambda clip=clip: decode_clip(clip, 10), None)


@settings(deadline=None, max_examples=examples(15))
@given(st.integers(0, 2**32), st.sampled_from(["flip", "flip", "cut", "swap"]))
def test_changed_bytes_of_a_clips_table_give_the_written_rows_or_an_error(made, copy, seed, how):
    dice, folder = random.Random(seed), copy()
    path = dice.choice(sorted(path for path in folder.iterdir() if path.suffix in (".json", ".parquet")))
    data = bytearray(path.read_bytes())
    place = dice.randrange(len(data))
    if how == "flip":
        data[place] ^= 1 << dice.randrange(8)
    elif how == "cut":
        del data[place:]
    else:
        data = bytearray(dice.choice(sorted(folder.glob("*.parquet"))).read_bytes())
    path.write_bytes(data)
    written = Table.open(made / "clips")
    for part in ("clips", "rejects"):
        with suppress(TableError):
            assert Table.open(folder).read(part) == written.read(part)
    with suppress(PusaError):
        inspect(folder).text()
    _read_finished(folder, written.facts["key"])


@settings(deadline=None, max_examples=examples(5))
@given(st.data())
def test_rows_that_nobody_would_write_give_only_errors_of_ours(copy, data):
    folder = copy()
    table = Table.open(folder)
    rows = table.read("clips").to_pylist()
    for name in data.draw(st.lists(st.sampled_from(CLIPS.names), min_size=1, max_size=3)):
        rows[0][name] = data.draw(of_type(CLIPS.field(name).type), label=name)
    write_shard(folder / table.parts["clips"][0]["name"], rows, CLIPS)
    list_again(table)
    read_all(folder)
    with suppress(PusaError):
        precompute(PrecomputeManifest(model=ModelSpec(weights="builtin:tiny")), folder.parent)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bucket", ""),
        ("bucket", "64x64x7\n"),
        ("bucket", "-1x64x7"),
        ("box", []),
        ("box", [0.0, 0.0, 1.0, float("nan")]),
        ("frames", []),
        ("frames", [0, -1]),
        ("fps", 0.0),
        ("source_fps", float("inf")),
        ("pixel_aspect", float("nan")),
        ("start_time", -1e300),
        ("width", 0),
        ("retimed_frames", -1),
    ],
)
def test_values_that_no_stage_writes_are_damage(copy, name, value):
    folder = copy()
    table = Table.open(folder)
    rows = table.read("clips").to_pylist()
    rows[0][name] = value
    write_shard(folder / table.parts["clips"][0]["name"], rows, CLIPS)
    list_again(table)
    with pytest.raises(TableError, match=f"cannot be read: column {name} has a"):
        Table.open(folder).read("clips", [name])
    read_all(folder)


@settings(deadline=None, max_examples=examples(15))
@given(st.data(), values)
def test_facts_of_any_json_give_only_errors_of_ours(copy, data, value):
    folder = copy()
    facts = Table.open(folder).facts
    name = data.draw(st.sampled_from(sorted(facts)))
    with suppress(ValueError):  # JSON has no such value
        edit_index(folder, lambda index: index["facts"].update({name: value}))
        read_all(folder, decode=False)


COLUMNS = st.sampled_from(
    [
        pa.array([1]),
        pa.array([None], pa.string()),
        pa.array([2**62]),
        pa.array([b"\xff\xfe"]).cast(pa.string(), safe=False),
        pa.array([[]], pa.list_(pa.int32())),
        pa.array([[None]], pa.list_(pa.int32())),
        pa.array(["x"]).dictionary_encode(),
        pa.array([{"a": 1}]),
        pa.array([float("nan")]),
    ]
)


@settings(deadline=None, max_examples=examples(15))
@given(st.sampled_from(CLIPS.names), COLUMNS, st.sampled_from(["replace", "drop", "twice"]))
def test_other_columns_give_only_errors_of_ours(copy, name, column, how):
    folder = copy()
    table = Table.open(folder)
    path = folder / table.parts["clips"][0]["name"]
    content = pq.read_table(path)
    if how == "replace":
        content = content.set_column(content.schema.names.index(name), name, pa.chunked_array([column]))
    elif how == "drop":
        content = content.drop_columns([name])
    else:
        content = content.append_column(name, column)
    pq.write_table(content, path)
    list_again(table)
    read_all(folder)


@settings(deadline=None, max_examples=examples(15))
@given(st.sampled_from([VERDICTS, READ]), st.data(), st.sampled_from(["replace", "drop", "values", "bytes"]))
def test_ledgers_that_nobody_wrote_are_forgotten(tmp_path_factory, schema, data, how):
    folder = tmp_path_factory.mktemp("ledger")
    (folder / ".lock").touch()
    row = {field.name: data.draw(of_type(field.type)) if how == "values" else None for field in schema}
    for field in schema:
        if row[field.name] is None or pa.types.is_struct(getattr(field.type, "value_type", pa.null())):
            row[field.name] = [] if pa.types.is_list(field.type) else 1 if pa.types.is_integer(field.type) else None
        if row[field.name] is None:
            row[field.name] = 1.0 if pa.types.is_floating(field.type) else "x"
        if field.name == "signature":
            row[field.name] = bytes(576)
    content = pa.Table.from_pylist([row], schema=schema)
    if how in ("replace", "drop"):
        name = data.draw(st.sampled_from(schema.names))
        content = content.drop_columns([name])
        if how == "replace":
            content = content.append_column(name, pa.chunked_array([data.draw(COLUMNS)]))
    prefix = f"{KEY}-00000001" if schema is VERDICTS else "pairs"
    path = write_hashed_shard(folder, prefix, content, content.schema)
    if how == "bytes":
        path.write_bytes(data.draw(st.binary(max_size=100)))
    if schema is VERDICTS:
        with Ledger.open(folder, KEY) as ledger:
            assert len(ledger.stamps()) == (how == "values") or how in ("replace", "drop")
            ledger.table(*VERDICTS.names)
            ledger.hashes()
            ledger.compact({"x": (1, 1, 1)})
    else:
        ledger = ImportLedger(folder)
        ledger.refresh()
        ledger.compact(["x"])
        assert len(ledger.row_keys) == (how == "values") or how in ("replace", "drop")


TENSORS = st.builds(
    lambda shape, kind: torch.zeros(shape).to(kind),
    st.lists(st.integers(0, 4), max_size=6),
    st.sampled_from([torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64]),
) | st.sampled_from(
    [
        torch.zeros(1).expand(1, 12, 2, 4, 10**9),
        torch.full((1, 12, 2, 4, 4), float("nan")),
        torch.zeros(2, 3).to_sparse(),
        torch.nn.Parameter(torch.zeros(1)),
        torch.zeros(1, TOKENS, WIDTH),
        torch.ones(1, TOKENS, dtype=torch.bool),
    ]
)
OBJECTS = st.recursive(
    TENSORS | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["mean", "logvar", "y_feat", "y_mask"]) | st.integers(), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=8,
)


def read_both(path: Path) -> None:
    for read in (lambda: read_latents(path, 12), lambda: read_features(path, TOKENS, WIDTH)):
        with suppress(Rejected):
            read()


@settings(deadline=None, max_examples=examples(60))
@given(
    OBJECTS
    | st.fixed_dictionaries({"mean": OBJECTS, "logvar": OBJECTS})
    | st.fixed_dictionaries({"y_feat": OBJECTS, "y_mask": OBJECTS})
)
def test_torch_files_of_any_object_are_read_or_rejected(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "object.pt"
    torch.save(value, path)
    read_both(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@settings(deadline=None, max_examples=examples(60))
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["x/data.pkl", "x/data/0", "x/version", "x/byteorder", "data.pkl", "../y", "", "/x", "x/é"]
            ),
            st.binary(max_size=200) | st.sampled_from([b"\x80\2}.", b"\x80\2]\x94h\0a.", b"3\n", b"little", b"huge"]),
        ),
        max_size=6,
    ),
    st.binary(max_size=30),
)
def test_archives_of_any_records_are_read_or_rejected(tmp_path_factory, records, end):
    path = tmp_path_factory.getbasetemp() / "archive.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records:
            archive.writestr(zipfile.ZipInfo(name), data)
    with path.open("ab") as file:
        file.write(end)
    read_both(path)


@settings(deadline=None, max_examples=examples(60))
@given(st.sampled_from(["latent", "embed"]), st.integers(0, 2**32))
def test_torch_files_with_changed_bytes_are_read_or_rejected(tmp_path_factory, kind, seed):
    path, dice = tmp_path_factory.getbasetemp() / f"{kind}.pt", random.Random(seed)
    data = bytearray(save(path, latent() if kind == "latent" else embed()).read_bytes())
    for _ in range(dice.choice([1, 2, 30])):
        place = dice.choice([dice.randrange(len(data)), len(data) - 1 - dice.randrange(400), dice.randrange(400)])
        data[place : place + 1] = dice.choice([b"", bytes([dice.randrange(256)]), dice.randbytes(4)])
    path.write_bytes(data)
    read_both(path)


NAMES = st.builds(
    os.path.join,
    st.sampled_from(["", "videos", "captions", "videos/d", "captions/d", ".hidden", "videos/videos"]),
    st.builds(
        str.__add__,
        st.sampled_from(["a", "A", "e\u0301", "\u00e9", "\udcff", "a.mp4@0", ".a", "", "\x1b[2J", "x" * 100]),
        st.sampled_from([LATENT, EMBED, TEXT, LATENT.upper(), ".pt", ".latent", ""]),
    ),
)


@settings(deadline=None, max_examples=examples(50))
@given(st.sets(NAMES, max_size=8), st.sampled_from(["file", "folder", "pipe", "link", "loop"]))
@example({"videos/\u00e9" + LATENT, "videos/e\u0301" + LATENT, "captions/\u00e9" + EMBED}, "file")
def test_of_a_folder_to_import_each_latent_is_a_pair_or_a_reject(tmp_path_factory, names, last):
    folder = tmp_path_factory.mktemp("p")
    for number, name in enumerate(sorted(names)):
        path = folder / name
        with suppress(OSError):  # one name may be a folder of another
            path.parent.mkdir(parents=True, exist_ok=True)
            if number or last == "file":
                path.write_text("x")
            elif last == "folder":
                path.mkdir()
            elif last == "pipe":
                os.mkfifo(path)
            else:
                path.symlink_to(folder if last == "loop" else "nowhere")
    pairs = find_pairs(folder)
    latents = [
        os.fsencode(path).decode("utf-8", "backslashreplace")
        for path in folder.rglob(f"*{LATENT}")
        if not path.is_dir() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    found = [str(pair.latent) for pair in pairs.pairs]
    rejected = [reject["source"] for reject in pairs.rejects if reject["source"].endswith(LATENT)]
    assert sorted(latents) == sorted(found + rejected)
    assert len({pair.clip_id for pair in pairs.pairs}) == len(pairs.pairs)
    json.dumps(pairs.rejects).encode()
    for pair in pairs.pairs:
        read_both(pair.latent)
        with suppress(Rejected):
            pair.caption()


@settings(deadline=None, max_examples=examples(50))
@given(st.binary(max_size=300) | st.text(max_size=50).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_a_caption_is_text_that_a_table_can_hold(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "caption.txt"
    path.write_bytes(content)
    with suppress(Rejected):
        pa.array([Pair("x", path, path, path).caption()[0]], pa.string())


def test_the_good_table_can_be_read(made):
    assert inspect(made / "clips").json()["clips"] == 1 and not inspect(made / "clips").unreadable
    result = _read_finished(made / "clips", Table.open(made / "clips").facts["key"])
    assert result is not None and asdict(result)["rejects"] == 1
    write_index(made / "clips/other", {}, {})
    with pytest.raises(TableError):
        inspect(made / "clips/other")
