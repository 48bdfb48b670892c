"""Kill -9 at any instant, then the same command again: nothing lost, nothing twice."""

import json
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.short_demo import shortened_demo


def start(folder, run_dir):
    command = [sys.executable, "-m", "flows", "pipeline", str(folder), "--run-dir", str(run_dir), "--no-prefect"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def outputs(run_dir) -> dict[str, bytes]:
    """What must not depend on how often the run was killed."""
    kept = [*run_dir.glob("videos/*.mp4"), *run_dir.glob("checkpoints/*/transformer/*.safetensors")]
    found = {str(path.relative_to(run_dir)): path.read_bytes() for path in kept if "last" not in path.parts}
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {**found, "losses": [(row["step"], row["loss"]) for row in rows]}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_pipeline_killed_again_and_again_ends_as_if_it_never_was(root, drawn, tmp_path, seed):
    folder = shortened_demo(root, tmp_path / "manifests", {"steps": 60, "checkpoint_every": 4, "batch_size": 4})
    generate = folder / "generate.yaml"  # a job is made in one go, so it must fit between two kills
    generate.write_text(generate.read_text().replace("steps: 60", "steps: 12"))
    finetune = folder / "finetune.yaml"  # likewise the validation sheets, which do not matter here
    finetune.write_text(re.sub("validation: .*\n", "", finetune.read_text()))
    with (folder / "precompute.yaml").open("a") as file:
        file.write("shard_rows: 2\n")
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "drawn").symlink_to(drawn)
    assert start(folder, tmp_path / "whole").wait() == 0
    dice = random.Random(seed)
    kills = 0
    while True:
        run = start(folder, tmp_path / "killed")
        try:
            assert run.wait(timeout=dice.uniform(4, 8)) == 0
            break
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.wait()
            kills += 1
            time.sleep(0.1)
        assert kills < 60, "it never gets to its end"
    assert kills >= 2
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "whole")
