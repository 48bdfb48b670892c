"""The pipeline flow: ingest -> precompute -> finetune -> generate."""

from pathlib import Path

from prefect import flow

from flows.finetune import finetune as finetune_flow
from flows.generate import generate as generate_flow
from flows.ingest import ingest as ingest_flow
from flows.precompute import precompute as precompute_flow
from flows.states import ended, whole
from pusa.generate.stage import Generated
from pusa.manifest.models import FinetuneManifest, GenerateManifest, IngestManifest, PrecomputeManifest
from pusa.system.failures import PartialFailures


@flow(name="pipeline", flow_run_name="pipeline {run_dir}")
def pipeline(
    ingest: IngestManifest,
    precompute: PrecomputeManifest,
    finetune: FinetuneManifest,
    generate: GenerateManifest,
    run_dir: Path,
) -> Generated:
    """Run the four stages in order, in one `run_dir`. If a part of a stage fails, the next ones use the rest."""
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
