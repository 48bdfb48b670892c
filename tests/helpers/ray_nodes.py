"""A Ray cluster of pretended nodes on this machine, all ports on the loopback address, with a token."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.processes import command_line, descendants, wait_for

BOUND = 600  # seconds to wait for what takes a few, on a busy machine
TOKEN = "a-token-of-the-tests-" + "0" * 20
NODES = """
import json, os, sys
from ray.cluster_utils import Cluster

numbers = json.loads(sys.argv[1])
cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **numbers[0]})
nodes = [cluster.head_node] + [cluster.add_node(**more) for more in numbers[1:]]
raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
with os.fdopen(int(sys.argv[2]), "w") as answer:
    json.dump([cluster.address, raylets], answer)
sys.stdin.read()
"""


@dataclass(frozen=True)
class RayNodes:
    """The address of the cluster, the process of each node, and the environment that a command needs to join it."""

    address: str
    raylets: list[int]

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_ADDRESS": self.address,
        }

    def workers(self, node: int) -> list[int]:
        """Return the processes of slots on a node."""
        parents = {}
        for pid in descendants(self.raylets[node]):
            with suppress(FileNotFoundError, ProcessLookupError):
                if "slot_worker" in command_line(pid):
                    parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return [pid for pid, parent in parents.items() if parent not in parents]  # not their children, as they begin


@contextmanager
def ray_nodes(*nodes: Mapping[str, int], environment: Mapping[str, str] = {}) -> Iterator[RayNodes]:
    """Start nodes with these arguments, such as `{"num_cpus": 1}`; they end with the process that starts them."""
    temporary = tempfile.mkdtemp(prefix="ray-")  # sockets are in it, whose paths must be short
    settings = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": temporary,
    }
    ours, theirs = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", NODES, json.dumps(nodes), str(theirs)],
        stdin=subprocess.PIPE,
        stdout=2,
        pass_fds=[theirs],
        env={**os.environ, **settings, **environment},
    )
    os.close(theirs)
    try:
        with os.fdopen(ours) as answer:
            address, raylets = json.load(answer)
        yield RayNodes(address, raylets)
    finally:
        process.kill()  # the nodes' processes die with it
        process.wait()
        shutil.rmtree(temporary, ignore_errors=True)


def start_stage(stage: str, manifest: Path, run_dir: Path, place: str, environment: Mapping[str, str] | None = None):
    """Start a stage in a process of its own, without Prefect."""
    command = [sys.executable, "-m", "flows", stage, str(manifest), "--no-prefect", "--place", place]
    return subprocess.Popen(
        [*command, "--run-dir", str(run_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def kill_a_worker_and_then_its_node(nodes: RayNodes, run: subprocess.Popen, count: Callable[[], int], each: int):
    """Kill a worker of the second node once `each` pieces are made, and that node after as many more."""
    wait_for(lambda: run.poll() is not None or (count() >= each and nodes.workers(1)), BOUND)
    assert run.poll() is None
    os.kill(victim := nodes.workers(1)[0], signal.SIGKILL)
    wait_for(lambda: run.poll() is not None or {*nodes.workers(1)} - {victim}, BOUND)
    made = count()
    wait_for(lambda: run.poll() is not None or count() >= made + each, BOUND)
    assert run.poll() is None
    os.kill(nodes.raylets[1], signal.SIGKILL)
