"""Show what a video says about how it was made. All of it may be written by strangers."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pusa.errors import MediaError
from pusa.system.text import printable
from pusa.video.provenance import AI_MADE, Provenance, read_provenance

MAX_LINES = 200  # of the facts of a video
NOTHING = "nothing: it was not made by Pusa, or another program has left this out"
LABELS = {"title": "title", "prompt": "prompt", "maker": "made with", "source_type": "digital source type"}


@dataclass(frozen=True)
class VideoInspection:
    """What a video says about itself; None if this is nothing."""

    path: Path
    provenance: Provenance | None

    def json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {"video": str(self.path), **({} if self.provenance is None else asdict(self.provenance))}

    def text(self) -> str:
        """Return it for a terminal: a line for each fact, of at most `MAX_LINES`, each cut where it is long."""
        lines = [*self._lines()]
        more = [("and", f"{len(lines) - MAX_LINES:,} more; --json prints all")] if len(lines) > MAX_LINES else []
        shown = [(printable(label, 60), printable(value)) for label, value in [*lines[:MAX_LINES], *more]]
        width = max(len(label) for label, _ in shown) + 2
        return "\n".join([printable(self.path), *(f"  {label:<{width}}{value}" for label, value in shown)])

    def _lines(self) -> Iterator[tuple[str, Any]]:
        if self.provenance is None:
            yield "says", NOTHING
            return
        for name, label in LABELS.items():
            if value := getattr(self.provenance, name):
                note = " (made by a model that was trained on samples)" if value == AI_MADE else ""
                yield label, f"{value}{note}"
        if self.provenance.facts is None:
            yield "settings", "not embedded, as with `embed: none`, and in drafts"
        else:
            yield from _flat(self.provenance.facts)


def _flat(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield the single values in JSON values, with the keys that lead to them; deep or listed ones as one text."""
    if isinstance(value, Mapping) and value.keys() == {"file", "sha256"}:
        yield name, f"{value['file']}, sha256 {value['sha256']}"
    elif isinstance(value, Mapping) and depth < 4:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key, depth + 1)
    else:
        yield name, value


def inspect_video(path: Path) -> VideoInspection:
    """Read what a video says about how it was made. Its frames are not decoded.

    Raises:
        MediaError: the file cannot be read.
    """
    try:
        return VideoInspection(path, read_provenance(path))
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error.strerror}") from error
