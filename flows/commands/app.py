"""The `pusa` command: its commands, the look of its help, and its exit codes.

Nothing heavy is imported before a command needs it, so that --help and shell completion answer at once.
"""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cyclopts import App, CycloptsError, Group, Parameter

from flows.commands import (
    deploy,
    evaluate,
    gallery,
    manifests,
    replay,
    server,
    stages,
    status,
    submit,
    tables,
    tiny,
    weights,
    worker,
)
from flows.console import flush_streams, open_streams, print_error
from flows.settings import reach_loopback_directly
from flows.terminal import shown_on_terminal
from pusa.errors import PartlyFailed, PusaError

if TYPE_CHECKING:
    from cyclopts.help import HelpPanel
    from rich.console import Console, ConsoleOptions

COMMANDS: dict[str, dict[str, Any]] = {
    "Run": {
        "pipeline": stages.pipeline,
        "ingest": stages.ingest,
        "precompute": stages.precompute,
        "finetune": stages.finetune,
        "generate": stages.generate,
        "finish": stages.finish,
        "demo": tiny.demo,
    },
    "Before a run": {
        "check": manifests.check,
        "plan": manifests.plan,
        "list": manifests.list_names,
        "describe": manifests.describe,
    },
    "During and after a run": {
        "status": status.status,
        "gallery": gallery.gallery,
        "evaluate": evaluate.evaluate,
        "inspect": tables.inspect,
        "replay": replay.replay,
        "quality": tiny.quality,
    },
    "Operation": {
        "server": server.server,
        "deploy": deploy.deploy,
        "worker": worker.worker,
        "submit": submit.submit,
        "watch": worker.watch,
        "cancel": worker.cancel,
        "doctor": server.doctor,
    },
    "Weights and tables": {
        "weights": {
            "inspect": weights.inspect,
            "convert": weights.convert,
            "export": weights.export,
            "fetch": weights.fetch,
        },
        "import-latents": tables.import_latents,
        "export-latents": tables.export_latents,
        "make-tiny": tiny.make_tiny,
    },
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: everything succeeded. 1: an error, printed as a sentence. 2: a mistake in the command line. 3: the run ended, and
    a part of its work failed, which is recorded. 130: interrupted.
    """
    open_streams()
    reach_loopback_directly(os.environ)
    code = _run(list(sys.argv[1:] if arguments is None else arguments))
    if problem := flush_streams():
        print_error(problem)
    return code or int(bool(problem))


def _run(words: Sequence[str]) -> int:
    app = build_app()
    try:
        command, bound, _ = app.parse_args(list(words))
        if command == app.help_print and not {"-h", "--help"} & set(words):
            raise CycloptsError(msg="a command is missing", command_chain=words)
        _require_usable_process()
        with shown_on_terminal():
            return command(*bound.args, **bound.kwargs) or 0
    except CycloptsError as error:
        print_error(f"{error}\nfor help: {' '.join(['pusa', *(error.command_chain or ()), '--help'])}")
        return 2
    except (PusaError, OSError) as error:
        print_error(error)
        return 3 if isinstance(error, PartlyFailed) else 1
    except MemoryError:
        print_error("out of memory; free some (`ulimit -v` may limit it), then run the same command again to resume")
        return 1
    except KeyboardInterrupt:
        print_error("interrupted; run the same command again to resume")
        return 130


def _require_usable_process() -> None:
    """Refuse what makes libraries fail later, in words of their own.

    Raises:
        PusaError: the current folder was removed, or Python runs without docstrings.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise PusaError(f"the current folder cannot be found ({error.strerror}); change to another one") from error
    if sys.flags.optimize > 1:
        raise PusaError("Python runs with -OO or PYTHONOPTIMIZE=2, without docstrings, which libraries read; unset it")


def build_app() -> App:
    """Return the commands with their options."""
    options = Parameter(negative=(), allow_repeating=True, show_default=lambda value: str(value) if value else None)
    app = App(
        name="pusa",
        help="Vectorized-timestep video diffusion, run as a pipeline.",
        version=_version,
        version_flags=("--version", "-V"),
        default_parameter=options,
        help_format="plaintext",
        help_formatter=_print_panel,
        print_error=False,
        exit_on_error=False,
        group_commands=Group("Other", sort_key=len(COMMANDS)),
    )
    for place, (title, commands) in enumerate(COMMANDS.items()):
        group = Group(title, sort_key=place)
        for row, (name, command) in enumerate(commands.items()):
            if callable(command):
                app.command(command, name=name, group=group, sort_key=row)
            else:
                inner = App(name=name, help=weights.HELP, group=group, sort_key=row)
                inner_group = Group("Commands")
                for inner_name, inner_command in command.items():
                    inner.command(inner_command, name=inner_name, group=inner_group)
                app.command(inner)
    app.register_install_completion_command(help="Install shell completion, for bash, zsh or fish.")
    return app


def _version() -> str:
    from importlib.metadata import version

    return f"pusa {version('pusa')}"


def _print_panel(console: "Console", options: "ConsoleOptions", panel: "HelpPanel") -> None:
    """Print a group of commands or options as two columns, without boxes."""
    from cyclopts.help import DescriptionRenderer, NameRenderer
    from rich.padding import Padding
    from rich.table import Table

    if not panel.entries:
        return
    width = max(12, console.width * 2 // 5)
    table = Table.grid(padding=(0, 2))
    table.add_column(max_width=width)
    table.add_column()
    for entry in panel.entries:
        table.add_row(NameRenderer(width)(entry), DescriptionRenderer()(entry))
    console.print(f"{panel.title}:", highlight=False, markup=False)
    console.print(Padding(table, (0, 0, 0, 2), expand=False))
    console.print()
