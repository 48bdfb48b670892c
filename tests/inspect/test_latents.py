"""The summary of a latents table agrees with its rows, and needs no torch."""

import json
import subprocess
import sys

import pytest

from pusa.data.latents import Latents
from pusa.data.reader import Table
from pusa.inspect.inspection import inspect


def test_the_numbers_agree_with_what_a_loader_reads(run):
    numbers, table = inspect(run / "latents").json(), Table.open(run / "latents")
    latents = Latents(table)
    mean, _ = latents.posterior(range(3))
    text = latents.text(range(3))
    features, mask = text.features, text.mask
    null = latents.text_tokens
    assert (numbers["rows"], numbers["sources"], numbers["clips"], numbers["rejects"]) == (3, 3, 3, 0)
    assert numbers["raw_bytes"] == 2 * (2 * mean.numel() + (int(mask.sum()) + null) * features.shape[2])
    assert numbers["tokens_max"] == int(mask.sum(1).max()) and numbers["captions"] == 3
    assert numbers["captions_cut"] == int((mask.sum(1) == latents.text_tokens).sum())
    json.dumps(numbers, allow_nan=False)


def test_bytes_are_those_of_the_shards(run):
    numbers = inspect(run / "latents").json()
    assert numbers["bytes"] == sum(path.stat().st_size for path in (run / "latents").glob("*.parquet"))


def test_facts_of_ingest_and_of_the_model_are_reported(run):
    clips, numbers = inspect(run / "clips").json(), inspect(run / "latents").json()
    copied = ("retimed_frames", "duplicates", "near_duplicates", "hours", "buckets")
    assert [numbers[name] for name in copied] == [clips[name] for name in copied]
    text = inspect(run / "latents").text()
    assert "builtin:tiny" in text and numbers["made_with"]["vae"] in text


def test_the_page_shows_how_clips_were_cut(run, tmp_path):
    inspect(run / "latents").write(tmp_path / "page.html", 100)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img") == 9 and "crop -&gt; 64x64" in page


@pytest.mark.parametrize("name", ["clips", "latents"])
def test_no_torch_is_needed(run, tmp_path, name):
    code = (
        "import sys; from pathlib import Path; from pusa.inspect.inspection import inspect\n"
        "result = inspect(Path(sys.argv[1])); result.json(); result.text(); result.write(Path(sys.argv[2]), 1)\n"
        "print('torch' in sys.modules)"
    )
    given = [sys.executable, "-c", code, str(run / name), str(tmp_path / "page.html")]
    assert subprocess.run(given, capture_output=True, text=True, check=True).stdout.strip() == "False"
