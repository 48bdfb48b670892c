"""Run folders in a browser, read-only: every file that is not hidden, and a page with the galleries, newest first.

Their addresses are `/runs/` and the file's absolute path. Prefect's own pages of runs are below `/runs` too.
"""

import base64
import hmac
import mimetypes
import os
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import partial
from html import escape
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from anyio import to_thread
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from pusa.generate.ledger import DRAFTS
from pusa.generate.outputs import RECORD, VIDEO
from pusa.generate.page import script_source
from pusa.system.text import printable

PREFIX = "/runs"
GALLERY = "gallery.html"
LEVELS = 4  # of folders, from a given one, in which galleries are looked for
MOST_GALLERIES = 1000  # on the page
PREFECTS_PAGES = ("flow-run", "task-run")  # below `/runs` as well
TEXT = (".yaml", ".yml", ".jsonl", ".log", ".md")  # shown as text, whatever the machine's list of types says
# Nothing of a run folder can act but the gallery's own script, which reaches no server: a page that a stranger put
# there must not use Prefect's API as a page of its own.
POLICY = (
    "default-src 'none'; media-src 'self'; img-src 'self' data:; style-src 'unsafe-inline'; "
    f"script-src {script_source()}; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
HEADERS = {"content-security-policy": POLICY, "cache-control": "no-cache", "x-content-type-options": "nosniff"}
CHALLENGE = {"www-authenticate": 'Basic realm="Pusa runs", charset="UTF-8"'}
UNAUTHORIZED, FORBIDDEN, NOT_FOUND, NOT_ALLOWED = 401, 403, 404, 405

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Pusa runs</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 1rem }}
td {{ padding: .6rem 1.2rem .6rem 0; overflow-wrap: anywhere }} .n {{ text-align: right; white-space: nowrap }}
@media (max-width: 640px) {{
  tr, td {{ display: inline-block }} tr {{ padding: .5rem 0 }} td {{ padding: .3rem .8rem .3rem 0 }}
}}
</style>
<h1>{title}</h1>
<table>
{rows}
</table></html>
"""


class Gallery(NamedTuple):
    """A gallery's page, when it was written (seconds since the epoch), and how many videos, drafts and jobs it shows.

    Jobs of which there is no file yet are not counted.
    """

    page: Path
    written: float
    videos: int
    drafts: int
    jobs: int


class RunFolders:
    """Answer what is asked of run folders; another app answers the rest."""

    def __init__(self, app: ASGIApp, folders: Sequence[str], auth_string: str | None = None) -> None:
        """Serve folders.

        Args:
            app: what answers all other requests.
            folders: absolute paths of run folders, or of folders of them.
            auth_string: the `USER:PASSWORD` to ask for, as Prefect's API does; None: everybody is answered.
        """
        self._app, self._auth_string = app, auth_string
        self._folders = {folder.rstrip("/"): _VisibleFiles(directory=folder, check_dir=False) for folder in folders}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        path = scope.get("path", "")
        below = path.removeprefix(f"{PREFIX}/")
        is_prefects = path == PREFIX or (below.split("/")[0] in PREFECTS_PAGES and not self._folder_of(path))
        if scope["type"] != "http" or not f"{path}/".startswith(f"{PREFIX}/") or is_prefects:
            await self._app(scope, receive, send)
            return
        try:
            response = await self._answer(scope, path)
        except HTTPException as error:
            headers = CHALLENGE if error.status_code == UNAUTHORIZED else error.headers
            response = PlainTextResponse(f"{error.detail}\n", error.status_code, headers)
        response.headers.update(HEADERS)
        await response(scope, receive, send)

    async def _answer(self, scope: Scope, path: str) -> Response:
        if self._auth_string is not None and not _is_authorized(Headers(scope=scope), self._auth_string):
            raise HTTPException(UNAUTHORIZED, "this server asks for its PREFECT_SERVER_API_AUTH_STRING")
        if scope["method"] not in ("GET", "HEAD"):
            raise HTTPException(NOT_ALLOWED, "run folders can only be read", {"allow": "GET, HEAD"})
        if path == f"{PREFIX}/":
            return HTMLResponse(await to_thread.run_sync(partial(index_page, list(self._folders))))
        if folder := self._folder_of(path):
            return await self._folders[folder].get_response(path[len(PREFIX) + len(folder) + 1 :], scope)
        raise HTTPException(NOT_FOUND, "not in a folder that `pusa server --runs` names")

    def _folder_of(self, path: str) -> str:
        """Return the innermost folder that an address is in; "" if it is in none."""
        inside = [folder for folder in self._folders if path.startswith(f"{PREFIX}{folder}/")]
        return max(inside, key=len, default="")


class _VisibleFiles(StaticFiles):
    """The regular files of a folder, without hidden ones and what hidden folders hold, and without links out of it."""

    def lookup_path(self, path: str) -> tuple[str, os.stat_result | None]:
        full, found = super().lookup_path(path)
        inside = os.path.relpath(full, os.path.realpath(str(self.directory))) if found else ""
        hidden = any(part.startswith(".") for part in [*path.split("/"), *inside.split("/")])
        return ("", None) if hidden else (full, found)

    async def get_response(self, path: str, scope: Scope) -> Response:
        try:
            return await super().get_response(path, scope)
        except HTTPException as error:
            if error.status_code == UNAUTHORIZED:  # Starlette's word for a file that the server may not read
                raise HTTPException(FORBIDDEN, "the server may not read it") from error
            raise
        except OSError as error:
            raise HTTPException(NOT_FOUND) from error

    def file_response(
        self, full_path: str | os.PathLike[str], stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        if not os.access(full_path, os.R_OK):
            raise HTTPException(FORBIDDEN, "the server may not read it")
        response = super().file_response(full_path, stat_result, scope, status_code)
        if isinstance(response, FileResponse):
            kind = mimetypes.guess_type(str(full_path))[0] or "application/octet-stream"
            response.headers["content-type"] = "text/plain; charset=utf-8" if str(full_path).endswith(TEXT) else kind
        return response


def _is_authorized(headers: Headers, auth_string: str) -> bool:
    """Return whether a request has the credentials; the time that this takes does not depend on them."""
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    try:
        given = base64.b64decode(credentials.strip(), validate=True)
    except ValueError:
        return False
    return scheme.lower() == "basic" and hmac.compare_digest(given, auth_string.encode())


def index_page(folders: Sequence[str]) -> str:
    """Return a page that links the galleries of run folders, newest first, with their numbers of videos and jobs."""
    galleries = sorted(find_galleries(folders), key=lambda gallery: gallery.written, reverse=True)
    rows = [_row(gallery) for gallery in galleries[:MOST_GALLERIES]]
    if (more := len(galleries) - MOST_GALLERIES) > 0:
        rows.append(f"<tr><td>and {more:,} older ones</td></tr>")
    return _PAGE.format(title="Runs" if rows else "No run has a gallery yet", rows="\n".join(rows))


def find_galleries(folders: Sequence[str]) -> list[Gallery]:
    """Return the galleries in folders. Links are not followed, and what cannot be read has none."""
    found = {gallery.page: gallery for folder in folders for gallery in _galleries_below(folder, LEVELS)}
    return list(found.values())


def _galleries_below(folder: str, levels: int) -> Iterator[Gallery]:
    inner, names = [], set()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                names.add(entry.name)
                if levels > 1 and entry.is_dir(follow_symlinks=False):
                    inner.append(entry.path)
        if GALLERY in names:
            page = Path(folder, GALLERY)
            drafts = set(os.listdir(Path(folder, DRAFTS))) if DRAFTS in names else set()
            videos, jobs = ({name for name in names | drafts if name.endswith(end)} for end in (VIDEO, RECORD))
            drafted = {name for name in drafts if name.endswith(VIDEO)} - names
            yield Gallery(page, page.stat().st_mtime, len(videos - drafted), len(drafted), len(jobs))
            return  # a folder of videos has no other folders of them
    except OSError:
        return
    for path in sorted(inner):
        yield from _galleries_below(path, levels - 1)


def _row(gallery: Gallery) -> str:
    run = gallery.page.parent.parent if gallery.page.parent.name == "videos" else gallery.page.parent
    link = quote(f"{PREFIX}{gallery.page}", errors="surrogateescape")
    written = datetime.fromtimestamp(gallery.written).astimezone().strftime("%Y-%m-%d %H:%M")
    counts = "".join(
        f'<td class="n">{count:,} {name}{"s" * (count != 1)}</td>'
        for count, name in ((gallery.videos, "video"), (gallery.drafts, "draft"), (gallery.jobs, "job"))
    )
    return (
        f'<tr><td><a href="{escape(link)}">{escape(printable(run))}</a></td>{counts}<td class="n">{written}</td></tr>'
    )
