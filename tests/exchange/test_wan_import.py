"""Import of V1.0's training data: normalised latents without a variance, and text features, in one file a clip."""

import json
import os
import pickle

import pytest
import torch

from flows.commands import main
from pusa.data.latents import Latents, sample_posterior
from pusa.data.reader import Table
from pusa.errors import ManifestError, Rejected, StageError
from pusa.exchange.exporting import export_latents
from pusa.exchange.importing import NO_VARIANCE, Settings, import_latents
from pusa.exchange.layout import find_pairs
from pusa.exchange.reading import read_tensors
from pusa.manifest.models import ModelSpec
from tests.exchange.test_refusals import Touches, with_nan
from tests.helpers.published_pairs import save
from tests.helpers.small_wan import MAX_TOKENS, TEXT_WIDTH, write_wan_2_1

SHAPE = (16, 3, 4, 6)  # 9 frames of 48x32


def tensors(seed=0, valid=5, dtype=torch.bfloat16, shape=SHAPE):
    """Return what the published trainer stores of a clip."""
    generator = torch.Generator().manual_seed(seed)
    context = torch.zeros(1, MAX_TOKENS, TEXT_WIDTH, dtype=dtype)
    context[:, :valid] = torch.randn(valid, TEXT_WIDTH, generator=generator).to(dtype)
    latents = torch.randn(shape, generator=generator).to(dtype)
    return {"latents": latents, "prompt_emb": {"context": context}, "image_emb": {}}


def write(folder, name, value=None, seed=0):
    return save(folder / f"train/{name}.tensors.pth", tensors(seed) if value is None else value)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return ModelSpec(backbone="wan2.1", weights=str(write_wan_2_1(tmp_path_factory.mktemp("wan"))))


@pytest.fixture
def run(model, tmp_path):
    def run(folder=tmp_path / "data", table=tmp_path / "table", **settings):
        return import_latents(folder, table, Settings(model, fps=16, **settings))

    return run


def metadata(folder, *rows, header="file_name,text"):
    folder.mkdir(exist_ok=True)
    (folder / "metadata.csv").write_text("\n".join([header, *rows]) + "\n")


def test_the_values_of_the_files_come_back_normalised_and_the_text_as_valid_rows(run, tmp_path, caplog):
    metadata(tmp_path / "data", "a/one.mp4,A red ball", 'two.mp4,"Two, and more"')
    files = {
        "a/one.mp4": tensors(1),
        "two.mp4": tensors(2, valid=512, dtype=torch.float32),
        "bare": tensors(3, valid=0),
    }
    for name, value in files.items():
        write(tmp_path / "data", name, value)
    result = run()
    assert (result.found, result.rows, result.rejects) == (3, 3, 0)
    table = Table.open(tmp_path / "table")
    assert table.facts["imported"] == {"from": str(tmp_path / "data"), "without_variance": 3}
    assert "3 of 3 clips have no variance" in caplog.text
    latents = Latents(table)
    for index, row in enumerate(table.read("rows").to_pylist()):
        published = files[row["clip_id"]]
        mean, logvar = latents.posterior([index])
        z = sample_posterior(mean, logvar, latents.space, torch.Generator().manual_seed(index))[0]
        assert (logvar == NO_VARIANCE).all() and torch.allclose(z, published["latents"].float(), atol=3e-6)
        assert torch.equal(latents.space.enter(mean)[0].bfloat16(), published["latents"].bfloat16())
        text = latents.text([index])
        assert torch.equal(text.features, published["prompt_emb"]["context"].float())
        stored, valid, _ = latents._text(index)
        assert len(stored) == (valid or 512) and text.mask.sum() == valid
        assert (row["fps"], row["bucket"]) == (16, "48x32x9")
    captions = {row["clip_id"]: row["caption"] for row in table.read("rows").to_pylist()}
    assert captions == {"a/one.mp4": "A red ball", "two.mp4": "Two, and more", "bare": ""}


def test_nothing_is_read_twice_and_a_changed_caption_is_read_again(run, tmp_path):
    metadata(tmp_path / "data", "a.mp4,one", "b.mp4,two")
    for seed, name in enumerate(("a.mp4", "b.mp4")):
        write(tmp_path / "data", name, seed=seed)
    assert run().read == 2 and run().read == 0
    metadata(tmp_path / "data", "a.mp4,one", "b.mp4,another")
    assert run().read == 1
    rows = Table.open(tmp_path / "table").read("rows").to_pylist()
    assert [row["caption"] for row in rows] == ["one", "another"]


