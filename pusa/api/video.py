"""A video that was made, as Python code and notebooks use it: pixels, latents, record, other formats, and a picture."""

import base64
import html
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import Tensor

from pusa.errors import MediaError
from pusa.generate.latents import read_latents
from pusa.generate.outputs import LATENTS, PREVIEW, PREVIEWS, RECORD
from pusa.system.files import PARTIAL, atomic, publish, read_object
from pusa.tasks.base import GIF_FPS
from pusa.video.formats import beside
from pusa.video.media import VideoWriter, probe
from pusa.video.provenance import read_provenance

FORMATS = {".webm": "webm", ".gif": "gif", ".mkv": "lossless", "": "png"}  # suffix -> format; "": a folder of frames
LARGEST_SHOWN = 20 << 20  # bytes of a video that a page holds


class Video:
    """A finished video of a run's folder.

    Args:
        path: its mp4. Beside it are the latents and the record.
        decode: decodes its latents to frames (T, H, W, 3) uint8.
        keeper: what keeps the files on the disk, as long as this video has it.

    Attributes:
        path: its mp4.
        sidecar: its record, <id>.json: settings, key, hashes, seeds, what it was made with.
    """

    def __init__(self, path: Path, decode: Callable[[Tensor], np.ndarray], keeper: object = None) -> None:
        self.path, self._decode, self._keeper = path, decode, keeper
        self.sidecar: dict[str, Any] = read_object(path.with_suffix(RECORD))

    @property
    def id(self) -> str:
        """Return the id of its job, which names its files."""
        return self.path.stem

    @property
    def fps(self) -> float:
        """Return its frames per second."""
        return float(self.sidecar["job"]["fps"])

    @property
    def seconds(self) -> float:
        """Return how long it plays."""
        return probe(self.path).num_frames / self.fps

    @property
    def latents(self) -> Tensor:
        """Return its latents (C, F, h, w), as they were sampled.

        Raises:
            MediaError: their file is gone or damaged, or belongs to another video of the same id by now.
        """
        self._require_in_place()
        return read_latents(self.path.with_name(f"{self.id}{LATENTS}"))

    def _require_in_place(self) -> None:
        if read_object(self.path.with_suffix(RECORD)).get("key") != self.sidecar["key"]:
            raise MediaError(
                f"{self.path} was removed, or replaced by another video of the same id; give each call another id"
            )

    @cached_property
    def frames(self) -> np.ndarray:
        """Return its frames (T, H, W, 3) uint8 as the model decodes them, before the mp4 loses any of their detail.

        They are decoded on first use, and kept.

        Raises:
            MediaError: as `latents`.
            NoMemoryError: they do not fit in memory.
        """
        return self._decode(self.latents)

    def save(self, path: str | Path) -> Path:
        """Write the video to a file, in the format of its suffix, and return the path.

        Args:
            path: NAME.mp4, NAME.webm, NAME.gif, NAME.mkv (FFV1: without any loss), or without a suffix a folder of PNG
                frames, which must be empty or missing. A file is replaced.

        Raises:
            MediaError: the suffix is another one, a gif cannot have this many frames per second, the folder is not
                empty; or as `latents`.
            OSError: it cannot be written.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix == ".mp4":
            self._require_in_place()
            with atomic(path) as partial:
                shutil.copyfile(self.path, partial)
            return path
        if suffix not in FORMATS:
            raise MediaError(f"{path}: expected a name that ends in .mp4, .webm, .gif or .mkv, or a folder's, without")
        if suffix == ".gif" and self.fps > GIF_FPS:
            raise MediaError(f"{path}: the video has {self.fps:g} frames per second, and a gif {GIF_FPS} at most")
        if not suffix and path.is_dir() and any(path.iterdir()):
            raise MediaError(f"{path} is not empty; name another folder for the frames")
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent, prefix=PARTIAL) as folder:
            said = read_provenance(self.path)
            writer = VideoWriter(Path(folder, "video.mp4"), self.fps, [FORMATS[suffix]], said)
            try:
                writer.write(self.frames)
                writer.finish()
            except BaseException:
                writer.abort()
                raise
            publish(beside(writer.path, FORMATS[suffix]), path)
        return path

    def __repr__(self) -> str:
        job = self.sidecar["job"]
        warning = f", warning: {self.sidecar['warning']}" if self.sidecar.get("warning") else ""
        varied = "".join(f"{key} {job[key]}, " for key in ("multiplier", "seed") if job.get(key) is not None)
        return f"<Video {self.id}: {job['width']}x{job['height']}, {self.fps:g} fps, {varied}{self.path}{warning}>"

    def _repr_html_(self) -> str:
        """Return a part of a page with all bytes of the video; of a large one, a picture of it and where it is."""
        try:
            self._require_in_place()
        except MediaError as error:
            return f"<p>{html.escape(str(error))}</p>"
        caption = html.escape(repr(self)[1:-1])
        size = self.path.stat().st_size
        if size > LARGEST_SHOWN:
            poster = self.path.parent / PREVIEWS / f"{self.id}{PREVIEW}"
            picture = base64.b64encode(poster.read_bytes()).decode() if poster.is_file() else ""
            image = f'<img src="data:image/jpeg;base64,{picture}"><br>' if picture else ""
            link = f'<a href="{html.escape(self.path.as_uri())}">{html.escape(str(self.path))}</a>'
            return f"<p>{image}{caption}<br>It has {size / 2**20:.0f} MiB, too many for this page: open {link}</p>"
        source = base64.b64encode(self.path.read_bytes()).decode()
        width = max(256, min(640, int(self.sidecar["job"]["width"])))
        return (
            f'<video controls loop autoplay muted playsinline style="width:{width}px;max-width:100%" '
            f'src="data:video/mp4;base64,{source}"></video><br><small>{caption}</small>'
        )
