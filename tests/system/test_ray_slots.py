"""What an actor of a Ray slot says, and which clusters are refused. The trials on a cluster are slow tests."""

import logging
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import pytest

from pusa.errors import ManifestError, StageError
from pusa.system import ray_slots
from pusa.system.ray_cluster import check_address
from pusa.system.ray_slots import SlotActor
from pusa.system.slot_worker import chained
from tests.helpers import slot_calls as calls
from tests.helpers.ray_nodes import ray_nodes


def test_an_actor_sends_plain_messages_of_its_process_and_outlives_it(tmp_path):
    with closing(SlotActor("one", {"PUSA_CACHE": "given"}, gpu=False)) as actor:

        def answer(call, *arguments):
            return list(actor.answer({"pusa.slot_calls": logging.INFO}, pickle.dumps((call, arguments))))

        kinds = [
            (kind, value["msg"] if kind == "log" else pickle.loads(value))
            for kind, value in answer(calls.emit_all, [1])
        ]
        assert kinds == [("log", "before 1"), ("event", 1), ("result", None)]
        assert pickle.loads(answer(calls.variable, "PUSA_CACHE")[-1][1]) == "given"
        kind, errors = answer(calls.fail, "value")[-1]
        assert (
            kind == "error"
            and isinstance(chained(errors), ValueError)
            and isinstance(chained(errors).__cause__, OSError)
        )
        assert answer(calls.die, "kill") == [("event", pickle.dumps("alive")), ("died", "signal 9")]
        assert answer(calls.fail, "device") == [("died", "RuntimeError: chunk failed")]
        assert pickle.loads(answer(calls.count)[-1][1])[1] == 1
        (tmp_path / "token").touch()
        about = actor.look(str(tmp_path), "token", os.getcwd())
        assert about["sees folder"] and about["versions"] == ray_slots._versions()


@contextmanager
def stand_in(token: str):
    """A server that answers as Ray's does, which asks for a token if there is one."""
    import grpc

    def answer(request: bytes, context) -> bytes:
        if token and ("authorization", f"Bearer {token}") not in [
            tuple(pair) for pair in context.invocation_metadata()
        ]:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return b""

    method = grpc.unary_unary_rpc_method_handler(answer)
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", {"CheckAlive": method})]
    )
    port = server.add_insecure_port("127.0.0.2:0")
    server.start()
    try:
        yield f"127.0.0.2:{port}"  # not 127.0.0.1, which Ray takes for the address of the network
    finally:
        server.stop(None)


def test_a_cluster_is_joined_only_with_the_token_that_it_asks_for(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with stand_in("") as unguarded, stand_in("right") as address:
        with pytest.raises(
            ManifestError, match=r"this process has no token for the Ray at .*start it with RAY_AUTH_MODE"
        ):
            check_address(address)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
        with pytest.raises(StageError, match="has another token than this process"):
            check_address(address)
        with pytest.raises(StageError, match="takes commands from everybody who reaches it"):
            check_address(unguarded)
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray/auth_token").write_text("right\n")
        monkeypatch.delenv("RAY_AUTH_TOKEN")
        assert check_address(address).rpartition(":")[2] == address.rpartition(":")[2]
        monkeypatch.setenv("PUSA_ALLOWED_FOLDERS", "/data")
        with pytest.raises(ManifestError, match="this worker allows auto, local, and what its RAY_ADDRESS names"):
            check_address(address)
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert check_address(address) and check_address("auto")
    with pytest.raises(StageError, match=r"no Ray answers at .* \(UNAVAILABLE\)"):
        check_address(address)
    monkeypatch.setenv("RAY_ADDRESS", "ray://host:1")
    with pytest.raises(ManifestError, match="place: ray: auto"):
        check_address("auto")


GPUS = [f"GPU-{number:08x}-0000-0000-0000-000000000000" for number in (1, 2)]
IN_SLOTS = """
import logging, sys, threading
from pathlib import Path
from pusa.system.devices import lock_device
from pusa.system.slots import SlotClosed, open_slots
from tests.helpers.slot_calls import count, variable
from tests.helpers.processes import wait_for

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
folder, gpus = Path(sys.argv[1]), sys.argv[2:]
other = lock_device(gpus[0], threading.Event())
def say(*words):
    logging.info(" ".join(map(str, words)))
def run(slot, *call):
    return slot.run(*call, on_event=say)
with open_slots({"ray": "auto", "slots": 3}, folder) as slots:
    starts = [threading.Thread(target=slot.start) for slot in slots[:2]]
    for thread in starts:
        thread.start()
    wait_for(lambda: not all(thread.is_alive() for thread in starts))
    say("one works", sum(thread.is_alive() for thread in starts))
    other.close()
    for thread in starts:
        thread.join()
    say("see", sorted(run(slot, variable, "CUDA_VISIBLE_DEVICES") for slot in slots[:2]))
    say("resident", [run(slots[0], count)[1] for _ in range(3)])
    say("locked", sorted(path.name for path in Path(folder, "locks").glob("*/*.lock")))
    def wait():
        try:
            slots[2].start()
        except SlotClosed as closed:
            say("third:", closed)
    third = threading.Thread(target=wait)
    third.start()
    slots[2].close()
    third.join()
say("left", [path.name for path in folder.iterdir()])
"""


@pytest.mark.slow
def test_each_actor_holds_a_gpu_and_its_lock(tmp_path, root):
    (tmp_path / "locks").mkdir()
    settings = {"TMPDIR": str(tmp_path / "locks"), "CUDA_VISIBLE_DEVICES": ",".join(GPUS)}
    with ray_nodes({"num_cpus": 2, "num_gpus": 2}, environment=settings) as nodes:
        environment = {**nodes.environment, "TMPDIR": settings["TMPDIR"], "PYTHONPATH": str(root)}
        done = subprocess.run(
            [sys.executable, "-c", IN_SLOTS, tmp_path, *GPUS], capture_output=True, text=True, env=environment
        )
    print(done.stdout)  # noqa: T201
    assert done.returncode == 0, done.stderr
    assert "the Ray cluster has 2 GPUs: 1 of 3 slots wait for more" in done.stdout
    assert "waiting for another process" in done.stdout and f"which uses GPU {GPUS[0]}" in done.stdout
    assert "one works 1" in done.stdout and f"see {GPUS}" in done.stdout and "resident [1, 2, 3]" in done.stdout
    assert f"locked {[f'{gpu}.lock' for gpu in GPUS]}" in done.stdout and "third: slot ray 2" in done.stdout
    assert "left ['locks']" in done.stdout
