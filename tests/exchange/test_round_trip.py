"""Pairs survive import and export bit for bit, and nothing is done twice."""

import os
import shutil
import unicodedata

import pyarrow.parquet as pq
import pytest
import torch

from pusa.data.latents import Latents
from pusa.data.reader import Table
from pusa.data.shard import Shard
from pusa.errors import StageError, TableError
from pusa.exchange import importing
from pusa.exchange.exporting import export_latents
from pusa.exchange.layout import find_pairs
from pusa.ingest.stage import ingest
from pusa.manifest.models import ClipSettings, IngestManifest, PrecomputeManifest
from pusa.precompute.stage import precompute
from pusa.tiny.dataset import draw_dataset
from tests.helpers.published_pairs import TINY, embed, latent, run, save, write_pair
from tests.manifest.conftest import FREE_NAMES

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def identical(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def loaded(path):
    return torch.load(path, weights_only=True)


@pytest.fixture
def pairs(tmp_path):
    """Published pairs by name, of all dtypes, three shapes and both layouts."""
    folder, made = tmp_path / "published", {}
    for seed, dtype in enumerate(DTYPES):
        name = f"a/{seed}.mp4@0"
        made[name] = write_pair(folder, name, latent(seed, dtype=dtype), embed(seed, seed + 1, dtype))
    made["long"] = write_pair(folder, "long", latent(7, (1, 12, 3, 2, 4)), embed(7, 16), beside=True)
    made["wide"] = write_pair(folder, "wide", latent(10, (1, 12, 3, 4, 2)), embed(10, 4))
    made["empty"] = write_pair(folder, "empty", latent(8), embed(8, 0))
    made["same text"] = write_pair(folder, "same text", latent(9), embed(7, 16))
    return made


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_published_files_come_back_bit_for_bit(pairs, tmp_path, compression):
    result = run(tmp_path / "published", tmp_path / "table", compression=compression)
    assert (result.found, result.rows, result.rejects) == (len(pairs), len(pairs), 0)
    exported = export_latents(tmp_path / "table", tmp_path / "out")
    assert (exported.clips, exported.written, exported.rejects) == (len(pairs), len(pairs), 0)
    for name, (latents, features) in pairs.items():
        back = loaded(tmp_path / f"out/videos/{name}.latent.pt")
        assert list(back) == ["mean", "logvar"] and all(identical(back[key], latents[key]) for key in back)
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in back.values())
        text = loaded(tmp_path / f"out/captions/{name}.embed.pt")
        mask = features["y_mask"][0]
        kept = mask if mask.any() else ~mask  # where none is valid, all are kept
        assert identical(text["y_mask"][0], mask) and text["y_feat"][0].dtype == torch.float32
        assert identical(text["y_feat"][0], features["y_feat"][0].masked_fill(~kept[..., None], 0))


def test_an_imported_table_is_read_like_any_other(pairs, tmp_path):
    run(tmp_path / "published", tmp_path / "table")
    table = Table.open(tmp_path / "table")
    latents = Latents(table)
    for index, row in enumerate(table.read("rows").to_pylist()):
        published, features = pairs[row["clip_id"]]
        mean, logvar = latents.posterior([index])
        assert torch.equal(mean, published["mean"].float()) and torch.equal(logvar, published["logvar"].float())
        text = latents.text([index]).features
        valid = features["y_mask"][0].sum()
        assert torch.equal(text[0, :valid], features["y_feat"][0][0, :valid])
        frames = 6 * (mean.shape[2] - 1) + 1
        assert row["bucket"] == f"{8 * mean.shape[4]}x{8 * mean.shape[3]}x{frames}" and len(row["frames"]) == frames
    assert table.facts["made_with"].keys() == {"vae", "text_encoder", "tokenizer"}
    assert table.facts["imported"] == {"from": str(tmp_path / "published")}


def test_a_table_of_precompute_survives_export_and_import(tmp_path):
    draw_dataset(tmp_path / "drawn", 3)
    (tmp_path / "drawn/videos/0001.txt").unlink()
    rule = ClipSettings(num_frames=13, width=32, height=32)
    ingest(IngestManifest(source=str(tmp_path / "drawn/videos"), missing_captions="empty", clips=rule), tmp_path)
    own = Table.open(precompute(PrecomputeManifest(model=TINY), tmp_path).table)
    export_latents(own.folder, tmp_path / "out", captions=True)
    assert run(tmp_path / "out", tmp_path / "again").rows == 3
    before, after = Latents(own), Latents(Table.open(tmp_path / "again"))
    assert before.clip_ids(range(3)) == after.clip_ids(range(3)) == [f"000{i}.mp4@0" for i in range(3)]
    arrays = [(*table.posterior(range(3)), *vars(table.text(range(3))).values()) for table in (before, after)]
    assert arrays[0][-1] is arrays[1][-1] is None  # no pooled features
    assert all(map(identical, arrays[0][:-1], arrays[1][:-1]))
    captions = (latents.table.read("rows")["caption"].to_pylist() for latents in (before, after))
    assert next(captions) == next(captions)
    same = ("made_with", "statistics", "text_tokens", "text_width", "stored_space", "null_key", "dtype", "compression")
    assert all(before.table.facts[name] == after.table.facts[name] for name in same)


