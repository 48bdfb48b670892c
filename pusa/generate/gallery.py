"""Show what a run made: a page that plays every video, and a picture with a strip of frames of each."""

from contextlib import closing
from functools import partial
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from pusa.generate.outputs import RECORD, VIDEO
from pusa.system.failures import Failure, attempt
from pusa.system.files import read_object, write_text
from pusa.system.text import preview, printable
from pusa.system.threads import DaemonThreadPool
from pusa.video.media import probe, read_frames, write_image
from pusa.video.sheets import labelled_strip, stack_pictures, strip_indices

SHEET_VIDEOS = 24  # of the contact sheet
DECODERS = 4  # that read these at once: most of their time is spent on starting
LONGEST = 2000  # characters of a prompt, of an error, and of a job's settings

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Pusa gallery</title>
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; media-src 'self' file:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2rem; background: #f4f4f2; color: #1c1c1c }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 1.25rem }}
figure {{ margin: 0; padding: .75rem; min-width: 0; overflow-wrap: anywhere; background: #fff; border-radius: .5rem;
  box-shadow: 0 1px 3px #0002 }}
video {{ width: 100%; image-rendering: pixelated; border-radius: .25rem; background: #ddd }}
figcaption {{ margin-top: .5rem }} small {{ color: #666 }} .failed {{ color: #a11 }}
</style>
<h1>{title}</h1>
<main>
{figures}
</main></html>
"""


def write_gallery(folder: Path, ids: list[str]) -> Path:
    """Write `folder/gallery.html` with these jobs, in order, from their sidecars; return its path."""
    figures = "\n".join(_figure(id, _facts(folder / f"{id}{RECORD}")) for id in ids)
    count = len(ids)
    page = folder / "gallery.html"
    write_text(page, _PAGE.format(title=f"{count} video{'s' * (count != 1)}", figures=figures))
    return page


def write_sheet(folder: Path, ids: list[str]) -> Path:
    """Write `folder/gallery.jpg`, a labelled strip of each of the first `SHEET_VIDEOS` videos; return its path.

    Jobs without a readable video are left out.
    """
    done = [id for id in ids[:SHEET_VIDEOS] if _facts(folder / f"{id}{RECORD}").get("status") == "done"]
    with closing(DaemonThreadPool(DECODERS)) as pool:
        reading = [pool.submit(attempt, partial(_strip, id, folder / f"{id}{VIDEO}"), folder) for id in done]
        strips = [strip.result() for strip in reading]
    write_image(folder / "gallery.jpg", stack_pictures([strip for strip in strips if not isinstance(strip, Failure)]))
    return folder / "gallery.jpg"


def _facts(sidecar: Path) -> dict[str, Any]:
    """Return a job's sidecar; of one that cannot be read, why."""
    try:
        return read_object(sidecar)
    except OSError as error:
        return {"status": "failed", "error": f"{sidecar} cannot be read: {error.strerror}"}


def _strip(id: str, video: Path) -> np.ndarray:
    return labelled_strip(id, read_frames(video, strip_indices(probe(video).num_frames)))


def _figure(id: str, facts: dict[str, Any]) -> str:
    """Return the HTML of one job: its video or its error, then its id, task, prompt and other settings.

    A sidecar is a file that others may have changed: facts of another type are shown as they are, or left out.
    """
    job = facts["job"] if isinstance(facts.get("job"), dict) else {}
    if facts.get("status") == "done":
        content = f'<video src="{_text(quote(f"{id}{VIDEO}"))}" autoplay loop muted playsinline controls></video>'
        if isinstance(failure := facts.get("failure"), dict):
            content += f'<p class="failed">of an earlier run; the last one failed: {_text(failure.get("error"))}</p>'
        if warning := facts.get("warning"):
            content += f'<p class="failed">{_text(warning)}</p>'
    else:
        content = f'<p class="failed">{_text(facts.get("error") or "not made")}</p>'
    in_heading = ("id", "task", "prompt")
    settings = {key: value for key, value in job.items() if key not in in_heading and value != ""}
    details = ", ".join(f"{key} {_brief(value)}" for key, value in settings.items())
    heading = f"<b>{_text(id)}</b> {_text(job.get('task') or '')}"
    prompt = _text(job.get("prompt") or "(no prompt)")
    return (
        f"<figure>{content}<figcaption>{heading}<br>{prompt}<br><small>{_text(details)}</small></figcaption></figure>"
    )


def _text(value: Any) -> str:
    """Return a value as text for a page: on one line, cut at `LONGEST` characters, and escaped."""
    return escape(printable(value if isinstance(value, str) else _brief(value), LONGEST))


def _brief(value: Any, depth: int = 8) -> str:
    """Return a setting as short text; of a path, its last part; nothing of what is nested deeper than `depth`."""
    if isinstance(value, dict | list) and not depth:
        return "..."
    if isinstance(value, dict):
        return " ".join(f"{key}: {_brief(inner, depth - 1)}" for key, inner in value.items())
    if isinstance(value, list):
        return f"[{', '.join(_brief(inner, depth - 1) for inner in value)}]"
    return Path(value).name if isinstance(value, str) else preview(value)
