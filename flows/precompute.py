"""The precompute flow: clips -> the latents table."""

from pathlib import Path

from prefect import flow

from flows import report, steps
from flows.states import ended
from pusa.manifest.models import PrecomputeManifest
from pusa.precompute.stage import Precomputed


@flow(name="precompute", flow_run_name="precompute {run_dir}")
def precompute(manifest: PrecomputeManifest, run_dir: Path) -> Precomputed:
    """Run the precompute stage in `run_dir`."""
    result = steps.precompute(manifest, run_dir)
    report.precompute(result)
    return ended(result, result.require_all)
