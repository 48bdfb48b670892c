"""Compare the numbers of a run's videos, or of two runs, and end with exit code 3 where a requirement is not met."""

import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from cyclopts import CycloptsError, Parameter, Token

from flows.commands.options import File, Text
from flows.console import show

if TYPE_CHECKING:
    from pusa.evaluate.runs import Comparison

STDOUT = Path("-")
Value = TypeVar("Value")


def to_output(kind: type, tokens: Sequence[Token]) -> Path:
    """Return the path of a file to write, or `STDOUT` for "-"; another option in its place is refused."""
    text = tokens[0].value
    if not text.strip() or (text.startswith("-") and text != str(STDOUT)):
        raise ValueError(f"{text!r:.80} is not a file; expected a path, or - for standard output")
    return Path(text)


def evaluate(
    run: File,
    second: Annotated[File | None, Parameter(name="RUN2")] = None,
    /,
    *,
    columns: Text | None = None,
    sort: Annotated[Text | None, Parameter(metavar="NAME")] = None,
    require: Annotated[tuple[Text, ...], Parameter(metavar="REQUIREMENT")] = (),
    json: Annotated[Path | None, Parameter(converter=to_output, allow_leading_hyphen=True, metavar="FILE")] = None,
    html: Annotated[File | None, Parameter(metavar="FILE")] = None,
    vbench: Annotated[File | None, Parameter(metavar="FOLDER")] = None,
    measure: bool = False,
) -> int:
    """Show the numbers of each video of a run, or of two runs side by side with the differences.

    Runs are only read. The exit code is 3 if a requirement is not met.

    Args:
        run: The folder of a run, for example runs/tiny.
        second: The folder of another run; its jobs are compared with those of the first by their ids.
        columns: The names of the numbers to show, with commas between them; by default those that a job has.
        sort: The worst jobs by this number first; of two runs, those that became worst by it.
        require: What each job's number must be in the last run: given_psnr>=30, mean(given_psnr)>=30, and of two runs
            change(motion)>=-0.5. A job without a video does not meet it. Repeat it for more.
        json: Write everything as JSON to this file; - for standard output, in place of the table.
        html: Write a page with strips of frames to this file.
        vbench: Write the videos of the last run, and their prompts, to this folder as VBench reads them.
        measure: Measure videos of earlier versions, whose records have no numbers: what the video alone gives.
    """
    from pusa.evaluate.listing import as_json
    from pusa.evaluate.page import write_page
    from pusa.evaluate.runs import compare_runs
    from pusa.evaluate.thresholds import check_requirements, known_name, parse_requirement, require_all
    from pusa.evaluate.vbench import write_vbench
    from pusa.system.files import write_json

    names = [_checked("--columns", known_name, name.strip()) for name in columns.split(",")] if columns else []
    order = _checked("--sort", known_name, sort) if sort else None
    requirements = [_checked("--require", parse_requirement, text) for text in require]
    if second is None and any(one.of_change for one in requirements):
        raise CycloptsError(msg="--require: a change needs two runs; name both", command_chain=["evaluate"])
    runs = [run, *([second] if second else [])]
    _require_outside(filter(None, (json, html, vbench)), runs)
    read = compare_runs(runs, names, measure)
    comparison = read.sorted_by(order) if order else read
    outcomes = check_requirements(comparison, requirements)
    if json == STDOUT:
        show(dumps(as_json(comparison, outcomes), indent=2))
    else:
        _show_table(comparison)
    if json and json != STDOUT:
        write_json(json, as_json(comparison, outcomes))
    if html:
        write_page(comparison, outcomes, html)
    if vbench:
        write_vbench([row for line in comparison.lines if (row := line.rows[-1])], vbench)
    require_all(comparison, outcomes)
    if outcomes:
        show(f"{len(outcomes)} of {len(outcomes)} requirements are met", error=json == STDOUT)
    return 0


def _show_table(comparison: "Comparison") -> None:
    """Print the jobs as a table as wide as the terminal, and remarks below it."""
    from pusa.evaluate.listing import notes, table_lines

    lines = table_lines(comparison, shutil.get_terminal_size().columns if sys.stdout.isatty() else None)
    remarks = notes(comparison)
    show(*lines, *[""] * bool(remarks), *remarks)


def _checked(option: str, read: Callable[[str], Value], text: str) -> Value:
    """Return what the text of an option means.

    Raises:
        CycloptsError: it means nothing; which is wrong usage.
    """
    try:
        return read(text)
    except ValueError as error:
        raise CycloptsError(msg=f"{option}: {error}", command_chain=["evaluate"]) from error


def _require_outside(paths: Iterable[Path], runs: Sequence[Path]) -> None:
    """Refuse to write in place of a run or where the files of its videos are, which this command only reads.

    Raises:
        CycloptsError: a path is there.
    """
    for path, run in product(paths, runs):
        folder, place = run / "videos", path.resolve()
        if path != STDOUT and (place == run.resolve() or place.is_relative_to(folder.resolve())):
            msg = f"{path} is in {folder}, which is only read; name another place"
            raise CycloptsError(msg=msg, command_chain=["evaluate"])
