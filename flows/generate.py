"""The generate flow: jobs -> videos."""

from pathlib import Path

from prefect import flow

from flows import report, steps
from pusa.generate.stage import Generated
from pusa.manifest.models import GenerateManifest


@flow(name="generate", flow_run_name="generate {run_dir}")
def generate(manifest: GenerateManifest, run_dir: Path) -> Generated:
    """Run the generate stage in `run_dir`."""
    result = steps.generate(manifest, run_dir)
    report.generate(result)
    result.require_all()
    return result
