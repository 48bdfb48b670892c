"""What torchrun sets in the environment is checked before processes wait for each other."""

import pytest

from flows.commands import main
from pusa.errors import TrainingError
from pusa.finetune.torchrun import Torchrun

WHOLE = {
    "WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1", "MASTER_ADDR": "node-0", "MASTER_PORT": "29500",
}  # fmt: skip


def test_the_numbers_of_a_process_are_read():
    assert Torchrun.find({}) is None and Torchrun.find({"RANK": "x"}) is None
    assert Torchrun.find(WHOLE) == Torchrun(5, 8, 1, "node-0, port 29500")
    assert Torchrun.find({name: WHOLE[name] for name in WHOLE if name != "LOCAL_RANK"}).local_rank == 0


@pytest.mark.parametrize(("changes", "message"), [
    ({"RANK": None}, "WORLD_SIZE=8, .* but not RANK; unset WORLD_SIZE"),
    ({"MASTER_ADDR": None}, "but not MASTER_ADDR"),
    ({"MASTER_PORT": ""}, "but not MASTER_PORT"),
    ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x; expected a number from 1 to 1048576"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0; expected a number"),
    ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE=9{40}; expected a number"),
    ({"RANK": "8"}, "RANK=8; expected a number from 0 to 7"),
    ({"RANK": "-1"}, "RANK=-1; expected a number"),
    ({"LOCAL_RANK": "6"}, "LOCAL_RANK=6; expected a number from 0 to 5"),
    ({"LOCAL_RANK": "\u0661"}, "LOCAL_RANK=\u0661; expected a number"),
    ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000; expected a number from 1 to 65535"),
])  # fmt: skip
def test_an_environment_that_another_program_left_is_refused(changes, message):
    environment = {name: value for name, value in {**WHOLE, **changes}.items() if value is not None}
    with pytest.raises(TrainingError, match=message):
        Torchrun.find(environment)


def test_the_command_refuses_it_in_a_sentence(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["finetune", str(root / "manifests/tiny/finetune.yaml"), "--run-dir", str(tmp_path)]) == 1
    assert "but not RANK; unset WORLD_SIZE" in capsys.readouterr().err
