"""Keep the state of a sampling in a file, from which it continues with the same bits."""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from pusa.errors import MediaError
from pusa.generate.latents import read_facts, read_verified, save_verified
from pusa.system.files import remove

log = logging.getLogger(__name__)
STATE_VERSION = "1"  # of what a saved state means; one of another version is ignored


@dataclass(frozen=True)
class State:
    """How far the sampling of a batch is: `step` steps of pass number `index` are made, of all passes `done`.

    `previous_BCFhw` are the latents of the pass before, `failed` the errors of jobs by their place in the batch. Where
    sampling stopped for drafts, `x0_BCFhw` is the estimate of the clean latents after these steps.
    """

    index: int = 0
    step: int = 0
    done: int = 0
    z_BCFhw: Tensor | None = None
    previous_BCFhw: Tensor | None = None
    failed: Mapping[int, str] | None = None
    x0_BCFhw: Tensor | None = None


class Saved:
    """The file that keeps the state of a sampling.

    Args:
        path: the file. Its folder is created, but not the one above.
        key: identifies the jobs of the batch, in order; a state of another key is ignored.
        every_seconds: how long sampling continues before its state is saved again.
        jobs: the keys of the jobs' latents, for `read_progress`.
        clock: returns seconds.
    """

    def __init__(
        self,
        path: Path,
        key: str,
        every_seconds: float,
        jobs: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._key, self._every, self._jobs, self._clock = path, key, every_seconds, jobs, clock
        self._last = clock()
        self._warned = False

    @cached_property
    def state(self) -> State | None:
        """Return the state that an earlier run saved; None if there is none, or not a usable one."""
        if not self._path.exists():
            return None
        try:
            tensors, facts = read_verified(self._path)
            if (facts["version"], facts["key"]) != (STATE_VERSION, self._key):
                raise MediaError(f"{self._path} is of other jobs, or of another version")
            index, step, done = (int(facts[name]) for name in ("index", "step", "done"))
            failed = {int(row): message for row, message in json.loads(facts["failed"]).items()}
        except (MediaError, KeyError) as error:
            log.warning("a saved state of sampling is ignored: %s", error)
            return None
        return State(index, step, done, tensors["z"], tensors.get("previous"), failed, tensors.get("x0"))

    def keep(self, state: State, total: int) -> None:
        """Save a state if it is time; `total` is the number of steps of all passes. A full disk is only warned of."""
        if self._clock() - self._last < self._every:
            return
        try:
            self.save(state, total)
        except OSError as error:
            if not self._warned:
                log.warning("the state of sampling cannot be saved, so a crash costs more: %s", error)
            self._warned = True
        self._last = self._clock()

    def save(self, state: State, total: int) -> None:
        """Save a state now, as `keep`.

        Raises:
            OSError: it cannot be written.
        """
        tensors = {"z": state.z_BCFhw, "previous": state.previous_BCFhw, "x0": state.x0_BCFhw}
        facts = {name: str(getattr(state, name)) for name in ("index", "step", "done")}
        facts |= {"version": STATE_VERSION, "key": self._key, "total": str(total)}
        facts |= {"jobs": json.dumps(list(self._jobs)), "failed": json.dumps(state.failed or {})}
        if not self._path.parent.parent.is_dir():  # the run folder was moved: do not make it anew
            raise FileNotFoundError(f"{self._path.parent.parent} does not exist")
        save_verified(self._path, {name: t.cpu() for name, t in tensors.items() if t is not None}, facts)

    def remove(self) -> None:
        """Remove the file: the latents are elsewhere now."""
        remove(self._path)


def read_progress(path: Path) -> tuple[list[str], int, int] | None:
    """Return what a saved state states: the keys of its jobs' latents, the steps made, and the steps of all passes.

    None if it is missing or torn.
    """
    try:
        facts = read_facts(path)
        return list(map(str, json.loads(facts["jobs"]))), int(facts["done"]), int(facts["total"])
    except (MediaError, KeyError, ValueError, TypeError, RecursionError):
        return None
