"""The pipeline flow: ingest -> precompute -> finetune -> generate."""

from pathlib import Path

from prefect import flow

from flows.finetune import finetune as finetune_flow
from flows.generate import generate as generate_flow
from flows.handover import ManifestFile, read
from flows.ingest import ingest as ingest_flow
from flows.precompute import precompute as precompute_flow
from flows.states import ended, whole
from pusa.generate.stage import Generated
from pusa.manifest.models import FinetuneManifest, GenerateManifest, IngestManifest, PrecomputeManifest
from pusa.system.failures import PartialFailures


@flow(name="pipeline", flow_run_name="pipeline {run_dir.name}")
def pipeline(
    ingest: ManifestFile, precompute: ManifestFile, finetune: ManifestFile, generate: ManifestFile, run_dir: Path
) -> Generated:
    """Run the four stages in order. If a part of a stage fails, the next ones use the rest.

    All four manifests are checked before the first stage starts.

    Args:
        ingest: the file for the first stage.
        precompute: the file for the second.
        finetune: the file for the third.
        generate: the file for the last.
        run_dir: the folder of the run.
    """
    for file, kind in (
        (ingest, IngestManifest),
        (precompute, PrecomputeManifest),
        (finetune, FinetuneManifest),
        (generate, GenerateManifest),
    ):
        read(file, run_dir, kind)
    failures = PartialFailures()
    with failures.collected():
        whole(ingest_flow(ingest, run_dir, return_state=True))
    with failures.collected():
        whole(precompute_flow(precompute, run_dir, return_state=True))
    finetune_flow(finetune, run_dir)
    generated = generate_flow(generate, run_dir, return_state=True)
    with failures.collected():
        whole(generated)
    return ended(generated.result(), failures.require_none)
