"""`python -m flows.agent N ARGUMENTS`: `pusa ARGUMENTS` in N processes on this machine, by torchrun's own agent.

torchrun itself would listen on every network address, whatever --rdzv-endpoint says, and whoever reaches that port may
write pickles that it reads. Here the processes meet at a store that listens on the loopback address alone.
"""

import os
import socket
import sys
from collections.abc import Sequence
from uuid import uuid4

from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.launcher import LaunchConfig, elastic_launch

from flows.children import AGENT

LOOPBACK = "127.0.0.1"


class Loopback(RendezvousHandler):
    """The meeting of a single machine's processes: nobody else comes, and nobody comes later."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id = parameters.run_id
        with socket.create_server((LOOPBACK, 0)) as listener:
            port = listener.getsockname()[1]
            self._store = TCPStore(
                LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
            )
        self._where = RendezvousStoreInfo(LOOPBACK, port)

    @property
    def use_agent_store(self) -> bool:
        """The trainers share it: a second one would listen on every address."""
        return True

    def get_backend(self) -> str:
        """Its name."""
        return "loopback"

    def next_rendezvous(self) -> RendezvousInfo:
        """Alone, at once."""
        return RendezvousInfo(self._store, rank=0, world_size=1, bootstrap_store_info=self._where)

    def is_closed(self) -> bool:
        """Never."""
        return False

    def set_closed(self) -> None:
        """Nobody else is to be told."""

    def num_nodes_waiting(self) -> int:
        """None."""
        return 0

    def get_run_id(self) -> str:
        """As it was named."""
        return self._run_id

    def shutdown(self) -> bool:
        """The store ends with this process."""
        return True


def main(processes: int, arguments: Sequence[str]) -> int:
    """Run the processes to their end; the exit code of the first that failed, 128 + its number if by a signal."""
    os.environ[AGENT] = str(os.getpid())
    rendezvous_handler_registry.register("loopback", Loopback)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid4().hex,
        rdzv_backend="loopback",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "flows", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"process {rank + 1} of {processes} ended first, with {failure.exitcode}", file=sys.stderr)  # noqa: T201
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as ended:
        return 128 + ended.sigval
    return 0


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]), sys.argv[2:]))
