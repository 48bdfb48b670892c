"""The shipped recipes of HunyuanVideo run as they are, but for sizes and steps, on a small model of the same name."""

import json

import pytest

from flows.commands import main
from pusa.generate.check import check_jobs
from pusa.manifest.loading import load_manifest
from pusa.tasks import TASKS
from pusa.video.media import probe
from tests.helpers.small_hunyuan_model import write_hunyuan
from tests.helpers.small_recipes import commands_of, files_of, link_videos, write_small_recipes
from tests.weights.conftest import empty_hub  # noqa: F401  a fixture

NAME = "hunyuanvideo-community/HunyuanVideo"


@pytest.fixture
def recipes(root, tmp_path, monkeypatch, empty_hub):  # noqa: F811
    """Return the folder of the shortened manifests; the current folder is that of the runs, and the hub has a model."""
    empty_hub.add(NAME, files_of(write_hunyuan(tmp_path / "model")))
    monkeypatch.chdir(tmp_path)
    return write_small_recipes(root, "hunyuan_video", tmp_path / "manifests")


def test_the_commands_of_the_readme_run_as_written_from_videos_to_every_task(root, recipes, drawn, tmp_path, capsys):
    link_videos(drawn, recipes / "hunyuan_video")
    printed, stages = {}, []
    for words in commands_of(root, "HunyuanVideo"):
        stage, manifest, *_ = words
        if stage in ("ingest", "precompute", "finetune", "generate"):
            assert main(["check", manifest]) == 0, (manifest, capsys.readouterr().err)
            words, stages = [*words, "--no-prefect"], [*stages, stage]
        assert main(words) == 0, (words, capsys.readouterr().err)
        printed[stage, manifest.rpartition("/")[2]] = capsys.readouterr().out
    assert stages == ["ingest", "precompute", "finetune", "generate"]
    assert {f"{stage}.yaml" for stage in stages} == {path.name for path in (recipes / "hunyuan_video").glob("*.yaml")}
    assert "lora, bfloat16, activation_checkpointing 1" in printed["plan", "finetune.yaml"]
    assert "one part at a time (offload: true)" in printed["plan", "generate.yaml"]

    run = tmp_path / "runs/hunyuan_video"
    jobs = load_manifest(recipes / "hunyuan_video/generate.yaml", run).jobs
    assert {job.task for job in jobs} == set(TASKS)
    for job in jobs:
        facts = probe(run / f"videos/{job.id}.mp4")
        assert (facts.width, facts.height) == (64, 32)
    record = json.loads((run / "videos/sail.json").read_text())
    assert (record["status"], record["job"]["guidance"], record["job"]["embedded_guidance"]) == ("done", 1, 6)
    checkpoint = json.loads((run / "checkpoints/last/checkpoint.json").read_text())
    assert checkpoint["recipe"]["embedded_guidance"] == 1


def test_the_jobs_can_be_made_at_their_own_size(root, tmp_path):
    manifest = load_manifest(root / "manifests/hunyuan_video/generate.yaml", tmp_path)
    assert not check_jobs(manifest, with_inputs=False, folder=tmp_path / "videos")
    assert {(job.width, job.height, job.fps, job.steps) for job in manifest.jobs} == {(960, 544, 24, 50)}
