"""The built-in tiny model: run the demo, measure what fine-tuning adds, and remake the model."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from flows.commands.options import Count, File, NoPrefect, RunDir, Text
from flows.commands.stages import pipeline
from flows.console import log_to_console, show

MANIFESTS = Path(__file__).parents[2] / "manifests" / "tiny"
DONE = """
Done. Look at
  the videos       {run}/videos/gallery.html   (open it in a browser)
  the clips        {run}/clips
  the latents      {run}/latents
  the checkpoint   {run}/checkpoints/last
  the loss         {run}/metrics.jsonl; as curves: .venv/bin/tensorboard --logdir {run}/tensorboard
  validation       {run}/validation   (videos of the same clips from each checkpoint)
  the dashboard    .venv/bin/pusa server, then http://127.0.0.1:4200
"""


def demo(*, run_dir: RunDir = None, no_prefect: NoPrefect = False) -> int:
    """Run the four stages with the built-in tiny model on synthetic clips."""
    from pusa.tiny.dataset import draw_dataset

    run_dir = (run_dir or Path("runs/tiny")).absolute()
    show("Drawing the data set ...", error=True)
    draw_dataset(run_dir / "drawn")
    pipeline(MANIFESTS, run_dir=run_dir, no_prefect=no_prefect)
    show(DONE.format(run=run_dir))
    return 0


def quality(
    *,
    base: Annotated[Text, Parameter(metavar="NAME")] = "builtin:tiny",
    pusa: Annotated[Text, Parameter(metavar="NAME")] = "builtin:tiny-pusa",
    clips: Count = 24,
    folder: Annotated[File, Parameter(name="--folder")] = Path("runs/quality"),
) -> int:
    """Measure what fine-tuning adds to each task.

    Args:
        base: The weights before fine-tuning.
        pusa: The fine-tuned weights.
        clips: The number of clips for each task.
        folder: The folder for the report and its contact sheets.
    """
    from pusa.evaluate.measure import measure
    from pusa.manifest.models import ModelSpec
    from pusa.system.locks import sole_writer
    from pusa.weights.resolve import require_model

    log_to_console()
    models = ModelSpec(weights=base), ModelSpec(weights=pusa)
    for model in models:
        require_model(model)
    with sole_writer(folder):
        report = measure(*models, clips)
        show(report.text(), *report.write(folder))
        report.require_all()
    return 0


def make_tiny(folder: File, /) -> int:
    """Remake the built-in tiny models from nothing (hours).

    Args:
        folder: The folder for the models. The package ships the result as pusa/builtin.
    """
    from pusa.tiny.make import make

    log_to_console()
    make(folder)
    show(f"to measure their quality: pusa quality --base {folder}/tiny --pusa {folder}/tiny-pusa")
    return 0
