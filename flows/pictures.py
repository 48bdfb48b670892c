"""Pictures in the markdown of Prefect's pages, as data: addresses: thumbnails, and a run's newest videos in a table.

Both of Prefect's dashboards show pictures in the cells of a table side by side, animated ones too. Elsewhere the newer
one puts each on a line of its own, and removes videos; the older one shows none in a link.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx
from PIL import Image
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, PREFECT_UI_URL

from pusa.errors import MediaError
from pusa.generate.outputs import PREVIEW as SUFFIX
from pusa.generate.outputs import PREVIEWS, VIDEO
from pusa.generate.summary import Made
from pusa.system.text import markdown
from pusa.tasks.base import is_id
from pusa.video.animations import Animation
from pusa.video.media import read_image

THUMBNAIL = (1200, 1600)  # pixels at most
THUMBNAIL_BYTES = 200_000
PREVIEW, PREVIEW_BYTES = (480, 160), 30_000  # of each job at work, at most
COLUMNS = 3  # of a table of pictures
NEWEST = 6  # videos that are shown
ANSWER_SECONDS = 2.0  # for the server's answer whether it serves the run
TABLE_BYTES = 2000  # for the names and marks of the table, more than they ever take

Cell = tuple[str, str]  # markdown: a name, and the picture of it or why there is none


def table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in markdown of texts, which are shown literally."""
    return rendered_table(list(map(markdown, names)), (list(map(markdown, row)) for row in rows))


def rendered_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are markdown already, each on one line."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def pictures_table(cells: Sequence[Cell]) -> str:
    """Return a table with a picture below each name, `COLUMNS` side by side."""
    columns = min(COLUMNS, len(cells))
    lines: list[list[str]] = []
    for start in range(0, len(cells), COLUMNS):
        row = [*cells[start : start + COLUMNS]]
        row += [("", "")] * (columns - len(row))
        lines += [[name for name, _ in row], [picture for _, picture in row]]
    return rendered_table(lines[0], lines[1:])


def inline(name: str, kind: str, picture: bytes) -> str:
    """Return a picture in markdown.

    Args:
        name: what is shown where the picture is not; a word of ours, or markdown.
        kind: such as "png".
        picture: the file's bytes.
    """
    return f"![{name}](data:image/{kind};base64,{base64.b64encode(picture).decode()})"


def inline_size(max_bytes: int) -> int:
    """Return how many bytes a picture may have that `inline` makes at most `max_bytes` of, without its name."""
    return max(0, (max_bytes - len(inline("", "webp", b""))) // 4 * 3)


def encode(picture: Image.Image, kind: str) -> bytes:
    """Return a picture's bytes as a file of a kind, such as "PNG"."""
    buffer = BytesIO()
    picture.save(buffer, kind, optimize=True)
    return buffer.getvalue()


def thumbnail(name: str, path: Path, size: tuple[int, int] = THUMBNAIL, max_bytes: int = THUMBNAIL_BYTES) -> str:
    """Return a picture, made smaller than a size and a number of bytes, in markdown; or why it cannot be shown."""
    try:
        picture = Image.fromarray(read_image(path)[0])
    except MediaError as error:
        return f"no picture: {markdown(error)}"
    picture.thumbnail(size)
    while len(jpeg := encode(picture, "JPEG")) > max_bytes:
        picture = picture.resize((max(1, picture.width * 4 // 5), max(1, picture.height * 4 // 5)))
    return inline(name, "jpeg", jpeg)


def previews_text(folder: Path, ids: Iterable[str], since: float) -> str:
    """Return a table in markdown of what these jobs become, the newest pictures first; "" if there are none.

    Args:
        folder: the folder of the videos.
        ids: those of the jobs that are at work.
        since: when the run began, in seconds since the epoch: older pictures are of other videos.
    """
    found = []
    for id in ids:
        path = folder / PREVIEWS / f"{id}{SUFFIX}"
        with suppress(OSError):  # there is none yet
            if (written := path.stat().st_mtime) >= since:
                found.append((written, id, path))
    newest = sorted(found, reverse=True)[:NEWEST]
    cells = [(markdown(id), thumbnail("preview", path, PREVIEW, PREVIEW_BYTES)) for _, id, path in newest]
    return f"what jobs at work become\n\n{pictures_table(cells)}" if cells else ""


class NewestVideos:
    """The newest videos of a folder. Each is decoded once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[tuple[str, float], Animation | str] = {}  # by id and time; or why there is none
        self._site: str | None = None  # the address of the folder, once it is known

    def text(self, made: Mapping[str, Made], max_bytes: int) -> str:
        """Return a table of the newest videos in markdown, of at most `max_bytes` bytes; "" if there are none.

        Args:
            made: the videos that are done.
            max_bytes: where they do not hold all, pictures have fewer frames, or are left out.
        """
        newest = sorted(made.items(), key=lambda item: item[1].at, reverse=True)[:NEWEST]
        if not newest:
            return ""
        keys = [(id, one.at) for id, one in newest]
        self._read = {key: self._read.get(key) or self._animation(key[0]) for key in keys}
        site = self._served_at(newest[0][0])
        gallery = self._folder / "gallery.html"
        where = f"[the gallery]({site}gallery.html)" if site and gallery.is_file() else markdown(gallery)
        text = f"the newest videos; all are in {where}\n\n"
        each = (max_bytes - len(text) - TABLE_BYTES * len(keys)) // len(keys)
        cells = [self._cell(id, self._read[id, at], each, site) for id, at in keys]
        return text + pictures_table(cells) if max_bytes > len(text) + TABLE_BYTES * len(keys) else ""

    def _cell(self, id: str, read: Animation | str, max_bytes: int, site: str | None) -> Cell:
        # The older dashboard shows neither pictures nor escaped characters in a link; an id has none to escape.
        name = f"[{id}]({site}{quote(f'{id}{VIDEO}')})" if site and is_id(id) else markdown(id)
        if isinstance(read, str):
            return name, markdown(read)
        picture = read.webp(inline_size(max_bytes))
        return name, "no room for a picture" if picture is None else inline("video", "webp", picture)

    def _animation(self, id: str) -> Animation | str:
        try:
            return Animation.read(self._folder / f"{id}{VIDEO}")
        except (MediaError, OSError) as error:  # it may be replaced at this moment
            return f"no picture: {error}"

    def _served_at(self, id: str) -> str | None:
        """Return the address, with a slash at its end, at which this run's server serves the folder; None: it does not.

        It is asked for a video, whose size must be right: the path may be another file on the server's machine.
        """
        if self._site is None and (origin := _origin(PREFECT_API_URL.value())):
            below, video = f"/runs{quote(bytes(self._folder))}/", self._folder / f"{id}{VIDEO}"
            url = f"{origin}{below}{quote(video.name)}"
            user, _, password = (PREFECT_API_AUTH_STRING.value() or "").partition(":")
            try:
                answer = httpx.head(url, auth=(user, password) if user else None, timeout=ANSWER_SECONDS)
                size = str(video.stat().st_size)
            except (httpx.HTTPError, httpx.InvalidURL, OSError):
                return None
            if answer.is_success and answer.headers.get("content-length") == size:
                self._site = f"{_origin(PREFECT_UI_URL.value())}{below}"
        return self._site


def _origin(url: str | None) -> str:
    """Return the scheme, host and port of an address, without a password; "" without an address."""
    parts = urlsplit(url or "")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts.netloc else ""