GOOD = tensors()
I2V = {"clip_feature": torch.zeros(1, 257, 8), "y": torch.zeros(1, 20, 3, 4, 6)}
BAD = {
    "nan": ({**GOOD, "latents": with_nan(GOOD["latents"])}, "not_finite", "mean are not finite"),
    "nan after the valid rows": (
        {**GOOD, "prompt_emb": {"context": with_nan(GOOD["prompt_emb"]["context"])}}, "not_finite", "features",
    ),
    "a list": ([1, 2], "bad_pair", "it holds list; expected latents and prompt_emb and image_emb"),
    "no latents": ({"prompt_emb": GOOD["prompt_emb"], "image_emb": {}}, "bad_pair", "it holds prompt_emb, image_emb"),
    "more keys": ({**GOOD, "more": torch.zeros(1)}, "bad_pair", "it holds latents, prompt_emb, image_emb, more"),
    "image inputs": ({**GOOD, "image_emb": I2V}, "bad_pair", "image_emb holds clip_feature, y; it is for a model with"),
    "no text": ({**GOOD, "prompt_emb": {}}, "bad_pair", "prompt_emb holds nothing; expected context"),
    "text of another form": ({**GOOD, "prompt_emb": GOOD["latents"].clone()}, "bad_pair", "prompt_emb holds Tensor"),
    "more text": (
        {**GOOD, "prompt_emb": {**GOOD["prompt_emb"], "pooled": torch.zeros(1)}}, "bad_pair", "holds context, pooled",
    ),
    "shorter text": ({**GOOD, "prompt_emb": {"context": torch.zeros(1, 256, 16)}}, "bad_pair", "gives 512 tokens"),
    "channels": (tensors(shape=(12, 3, 4, 6)), "bad_pair", "latents have 12 channels; the VAE has 16"),
    "two clips": (tensors(shape=(2, *SHAPE)), "bad_pair", "expected 4 dimensions"),
    "odd size": (tensors(shape=(16, 3, 4, 5)), "bad_pair", "width 40 is not a multiple of 16"),
    "a bomb": ({**GOOD, "latents": GOOD["latents"][..., :1].expand(16, 3, 4, 10**9)}, "bad_pair", "more than the file"),
    "integers": ({**GOOD, "latents": GOOD["latents"].int()}, "bad_pair", "allowed are bfloat16, float16, float32"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_rejected_with_the_reason(run, tmp_path, case):
    value, reason, why = BAD[case]
    write(tmp_path / "data", "good.mp4", seed=1)
    path = write(tmp_path / "data", "wrong.mp4", value)
    result = run()
    assert (result.found, result.rows, result.rejects) == (2, 1, 1)
    (reject,) = Table.open(tmp_path / "table").read("rejects").to_pylist()
    assert (reject["source"], reject["reason"]) == (str(path), reason) and why in reject["detail"], reject


def test_no_code_in_a_file_is_run(tmp_path):
    marker = tmp_path / "marker"
    zipped = save(tmp_path / "zip.pth", {**GOOD, "image_emb": Touches(marker)})
    plain = tmp_path / "plain.pth"
    plain.write_bytes(pickle.dumps(Touches(marker)))
    for path in (zipped, plain):
        with pytest.raises(Rejected):
            read_tensors(path, 16, MAX_TOKENS, TEXT_WIDTH)
    assert not marker.exists()


def test_rows_and_files_without_a_partner_are_rejects_or_have_no_caption(run, tmp_path):
    data = tmp_path / "data"
    metadata(
        data, "a.mp4,one", "gone.mp4,two", "twice.mp4,three", "twice.mp4,four", "same.mp4,x", "same.mp4,x", ",none"
    )
    for seed, name in enumerate(("a.mp4", "twice.mp4", "same.mp4", "unlisted.mp4")):
        write(data, name, seed=seed)
    os.mkfifo(data / "train/pipe.tensors.pth")
    os.mkfifo(data / "train/pipe.txt")
    result = run()
    rejects = Table.open(tmp_path / "table").read("rejects").to_pylist()
    listed = {(reject["source"].removeprefix(f"{data}/"), reject["reason"]) for reject in rejects}
    assert listed == {
        ("metadata.csv", "bad_row"),
        ("train/twice.mp4.tensors.pth", "bad_caption"),
        ("train/pipe.tensors.pth", "unreadable"),
    }
    assert (result.found, result.rows) == (7, 3)


def test_a_broken_list_of_captions_ends_the_import(run, tmp_path, capsys, model):
    write(tmp_path / "data", "a.mp4")
    for content, message in ((b"name,text\n", "no column 'file_name'"), (b"\xff", "cannot be read")):
        (tmp_path / "data/metadata.csv").write_bytes(content)
        with pytest.raises(ManifestError, match=message):
            run()
    command = ["import-latents", str(tmp_path / "data"), "--to", str(tmp_path / "t"), "--weights", model.weights]
    assert main([*command, "--backbone", "wan2.1"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (tmp_path / "t").exists()


def test_the_command_says_that_there_is_no_variance_and_takes_the_rate_of_the_family(tmp_path, model, capsys, caplog):
    write(tmp_path / "data", "a.mp4")
    command = ["import-latents", str(tmp_path / "data"), "--to", str(tmp_path / "table"), "--weights", model.weights]
    assert main([*command, "--backbone", "wan2.1"]) == 0
    assert "rows: 1" in capsys.readouterr().out and "1 of 1 clips have no variance" in caplog.text
    assert Table.open(tmp_path / "table").read("rows")["fps"].to_pylist() == [16]
    assert json.loads((tmp_path / "table/index.json").read_text())["facts"]["imported"]["without_variance"] == 1


def test_an_imported_table_exports_to_the_other_layout_and_back(run, tmp_path):
    write(tmp_path / "data", "a.mp4")
    run()
    export_latents(tmp_path / "table", tmp_path / "out")
    run(tmp_path / "out", tmp_path / "again")
    one, other = (Latents(Table.open(tmp_path / name)) for name in ("table", "again"))
    before, after = ((*rows.posterior([0]), rows.text([0]).features, rows.text([0]).mask) for rows in (one, other))
    assert all(map(torch.equal, before, after))


def test_a_folder_without_captions_is_imported_and_says_so(run, tmp_path, caplog):
    write(tmp_path / "data", "a.mp4")
    assert run(tmp_path / "data/train").rows == 1
    assert "has no metadata.csv, so its clips have no captions" in caplog.text


def test_a_folder_without_files_of_either_layout_is_an_error(run, tmp_path):
    metadata(tmp_path / "data", "a.mp4,one")
    with pytest.raises(StageError, match="holds no pairs"):
        run()
    assert not find_pairs(tmp_path / "data").pairs
