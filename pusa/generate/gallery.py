"""What a run made, to look at: a page that plays every video, and a picture with a strip of frames of each."""

from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from pusa.errors import MediaError
from pusa.system.files import read_json, write_text
from pusa.video.media import probe, read_frames, write_image
from pusa.video.sheets import labelled_strip, stack_pictures, strip_indices

SHEET_VIDEOS = 24

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Pusa gallery</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2rem; background: #f4f4f2; color: #1c1c1c }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 1.25rem }}
figure {{ margin: 0; padding: .75rem; background: #fff; border-radius: .5rem; box-shadow: 0 1px 3px #0002 }}
video {{ width: 100%; image-rendering: pixelated; border-radius: .25rem; background: #ddd }}
figcaption {{ margin-top: .5rem }} small {{ color: #666; overflow-wrap: anywhere }} .failed {{ color: #a11 }}
</style>
<h1>{title}</h1>
<main>
{figures}
</main></html>
"""


def write_gallery(folder: Path, ids: list[str]) -> Path:
    """Write `folder/gallery.html` over these jobs, in order, from their sidecars."""
    figures = "\n".join(_figure(folder, read_json(folder / f"{id}.json") or {"id": id}) for id in ids)
    count = len(ids)
    write_text(folder / "gallery.html", _PAGE.format(title=f"{count} video{'s' * (count != 1)}", figures=figures))
    return folder / "gallery.html"


def write_sheet(folder: Path, ids: list[str]) -> Path:
    """Write `folder/gallery.jpg`: for each of the first `SHEET_VIDEOS` that are there, its name and a strip of it."""
    write_image(folder / "gallery.jpg", stack_pictures([strip for id in ids[:SHEET_VIDEOS] for strip in _strip(folder, id)]))
    return folder / "gallery.jpg"


def _strip(folder: Path, id: str) -> list[np.ndarray]:
    """That of a job, if its video is there."""
    if (read_json(folder / f"{id}.json") or {}).get("status") != "done":
        return []
    path = folder / f"{id}.mp4"
    try:
        return [labelled_strip(id, read_frames(path, strip_indices(probe(path).num_frames)))]
    except MediaError:
        return []


def _figure(folder: Path, facts: dict[str, Any]) -> str:
    id, job = escape(facts["id"]), facts.get("job", {})
    if facts.get("status") == "done":
        shown = f'<video src="{id}.mp4" autoplay loop muted playsinline controls></video>'
    else:
        shown = f'<p class="failed">{escape(facts.get("error") or "not made")}</p>'
    told = ("id", "task", "prompt")
    details = ", ".join(f"{key} {_brief(value)}" for key, value in job.items() if key not in told and value != "")
    heading = f"<b>{id}</b> {escape(str(job.get('task', '')))}"
    prompt = escape(str(job.get("prompt") or "(no prompt)"))
    return f"<figure>{shown}<figcaption>{heading}<br>{prompt}<br><small>{escape(details)}</small></figcaption></figure>"


def _brief(value: Any) -> str:
    """A setting in few letters: of a path, its last part."""
    if isinstance(value, dict):
        return " ".join(f"{key}: {_brief(inner)}" for key, inner in value.items())
    return Path(value).name if isinstance(value, str) else str(value)
