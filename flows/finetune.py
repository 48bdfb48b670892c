"""The finetune flow: latents -> a checkpoint."""

from pathlib import Path

from prefect import flow

from flows import report, steps
from pusa.finetune import Finetuned
from pusa.manifest import FinetuneManifest


@flow(name="finetune", flow_run_name="finetune {run_dir}")
def finetune(manifest: FinetuneManifest, run_dir: Path) -> Finetuned:
    """Run the finetune stage in `run_dir`."""
    result = steps.finetune(manifest, run_dir)
    report.finetune(result)
    return result