def test_identical_pairs_are_stored_once(pairs, tmp_path):
    for name in ("videos/empty.latent.pt", "captions/empty.embed.pt"):
        shutil.copy(tmp_path / "published" / name, tmp_path / "published" / name.replace("empty", "copy"))
    assert run(tmp_path / "published", tmp_path / "table", shard_rows=2).rows == len(pairs) + 1
    table = Table.open(tmp_path / "table")
    shards = [table.folder / shard["name"] for shard in table.parts["latents"]]
    assert all(len(set(pq.read_table(shard)["bucket"].to_pylist())) == 1 for shard in shards)
    assert table.rows("latents") == len(pairs) and table.rows("texts") == len(pairs)  # and the empty prompt's


def test_captions_are_read_from_both_folders_and_exported(tmp_path):
    for name in ("a", "b", "c"):
        write_pair(tmp_path / "p", name, seed=ord(name))
    (tmp_path / "p/captions/a.txt").write_text("of the captions\n")
    (tmp_path / "p/videos/b.txt").write_text("of the videos")
    run(tmp_path / "p", tmp_path / "table")
    rows = Table.open(tmp_path / "table").read("rows").to_pylist()
    captions = {row["clip_id"]: (row["caption"], row["caption_from"]) for row in rows}
    assert captions == {"a": ("of the captions", "a.txt"), "b": ("of the videos", "b.txt"), "c": ("", "no text file")}
    export_latents(tmp_path / "table", tmp_path / "out", captions=True)
    texts = {path.name: path.read_text() for path in (tmp_path / "out").rglob("*.txt")}
    assert texts == {"a.txt": "of the captions\n", "b.txt": "of the videos\n"}
    assert [pair.clip_id for pair in find_pairs(tmp_path / "out").pairs] == ["a", "b", "c"]


@FREE_NAMES
def test_pairs_are_found_whatever_the_unicode_form_of_their_names(tmp_path, caplog):
    nfc, nfd = (unicodedata.normalize(form, "été") for form in ("NFC", "NFD"))
    third = nfd[:2] + nfc[1:]
    videos, captions = tmp_path / "videos", tmp_path / "captions"
    for path in (videos / f"{nfd}.latent.pt", captions / f"{nfc}.embed.pt", captions / f"{nfc}.txt"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (pair,) = find_pairs(tmp_path).pairs
    assert (pair.clip_id, pair.embed.name, pair.text.name) == (nfd, f"{nfc}.embed.pt", f"{nfc}.txt")
    assert "1 names differ from those of their latents" in caplog.text
    (videos / f"{nfc}.latent.pt").touch()  # the embedding has its very name, so it is no longer the other's
    found = find_pairs(tmp_path)
    assert [pair.clip_id for pair in found.pairs] == [nfc] and "has no features" in found.rejects[0]["detail"]
    (videos / f"{nfc}.latent.pt").unlink()
    (captions / f"{third}.embed.pt").touch()
    found = find_pairs(tmp_path)
    assert not found.pairs and all(ascii(name)[1:-1] in found.rejects[0]["detail"] for name in (nfc, third))


def test_an_export_is_resumed_and_never_mixed_with_another(pairs, tmp_path):
    run(tmp_path / "published", tmp_path / "table")
    export_latents(tmp_path / "table", tmp_path / "out")
    gone, garbage = tmp_path / "out/captions/long.embed.pt", tmp_path / "out/videos/a/.partial-1-0.latent.pt"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.pt")}
    content = gone.read_bytes()
    gone.unlink()
    garbage.write_text("what a killed run left")
    assert export_latents(tmp_path / "table", tmp_path / "out").written == 1
    assert gone.read_bytes() == content and not garbage.exists()
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path != gone)
    write_pair(tmp_path / "published", "one more", seed=20)
    run(tmp_path / "published", tmp_path / "table")
    with pytest.raises(StageError, match="with other content"):
        export_latents(tmp_path / "table", tmp_path / "out")
    with pytest.raises(StageError, match="Pusa did not write it"):
        export_latents(tmp_path / "table", tmp_path / "published")
    (tmp_path / "published/.lock").touch()
    with pytest.raises(StageError, match="no export wrote"):
        export_latents(tmp_path / "table", tmp_path / "published")
    with pytest.raises(StageError, match="holds a table"):
        export_latents(tmp_path / "table", tmp_path / "table")
    with pytest.raises(StageError, match="holds the pairs to import"):
        run(tmp_path / "out", tmp_path / "out")


