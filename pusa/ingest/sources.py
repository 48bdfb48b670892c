"""The list of sources: the videos of a folder, or of a metadata file, with their captions."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from pusa.errors import ManifestError, Reason, Rejected
from pusa.ingest.hub import fetch_dataset
from pusa.ingest.metadata import SUFFIXES, Row, read_rows
from pusa.manifest.models import IngestManifest
from pusa.system.files import GONE, Stamp, digest, stamp_of, walk
from pusa.system.text import join_names, printable
from pusa.video.ffmpeg import opened
from pusa.video.media import VIDEO_SUFFIXES
from pusa.weights.hub import PREFIX

log = logging.getLogger(__name__)
SPACE = 64  # bytes that a caption's file may have around it


@dataclass(frozen=True, slots=True)
class Source:
    """A video, its caption if it has one, and where that came from; or why it cannot even be looked at."""

    path: Path
    caption: str | None
    caption_from: str
    stamp: Stamp = GONE
    reject: Rejected | None = None

    @property
    def shown(self) -> str:
        """The path as text, also where its bytes are no UTF-8."""
        return os.fsencode(self.path).decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class Catalogue:
    """All sources in a fixed order."""

    folder: Path  # what their names are relative to
    sources: list[Source]
    unlisted: int = 0  # files in the folder that its metadata file does not name
    walked: bool = False  # the sources are all that is in the folder

    def name(self, source: Source) -> str:
        """How a source is called in the names of its clips: by its path in the folder.

        Of one elsewhere it is outside-HASH/NAME, with the hash of the path of the folder that it is in: a path that
        leads out of a folder could not be exported.
        """
        path, folder = os.path.normpath(source.path), os.path.normpath(self.folder)
        if path.startswith(inside := os.path.join(folder, "")):
            return path.removeprefix(inside)
        parent, name = os.path.split(path)
        return f"outside-{digest(parent)[:8]}/{name}"

    def mixes_with(self, table: Path) -> bool:
        """Whether a table's folder holds sources, or its own files would be listed as sources the next time."""
        place, folder = Path(os.path.realpath(table)), Path(os.path.realpath(self.folder))
        if self.walked:
            return place.is_relative_to(folder) or folder.is_relative_to(place)
        parents = {source.path.parent for source in self.sources}
        return any(Path(os.path.realpath(parent)).is_relative_to(place) for parent in parents)


def find_sources(manifest: IngestManifest) -> Catalogue:
    """Every file of a folder but hidden ones, videos with the captions beside them; or every row of a metadata file.

    Raises:
        ManifestError: the source is not there, is neither, or holds nothing; a metadata file cannot be read, or has no
            such columns; captions are missing, and the manifest calls that an error.
    """
    place = fetch_dataset(manifest.source) if manifest.source.startswith(PREFIX) else Path(manifest.source).absolute()
    longest = manifest.limits.caption_characters
    if (file := _metadata_file(place, manifest.source)) is None:
        folder, found = place, _of_folder(place, longest)
    else:
        rows = read_rows(file, manifest.file_column, manifest.caption_column)
        bound = manifest.source.startswith(PREFIX)
        folder, found = file.parent, (_of_row(row, file, bound) for row in rows)
    sources = [_checked(source, longest) for source in found]
    if not sources:
        raise ManifestError(f"{manifest.source} holds no videos; known suffixes are {', '.join(VIDEO_SUFFIXES)}")
    unlisted = _unlisted(file, sources) if file is not None and place.is_dir() else 0
    return Catalogue(folder, _captioned(sources, manifest), unlisted, walked=file is None)


def _metadata_file(place: Path, source: str) -> Path | None:
    """The metadata file that a manifest's source is or holds; None for a folder without one."""
    if place.is_file() and place.suffix.lower() in SUFFIXES:
        return place
    if not place.is_dir():
        raise ManifestError(f"source {source} is neither a folder nor a metadata file ({', '.join(SUFFIXES)})")
    found = [place / f"metadata{suffix}" for suffix in SUFFIXES if (place / f"metadata{suffix}").is_file()]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise ManifestError(f"{source} holds {names}; name the one that is meant as the source")
    return found[0] if found else None


def _of_folder(folder: Path, longest: int) -> Iterator[Source]:
    for inner, names in walk(folder):
        if isinstance(names, OSError):
            reject = Rejected(Reason.UNREADABLE, f"the folder cannot be read: {names.strerror}")
            yield Source(inner, None, "", GONE, reject)
        else:
            yield from _of_names(inner, names, longest)


def _of_names(folder: Path, names: list[str], longest: int) -> Iterator[Source]:
    """The files of one folder. Names differ in the case of their suffixes."""
    parts = {name: os.path.splitext(name) for name in names}
    texts = {stem: name for name, (stem, suffix) in parts.items() if suffix.lower() == ".txt"}
    captions = {name: texts.get(stem) for name, (stem, suffix) in parts.items() if suffix.lower() in VIDEO_SUFFIXES}
    used = set(captions.values())
    for name in names:
        if name in captions:
            yield _with_sidecar(folder / name, captions[name], longest)
        elif name not in used:
            yield Source(folder / name, None, "", GONE, _no_video(Path(name)))


