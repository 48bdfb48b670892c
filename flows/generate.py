"""The generate flow: jobs -> videos."""

from pathlib import Path

from prefect import flow

from flows import report, steps
from flows.states import ended
from pusa.generate.stage import Generated
from pusa.manifest.models import GenerateManifest


@flow(name="generate", flow_run_name="generate {run_dir}")
def generate(manifest: GenerateManifest, run_dir: Path, retry_failed: bool = False) -> Generated:
    """Run the generate stage in `run_dir`; with `retry_failed`, only try the jobs again that have failed."""
    result = steps.generate(manifest, run_dir, retry_failed)
    report.generate(result)
    return ended(result, result.require_all)
