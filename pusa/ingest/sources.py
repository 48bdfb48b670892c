"""List the sources: the videos of a folder, a metadata file or a data set of a hub, with their captions."""

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from pusa.errors import ManifestError, Reason, Rejected
from pusa.ingest.hub import fetch_dataset
from pusa.ingest.metadata import SUFFIXES, Row, read_rows
from pusa.manifest.models import IngestManifest
from pusa.system.allowed import ANYWHERE, Allowed
from pusa.system.files import GONE, Stamp, digest, stamp_of, walk
from pusa.system.names import Names, find_path
from pusa.system.text import join_names, printable
from pusa.video.ffmpeg import open_regular_file
from pusa.video.media import VIDEO_SUFFIXES
from pusa.weights.hub import HUB_PREFIX

log = logging.getLogger(__name__)
DRAWN = "drawn", "videos"  # where a run has the clips that `pusa demo` draws
CAPTION_PADDING = 64  # bytes of white space that a caption file may have around the caption


@dataclass(frozen=True, slots=True)
class Source:
    """A video with its caption, or the reason why it is rejected before it is decoded."""

    path: Path
    caption: str | None
    caption_from: str  # the file, or FILE:LINE of a metadata file
    stamp: Stamp = GONE
    reject: Rejected | None = None
    other_form: str = ""  # the name that was looked for, if the video's or the caption's differs by its Unicode form

    @property
    def path_text(self) -> str:
        """The path as text. Bytes that are not UTF-8 are escaped."""
        return os.fsencode(self.path).decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class Catalogue:
    """All sources in a fixed order."""

    folder: Path  # source names are relative to it
    sources: list[Source]
    unlisted: int = 0  # files in the folder that its metadata file does not name
    is_whole_folder: bool = False  # the sources are all files of the folder

    def name(self, source: Source) -> str:
        """Return the name of a source in clip ids: its path relative to the folder.

        A source outside the folder is named outside-HASH/NAME, with the hash of its own folder's path. A relative path
        that leads out of a folder could not be exported.
        """
        path, folder = os.path.normpath(source.path), os.path.normpath(self.folder)
        if path.startswith(inside := os.path.join(folder, "")):
            return path.removeprefix(inside)
        parent, name = os.path.split(path)
        return f"outside-{digest(parent)[:8]}/{name}"

    def mixes_with(self, table: Path) -> bool:
        """Return whether a table's folder holds sources, or the table's files would be listed as sources next time."""
        table, folder = Path(os.path.realpath(table)), Path(os.path.realpath(self.folder))
        if self.is_whole_folder:
            return table.is_relative_to(folder) or folder.is_relative_to(table)
        parents = {source.path.parent for source in self.sources}
        return any(Path(os.path.realpath(parent)).is_relative_to(table) for parent in parents)


def find_sources(manifest: IngestManifest) -> Catalogue:
    """List every file of a folder except hidden ones, or every row of a metadata file, with its caption.

    Raises:
        ManifestError: the source is missing, is neither a folder nor a metadata file, or is empty; a metadata file
            cannot be read, lacks a column or changes while it is read; or captions are missing and the manifest makes
            that an error.
    """
    from_hub = manifest.source.startswith(HUB_PREFIX)
    place = fetch_dataset(manifest.source) if from_hub else Path(manifest.source).absolute()
    max_characters = manifest.limits.caption_characters
    allowed = ANYWHERE if from_hub else Allowed.from_environment()
    file = _find_metadata_file(place, manifest.source, allowed)
    stamp = stamp_of(file) if file is not None else GONE
    if file is None:
        folder, unchecked = place, _list_folder(place, max_characters, allowed)
    else:
        rows = read_rows(file, manifest.file_column, manifest.caption_column)
        listings: dict[Path, Names] = {}
        folder, unchecked = file.parent, (_source_of_row(row, file, from_hub, listings) for row in rows)
    sources = [_with_checked_caption(source, max_characters) for source in unchecked]
    if file is not None and stamp_of(file) != stamp:
        raise ManifestError(f"{file} was changed while it was read; run the command again once it is complete")
    if not sources:
        raise ManifestError(f"{manifest.source} holds no videos; known suffixes are {', '.join(VIDEO_SUFFIXES)}")
    if others := [source.other_form for source in sources if source.other_form]:
        message = (
            f"{len(others)} names differ from those of their files only by their Unicode form: {join_names(others)}"
        )
        log.warning("%s", printable(f"{manifest.source}: {message}", 2000))
    unlisted = _count_unlisted(file, sources, allowed) if file is not None and place.is_dir() else 0
    if manifest.missing_captions == "error":
        missing = [source.path_text for source in sources if source.reject is None and not source.caption]
        if missing:
            raise ManifestError(f"{manifest.source}: {len(missing)} sources have no caption: {join_names(missing)}")
    skip = manifest.missing_captions == "skip"
    sources = [source if source.reject else _with_caption_or_reject(source, skip) for source in sources]
    return Catalogue(folder, sources, unlisted, is_whole_folder=file is None)


