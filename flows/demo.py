"""Where the demo's manifests are, and what it says at its end."""

from pathlib import Path

MANIFESTS = Path(__file__).parent.parent / "manifests" / "tiny"

_FAREWELL = """
Done. Look at
  the videos       {run}/videos/gallery.html   (open it in a browser)
  the clips        {run}/clips
  the latents      {run}/latents
  the checkpoint   {run}/checkpoints/last
  the loss         {run}/metrics.jsonl; as curves: .venv/bin/tensorboard --logdir {run}/tensorboard
  validation       {run}/validation   (what each checkpoint makes of the same clips)
  the dashboard    .venv/bin/pusa dashboard, then http://127.0.0.1:4200
"""


def farewell(run_dir: Path) -> str:
    """Where the demo left everything."""
    return _FAREWELL.format(run=run_dir)
