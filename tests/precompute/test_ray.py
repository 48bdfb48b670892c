"""Rows on a Ray cluster of two pretended nodes, of which a worker and then a node are killed: the table is the same."""

import shutil
import subprocess
from pathlib import Path

import pytest

from pusa.data.reader import Table
from pusa.ingest.stage import ingest
from pusa.manifest.models import ClipSettings, IngestManifest
from pusa.tiny.dataset import draw_dataset
from tests.helpers.ray_nodes import BOUND, kill_a_worker_and_then_its_node, ray_nodes, start_stage

ROWS = 96


def start(run_dir: Path, place: str, environment=None) -> subprocess.Popen:
    manifest = run_dir / "precompute.yaml"
    manifest.write_text("kind: precompute\nmodel: {weights: builtin:tiny}\nshard_rows: 4\n")
    return start_stage("precompute", manifest, run_dir, place, environment)


def count_shards(run_dir: Path) -> int:
    return len(list((run_dir / "latents").rglob("*.parquet")))


@pytest.mark.slow
def test_the_table_is_the_same_although_a_worker_and_a_node_are_killed(tmp_path):
    draw_dataset(tmp_path / "drawn", ROWS)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ingest(
        IngestManifest(source=tmp_path / "drawn/videos", clips=ClipSettings(width=64, height=64, num_frames=31)), whole
    )
    shutil.copytree(whole / "clips", killed / "clips")
    alone = start(whole, "processes=2")
    _, err = alone.communicate(timeout=BOUND)
    assert alone.returncode == 0, err
    with ray_nodes({"num_cpus": 1}, {"num_cpus": 1}) as nodes:
        run = start(killed, "ray=auto,slots=2", nodes.environment)
        kill_a_worker_and_then_its_node(nodes, run, lambda: count_shards(killed), 4)
        out, err = run.communicate(timeout=BOUND)
    print(err)  # noqa: T201
    assert run.returncode == 0, err
    assert "died (signal 9)" in err and "died (its node has died)" in err and "(raylet)" not in out + err
    tables = [Table.open(folder / "latents") for folder in (whole, killed)]
    assert tables[0].fingerprint == tables[1].fingerprint and tables[1].rows("rows") == ROWS
    assert tables[1].rows("rejects") == 0
