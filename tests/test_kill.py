"""A pipeline is killed with SIGKILL at random moments and started again: no work is lost, and none is done twice."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Set
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import sleep
from typing import Any

import pytest

from tests.helpers.processes import descendants, wait_for
from tests.helpers.short_demo import shortened_demo


def start(folder: Path, run_dir: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "flows", "pipeline", str(folder), "--run-dir", str(run_dir), "--no-prefect"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def finished_files(run_dir: Path) -> set[Path]:
    """Return the results that carry their final names; unfinished ones begin with a dot, or lie in such a folder."""
    folders = ("clips", "latents", "checkpoints", "videos")
    walks = (walk for folder in folders for walk in os.walk(run_dir / folder))  # skips what is removed meanwhile
    paths = (Path(parent, name).relative_to(run_dir) for parent, inner, names in walks for name in (*inner, *names))
    return {path for path in paths if not any(part.startswith(".") for part in path.parts)}


def outputs(run_dir: Path) -> dict[str, Any]:
    """Return everything that must not depend on how often the run was killed."""
    kept = [*run_dir.glob("videos/*.mp4"), *run_dir.glob("checkpoints/*/transformer/*.safetensors")]
    files = {str(path.relative_to(run_dir)): path.read_bytes() for path in kept if "last" not in path.parts}
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {**files, "losses": [(row["step"], row["loss"]) for row in rows]}


def run_for_a_while(dice: random.Random, folder: Path, run_dir: Path) -> bool:
    """Start the pipeline and kill it at a random moment. Return whether it ended before that.

    In three of four lives it is killed after it finished a file, so that it gets to its end however slow the machine
    is; in the others at any moment, which may be before it has done anything.
    """
    before = finished_files(run_dir)
    run = start(folder, run_dir)
    if dice.random() < 0.75:
        wait_for(lambda: run.poll() is not None or finished_files(run_dir) - before, seconds=600)
    try:
        assert run.wait(timeout=dice.uniform(0, 5)) == 0
        return True
    except subprocess.TimeoutExpired:
        run.send_signal(signal.SIGKILL)
        run.wait()
        return False


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_pipeline_killed_many_times_ends_as_one_that_was_not_killed(root, drawn, tmp_path, seed):
    folder = shortened_demo(root, tmp_path / "manifests", {"steps": 60, "checkpoint_every": 4, "batch_size": 4})
    generate = folder / "generate.yaml"  # a job is made without a pause, so it must fit between two kills
    generate.write_text(re.sub(r"steps: 60", "steps: 12", generate.read_text()))
    finetune = folder / "finetune.yaml"  # likewise the validation sheets, which this test does not compare
    finetune.write_text(re.sub("validation: .*\n", "", finetune.read_text()))
    with (folder / "precompute.yaml").open("a") as file:
        file.write("shard_rows: 2\n")
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "drawn").symlink_to(drawn)
    assert start(folder, tmp_path / "whole").wait() == 0
    dice, kills = random.Random(seed), 0
    while not run_for_a_while(dice, folder, tmp_path / "killed"):
        kills += 1
        assert kills < 100, "it never gets to its end"
    assert kills >= 2
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "whole")


JOBS = """
kind: generate
model: {weights: builtin:tiny-pusa}
defaults: {width: 64, height: 64, num_frames: 31, steps: 6, guidance: 2}
save_every: 0.3
jobs:
  - {id: ball, task: text_to_video, prompt: a red circle bounces, sweep: {seed: [1, 2, 3, 4, 5, 6, 7, 8]}}
  - {id: box, task: image_to_video, image: STILL, multiplier: 0.2, sweep: {seed: [1, 2, 3, 4], steps: [4, 5, 6, 7]}}
  - {id: more, task: extension, video: job:ball-seed3, given: [0, 1], num_frames: 61, window: 31, sweep: {seed: [1, 2]}}
  - {id: long, task: long_video, prompt: a blue square moves, num_frames: 121, window: 31, sweep: {seed: [1, 2, 3]}}
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_generation_killed_20_times_ends_as_one_that_was_not_killed(root, tmp_path, seed):
    manifest = tmp_path / "generate.yaml"
    manifest.write_text(JOBS.replace("STILL", str(root / "manifests/tiny-pusa/still.png")))

    def start(name: str, *more: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "flows", "generate", str(manifest), "--no-prefect", *more]
        return subprocess.Popen([*command, "--run-dir", str(tmp_path / name)], stderr=subprocess.DEVNULL)

    def videos(name: str) -> dict[str, bytes]:
        files = (tmp_path / name / "videos").glob("*")
        return {path.name: path.read_bytes() for path in files if path.suffix in (".mp4", ".safetensors")}

    def goes_on(runs: list[subprocess.Popen], before: Set[str]) -> bool:
        return bool(videos("killed").keys() - before) or all(run.poll() is not None for run in runs)

    assert start("whole").wait() == 0
    dice, runs = random.Random(seed), []
    for _ in range(20):
        runs = [run for run in runs if run.poll() is None]
        while len(runs) < 2:  # two commands, of which one has two processes
            runs.append(start("killed", *(["--place", "processes=2"] if not runs else [])))
        if dice.random() < 0.75:
            wait_for(partial(goes_on, runs, videos("killed").keys()), 600)
        victim = dice.choice(runs)
        sleep(dice.uniform(0, 2))
        for pid in dice.choice([[victim.pid], descendants(victim.pid)[:1]]):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for run in runs:
        run.wait()
    start("killed", "--retry-failed").wait()  # if one job was hit three times
    assert start("killed").wait() == 0
    assert videos("killed") == videos("whole")
