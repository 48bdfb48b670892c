"""Courses: how the level of each latent frame falls over the steps of sampling. By name, or as a matrix of levels.

A matrix has N + 1 rows, one before each of the N steps and one after the last, and a column for each latent frame.
Plain numbers, no torch: jobs are checked here, `pusa.generate.sampling` turns courses into levels.
"""

import math
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from tokenize import TokenError
from typing import Any

from pusa.errors import ConditionError
from pusa.system.files import State, state_of
from pusa.system.text import preview

Matrix = tuple[tuple[float, ...], ...]
Levels = str | Matrix  # a course by its name, as `parse_course` reads it, or a matrix
SCHEDULE, STAIRCASE, RELEASE = "schedule", "staircase", "release"
COURSES = {SCHEDULE: "schedule", STAIRCASE: "staircase(k)", RELEASE: "release(a, b)"}  # name -> how it is written
FORMS = tuple(COURSES.values())
FILE = ".npy"
MAX_ROWS, MAX_VALUES, MAX_HEADER = 2_001, 1 << 17, 10_000  # rows and levels of a matrix; bytes of a file's header
MAX_STAIR = 10_000
ROUNDING = 1e-6  # of levels in fp32
EXPECTED = f"expected {', '.join(FORMS)}, a list of rows of levels, or a {FILE} file"


def is_matrix(levels: Any) -> bool:
    """Return whether a job's `levels`, as they are written or read, are a matrix or the file of one."""
    return levels is not None and (not isinstance(levels, str | Path) or str(levels).endswith(FILE))


def parse_course(text: str) -> tuple[str, tuple[float, ...]]:
    """Split "release(0.4, 0.5)" into the name of a course and its numbers.

    Raises:
        ValueError: no course is written like this, or a number is out of range.
    """
    name, _, rest = text.partition("(")
    form = COURSES.get(name.strip())
    if form is None:
        raise ValueError(f"unknown levels {preview(text)}; {EXPECTED}")
    if rest and ")" not in rest:
        raise ValueError(
            f'{preview(text)} has no closing bracket; inside [ ] or {{ }} put a course in quotes: "{form}"'
        )
    number = r"\d{1,9}(?:\.\d{1,9})?"
    match = re.fullmatch(rf"\s*\w+\s*(?:\(\s*({number}(?:\s*,\s*{number})*)\s*\))?\s*", text, re.A)
    numbers = tuple(map(float, match[1].split(","))) if match and match[1] else ()
    if match is None or len(numbers) != (form.count(",") + 1 if "(" in form else 0):
        raise ValueError(f"{preview(text)} is not written as {form}, with decimal numbers")
    if form.startswith(STAIRCASE) and not (numbers[0].is_integer() and numbers[0] <= MAX_STAIR):
        raise ValueError(f"{preview(text)}: k is {numbers[0]:g}; expected a whole number of steps, 0 to {MAX_STAIR}")
    if form.startswith(RELEASE):
        for letter, value in zip("ab", numbers, strict=True):
            if not 0 < value <= 1:
                raise ValueError(f"{preview(text)}: {letter} is {value:g}; expected a number above 0, at most 1")
    return name.strip(), numbers


def read_levels(value: Any) -> Levels:
    """Return a course or a matrix as a job keeps it: courses in one spelling, rows as tuples of floats.

    Raises:
        ValueError: it is neither; or a matrix is not rectangular, too large, has a level outside [0, 1], rises in a
            frame, or does not end at 0. The message names the row, the frame and the value.
    """
    if isinstance(value, str):
        name, numbers = parse_course(value)
        return f"{name}({', '.join(f'{number:.12g}' for number in numbers)})" if numbers else name
    if not isinstance(value, list | tuple) or not value or not all(isinstance(row, list | tuple) for row in value):
        raise ValueError(f"got {preview(value)}; {EXPECTED}")
    rows, frames = len(value), len(value[0])
    if not 2 <= rows <= MAX_ROWS or not 1 <= frames <= MAX_VALUES // rows:
        raise ValueError(
            f"the matrix has {rows:,} rows of {frames:,} levels; expected 2 to {MAX_ROWS:,} rows, and at most "
            f"{MAX_VALUES:,} levels"
        )
    for number, row in enumerate(value):
        if len(row) != frames:
            raise ValueError(f"row {number} has {len(row)} levels and row 0 has {frames}; expected one for each frame")
        for frame, level in enumerate(row):
            if isinstance(level, bool) or not isinstance(level, int | float) or not 0 <= level <= 1:
                raise ValueError(f"row {number}, frame {frame}: the level is {preview(level)}; expected 0 to 1")
            if number and level > value[number - 1][frame]:
                raise ValueError(
                    f"row {number}, frame {frame}: the level rises from {value[number - 1][frame]:g} to {level:g}; "
                    "expected levels that fall or stay"
                )
            if number == rows - 1 and level != 0:
                raise ValueError(f"row {number}, frame {frame}: the last level is {level:g}; expected 0")
    return tuple(tuple(level + 0.0 for level in row) for row in value)  # -0.0 becomes 0.0


