"""End a flow whose work partly failed as "Completed with failures", and take the result out of a flow's last state."""

from collections.abc import Callable
from typing import TypeVar

from prefect import State
from prefect.client.schemas.objects import StateType

from pusa.errors import PartlyFailed

WITH_FAILURES = "Completed with failures"  # the name of a state of type COMPLETED
NO_HEARTBEAT = "no heartbeat for "  # how the message begins of a Crashed state that the automation of heartbeats set

Result = TypeVar("Result")


def ended(result: Result, require_all: Callable[[], None]) -> Result:
    """Return what a flow returns for a result: itself, or if `require_all` raises PartlyFailed a state that holds it.

    Prefect makes this state the run's, with the error's message, and gives the caller of the flow the result.
    """
    try:
        require_all()
    except PartlyFailed as error:
        state: State[Result] = State(type=StateType.COMPLETED, name=WITH_FAILURES, message=str(error), data=result)
        return state  # type: ignore[return-value]  # Prefect's flows have no type for both
    return result


def whole(state: State[Result]) -> Result:
    """Return the result of a flow that was called with `return_state=True`.

    Raises:
        PartlyFailed: the flow completed with failures.
        Exception: the flow's own, if it failed.
    """
    result = state.result()
    if state.name == WITH_FAILURES:
        raise PartlyFailed(state.message)
    return result
