"""The generate flow: jobs -> videos."""

from pathlib import Path

from prefect import flow

from flows import events, live, report, steps
from flows.handover import ManifestFile, read, run_name
from flows.notices import noticed
from flows.states import ended
from pusa.generate.stage import Generated
from pusa.manifest.models import GenerateManifest
from pusa.manifest.place import Place


@flow(name="generate", flow_run_name=run_name)
def generate(
    manifest: ManifestFile, run_dir: Path, place: Place | None = None, retry_failed: bool = False
) -> Generated:
    """Make the videos of a manifest's jobs.

    Args:
        manifest: the file of the jobs.
        run_dir: the folder of the run; the videos are in its folder videos.
        place: where the work is done, in place of the manifest's.
        retry_failed: only try the jobs again that have failed.
    """
    loaded = read(manifest, run_dir, GenerateManifest, place=place)
    with (
        noticed("generate", loaded, manifest.path, run_dir) as outcome,
        live.reporting(report.GeneratePage(manifest, run_dir, [job.id for job in loaded.jobs])),
    ):
        outcome.result = result = steps.generate(loaded, run_dir, retry_failed)
    events.stage_ended("generate", run_dir)
    return ended(result, result.require_all)
