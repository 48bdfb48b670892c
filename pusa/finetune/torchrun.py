"""Read from the environment which process of a training torchrun started, and where they all meet."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from pusa.errors import TrainingError

MARK = "WORLD_SIZE"  # its presence means that torchrun, or something like it, started this process
MAX_PROCESSES = 1 << 20


@dataclass(frozen=True)
class Torchrun:
    """This is process `rank` of `size`, and process `local_rank` of its machine; all meet at `address`."""

    rank: int
    size: int
    local_rank: int
    address: str

    @classmethod
    def find(cls, environment: Mapping[str, str] = os.environ) -> Self | None:
        """Return what torchrun's variables say; None where there are none.

        Raises:
            TrainingError: a variable is missing or impossible; another program may have left the others.
        """
        if MARK not in environment:
            return None
        size = _number(environment, MARK, 1, MAX_PROCESSES)
        rank = _number(environment, "RANK", 0, size - 1)
        local_rank = _number(environment, "LOCAL_RANK", 0, rank) if "LOCAL_RANK" in environment else 0
        port = _number(environment, "MASTER_PORT", 1, 65535)
        return cls(rank, size, local_rank, f"{_text(environment, 'MASTER_ADDR')}, port {port}")


def _text(environment: Mapping[str, str], name: str) -> str:
    if not (text := environment.get(name, "")):
        raise TrainingError(
            f"the environment has {MARK}={environment[MARK]:.40}, as torchrun sets it for processes that it starts, "
            f"but not {name}; unset {MARK}, or start with torchrun"
        )
    return text


def _number(environment: Mapping[str, str], name: str, low: int, high: int) -> int:
    text = _text(environment, name)
    if not (text.isascii() and text.isdigit() and low <= int(text[:20]) <= high):
        raise TrainingError(
            f"the environment has {name}={text:.40}; expected a number from {low} to {high}, as torchrun sets it for "
            f"the processes that it starts; unset {MARK} and {name}, or start with torchrun"
        )
    return int(text)
