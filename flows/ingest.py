"""The ingest flow: videos + captions -> the clips table."""

from pathlib import Path

from prefect import flow

from flows import events, live, report, steps
from flows.handover import ManifestFile, read, run_name
from flows.notices import noticed
from flows.states import ended
from pusa.ingest.stage import Ingested
from pusa.manifest.models import IngestManifest


@flow(name="ingest", flow_run_name=run_name)
def ingest(manifest: ManifestFile, run_dir: Path) -> Ingested:
    """Cut videos with captions into clips, those that are new.

    Args:
        manifest: the file that names the videos and the shape of the clips.
        run_dir: the folder of the run; the clips are in its folder clips.
    """
    loaded = read(manifest, run_dir, IngestManifest)
    with (
        noticed("ingest", loaded, manifest.path, run_dir) as outcome,
        live.reporting(report.IngestPage(manifest, run_dir)),
    ):
        outcome.result = result = steps.ingest(loaded, run_dir)
    events.stage_ended("ingest", run_dir)
    return ended(result, result.require_all)
