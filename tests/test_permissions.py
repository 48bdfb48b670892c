"""Colleagues share a disk: every file and folder has the permissions that the umask gives, whoever wrote it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pusa.exchange.exporting import export_latents
from pusa.finetune.stage import finetune
from pusa.system.locks import join_work
from pusa.tiny.make import _save
from pusa.video.media import write_image, write_video
from pusa.weights.export import export
from pusa.weights.whole import export_pipeline
from tests.helpers.short_demo import shortened_demo
from tests.helpers.training_runs import recipe


@pytest.fixture
def umask():
    """Return a function that sets the umask until the end of the test."""
    before = os.umask(0)
    os.umask(before)
    yield os.umask
    os.umask(before)


def require_permissions(folder: Path, mask: int) -> None:
    """Check every file and folder, of which there must be some."""
    paths = [path for path in folder.rglob("*") if not path.is_symlink()]
    wanted = {path: (0o777 if path.is_dir() else 0o666) & ~mask for path in paths}
    wrong = {path: oct(path.stat().st_mode) for path in paths if path.stat().st_mode & 0o777 != wanted[path]}
    assert paths and not wrong


def test_every_writer_honours_the_umask(made, networks, tmp_path, umask):
    umask(0o027)
    manifest = recipe(made, steps=1, checkpoint_every=1, train={"method": "lora", "rank": 4})
    checkpoint = finetune(manifest, tmp_path / "run").checkpoint
    for to in ("lora", "peft"):
        export(checkpoint, tmp_path / to, to)
    export_pipeline(checkpoint, tmp_path / "pipeline")  # of the base that the checkpoint records
    assert "| clips | " in (tmp_path / "pipeline/README.md").read_text()
    export_latents(made / "latents", tmp_path / "exported", captions=True)
    frames = np.zeros((3, 32, 32, 3), np.uint8)
    write_video(tmp_path / "media/a.mp4", frames, 24)
    write_image(tmp_path / "media/a.jpg", frames[0])
    _save(networks[1], tmp_path / "tiny/transformer")
    with join_work(tmp_path / "latents", lambda: None, {"made_from": "a"}) as group, group.lock("segment"):
        pass
    require_permissions(tmp_path, 0o027)


@pytest.mark.slow
@pytest.mark.parametrize("mask", [0o027, 0o002])
def test_a_pipeline_honours_the_umask(root, drawn, tmp_path, umask, mask):
    folder, run_dir = (
        shortened_demo(root, tmp_path / "manifests", {"steps": 4, "checkpoint_every": 2}),
        tmp_path / "run",
    )
    umask(mask)
    run_dir.mkdir()
    (run_dir / "drawn").symlink_to(drawn)
    command = [sys.executable, "-m", "flows", "pipeline", str(folder), "--run-dir", str(run_dir), "--no-prefect"]
    assert subprocess.run(command, check=False).returncode == 0
    require_permissions(run_dir, mask)