def test_only_what_changed_is_read_again(pairs, tmp_path):
    folder, table = tmp_path / "published", tmp_path / "table"
    assert run(folder, table, shard_rows=2).read == len(pairs)
    assert run(folder, table, shard_rows=2).read == 0
    assert run(folder, table, shard_rows=5).read == 0
    before = Table.open(table)
    save(folder / "videos/empty.latent.pt", latent(30))
    (folder / "captions/empty.txt").write_text("a caption")
    result = run(folder, table, shard_rows=2)
    assert (result.read, result.rows) == (1, len(pairs))
    after = Table.open(table)
    assert before.fingerprint != after.fingerprint
    assert {shard["name"] for part in after.parts.values() for shard in part} == {
        path.name for path in table.glob("*-*.parquet") if not path.name.startswith("pairs-")
    }


def interrupt():
    raise KeyboardInterrupt


def test_an_interrupted_import_is_resumed(pairs, tmp_path, monkeypatch):
    folder, table = tmp_path / "published", tmp_path / "table"
    read, calls = importing.read_features, iter(range(100))
    monkeypatch.setattr(importing, "read_features", lambda *given: interrupt() if next(calls) == 3 else read(*given))
    with pytest.raises(KeyboardInterrupt):
        run(folder, table, shard_rows=1)
    with pytest.raises(TableError):
        Table.open(table)
    monkeypatch.undo()
    assert run(folder, table, shard_rows=1).read == len(pairs) - 3


@pytest.mark.parametrize("new_time", [True, False])
def test_a_damaged_shard_is_made_again(pairs, tmp_path, new_time):
    run(tmp_path / "published", tmp_path / "table")
    table = Table.open(tmp_path / "table")
    path = table.folder / table.parts["latents"][0]["name"]
    data, stat = bytearray(path.read_bytes()), path.stat()
    data[len(data) // 2] ^= 1
    path.write_bytes(data[:-1] if new_time else data)
    if not new_time:  # bit rot
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert run(tmp_path / "published", tmp_path / "table").read == 0
    assert 0 < run(tmp_path / "published", tmp_path / "table", verify=not new_time).read < len(pairs)
    assert Latents(Table.open(tmp_path / "table")).buckets.keys() == {"32x32x7", "32x16x13", "16x32x13"}


def test_an_index_records_how_its_shards_are_stored(pairs, tmp_path):
    folder, table = tmp_path / "published", tmp_path / "table"
    run(folder, table, compression="none")
    assert Table.open(table).facts["compression"] == "none"
    write_pair(folder, "one more", seed=20)
    run(folder, table, compression="zstd")
    facts = Table.open(table).facts
    assert (facts["compression"], facts["dtype"]) == ("none+zstd", "bfloat16+float16+float32")
    for part, column in (("latents", "latent_mean"), ("texts", "text")):
        for shard in Table.open(table).parts[part]:
            file = pq.ParquetFile(table / shard["name"])
            facts, group = Shard(table / shard["name"]).facts, file.metadata.row_group(0)
            columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
            assert columns[column].compression == {"none": "UNCOMPRESSED", "zstd": "ZSTD"}[facts["compression"]]
            assert set(file.read(["dtype"])["dtype"].to_pylist()) == {facts["dtype"]}


def test_the_leftovers_of_killed_runs_are_removed_even_if_there_is_nothing_to_do(pairs, tmp_path):
    folder, table = tmp_path / "published", tmp_path / "table"
    run(folder, table)
    names = {path.name for path in table.iterdir()}
    (ledger,) = table.glob("pairs-*.parquet")
    shutil.copy(ledger, table / f"pairs-{'0' * 32}.parquet")
    for name in (f"latents-{'0' * 12}-{'0' * 32}.parquet", "rejected-latents-0.json", ".partial-1-x.parquet"):
        (table / name).write_text("[]")
    assert run(folder, table).read == 0
    assert {path.name for path in table.iterdir()} - {"quarantine"} == names
    (ledger,) = table.glob("pairs-*.parquet")
    assert run(folder, table, shard_rows=1).read == 0


def test_links_to_folders_are_followed_once(pairs, tmp_path):
    (tmp_path / "linked").mkdir()
    for name in ("videos", "captions"):
        os.symlink(tmp_path / "published" / name, tmp_path / "linked" / name)
    os.symlink(tmp_path / "linked", tmp_path / "published/videos/back")
    pair_list = find_pairs(tmp_path / "linked")
    assert len(pair_list.pairs) == len(pairs) - 1 and not pair_list.rejects
