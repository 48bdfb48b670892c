"""Define where a stage's work is done: in this process, on chosen GPUs, or in several processes. No torch here."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, field_validator

from pusa.system.strict import Strict
from pusa.system.text import preview

MAX_GPUS, MAX_PROCESSES = 1024, 256


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


def _in_one_sentence(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Validate a place. Pydantic would report what is wrong with a value once for each type of the union."""
    try:
        return validate(value)
    except ValidationError:
        raise ValueError(
            f"got {preview(value)}; expected local, {{gpus: [0, 2]}} with different numbers from 0 to {MAX_GPUS - 1}, "
            f"or {{processes: 2}} with a number from 1 to {MAX_PROCESSES}"
        ) from None


Place = Annotated[Literal["local"] | Gpus | Processes, WrapValidator(_in_one_sentence)]
PLACE = "where the work is done: local (every visible GPU, or this machine's CPU), {gpus: [0, 2]}, or {processes: 2}"
