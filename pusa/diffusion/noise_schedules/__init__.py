"""List the noise schedules: name -> "module:function". To add one: its file, and one line here.

A function takes the number of steps N, the multipliers of the latent frames (F,) and, where a schedule is parametrized,
a number, and returns levels (N + 1, F). A manifest names a schedule as `shifted`, or with its number as `shifted(12)`.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from pusa.registry import find

NOISE_SCHEDULES = {
    "linear_quadratic": "pusa.diffusion.noise_schedules.linear_quadratic:levels",
    "shifted": "pusa.diffusion.noise_schedules.shifted:levels",
}
PARAMETRIZED = {"shifted"}


def parse_noise_schedule(text: str) -> tuple[str, float | None]:
    """Split "shifted(12)" into the name and the number, None where none is given.

    Raises:
        ValueError: no schedule has this name, or it takes no number.
    """
    match = re.fullmatch(r"(\w+)(?:\((\d+(?:\.\d+)?)\))?", text)
    if not match or match[1] not in NOISE_SCHEDULES:
        raise ValueError(f"unknown noise schedule {text!r}; allowed are {', '.join(NOISE_SCHEDULES)}")
    number = None if match[2] is None else float(match[2])
    if number is not None and (match[1] not in PARAMETRIZED or number <= 0):
        raise ValueError(f"{text!r}: expected one of {', '.join(PARAMETRIZED)} with a number above 0, or no number")
    return match[1], number


def check_noise_schedule(text: str) -> str:
    """Return the text if it names a noise schedule.

    Raises:
        ValueError: as `parse_noise_schedule`.
    """
    parse_noise_schedule(text)
    return text


def find_noise_schedule(text: str) -> Callable[..., Any]:
    """Return the function (steps, multipliers_F) -> levels (N + 1, F) of a noise schedule.

    Raises:
        ValueError: as `parse_noise_schedule`.
    """
    name, number = parse_noise_schedule(text)
    levels: Callable[..., Any] = find(NOISE_SCHEDULES, name, "noise schedule")
    return levels if number is None else partial(levels, number=number)
