"""Show what a run made: a page that plays every video, and a picture with a strip of frames of each."""

from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

from pusa.errors import MediaError
from pusa.system.files import read_json, write_text
from pusa.video.media import probe, read_frames, write_image
from pusa.video.sheets import labelled_strip, stack_pictures, strip_indices

SHEET_VIDEOS = 24  # of the contact sheet

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
    """Write `folder/gallery.html` with these jobs, in order, from their sidecars; return its path."""
    figures = "\n".join(_figure(read_json(folder / f"{id}.json") or {"id": id}) for id in ids)
    count = len(ids)
    page = folder / "gallery.html"
    write_text(page, _PAGE.format(title=f"{count} video{'s' * (count != 1)}", figures=figures))
    return page


def write_sheet(folder: Path, ids: list[str]) -> Path:
    """Write `folder/gallery.jpg`, a labelled strip of each of the first `SHEET_VIDEOS` videos; return its path.

    Jobs without a readable video are left out.
    """
    strips = []
    for id in ids[:SHEET_VIDEOS]:
        if (read_json(folder / f"{id}.json") or {}).get("status") == "done":
            video = folder / f"{id}.mp4"
            with suppress(MediaError):
                frames = read_frames(video, strip_indices(probe(video).num_frames))
                strips.append(labelled_strip(id, frames))
    write_image(folder / "gallery.jpg", stack_pictures(strips))
    return folder / "gallery.jpg"


def _figure(facts: dict[str, Any]) -> str:
    """Return the HTML of one job: its video or its error, then its id, task, prompt and other settings."""
    id, job = escape(facts["id"]), facts.get("job", {})
    if facts.get("status") == "done":
        content = f'<video src="{id}.mp4" autoplay loop muted playsinline controls></video>'
    else:
        content = f'<p class="failed">{escape(facts.get("error") or "not made")}</p>'
    in_heading = ("id", "task", "prompt")
    settings = {key: value for key, value in job.items() if key not in in_heading and value != ""}
    details = ", ".join(f"{key} {_brief(value)}" for key, value in settings.items())
    heading = f"<b>{id}</b> {escape(str(job.get('task', '')))}"
    prompt = escape(str(job.get("prompt") or "(no prompt)"))
    caption = f"{heading}<br>{prompt}<br><small>{escape(details)}</small>"
    return f"<figure>{content}<figcaption>{caption}</figcaption></figure>"


def _brief(value: Any) -> str:
    """Return a setting as short text; of a path, its last part."""
    if isinstance(value, dict):
        return " ".join(f"{key}: {_brief(inner)}" for key, inner in value.items())
    return Path(value).name if isinstance(value, str) else str(value)