def read_matrix(path: Path) -> Matrix:
    """Return the matrix in a .npy file of real numbers, which is read once as long as it does not change.

    Raises:
        ValueError: the file is missing, too large or of another kind; or as `read_levels`.
    """
    try:
        if not os.path.isfile(path):  # opening a named pipe would wait
            raise ValueError(f"{str(path)!r:.300} is not a file; expected a {FILE} file of levels")
        return _read_file(path, state_of(path))
    except OSError as error:
        raise ValueError(f"{str(path)!r:.300} cannot be read: {error.strerror}") from error


@lru_cache(maxsize=16)
def _read_file(path: Path, _: State) -> Matrix:
    """Read a file once for all jobs that name it."""
    import numpy as np

    most = MAX_HEADER + 8 * MAX_VALUES  # bytes; 8 are the most that a level has
    with path.open("rb") as file:
        content = file.read(most + 1)
    name = f"{str(path)!r:.300}"
    if len(content) > most:
        raise ValueError(f"{name} has more than {most:,} bytes; expected a matrix of at most {MAX_VALUES:,} levels")
    data = BytesIO(content)
    try:
        version = np.lib.format.read_magic(data)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _order, kind = readers[version](data, max_header_size=MAX_HEADER)
        if len(shape) != 2 or math.prod(shape) > MAX_VALUES or kind.kind not in "fiu" or kind.itemsize > 8:
            raise ValueError(f"it holds {kind} of shape {shape}")
        data.seek(0)
        rows = np.load(data, allow_pickle=False).tolist()
    except (ValueError, KeyError, TypeError, EOFError, SyntaxError, TokenError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"{name} is not a {FILE} file of real numbers (steps + 1, latent frames), at most {MAX_VALUES:,}: {error}"
        ) from error
    read = read_levels(rows)
    assert not isinstance(read, str)
    return read


def steps_of(levels: Levels) -> int | None:
    """Return the number of steps of a matrix; None for a course, which follows the job's noise schedule."""
    return None if isinstance(levels, str) else len(levels) - 1


def name_levels(levels: Levels) -> str:
    """Return levels in a few words: the course, or the size of the matrix."""
    return levels if isinstance(levels, str) else f"a matrix of {len(levels)} rows for {len(levels[0])} latent frames"


def starts_of(levels: Levels, multipliers: Sequence[float]) -> tuple[int, ...]:
    """Return the step at which each frame starts. On a staircase, frames of multiplier 0 do not wait."""
    name, numbers = parse_course(levels) if isinstance(levels, str) else ("", ())
    stair = int(numbers[0]) if name == STAIRCASE else 0
    return tuple(frame * stair if multiplier else 0 for frame, multiplier in enumerate(multipliers))


def release(sigmas: Sequence[float], a: float, b: float) -> list[float]:
    """Return the N + 1 levels of a given frame that is noisy at first and exact later: a (1 - i / (b N)) sigma_i.

    From step i = b N on they are 0. `sigmas` are the N + 1 levels of the noise schedule.
    """
    last = b * (len(sigmas) - 1)
    return [a * (1 - i / last) * sigma if i < last - ROUNDING else 0.0 for i, sigma in enumerate(sigmas)]


def require_fit(levels: Levels, multipliers: Sequence[float]) -> None:
    """Check that a course or a matrix fits the latent frames of a run, which have these multipliers.

    A frame of multiplier 0 is exact at the end whatever its levels: it is not denoised, but noised anew for each step.

    Raises:
        ConditionError: a matrix is of another number of frames, or a frame starts at another level than its multiplier;
            or frames are to be released, and none is given, or one with a multiplier above 0.
    """
    given = {frame: multiplier for frame, multiplier in enumerate(multipliers) if multiplier < 1}
    if not isinstance(levels, str):
        if len(levels[0]) != len(multipliers):
            raise ConditionError(
                f"levels has rows of {len(levels[0])} levels; expected {len(multipliers)}, one for each latent frame"
            )
        for frame, (first, multiplier) in enumerate(zip(levels[0], multipliers, strict=True)):
            if multiplier and abs(first - multiplier) > ROUNDING:
                why = f"its multiplier is {multiplier:g}" if multiplier < 1 else "it is free"
                raise ConditionError(
                    f"levels: row 0, frame {frame}: the level is {first:g}; expected {multiplier:g}, since {why}"
                )
    elif parse_course(levels)[0] == RELEASE:
        if not given:
            raise ConditionError(f"levels is {levels}, which is for given frames, and none is given")
        if noisy := {frame: multiplier for frame, multiplier in given.items() if multiplier}:
            frame, multiplier = next(iter(noisy.items()))
            raise ConditionError(
                f"levels is {levels}, which is for frames that are exact at the end, and latent frame {frame} has "
                f"multiplier {multiplier:g}; expected 0"
            )
