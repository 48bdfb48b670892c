"""The command itself, killed with SIGKILL and started again."""

import signal
import subprocess
import sys

from pusa.finetune.stage import finetune
from pusa.system.locks import sole_writer
from tests.helpers.processes import wait_for
from tests.helpers.training_runs import ROOT, furthest, losses, recipe, weights


def test_a_killed_command_releases_its_lock_and_resumes_exactly(made, tmp_path):
    settings = {"ema_decay": 0.9, "loader_workers": 1, "learning_rate": 1e-4}
    run, path = tmp_path / "killed", tmp_path / "finetune.yaml"
    path.write_text(recipe(made, steps=1_000_000, **settings).model_dump_json())  # it cannot end before it is killed
    command = [sys.executable, "-m", "flows", "finetune", str(path), "--run-dir", str(run), "--no-prefect"]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: child.poll() is not None or (run / "checkpoints/00000002").exists())
    assert child.poll() is None, "it ended before it was killed"
    child.send_signal(signal.SIGKILL)
    child.wait()
    with sole_writer(run / "checkpoints"):  # its loader process, which lives a little longer, does not hold the lock
        pass
    last = max(int(path.name) for path in (run / "checkpoints").glob("[0-9]" * 8))
    manifest = recipe(made, steps=last + 4, **settings)
    assert finetune(manifest, run).trained_steps == 4
    finetune(manifest, tmp_path / "whole")
    assert losses(run) == losses(tmp_path / "whole")
    assert furthest(weights(run, last + 4), weights(tmp_path / "whole", last + 4)) == 0
