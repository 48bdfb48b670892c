"""Define where a stage's work is done: here, on chosen GPUs, in processes, or on a Ray cluster. No torch here."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, field_validator

from pusa.system.strict import Strict
from pusa.system.text import preview

MAX_GPUS, MAX_PROCESSES, MAX_SLOTS = 1024, 256, 1024


class Gpus(Strict):
    """Work on some of this machine's GPUs, each in a process of its own."""

    gpus: tuple[Annotated[int, Field(ge=0, lt=MAX_GPUS)], ...] = Field(
        min_length=1, max_length=MAX_GPUS, description="numbers of GPUs among those that are visible"
    )

    @field_validator("gpus")
    @classmethod
    def _distinct(cls, gpus: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(gpus)) < len(gpus):
            raise ValueError("a GPU is named twice")
        return gpus


class Processes(Strict):
    """Work on this machine's CPU, in processes that share its cores."""

    processes: int = Field(ge=1, le=MAX_PROCESSES, description="the number of processes")


class RayCluster(Strict):
    """Work on the machines of a Ray cluster, in an actor for each GPU, or for each core where there is no GPU."""

    ray: str = Field(
        pattern=r"^(auto|local|[A-Za-z0-9._-]+:[0-9]{1,5}|\[[0-9A-Fa-f:.]+\]:[0-9]{1,5})$",
        max_length=300,
        description="auto: the cluster that this machine is in; local: a Ray of the run's own; or HOST:PORT",
    )
    slots: int = Field(ge=1, le=MAX_SLOTS, description="the number of actors")


def _in_one_sentence(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Validate a place. Pydantic would report what is wrong with a value once for each type of the union."""
    try:
        return validate(value)
    except ValidationError:
        raise ValueError(
            f"got {preview(value)}; expected local, {{gpus: [0, 2]}} with different numbers from 0 to {MAX_GPUS - 1}, "
            f"{{processes: 2}} with a number from 1 to {MAX_PROCESSES}, or {{ray: auto, slots: 16}} with auto, local "
            f"or HOST:PORT, and a number from 1 to {MAX_SLOTS}"
        ) from None


Place = Annotated[Literal["local"] | Gpus | Processes | RayCluster, WrapValidator(_in_one_sentence)]
PLACE = (
    "where the work is done: local (every visible GPU, or this machine's CPU), {gpus: [0, 2]}, {processes: 2}, or "
    "{ray: auto, slots: 16}"
)
