"""What an actor of a Ray slot says, and which clusters are refused. The trials on a cluster are slow tests."""

import logging
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import pytest

from pusa.errors import ManifestError, StageError
from pusa.system import ray_slots
from pusa.system.ray_cluster import check_address
from pusa.system.ray_slots import SlotActor
from pusa.system.slot_worker import chained
from tests.helpers import slot_calls as calls


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