def _find_metadata_file(place: Path, source: str, allowed: Allowed) -> Path | None:
    """Return the metadata file that a manifest's source is or contains; None for a folder without one."""
    allowed.require(place)
    if place.is_file() and place.suffix.lower() in SUFFIXES:
        return place
    if missing := missing_source(source, place):
        raise ManifestError(missing)
    if not place.is_dir():
        raise ManifestError(f"source {source} is neither a folder nor a metadata file ({', '.join(SUFFIXES)})")
    files = [place / f"metadata{suffix}" for suffix in SUFFIXES if (place / f"metadata{suffix}").is_file()]
    if len(files) > 1:
        names = " and ".join(path.name for path in files)
        raise ManifestError(f"{source} holds {names}; name the file to use as the source")
    for path in files:
        allowed.require(path)
    return files[0] if files else None


def missing_source(source: str, place: Path) -> str:
    """Return a sentence about a manifest's source if there is nothing at its place; "" if there is."""
    if place.exists():
        return ""
    advice = "; `pusa demo` draws it" if place.parts[-2:] == DRAWN else ""
    return f"source {source} does not exist{advice}"


def _list_folder(root: Path, max_characters: int, allowed: Allowed) -> Iterator[Source]:
    """Yield every file below a folder, except captions that belong to a video."""
    for folder, names in walk(root, allowed):
        if isinstance(names, OSError):
            reject = Rejected(Reason.UNREADABLE, f"the folder cannot be read: {names.strerror}")
            yield Source(folder, None, "", GONE, reject)
            continue
        parts = {name: os.path.splitext(name) for name in names}  # suffixes may be in upper case
        texts = {stem: name for name, (stem, suffix) in parts.items() if suffix.lower() == ".txt"}
        videos = {name: stem for name, (stem, suffix) in parts.items() if suffix.lower() in VIDEO_SUFFIXES}
        stems = Names(texts, looked_up=videos.values())
        used = {texts[text] for stem in videos.values() for text in stems.alike(stem)}
        for name, (_, suffix) in parts.items():
            if name in videos:
                yield _with_caption_file(folder / name, texts, stems, max_characters)
            elif suffix.lower() == ".txt" and name not in used:
                reject = Rejected(Reason.NOT_A_VIDEO, "a caption without a video of the same name")
                yield Source(folder / name, None, "", GONE, reject)
            elif name not in used:
                detail = f"{suffix!a} is not a video suffix; known suffixes are {', '.join(VIDEO_SUFFIXES)}"
                yield Source(folder / name, None, "", GONE, Rejected(Reason.NOT_A_VIDEO, detail))


def _with_caption_file(path: Path, texts: Mapping[str, str], stems: Names, max_characters: int) -> Source:
    """Return the source with the text of the caption file beside it. No more of that file is read than allowed.

    Args:
        path: the video.
        texts: stem -> name of each caption file of the folder.
        stems: the stems that are found for the video's.
        max_characters: of a caption.
    """
    stem = os.path.splitext(path.name)[0]
    try:
        text = stems.find(stem)
    except ManifestError as error:
        ambiguous = Rejected(Reason.BAD_CAPTION, f"caption {error}")
        return Source(path, None, f"{_escape(stem)}.txt", stamp_of(path), ambiguous)
    if text is None:
        return Source(path, None, f"{_escape(stem)}.txt", stamp_of(path))
    caption_file, other_form = texts[text], "" if text == stem else stem
    max_bytes = 4 * max_characters + CAPTION_PADDING
    caption, reject = None, None
    try:
        with open_regular_file(path.with_name(caption_file)) as handle:
            data = os.read(handle, max_bytes + 1)
        if len(data) > max_bytes:
            detail = f"{caption_file} is too large; a caption has at most {max_characters} characters"
            raise Rejected(Reason.BAD_CAPTION, detail)
        caption = data.decode("utf-8-sig")
    except Rejected as error:
        reject = Rejected(Reason.BAD_CAPTION, _escape(error.detail))
    except (OSError, UnicodeDecodeError) as error:
        reject = Rejected(Reason.BAD_CAPTION, f"{_escape(caption_file)} cannot be read: {error}")
    return Source(path, caption, _escape(caption_file), stamp_of(path), reject, other_form)


