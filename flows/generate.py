"""The generate flow: jobs -> videos."""

import time
from pathlib import Path

from prefect import flow

from flows import events, live, report, steps
from flows.handover import ManifestFile, changed, read, run_name
from flows.notices import noticed
from flows.states import ended
from pusa.generate.chunks import next_time
from pusa.generate.finish import Chosen
from pusa.generate.listed import manifest_of_run
from pusa.generate.stage import Generated
from pusa.manifest.models import GenerateManifest, TimeOfDay
from pusa.manifest.place import Place


@flow(name="generate", flow_run_name=run_name)
def generate(
    manifest: ManifestFile,
    run_dir: Path,
    place: Place | None = None,
    retry_failed: bool = False,
    until: TimeOfDay | None = None,
    finish: Chosen | None = None,
) -> Generated:
    """Make the videos of a manifest's jobs.

    Args:
        manifest: the file of the jobs.
        run_dir: the folder of the run; the videos are in its folder videos.
        place: where the work is done, in place of the manifest's.
        retry_failed: only try the jobs again that have failed.
        until: start no more work after this local time, in place of the manifest's.
        finish: make these jobs of the run to the end, with the manifest that it ran last.
    """
    if finish is None:
        loaded, chosen = read(manifest, run_dir, GenerateManifest, place=place), None
    else:
        loaded = changed(manifest_of_run(run_dir), {"place": place})
        chosen, manifest = finish.ids_in(loaded), ManifestFile(path=run_dir.absolute() / "videos")
    until = until or loaded.until
    stop_at = next_time(until, time.time()) if until else None  # the same for each try
    with (
        noticed("generate", loaded, manifest.path, run_dir) as outcome,
        live.reporting(report.GeneratePage(manifest, run_dir, [job.id for job in loaded.jobs])),
    ):
        outcome.result = result = steps.generate(loaded, run_dir, retry_failed, chosen, stop_at)
    events.stage_ended("generate", run_dir)
    return ended(result, result.require_all)
