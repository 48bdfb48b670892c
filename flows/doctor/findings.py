"""What a check finds, and how a table of checks is run. Imports nothing heavy."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from pusa.errors import PusaError
from pusa.system.text import first_line


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        level: how bad it is.
        text: what it is.
        mend: what to do about it; "": nothing.
        repair: does it, and returns what it did. It removes nothing that a user made.
    """

    level: Level
    text: str
    mend: str = ""
    repair: Callable[[], str] | None = None


@dataclass(frozen=True)
class Line:
    """A line of the report: the check's name and a finding of it."""

    check: str
    finding: Finding

    def as_json(self) -> dict[str, str]:
        """Return everything as JSON values."""
        return {"check": self.check, "level": self.finding.level, "text": self.finding.text, "mend": self.finding.mend}

    def lines(self) -> list[str]:
        """Return one line for people, and a second one with what to do."""
        found = self.finding
        mend = [f"{'':<8} -> {found.mend}"] if found.mend else []
        return [f"{found.level:<8} {self.check}: {found.text}", *mend]


Check = Callable[[], Iterable[Finding]]


def ok(text: str) -> Finding:
    """Return that something is well."""
    return Finding(Level.OK, text)


def note(text: str, mend: str = "", repair: Callable[[], str] | None = None) -> Finding:
    """Return something worth knowing, which keeps nothing from working."""
    return Finding(Level.NOTE, text, mend, repair)


def problem(text: str, mend: str, repair: Callable[[], str] | None = None) -> Finding:
    """Return something that keeps runs from working, and what to do about it."""
    return Finding(Level.PROBLEM, text, mend, repair)


def examine(checks: Mapping[str, Check], repair: bool = False) -> Iterator[Line]:
    """Run checks, one after the other, and yield what they find.

    Args:
        checks: by their names.
        repair: repair what can be repaired; what was repaired is a note in place of the finding.
    """
    for name, check in checks.items():
        try:
            for finding in check():
                yield Line(name, _repaired(finding) if repair and finding.repair else finding)
        except Exception as error:  # noqa: BLE001  the other checks are run all the same
            kind = "" if isinstance(error, PusaError) else f"{type(error).__name__}: "
            yield Line(name, problem(f"the check failed: {kind}{first_line(error)}", ""))


def _repaired(finding: Finding) -> Finding:
    assert finding.repair is not None
    try:
        return note(f"{finding.text}; repaired: {finding.repair()}")
    except Exception as error:  # noqa: BLE001  the other findings are repaired all the same
        return problem(f"{finding.text}; the repair failed: {first_line(error)}", finding.mend)
