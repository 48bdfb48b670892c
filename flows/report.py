"""What the dashboard shows of a stage: tables, the loss curve, and pictures."""

import base64
import json

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from pusa.finetune import Finetuned
from pusa.generate import Generated
from pusa.ingest import Ingested
from pusa.precompute import Precomputed

LOSS_ROWS = 20


def ingest(result: Ingested) -> None:
    """How many sources came to what."""
    _table("ingest", "Clips", sources=result.sources, clips=result.clips, rejects=result.rejects,
           retimed_frames=result.retimed_frames, duplicates=result.duplicates,
           near_duplicates=result.near_duplicates, table=str(result.table))  # fmt: skip


def precompute(result: Precomputed) -> None:
    """How many clips came to what."""
    _table("precompute", "Latents", clips=result.clips, rows=result.rows, rejects=result.rejects,
           newly_encoded=result.encoded, table=str(result.table))  # fmt: skip


def finetune(result: Finetuned) -> None:
    """The loss, averaged over `LOSS_ROWS` stretches of the run."""
    losses = [json.loads(line)["loss"] for line in result.metrics.read_text(encoding="utf-8").splitlines()]
    length = max(1, -(-len(losses) // LOSS_ROWS))
    stretches = [losses[i : i + length] for i in range(0, len(losses), length)]
    means = [sum(stretch) / len(stretch) for stretch in stretches]
    top = max(means, default=1.0)
    rows = "\n".join(
        f"| {i * length + len(stretch)} | {mean:.4f} | {'█' * round(30 * mean / top)} |"
        for i, (stretch, mean) in enumerate(zip(stretches, means, strict=True))
    )
    heading = f"`{result.checkpoint}`, {result.trained_steps} steps in this run"
    table = f"| up to step | loss | |\n|---|---|---|\n{rows}"
    create_markdown_artifact(f"{heading}\n\n{table}", key="finetune", description="Loss")


def generate(result: Generated) -> None:
    """What was made, kept and failed, and the sheet of strips as a data: URL, which markdown shows."""
    counts = f"{len(result.made)} made, {len(result.kept)} kept, {len(result.failed)} failed: `{result.gallery}`"
    failures = [f"- **{id}** failed: {reason}" for id, reason in result.failed.items()]
    picture = base64.b64encode(result.sheet.read_bytes()).decode()
    text = "\n".join([counts, "", *failures, "", f"![videos](data:image/jpeg;base64,{picture})"])
    create_markdown_artifact(text, key="generate", description="Videos")


def _table(key: str, description: str, **row: object) -> None:
    create_table_artifact([row], key=key, description=description)
