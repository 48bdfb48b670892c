"""The command itself, killed with SIGKILL and started again."""

import signal
import subprocess
import sys
import time

from pusa.finetune.stage import finetune
from pusa.system.locks import sole_writer
from tests.helpers.training_runs import ROOT, furthest, losses, recipe, weights


def test_a_killed_command_releases_its_lock_and_resumes_exactly(made, tmp_path):
    manifest = recipe(made, steps=24, ema_decay=0.9, loader_workers=1, learning_rate=1e-4, keep_checkpoints=20)
    finetune(manifest, tmp_path / "whole")
    run, path = tmp_path / "killed", tmp_path / "finetune.yaml"
    path.write_text(manifest.model_dump_json())
    command = [sys.executable, "-m", "flows", "finetune", str(path), "--run-dir", str(run), "--no-prefect"]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (run / "checkpoints/00000006").exists():
        assert child.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    with sole_writer(run / "checkpoints"):  # its loader process, which lives a little longer, does not hold the lock
        pass
    assert 0 < finetune(manifest, run).trained_steps <= 18
    assert losses(run) == losses(tmp_path / "whole")
    assert furthest(weights(run, 24), weights(tmp_path / "whole", 24)) == 0
