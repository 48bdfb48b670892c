"""Require numbers of a run: read what the command line asks for, and say which jobs do not meet it."""

import operator
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pusa.errors import PartlyFailed
from pusa.evaluate.runs import CHANGE, KNOWN, LABELS, MOTION, MOTION_SHARE, Comparison
from pusa.system.text import MAX_LISTED, join_lines, preview, printable

FORM = re.compile(
    r"(?P<mean>mean\()?(?P<change>change\()?(?P<name>\w+)(?(change)\))(?(mean)\))"
    r"(?P<sign>>=|<=|>|<)(?P<bound>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)",
    re.ASCII,
)
SIGNS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
EXPECTED = "NAME>=NUMBER, mean(NAME)>=NUMBER, change(NAME)>=NUMBER or mean(change(NAME))>=NUMBER, with >=, <=, > or <"
LONGEST = 200  # characters of a requirement


@dataclass(frozen=True)
class Requirement:
    """What a number has to be: for each job that has it, or their mean; in the last run, or as the change to it."""

    text: str
    name: str
    sign: str
    bound: float
    of_mean: bool
    of_change: bool

    def accepts(self, value: float) -> bool:
        """Return whether a value meets it."""
        return bool(SIGNS[self.sign](value, self.bound))


def known_name(name: str) -> str:
    """Return the name of a number, if there is one of it.

    Raises:
        ValueError: there is none; the message has the nearest one.
    """
    if name not in KNOWN:
        near = get_close_matches(name[:LONGEST], KNOWN, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(KNOWN)}"
        raise ValueError(f"{preview(name)} is not a number of videos; {hint}")
    return name


def parse_requirement(text: str) -> Requirement:
    """Read a requirement such as "given_psnr>=30" or "mean(change(motion))>=-0.5"; spaces do not matter.

    Raises:
        ValueError: it is none, or names an unknown number.
    """
    match = FORM.fullmatch(re.sub(r"\s+", "", text[:LONGEST]))
    if match is None or len(text) > LONGEST or abs(bound := float(match["bound"])) == float("inf"):
        raise ValueError(f"{preview(text)} is not a requirement; expected {EXPECTED}")
    parts = match.groupdict()
    return Requirement(
        match[0], known_name(parts["name"]), parts["sign"], bound, bool(parts["mean"]), bool(parts["change"])
    )


@dataclass(frozen=True)
class Outcome:
    """A requirement, and why it is not met, in lines; none if it is met."""

    requirement: Requirement
    problems: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"requirement": self.requirement.text, "met": not self.problems, "problems": list(self.problems)}


def check_requirements(comparison: Comparison, requirements: Sequence[Requirement]) -> list[Outcome]:
    """Return for each requirement whether the last run meets it. What cannot be judged does not meet it."""
    return [Outcome(one, tuple(_problems(comparison, one))) for one in requirements]


def all_problems(outcomes: Collection[Outcome]) -> list[str]:
    """Return why requirements are not met, each reason once."""
    return list(dict.fromkeys(problem for outcome in outcomes for problem in outcome.problems))


def require_all(comparison: Comparison, outcomes: Collection[Outcome]) -> None:
    """Raise PartlyFailed unless each requirement is met; the message names the jobs and their values."""
    if problems := all_problems(outcomes):
        failed = sum(bool(outcome.problems) for outcome in outcomes)
        run = printable(comparison.runs[-1])
        raise PartlyFailed(join_lines(f"{run} does not meet {failed} of {len(outcomes)} requirements:", problems))


def _problems(comparison: Comparison, one: Requirement) -> Iterator[str]:
    """Yield what is wrong with a requirement, on one line each."""
    side = CHANGE if one.of_change else len(comparison.runs) - 1
    values = comparison.values(side, one.name)
    mean = comparison.mean(side, one.name)
    if mean is None:
        both = " in both runs" if one.of_change else ""
        yield f"{one.text}: no job has {one.name}{both}"
    elif one.of_mean and not one.accepts(mean):
        yield f"{one.text}: the mean of {len(values):,} jobs is {mean:.6g}"
    wrong = {} if one.of_mean else {id: value for id, value in values.items() if not one.accepts(value)}
    if wrong:
        worst = sorted(wrong, key=wrong.__getitem__, reverse=one.sign in ("<", "<="))
        jobs = _listed([f"{id} {wrong[id]:.6g}" for id in worst])
        yield f"{one.text}: {len(wrong):,} of {len(values):,} jobs: {jobs}"
    rows = {line.id: line.rows[-1] for line in comparison.lines}
    states = {id: row.state if row else f"not in the {LABELS[1]} run" for id, row in rows.items()}
    unmade = [f"{id} ({states[id]})" for id, row in rows.items() if not (row and row.is_made)]
    if unmade:
        yield f"without a video: {_listed(unmade)}"
    source = MOTION if one.name == MOTION_SHARE else one.name  # what the record has to hold for it
    unknown = [
        id
        for id, row in rows.items()
        if row and row.is_made and source not in row.numbers and (row.unmeasured or source in row.unusable)
    ]
    if unknown:
        yield f"{one.text}: not a number in the records of {_listed(unknown)}"


def _listed(names: Sequence[str]) -> str:
    """Return the first names, and the number of the others."""
    more = f" and {len(names) - MAX_LISTED:,} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
