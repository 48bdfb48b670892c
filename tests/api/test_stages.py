"""`pusa.run` does what the command of the manifest's kind does, in this process."""

import os
from pathlib import Path

import pytest

import pusa
from pusa.data.reader import Table
from pusa.errors import ManifestError
from pusa.manifest.models import ClipSettings, IngestManifest
from tests.helpers.stub_model import SIZE
from tests.helpers.training_runs import recipe

MODEL = {"weights": "builtin:tiny"}
JOB = {"id": "a", "task": "text_to_video", **SIZE}


def test_each_stage_runs_from_a_mapping_a_file_or_a_manifest(drawn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clips = {"width": 64, "height": 64, "num_frames": 31}
    (tmp_path / "ingest.yaml").write_text(f"kind: ingest\nsource: {drawn}/videos\nclips: {clips}\n")
    by_file = pusa.run("ingest.yaml", "run")
    assert by_file.clips == 12 and by_file.table == tmp_path / "run/clips"
    assert pusa.run(IngestManifest(source=drawn / "videos", clips=ClipSettings(**clips)), "run").skipped
    assert Table.open(pusa.run({"kind": "precompute", "model": MODEL}, Path("run")).table).rows("latents") == 12
    made = pusa.run({"kind": "generate", "model": MODEL, "jobs": [{**JOB, "sweep": {"seed": [1, 2]}}]}, "run")
    assert len(made.made) == 2 and made.gallery.exists()
    assert (
        pusa.run({"kind": "generate", "model": MODEL, "jobs": [JOB]}).videos
        == Path("runs", tmp_path.name, "videos").absolute()
    )


def test_a_fine_tune_runs_with_its_options(made, own_run):
    manifest = recipe(own_run).model_copy(update={"steps": 2, "checkpoint_every": 2})
    assert pusa.run(manifest, own_run).checkpoint.name == "00000002"


def test_a_fine_tune_in_several_processes_is_refused(own_run):
    manifest = {"kind": "finetune", "base": MODEL, "parallel": {"processes": 2}}
    with pytest.raises(ManifestError, match=r"parallel: processes is 2.*`pusa finetune MANIFEST` starts all"):
        pusa.run(manifest, own_run)


def test_a_failed_part_is_raised_as_commands_do(tmp_path):
    jobs = [JOB, {**JOB, "id": "b", "width": 33}]
    with pytest.raises(pusa.PartlyFailed, match=r"1 job failed \('b'\)") as raised:
        pusa.run({"kind": "generate", "model": MODEL, "jobs": jobs}, tmp_path)
    assert raised.value.result.made == ["a"] and list(raised.value.result.failed) == ["b"]
    assert (tmp_path / "videos/a.mp4").exists()


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({}, "the manifest: kind is None; allowed are ingest, precompute"),
        ({"kind": "generate", "model": MODEL, "jobs": [{**JOB, "promt": "x"}]}, "jobs.0.promt: unknown key"),
        ({"kind": "ingest", "source": "x", "clip": {}}, "clip: unknown key; did you mean 'clips'"),
        (3, "got int; expected a file, a mapping or a manifest"),
        ("missing.yaml", "missing.yaml"),
    ],
)
def test_a_wrong_manifest_is_refused(manifest, message, tmp_path):
    with pytest.raises(ManifestError, match=message):
        pusa.run(manifest, tmp_path)
    assert os.listdir(tmp_path) == []
