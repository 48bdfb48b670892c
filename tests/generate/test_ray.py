"""Jobs on a Ray cluster of two pretended nodes: workers, a node and commands are killed, and no job is lost."""

import signal
import subprocess
from pathlib import Path
from threading import Event, Thread

import pytest

from tests.helpers.processes import is_alive, wait_for
from tests.helpers.ray_nodes import BOUND, RayNodes, kill_a_worker_and_then_its_node, ray_nodes, start_stage

pytestmark = pytest.mark.slow
JOBS = 60
MANIFEST = """
kind: generate
model: {weights: builtin:tiny}
batch_tokens: 0
defaults: {width: 64, height: 64, num_frames: 7, steps: 6, guidance: 1}
jobs:
"""
POISON = """
import os, sys

def kill(event, arguments):
    if event == "os.rename" and "j007.latents" in str(arguments[1]):
        os.kill(os.getpid(), 9)

sys.addaudithook(kill)
"""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("manifest") / "generate.yaml"
    jobs = [f'  - {{id: j{i:03}, task: text_to_video, prompt: "a red ball", seed: {i}}}' for i in range(JOBS)]
    path.write_text(MANIFEST + "\n".join(jobs))
    return path


def start_on_ray(manifest: Path, run_dir: Path, nodes: RayNodes) -> subprocess.Popen:
    return start_stage("generate", manifest, run_dir, "ray=auto,slots=2", nodes.environment)


def results(run_dir: Path) -> dict[str, bytes]:
    files = (run_dir / "videos").glob("*")
    return {path.name: path.read_bytes() for path in files if path.suffix in (".mp4", ".safetensors")}


def count_videos(run_dir: Path) -> int:
    return len(list((run_dir / "videos").glob("*.mp4")))


@pytest.fixture(scope="module")
def whole(manifest, tmp_path_factory) -> dict[str, bytes]:
    """The results of two processes on this machine."""
    run_dir = tmp_path_factory.mktemp("whole")
    run = start_stage("generate", manifest, run_dir, "processes=2")
    assert run.wait() == 0
    made = results(run_dir)
    assert len(made) == 2 * JOBS
    return made


class Watch:
    """What is seen of a run while it lasts: the processes of its slots, and whether a job's record was replaced."""

    def __init__(self, run_dir: Path, nodes: RayNodes) -> None:
        self.workers: set[int] = set()
        self.files: dict[str, set[int]] = {}
        self._run_dir, self._nodes, self._ended = run_dir, nodes, Event()
        self._thread = Thread(target=self._look)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.1):
            for node in range(len(self._nodes.raylets)):
                self.workers |= set(self._nodes.workers(node))
            for path in (self._run_dir / "videos").glob("[!.]*.json"):  # written last of a job
                self.files.setdefault(path.name, set()).add(path.stat().st_ino)


def test_every_job_is_made_once_although_a_worker_and_a_node_are_killed(manifest, whole, tmp_path):
    with ray_nodes({"num_cpus": 1}, {"num_cpus": 1}) as nodes, Watch(tmp_path, nodes) as watch:
        run = start_on_ray(manifest, tmp_path, nodes)
        kill_a_worker_and_then_its_node(nodes, run, lambda: count_videos(tmp_path), 6)
        out, err = run.communicate(timeout=BOUND)
    print(err)  # noqa: T201
    assert run.returncode == 0, err
    assert results(tmp_path) == whole
    assert "(raylet)" not in out + err and "failed" not in err
    assert len(watch.workers) == 3  # two, and one in place of the one that was killed
    assert {len(files) for files in watch.files.values()} == {1}  # no job was made again
    assert "died (signal 9)" in err and "died (its node has died)" in err
    wait_for(lambda: not any(map(is_alive, watch.workers)), BOUND)


def test_a_killed_command_leaves_nothing_that_works_and_resumes(manifest, whole, tmp_path):
    with ray_nodes({"num_cpus": 1}, {"num_cpus": 1}) as nodes:
        for number, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, -15)):
            made = count_videos(tmp_path)
            run = start_on_ray(manifest, tmp_path, nodes)
            wait_for(lambda run=run, made=made: run.poll() is not None or count_videos(tmp_path) >= made + 4, BOUND)
            workers = nodes.workers(0) + nodes.workers(1)
            assert len(workers) == 2
            run.send_signal(number)
            _, err = run.communicate(timeout=BOUND)
            assert run.returncode == code, err
            wait_for(lambda: not nodes.workers(0) + nodes.workers(1), BOUND)
        run = start_on_ray(manifest, tmp_path, nodes)
        _, err = run.communicate(timeout=BOUND)
        assert run.returncode == 0, err
        assert results(tmp_path) == whole


def test_a_job_that_kills_its_worker_fails_alone(manifest, whole, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(POISON)
    poisoned = ray_nodes({"num_cpus": 1}, {"num_cpus": 1}, environment={"PYTHONPATH": str(tmp_path)})
    with poisoned as nodes:  # noqa: SIM117
        with Watch(tmp_path, nodes) as watch:
            _, err = (run := start_on_ray(manifest, tmp_path, nodes)).communicate(timeout=BOUND)
    print(err)  # noqa: T201
    assert run.returncode == 3 and "its worker died 3 times while it made this job (signal 9)" in err
    assert results(tmp_path) == {name: value for name, value in whole.items() if not name.startswith("j007")}
    assert len(watch.workers) in (4, 5)  # two, and another after each death but the last, if nothing is left
