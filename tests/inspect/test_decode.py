"""Decoded rows are compared with their sources, and unusual values are flagged."""

import json
import shutil
from itertools import pairwise

import pytest
import torch

from pusa.data.encoding import pack
from pusa.data.reader import Table
from pusa.data.schema import latents_schema
from pusa.data.writer import write_hashed_shard
from pusa.errors import TableError
from pusa.inspect.decode import choose_rows, decode_rows, measure_ranges
from pusa.inspect.inspection import inspect
from pusa.video.compare import psnr
from pusa.weights.resolve import BUILTIN
from tests.helpers.indexes import edit_index, list_again


@pytest.fixture
def latents(run, tmp_path):
    """A copy of the latents table that a test may change."""
    return shutil.copytree(run / "latents", tmp_path / "latents")


def rewrite(folder, **facts):
    """Write other facts into the index."""
    edit_index(folder, lambda index: index["facts"].update(facts))


def spoil(folder, value):
    """Replace the first row's mean by zeros with `value` as the first one; return the clip id."""
    table = Table.open(folder)
    rows = table.read("latents").to_pylist()
    mean = torch.zeros(rows[0]["latent_shape"])
    mean.view(-1)[0] = value
    rows[0]["latent_mean"] = pack(mean, rows[0]["dtype"], rows[0]["encoding"])
    schema = latents_schema(len(rows[0]["latent_mean"]))
    path = write_hashed_shard(folder, "latents", rows, schema, facts={"encoding": table.facts["encoding"]})
    list_again(table, latents=[path])
    return table.read("rows").to_pylist()[0]["clip_id"]


def test_rows_decode_to_about_their_sources(run, tmp_path):
    inspection = inspect(run / "latents", decode=2)
    assert len(inspection.decoded) == 2 and all(row.psnr > 25 and not row.ranges.flags for row in inspection.decoded)
    assert all(row.worst_frame_psnr <= row.psnr and 0 <= row.worst_frame < 31 for row in inspection.decoded)
    rows = json.loads(json.dumps(inspection.json(), allow_nan=False))["decoded"]
    assert [row["clip_id"] for row in rows] == [row.clip_id for row in inspection.decoded] and rows[0]["flags"] == []
    assert f"{inspection.decoded[0].psnr:.1f} dB" in inspection.text()
    inspection.write(tmp_path / "page.html", 100)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img") == 4 and "Decoded: 2 of 3 rows" in page


def test_the_strips_show_the_decoded_frames_and_the_fitted_source(run):
    for row in decode_rows(Table.open(run / "latents"), 3):
        decoded, source = (torch.tensor(list(strip.tobytes()), dtype=torch.uint8).numpy() for strip in row.strips)
        assert psnr(decoded, source) > 20


def test_a_row_without_its_source_is_decoded_with_a_note(run, videos, tmp_path):
    shutil.move(videos / "0000.mp4", tmp_path / "hidden")
    try:
        rows = {row.clip_id: row for row in decode_rows(Table.open(run / "latents"), 3)}
    finally:
        shutil.move(tmp_path / "hidden", videos / "0000.mp4")
    gone = rows["0000.mp4@0"]
    assert gone.psnr is None and "is gone" in gone.note and len(gone.strips) == 1
    assert rows["0001.mp4@0"].psnr is not None


@pytest.mark.parametrize(
    "value, flag", [(float("nan"), "1 values are not finite"), (1e4, "mean is not within"), (3e38, "std is not within")]
)
def test_a_spoilt_row_is_flagged(latents, value, flag):
    clip_id = spoil(latents, value)
    (row,) = [row for row in decode_rows(Table.open(latents), 3) if row.clip_id == clip_id]
    assert any(flag in sentence for sentence in row.ranges.flags)
    json.dumps(row.json(), allow_nan=False)


def test_a_vae_that_did_not_make_the_table_is_refused(latents, tmp_path):
    other = shutil.copytree(BUILTIN / "tiny", tmp_path / "other")
    config = json.loads((other / "vae/config.json").read_text())
    (other / "vae/config.json").write_text(json.dumps(config | {"_name_or_path": "other"}))
    expected = Table.open(latents).facts["made_with"]["vae"]
    with pytest.raises(TableError, match=rf"other has the VAE [0-9a-f]+; .* was made with {expected}"):
        decode_rows(Table.open(latents), 1, str(other))


def test_weights_must_be_named_if_none_are_recorded(latents):
    rewrite(latents, weights=None)
    with pytest.raises(TableError, match="--weights"):
        decode_rows(Table.open(latents), 1)
    assert decode_rows(Table.open(latents), 1, "builtin:tiny")[0].psnr > 25


def test_invalid_recorded_weights_are_refused(latents):
    rewrite(latents, weights={"backbone": "none"})
    with pytest.raises(TableError, match="records invalid weights"):
        decode_rows(Table.open(latents), 1)


def test_rows_are_spread_and_every_bucket_has_one():
    buckets = {"small": list(range(90)), "large": [90, 91, 92], "odd": [93]}
    chosen = choose_rows(buckets, 10)
    assert len(set(chosen)) == 10 and all(set(rows) & set(chosen) for rows in buckets.values())
    assert len(choose_rows(buckets, 1)) == 3 and choose_rows(buckets, 1000) == list(range(94))
    assert max(b - a for a, b in pairwise(chosen)) < 25


@pytest.mark.parametrize(
    "mean, logvar, flags",
    [
        (torch.randn(12, 6, 8, 8), torch.full((12, 6, 8, 8), -9.0), []),
        (torch.randn(12, 6, 8, 8) * 4, torch.zeros(2), ["std is not within 0.30 .. 3.00"]),
        (torch.randn(12, 6, 8, 8) + 7, torch.zeros(2), ["average is not within -5.00 .. 5.00"]),
        (torch.randn(12, 6, 8, 8), torch.tensor([-31.0, 0]), ["logvar is not within -30.00 .. 5.00"]),
        (torch.randn(12, 6, 8, 8), torch.tensor([0, 6.0]), ["logvar is not within -30.00 .. 5.00"]),
        (
            torch.full((2,), 3e38),
            torch.zeros(2),
            [
                "mean is not within -20.00 .. 20.00",
                "average is not within -5.00 .. 5.00",
                "std is not within 0.30 .. 3.00",
            ],
        ),
        (torch.full((2,), torch.nan), torch.full((2,), torch.inf), ["4 values are not finite"]),
    ],
)
def test_unusual_values_are_flagged(mean, logvar, flags):
    assert measure_ranges(mean, logvar, mean).flags == flags


def test_values_that_are_not_finite_once_normalised_are_counted():
    mean = torch.tensor([3e38, 1.0])
    ranges = measure_ranges(mean, torch.zeros(2), mean * 1e3)
    assert ranges.not_finite == 1 and ranges.mean_max == 1e3 and ranges.flags[0] == "1 values are not finite"
    spread = measure_ranges(torch.tensor([3e38, -3e38]), torch.zeros(2), torch.tensor([3e38, -3e38]))
    assert spread.mean_std == pytest.approx(3e38, rel=1e-6) and spread.mean_average == 0
