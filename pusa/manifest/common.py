"""Define the keys that every kind of manifest has: who is told about a run's end, and the disk that stays free."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from pusa.system.notices import read_addresses
from pusa.system.strict import Strict

Addresses = Annotated[tuple[str, ...], BeforeValidator(read_addresses)]


class Operation(Strict):
    """How a run is operated. None of it changes a result, so it is part of no hash and of no recipe."""

    on_end: Addresses = Field(
        (),
        description="where a JSON notice of a run's end is sent: an http(s) URL, env:PUSA_WEBHOOK_NAME, or a list",
    )
    on_failure: Addresses = Field((), description="where it is sent if the run failed, or a part of it; as on_end")
    min_free_gib: float = Field(
        1.0, ge=0, le=1e6, description="the work pauses while the disk it writes to has less free space; GiB, 0: never"
    )


OPERATION = frozenset(Operation.model_fields)
