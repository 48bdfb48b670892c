"""Import refuses files that are damaged, malicious or do not fit, and names the reason."""

import json
import os
import pickle
import random
import unicodedata
import zipfile

import pytest
import torch

from flows.commands import main
from pusa.data.reader import Table
from pusa.data.schema import REJECTS, ROWS
from pusa.data.writer import write_index, write_shard
from pusa.errors import MediaError, Rejected, StageError, TableError
from pusa.exchange.exporting import export_latents
from pusa.exchange.layout import find_pairs
from pusa.exchange.reading import read_features, read_latents
from tests.helpers.indexes import list_again
from tests.helpers.published_pairs import TOKENS, WIDTH, embed, latent, run, save, write_pair
from tests.manifest.conftest import FREE_NAMES


class Touches:
    """An object that makes a folder when plain pickle loads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def with_nan(tensor):
    return tensor.index_fill(-1, torch.tensor([1]), float("nan"))


def masked(*valid):
    return [torch.isin(torch.arange(TOKENS), torch.tensor(valid))[None]]


GOOD = latent()
BAD_LATENTS = {
    "nan": ({"mean": with_nan(GOOD["mean"]), "logvar": GOOD["logvar"]}, "not_finite", "mean are not finite"),
    "a list": ([1, 2], "bad_pair", "it holds list"),
    "other keys": ({"mu": GOOD["mean"], "logvar": GOOD["logvar"]}, "bad_pair", "it holds mu, logvar"),
    "more keys": ({**GOOD, "more": GOOD["mean"].clone()}, "bad_pair", "expected mean and logvar"),
    "no tensor": ({"mean": 1.0, "logvar": GOOD["logvar"]}, "bad_pair", "mean is float"),
    "parameter": ({**GOOD, "mean": torch.nn.Parameter(GOOD["mean"])}, "bad_pair", "_rebuild_parameter"),
    "integers": ({**GOOD, "mean": GOOD["mean"].int()}, "bad_pair", "allowed are bfloat16, float16, float32"),
    "two dtypes": ({**GOOD, "mean": GOOD["mean"].float()}, "bad_pair", "expected both to be alike"),
    "two shapes": ({**GOOD, "mean": GOOD["mean"][:, :, :1]}, "bad_pair", "expected both to be alike"),
    "flat": ({name: part.flatten() for name, part in GOOD.items()}, "bad_pair", "expected 4 dimensions"),
    "batch of 2": (latent(shape=(2, 12, 2, 4, 4)), "bad_pair", "expected 4 dimensions"),
    "no frames": (latent(shape=(1, 12, 0, 4, 4)), "bad_pair", "expected 4 dimensions"),
    "channels": (latent(shape=(1, 16, 2, 4, 4)), "bad_pair", "16 channels; the VAE has 12"),
    "odd size": (latent(shape=(1, 12, 2, 3, 4)), "bad_pair", "height 24 is not a multiple of 16"),
    "a bomb": ({name: part[..., :1].expand(1, 12, 2, 4, 10**9) for name, part in GOOD.items()}, "bad_pair", "more"),
    "sparse": ({**GOOD, "mean": GOOD["mean"].float().to_sparse()}, "bad_pair", "_rebuild_sparse_tensor"),
    "odd keys": ({1: 2, (3,): GOOD["mean"]}, "bad_pair", "it holds int, tuple;"),
    "too much": ({"mean": [[] for _ in range(600)], "logvar": 0}, "bad_pair", "more than 1000 opcodes"),
    "the same twice": (dict.fromkeys(GOOD, GOOD["mean"]), "bad_pair", "uses something twice"),
}  # fmt: skip
BAD_FEATURES = {
    "nan": ({**embed(), "y_feat": [with_nan(embed()["y_feat"][0])]}, "not_finite", "features are not finite"),
    "other width": (embed(width=32), "bad_pair", f"tokens of width {WIDTH}"),
    "other length": (embed(tokens=8), "bad_pair", f"gives {TOKENS} tokens"),
    "gap": ({**embed(), "y_mask": masked(0, 2)}, "bad_pair", "2 valid tokens of y_mask are not the first"),
    "numbers for a mask": ({**embed(), "y_mask": [torch.ones(1, TOKENS)]}, "bad_pair", "allowed are bool"),
    "two texts": ({**embed(), "y_feat": [*embed()["y_feat"], *embed()["y_feat"]]}, "bad_pair", "y_feat is list"),
    "no mask": ({"y_feat": embed()["y_feat"]}, "bad_pair", "it holds y_feat"),
}


@pytest.mark.parametrize("case", BAD_LATENTS)
def test_bad_latents_are_rejected_with_the_reason(tmp_path, case):
    value, reason, why = BAD_LATENTS[case]
    check_rejected(tmp_path, reason, why, latents=value)


@pytest.mark.parametrize("case", BAD_FEATURES)
def test_bad_features_are_rejected_with_the_reason(tmp_path, case):
    value, reason, why = BAD_FEATURES[case]
    check_rejected(tmp_path, reason, why, features=value)


def check_rejected(folder, reason, why, **bad):
    """Import a good and a bad pair: the good one is a row, the bad one a reject with its reason."""
    write_pair(folder / "p", "good", seed=1)
    write_pair(folder / "p", "wrong", **bad)
    result = run(folder / "p", folder / "table")
    assert (result.found, result.rows, result.rejects) == (2, 1, 1)
    (reject,) = Table.open(folder / "table").read("rejects").to_pylist()
    assert reject["source"] == str(folder / "p/videos/wrong.latent.pt")
    assert reject["reason"] == reason and why in reject["detail"], reject
    assert Table.open(folder / "table").facts["rejects_by_reason"] == {reason: 1}


def test_no_code_in_a_file_is_run(tmp_path):
    marker = tmp_path / "marker"
    write_pair(tmp_path / "p", "good")
    write_pair(tmp_path / "p", "zip", {**GOOD, "logvar": Touches(marker)}, seed=1)
    write_pair(tmp_path / "p", "legacy", seed=2)
    (tmp_path / "p/videos/legacy.latent.pt").write_bytes(pickle.dumps(Touches(marker)))
    write_pair(tmp_path / "p", "text", seed=3)
    save(tmp_path / "p/captions/text.embed.pt", {"y_feat": [Touches(marker)], "y_mask": masked(0)})
    result = run(tmp_path / "p", tmp_path / "table")
    assert (result.rows, result.rejects) == (1, 3) and not marker.exists()
    torch.load(tmp_path / "p/videos/zip.latent.pt", weights_only=False)
    assert marker.exists()  # the file is indeed dangerous


def test_a_damaged_file_is_read_or_rejected(tmp_path):
    """With flipped bytes and missing ends, a file is read or rejected; there is no other error."""
    whole = {read_latents: save(tmp_path / "l.pt", GOOD), read_features: save(tmp_path / "e.pt", embed())}
    damaged, dice, rejects = tmp_path / "x.pt", random.Random(0), 0
    for read, path in whole.items():
        for _ in range(150):
            data = bytearray(path.read_bytes())
            for _ in range(dice.choice([1, 4, 40])):
                data[dice.randrange(len(data))] = dice.randrange(256)
            damaged.write_bytes(data[: dice.choice([len(data), dice.randrange(len(data))])])
            try:
                read(damaged, *((12,) if read is read_latents else (TOKENS, WIDTH)))
            except Rejected as reject:
                rejects += 1
                assert str(damaged) in reject.detail
    assert rejects > 100


def test_a_file_that_grows_when_it_is_unpacked_is_refused(tmp_path):
    save(tmp_path / "plain.pt", GOOD)
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "x.pt", "w", 8) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(Rejected, match="it is compressed"):
        read_latents(tmp_path / "x.pt", 12)


def test_a_key_that_takes_forever_to_hash_or_print_is_refused(tmp_path):
    """A tuple contains another one twice, which contains another one twice, ...: 2^22 parts in 120 bytes."""
    doubled = b"q\0h\0\x86"  # store the last item in the memo, fetch it, and make a pair of both
    as_key, as_value = b"\x80\2})" + 22 * doubled + b"Ns.", b"\x80\2}K\1)" + 22 * doubled + b"s."
    for pickled in (as_key, as_value):
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
            archive.writestr("x/data.pkl", pickled)
            archive.writestr("x/version", "3\n")
        with pytest.raises(Rejected, match="uses something twice"):
            read_latents(tmp_path / "x.pt", 12)


def test_files_without_a_pair_and_invalid_names_are_rejects(tmp_path):
    folder = tmp_path / "p"
    write_pair(folder, "good")
    save(folder / "videos/a/alone.latent.pt", GOOD)
    save(folder / "captions/b/alone.embed.pt", embed())
    write_pair(folder, "good", beside=True)
    write_pair(folder, "bad-text", seed=1)
    (folder / "captions/bad-text.txt").write_bytes(b"\xff")
    save(folder / "videos/\udcff.latent.pt", GOOD)
    (folder / "videos/.partial-1-x.latent.pt").write_text("what a killed run left")
    os.mkfifo(folder / "videos/pipe.latent.pt")
    save(folder / "captions/pipe.embed.pt", embed())
    result = run(folder, tmp_path / "table")
    rejects = Table.open(tmp_path / "table").read("rejects").to_pylist()
    listed = {(reject["source"].removeprefix(f"{folder}/"), reject["reason"]) for reject in rejects}
    assert listed == {
        ("videos/a/alone.latent.pt", "bad_pair"),
        ("captions/b/alone.embed.pt", "bad_pair"),
        ("videos/good.latent.pt", "bad_pair"),  # the one beside its features comes first
        ("videos/bad-text.latent.pt", "bad_caption"),
        ("videos/\\xff.latent.pt", "bad_name"),
        ("videos/pipe.latent.pt", "unreadable"),
    }
    assert (result.rows, result.found) == (1, 7)


def test_a_reject_is_tried_again_and_becomes_a_row_once_it_is_repaired(tmp_path):
    write_pair(tmp_path / "p", "good")
    write_pair(tmp_path / "p", "b", BAD_LATENTS["nan"][0])
    assert run(tmp_path / "p", tmp_path / "table").rejects == 1
    again = run(tmp_path / "p", tmp_path / "table")
    assert (again.rejects, again.read) == (1, 0)
    save(tmp_path / "p/videos/b.latent.pt", latent(4))
    repaired = run(tmp_path / "p", tmp_path / "table")
    assert (repaired.rejects, repaired.rows, repaired.read) == (0, 2, 1)


def test_no_importable_pair_is_an_error_with_the_reason(tmp_path):
    write_pair(tmp_path / "p", "a", features=embed(width=32))
    with pytest.raises(StageError, match=f"none of 1 .* {WIDTH}"):
        run(tmp_path / "p", tmp_path / "table")
    (tmp_path / "none").mkdir()
    with pytest.raises(StageError, match="holds no pairs"):
        run(tmp_path / "none", tmp_path / "table")
    with pytest.raises(MediaError, match="is not a folder; expected"):
        find_pairs(tmp_path / "nowhere")


def test_a_table_that_was_not_imported_is_not_replaced(tmp_path):
    write_pair(tmp_path / "p", "a")
    write_shard(tmp_path / "table/rejects.parquet", [], REJECTS)
    write_index(tmp_path / "table", {"rejects": [tmp_path / "table/rejects.parquet"]}, {})
    with pytest.raises(TableError, match="was not imported"):
        run(tmp_path / "p", tmp_path / "table")


def test_an_export_writes_only_inside_its_folder(tmp_path):
    for name in ("a", "b", "c", "d", "e"):
        write_pair(tmp_path / "p", name, seed=ord(name))
    run(tmp_path / "p", tmp_path / "table")
    table = Table.open(tmp_path / "table")
    rows = table.read("rows").to_pylist()
    ids = ("../../escaped", str(tmp_path / "escaped"), "x" * 300, "fine/d.mp4@0", "fine/d.mp4@0")
    for row, clip_id in zip(rows, ids, strict=True):
        row["clip_id"] = clip_id
    write_shard(table.folder / table.parts["rows"][0]["name"], rows, ROWS)
    list_again(table)
    exported = export_latents(table.folder, tmp_path / "out/inner")
    assert (exported.rows, exported.clips, exported.rejects) == (5, 1, 4)
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.pt")}
    assert files == {"inner/videos/fine/d.mp4@0.latent.pt", "inner/captions/fine/d.mp4@0.embed.pt"}
    assert not list(tmp_path.glob("escaped*"))


@FREE_NAMES
def test_clips_that_differ_only_by_unicode_form_are_not_exported_to_one_file(tmp_path):
    names = [unicodedata.normalize(form, "été") for form in ("NFC", "NFD")]
    for name in names:
        write_pair(tmp_path / "p", name, seed=len(name))
    assert run(tmp_path / "p", tmp_path / "table").rows == 2
    exported = export_latents(tmp_path / "table", tmp_path / "out")
    assert (exported.clips, exported.rejects) == (1, 1)
    (record,) = json.loads((tmp_path / "out/export.json").read_text())["rejects"]
    assert record["reason"] == "duplicate" and record["source"] in names


def test_the_commands_import_and_export(tmp_path, capsys):
    write_pair(tmp_path / "p", "a")
    folder, table = str(tmp_path / "p"), str(tmp_path / "table")
    assert main(["import-latents", folder, "--to", table, "--weights", "builtin:tiny", "--fps", "12"]) == 0
    assert "rows: 1" in capsys.readouterr().out
    assert Table.open(tmp_path / "table").read("rows")["fps"].to_pylist() == [12]
    assert main(["export-latents", table, str(tmp_path / "out")]) == 0
    assert main(["export-latents", table, folder]) == 1
    assert "Pusa did not write it" in capsys.readouterr().err


def test_a_flipped_bit_in_the_values_is_found(tmp_path):
    path = tmp_path / "x.latent.pt"
    torch.save({"mean": torch.ones(1, 12, 2, 4, 4), "logvar": torch.zeros(1, 12, 2, 4, 4)}, path)
    read_latents(path, 12)
    data = bytearray(path.read_bytes())
    data[data.index(torch.ones(4).numpy().tobytes()) + 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(Rejected, match=r"the checksum of .*data/0 is wrong"):
        read_latents(path, 12)