def _no_video(name: Path) -> Rejected:
    if name.suffix.lower() == ".txt":
        return Rejected(Reason.NOT_A_VIDEO, "a caption beside no video")
    known = ", ".join(VIDEO_SUFFIXES)
    return Rejected(Reason.NOT_A_VIDEO, f"suffix {name.suffix!a} is no video's; known suffixes are {known}")


def _with_sidecar(path: Path, sidecar: str | None, longest: int) -> Source:
    if sidecar is None:
        return Source(path, None, f"{_shown(path.stem)}.txt", stamp_of(path))
    caption, reject = None, None
    try:
        caption = _read_caption(path.with_name(sidecar), longest)
    except Rejected as refusal:
        reject = Rejected(Reason.BAD_CAPTION, _shown(refusal.detail))
    except (OSError, UnicodeDecodeError) as error:
        reject = Rejected(Reason.BAD_CAPTION, f"{_shown(sidecar)} cannot be read: {error}")
    return Source(path, caption, _shown(sidecar), stamp_of(path), reject)


def _read_caption(path: Path, longest: int) -> str:
    """A sidecar's text; of a file that is no caption, not a byte more than tells so."""
    with opened(path) as handle:
        data = os.read(handle, 4 * longest + SPACE + 1)
    if len(data) > 4 * longest + SPACE:
        raise Rejected(Reason.BAD_CAPTION, f"{path.name} is too large; captions have {longest} characters at most")
    return data.decode("utf-8-sig")


def _of_row(row: Row, file: Path, bound: bool) -> Source:
    """A source of a metadata file; where the row names none, the row itself.

    One by a stranger is bound to its folder: it might name any file of this machine.
    """
    where = f"{file.name}:{row.number}"
    try:
        if not isinstance(row.file, str) or not row.file or "\0" in row.file:
            raise ValueError(f"{where} has no usable file name: {row.shown}")
        if bound and _leads_out(row.file):
            raise ValueError(f"{where} names {row.file!a:.200}, which is not in the data set")
        path = file.parent / row.file
        os.fsencode(path)
    except ValueError as error:  # a lone surrogate, too, which JSON can write and no file system can
        return Source(file.parent / where, None, where, GONE, Rejected(Reason.BAD_ROW, _shown(str(error))))
    if row.caption is not None and not isinstance(row.caption, str):
        reject = Rejected(Reason.BAD_CAPTION, f"{where}: caption {row.caption!r:.200} is no text")
        return Source(path, None, where, stamp_of(path), reject)
    return Source(path, row.caption, where, stamp_of(path))


def _leads_out(name: str) -> bool:
    """By its words alone: the files of a hub's cache are links themselves."""
    return os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir


def _checked(source: Source, longest: int) -> Source:
    """With its caption stripped, or refused where that is too long or cannot be stored."""
    if source.reject is not None or source.caption is None:
        return source
    caption = source.caption.strip()
    wrong = f"the caption has {len(caption)} characters; allowed are {longest}" if len(caption) > longest else ""
    try:
        caption.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        wrong = "the caption is not UTF-8"
    if wrong:
        return replace(source, caption=None, reject=Rejected(Reason.BAD_CAPTION, f"{source.caption_from}: {wrong}"))
    return replace(source, caption=caption)


def _captioned(sources: list[Source], manifest: IngestManifest) -> list[Source]:
    """What the manifest wants of sources without caption."""
    if manifest.missing_captions == "error":
        missing = [source.shown for source in sources if source.reject is None and not source.caption]
        if missing:
            raise ManifestError(f"{manifest.source}: {len(missing)} sources have no caption: {join_names(missing)}")
    skip = manifest.missing_captions == "skip"
    return [source if source.reject else _settled(source, skip) for source in sources]


def _settled(source: Source, skip: bool) -> Source:
    """The source with a caption, or refused."""
    if source.shown != str(source.path):
        reject = Rejected(Reason.BAD_NAME, "the file's name is not UTF-8, which tables and decoders want")
        return replace(source, reject=reject)
    if not source.caption and skip and source.stamp != GONE:  # what is not there has a graver fault
        return replace(source, reject=Rejected(Reason.NO_CAPTION, f"no caption in {source.caption_from}"))
    return source if source.caption else replace(source, caption="")


def _unlisted(file: Path, sources: list[Source]) -> int:
    """How many files beside a metadata file, and in the folders there, it does not name."""
    named = {_place(source.path) for source in sources} | {_place(file)}
    paths = (inner / name for inner, names in walk(file.parent) if isinstance(names, list) for name in names)
    unlisted = [path.name for path in paths if _place(path) not in named]
    if unlisted:
        told = (
            f"{file} does not list {len(unlisted)} files of its folder, so they are no sources: {join_names(unlisted)}"
        )
        log.warning("%s", printable(told, 2000))
    return len(unlisted)


def _place(path: Path) -> tuple[str, str]:
    """Where a file is, whatever links and detours lead to its folder."""
    folder, name = os.path.split(os.path.abspath(path))
    return _real(folder), name


_real = lru_cache(maxsize=4096)(os.path.realpath)


def _shown(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()
