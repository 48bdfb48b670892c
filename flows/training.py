"""The command `pusa finetune` without Prefect: who trains, this process, children of it, or it as one of several."""

import argparse
import logging
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from flows.options import log_to_console, show
from pusa.errors import PusaError
from pusa.system.strict import RUN_PREFIX

if TYPE_CHECKING:
    from pusa.finetune.stage import Finetuned
    from pusa.manifest.models import FinetuneManifest

log = logging.getLogger("pusa.finetune")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `pusa finetune` has beyond the options of every stage."""
    parser.add_argument(
        "--override",
        type=_override,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="go on from the last checkpoint with another value of its recipe; once for each key",
    )
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)  # where a child tells how it ended


def is_trainer(options: argparse.Namespace) -> bool:
    """Whether this process was started to train, by torchrun or a launcher, and for nothing else."""
    return options.stage == "finetune" and ("WORLD_SIZE" in os.environ or options.result is not None)


def run_trainer(options: argparse.Namespace) -> int:
    """Train as one of the processes; the first shows the result, or leaves it for the launcher."""
    from flows.launch import tell_error, tell_result
    from pusa.manifest.loading import default_run_dir, load_manifest
    from pusa.manifest.models import FinetuneManifest

    rank = _take_rank()
    try:
        run_dir = (options.run_dir or default_run_dir(options.manifest)).absolute()
        manifest = load_manifest(options.manifest, run_dir, "finetune")
        assert isinstance(manifest, FinetuneManifest)
        from pusa.finetune.stage import finetune

        result = finetune(manifest, run_dir, dict(options.override))
    except PusaError as error:
        if options.result:
            tell_error(options.result, error)
        raise
    if options.result and rank == 0:
        tell_result(options.result, result)
    elif rank == 0:
        show(result)
    return 0


def train(manifest: "FinetuneManifest", run_dir: Path, overrides: Mapping[str, str] = {}) -> "Finetuned":
    """Train here, or in as many processes as the manifest says; then render the probe of the checkpoints there are."""
    result = _trained(manifest, run_dir, overrides)
    if manifest.probe is not None:
        from pusa.finetune.validation import probe

        try:
            probe(manifest, run_dir)
        except (PusaError, OSError, RuntimeError) as error:
            log.warning("the training is done, but not its probe: %s", error)
    return result


def _trained(manifest: "FinetuneManifest", run_dir: Path, overrides: Mapping[str, str]) -> "Finetuned":
    if manifest.parallel.processes > 1:
        from flows.launch import launch  # and nothing of torch, which the children load

        return launch(manifest, run_dir, overrides)
    from pusa.finetune.stage import finetune

    return finetune(manifest, run_dir, overrides)


def _take_rank() -> int:
    """This process's rank. One of several ends with the agent that started it, and only the first speaks."""
    from flows.children import AGENT
    from pusa.system.processes import end_with_parent

    if "WORLD_SIZE" in os.environ:
        agent = os.environ.get(AGENT)
        end_with_parent(signal.SIGKILL, int(agent) if agent else None)  # torchrun gave it a session of its own
    log_to_console()
    rank = int(os.environ.get("RANK", 0))
    if rank:
        logging.getLogger("pusa").setLevel(logging.WARNING)
        os.environ["TQDM_DISABLE"] = "1"
    return rank


def _override(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    if key == "latents" and not value.startswith(f"{RUN_PREFIX}/"):
        value = str(Path(value).absolute())  # the trainer may start in another folder
    return key, value
