"""Make the clips and latents tables of a small run whose file names and captions contain HTML and control codes."""

import shutil
from pathlib import Path

import numpy as np

from pusa.ingest.stage import ingest
from pusa.manifest.models import ClipSettings, IngestManifest, ModelSpec, PrecomputeManifest
from pusa.precompute.stage import precompute
from pusa.video.media import write_video

HOSTILE_TEXT = '<script>alert("x")</script> & \x1b[31m \u202e red'


def make_videos(drawn: Path, folder: Path) -> Path:
    """Make two drawn videos; one twice as wide, black except for its right quarter; and two empty files."""
    for path in sorted((drawn / "videos").glob("000[0-1].*")):
        shutil.copy(path, folder)
    wide = np.zeros((40, 64, 128, 3), np.uint8)
    wide[:, :, 96:] = 255
    write_video(folder / "<b>wide.mp4", wide, 30)
    (folder / "<b>wide.txt").write_text(HOSTILE_TEXT)
    for name in ("empty\nline", "empty2"):
        (folder / f"{name}.mp4").touch()
        (folder / f"{name}.txt").write_text("nothing")
    return folder


def make_run(videos: Path, folder: Path) -> Path:
    """Run ingest and precompute; return the folder with `clips` and `latents`."""
    ingest(IngestManifest(source=str(videos), clips=ClipSettings(num_frames=31, width=64, height=64, fps=24)), folder)
    precompute(PrecomputeManifest(model=ModelSpec(weights="builtin:tiny")), folder)
    return folder
