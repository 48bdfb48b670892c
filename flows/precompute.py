"""The precompute flow: clips -> the latents table."""

from pathlib import Path

from prefect import flow

from flows import events, live, report, steps
from flows.handover import ManifestFile, read, run_name
from flows.notices import noticed
from flows.states import ended
from pusa.manifest.models import PrecomputeManifest
from pusa.manifest.place import Place
from pusa.precompute.stage import Precomputed


@flow(name="precompute", flow_run_name=run_name)
def precompute(manifest: ManifestFile, run_dir: Path, place: Place | None = None) -> Precomputed:
    """Encode the clips of a run as latents, those that are new.

    Args:
        manifest: the file that says how.
        run_dir: the folder of the run; the latents are in its folder latents.
        place: where the work is done, in place of the manifest's.
    """
    loaded = read(manifest, run_dir, PrecomputeManifest, place=place)
    with (
        noticed("precompute", loaded, manifest.path, run_dir) as outcome,
        live.reporting(report.PrecomputePage(manifest, run_dir)),
    ):
        outcome.result = result = steps.precompute(loaded, run_dir)
    events.stage_ended("precompute", run_dir)
    return ended(result, result.require_all)
