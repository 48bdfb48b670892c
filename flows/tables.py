"""`pusa inspect TABLE`: what a table holds, in numbers and in pictures."""

import argparse
import json
from pathlib import Path
from typing import Any

from flows.options import add_command, count, log_to_console
from pusa.errors import TableError


def add_commands(commands: Any) -> None:
    """inspect."""
    what = "say what a table of clips or latents holds, and write a page that shows it"
    inspect = add_command(commands, "inspect", what, run_inspect)
    inspect.add_argument("table", type=Path, help="a folder such as RUN/clips or RUN/latents")
    output = inspect.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="one JSON object instead; nothing is written")
    output.add_argument("--html", type=Path, metavar="FILE", help="where the page goes; default TABLE/inspect.html")
    inspect.add_argument("--limit", type=count, default=100, help="clips with pictures on the page; default 100")
    inspect.add_argument("--decode", type=count, default=0, metavar="ROWS", help="decode so many rows of latents")
    inspect.add_argument("--weights", help="the model to decode with, where the table does not record it")


def run_inspect(options: argparse.Namespace) -> int:
    """`pusa inspect TABLE`."""
    from pusa.inspect.inspection import inspect

    if options.weights and not options.decode:
        raise TableError(f"--weights {options.weights} is what to decode with; add --decode ROWS")
    log_to_console()
    found = inspect(options.table, options.decode, options.weights)
    if options.json:
        print(json.dumps(found.json(), indent=2, allow_nan=False))
        return 0
    print(found.text(), flush=True)
    page = options.html or options.table / "inspect.html"
    found.write(page, options.limit)
    print(page)
    return 0