def _source_of_row(row: Row, file: Path, inside_only: bool, listings: dict[Path, Names]) -> Source:
    """Return the source that a row of a metadata file names, or the row itself as a reject.

    A downloaded metadata file (`inside_only`) may name only files of its own folder, not any file of this machine.
    `listings` keeps the names of folders in which a name in another Unicode form was looked for.
    """
    where = f"{file.name}:{row.number}"
    try:
        if not isinstance(row.file, str) or not row.file or "\0" in row.file:
            raise ValueError(f"{where} has no usable file name: {row.preview}")
        # The name alone decides: the files in a hub's cache are links themselves.
        leads_out = os.path.isabs(row.file) or os.path.normpath(row.file).split(os.sep)[0] == os.pardir
        if inside_only and leads_out:
            raise ValueError(f"{where} names {row.file!a:.200}, which is not in the data set")
        os.fsencode(file.parent / row.file)
        path = find_path(file.parent / row.file, listings)
    except ManifestError as error:
        return Source(file.parent / row.file, None, where, GONE, Rejected(Reason.BAD_ROW, f"{where}: {error}"))
    except ValueError as error:  # also for a lone surrogate, which JSON can contain and no file system can store
        return Source(file.parent / where, None, where, GONE, Rejected(Reason.BAD_ROW, _escape(str(error))))
    if row.caption is not None and not isinstance(row.caption, str):
        reject = Rejected(Reason.BAD_CAPTION, f"{where}: caption {row.caption!r:.200} is not text")
        return Source(path, None, where, stamp_of(path), reject)
    other_form = row.file if path != file.parent / row.file else ""
    return Source(path, row.caption, where, stamp_of(path), other_form=other_form)


def _with_checked_caption(source: Source, max_characters: int) -> Source:
    """Return the source with its caption stripped, or rejected if the caption is too long or cannot be stored."""
    if source.reject is not None or source.caption is None:
        return source
    caption = source.caption.strip()
    fault = ""
    if len(caption) > max_characters:
        fault = f"the caption has {len(caption)} characters; allowed are {max_characters}"
    try:
        caption.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        fault = "the caption is not UTF-8"
    if fault:
        return replace(source, caption=None, reject=Rejected(Reason.BAD_CAPTION, f"{source.caption_from}: {fault}"))
    return replace(source, caption=caption)


def _with_caption_or_reject(source: Source, skip: bool) -> Source:
    """Return the source with a caption, maybe an empty one; or rejected for its name, or with `skip` for no caption."""
    if source.path_text != str(source.path):
        reject = Rejected(Reason.BAD_NAME, "the file name is not UTF-8, which tables and decoders need")
        return replace(source, reject=reject)
    if not source.caption and skip and source.stamp != GONE:  # a missing file is rejected later, as unreadable
        return replace(source, reject=Rejected(Reason.NO_CAPTION, f"no caption in {source.caption_from}"))
    return source if source.caption else replace(source, caption="")


def _count_unlisted(file: Path, sources: list[Source], allowed: Allowed) -> int:
    """Return the number of files below the folder of a metadata file that the metadata file does not name."""
    listed = {_resolve_folder(source.path) for source in sources} | {_resolve_folder(file)}
    listed_now = walk(file.parent, allowed)
    paths = (folder / name for folder, names in listed_now if isinstance(names, list) for name in names)
    unlisted = [path.name for path in paths if _resolve_folder(path) not in listed]
    if unlisted:
        message = f"{file} does not list {len(unlisted)} files of its folder; they are ignored: {join_names(unlisted)}"
        log.warning("%s", printable(message, 2000))
    return len(unlisted)


def _resolve_folder(path: Path) -> tuple[str, str]:
    """Return the real path of a file's folder, and the file's name. Links that are files themselves stay distinct."""
    folder, name = os.path.split(os.path.abspath(path))
    return _realpath(folder), name


_realpath = lru_cache(maxsize=4096)(os.path.realpath)


def _escape(text: str) -> str:
    """Return text that UTF-8 can encode: surrogates are written as \\udcXX."""
    return text.encode("utf-8", "backslashreplace").decode()
