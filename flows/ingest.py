"""The ingest flow: videos + captions -> the clips table."""

from pathlib import Path

from prefect import flow

from flows import report, steps
from flows.states import ended
from pusa.ingest.stage import Ingested
from pusa.manifest.models import IngestManifest


@flow(name="ingest", flow_run_name="ingest {run_dir}")
def ingest(manifest: IngestManifest, run_dir: Path) -> Ingested:
    """Run the ingest stage in `run_dir`."""
    result = steps.ingest(manifest, run_dir)
    report.ingest(result)
    return ended(result, result.require_all)
