"""The built-in tiny model: run the demo, measure what fine-tuning adds, and remake the model."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from flows.commands.options import Count, File, NoPrefect, RunDir, Text
from flows.commands.stages import pipeline
from flows.console import log_to_console, show
from pusa.backbones import all_families
from pusa.errors import ManifestError
from pusa.system.text import preview

MANIFESTS = Path(__file__).parents[2] / "manifests"
Family = Annotated[Text, Parameter(metavar="NAME")]
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


def demo(*, family: Family = "tiny", run_dir: RunDir = None, no_prefect: NoPrefect = False) -> int:
    """Run the four stages with a built-in tiny model on synthetic clips.

    Args:
        family: The name of a built-in tiny model, without "builtin:".
    """
    from pusa.tiny.dataset import draw_dataset

    find_backbone_of(family)
    run_dir = (run_dir or Path("runs", family)).absolute()
    show("Drawing the data set ...", error=True)
    draw_dataset(run_dir / "drawn")
    pipeline(MANIFESTS / family, run_dir=run_dir, no_prefect=no_prefect)
    show(DONE.format(run=run_dir))
    return 0


def quality(
    *,
    family: Family = "tiny",
    base: Annotated[Text | None, Parameter(metavar="NAME")] = None,
    pusa: Annotated[Text | None, Parameter(metavar="NAME")] = None,
    clips: Count = 24,
    folder: Annotated[File, Parameter(name="--folder")] = Path("runs/quality"),
) -> int:
    """Measure what fine-tuning adds to each task.

    Args:
        family: The name of a built-in tiny model, without "builtin:".
        base: The weights before fine-tuning; by default the built-in ones.
        pusa: The fine-tuned weights, or a LoRA for the base; by default the built-in ones.
        clips: The number of clips for each task.
        folder: The folder for the report and its contact sheets.
    """
    from pusa.evaluate.measure import measure
    from pusa.manifest.models import ModelSpec
    from pusa.system.locks import sole_writer
    from pusa.weights.resolve import is_lora, require_model

    log_to_console()
    backbone, base, pusa = find_backbone_of(family), base or f"builtin:{family}", pusa or f"builtin:{family}-pusa"
    before = ModelSpec(backbone=backbone, weights=base)
    after = {"weights": base, "lora": pusa} if is_lora(pusa) else {"weights": pusa}
    models = before, ModelSpec.model_validate({"backbone": backbone, **after})
    for model in models:
        require_model(model)
    with sole_writer(folder):
        report = measure(*models, clips)
        show(report.text(), *report.write(folder))
        report.require_all()
    return 0


def make_tiny(folder: File, /, *, family: Family = "tiny") -> int:
    """Remake the built-in tiny models from nothing (hours).

    Args:
        folder: The folder for the models. The package ships the result as pusa/builtin.
        family: The name of a built-in tiny model, without "builtin:".
    """
    from pusa.tiny.make import make

    log_to_console()
    make(folder, find_backbone_of(family))
    places = f"--base {folder}/{family} --pusa {folder}/{family}-pusa"
    show(f"to measure their quality: pusa quality --family {family} {places}")
    return 0


def find_backbone_of(family: str) -> str:
    """Return the backbone of a built-in tiny model.

    Raises:
        ManifestError: no built-in model has this name.
    """
    known = {known.tiny.removeprefix("builtin:"): known.name for known in all_families() if known.tiny}
    if family not in known:
        raise ManifestError(f"--family {preview(family)}: expected one of {', '.join(known)}")
    return known[family]
