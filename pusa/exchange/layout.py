"""Find the files of the published layouts, without importing torch.

V0.5's layout is `videos/**/X.latent.pt` and `captions/**/X.embed.pt`, or both files in one folder. V1.0's is
`train/**/X.tensors.pth`, which holds both, with the captions in `metadata.csv`.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pusa.errors import ManifestError, MediaError, Reason, Rejected
from pusa.ingest.metadata import read_rows
from pusa.manifest.models import Limits
from pusa.system.files import Stamp, stamp_of, walk
from pusa.system.names import Names, nfc
from pusa.system.text import join_names, printable, read_text
from pusa.video.ffmpeg import open_regular_file

log = logging.getLogger(__name__)
LATENT, EMBED, TEXT = ".latent.pt", ".embed.pt", ".txt"
VIDEOS, CAPTIONS = "videos", "captions"
TENSORS, TRAIN, METADATA = ".tensors.pth", "train", "metadata.csv"  # V1.0's
NO_TEXT = "no text file"
MAX_NAME = 200  # bytes of a file's name; leaves room for its suffix and a temporary prefix


@dataclass(frozen=True)
class Pair:
    """The files of one clip: latents, text features and a caption. In V1.0's layout all but the caption are one."""

    clip_id: str
    latent: Path
    embed: Path | None  # None: `latent` holds the features too
    text: Path | None
    listed: tuple[object, str] | None = None  # the caption in metadata.csv, and its place there

    @property
    def files(self) -> list[Path]:
        """Return the clip's own files."""
        return [path for path in (self.latent, self.embed, self.text) if path is not None]

    @property
    def stamps(self) -> list[Stamp]:
        """Sizes and times of the files, which identify their content before it is read."""
        return [stamp_of(path) for path in self.files]

    def caption(self) -> tuple[str, str]:
        """Return the caption (empty if there is none) and the name of its file.

        Raises:
            Rejected: the file cannot be read, or the caption is not text or too long.
        """
        longest = Limits().caption_characters
        if self.listed is not None:
            text, place = self.listed
            if text is not None and not isinstance(text, str):
                raise Rejected(Reason.BAD_CAPTION, f"{place}: the caption {text!r:.200} is not text")
            caption, where = (text or "").strip(), place
        elif self.text is None:
            return "", NO_TEXT
        else:
            where = self.text.name
            try:
                with open_regular_file(self.text):  # a named pipe would wait for its writer
                    caption = read_text(self.text, 4 * longest).strip()
            except (ManifestError, Rejected) as error:
                raise Rejected(Reason.BAD_CAPTION, str(error)) from error
        if len(caption) > longest:
            source = self.text or where
            raise Rejected(Reason.BAD_CAPTION, f"{source} has {len(caption)} characters; {longest} are allowed")
        return caption, where


@dataclass
class PairList:
    """The pairs of a folder in the order of their names, and the files without a pair, as rows of "rejects"."""

    pairs: list[Pair] = field(default_factory=list)
    rejects: list[dict[str, str]] = field(default_factory=list)

    def reject(self, path: Path, reason: Reason, detail: str) -> None:
        """Record a file that is left out."""
        self.rejects.append({"source": path_text(path), "reason": reason, "detail": detail})


def find_pairs(folder: Path) -> PairList:
    """Find every latent file of a folder with its features and its caption. Hidden files are ignored.

    Raises:
        MediaError: the folder does not exist.
        ManifestError: its metadata.csv cannot be read.
    """
    if not folder.is_dir():
        raise MediaError(
            f"{folder} is not a folder; expected a folder with **/*{LATENT} and **/*{EMBED}, or with **/*{TENSORS}"
        )
    pair_list = PairList()
    paths: list[Path] = []
    for inner, names in walk(folder):
        if isinstance(names, OSError):
            detail = f"{path_text(inner)} cannot be read: {names.strerror}"
            pair_list.reject(inner, Reason.UNREADABLE, detail)
        else:
            paths += [inner / name for name in names]
    files = {path.relative_to(folder).as_posix(): path for path in sorted(paths)}
    unpaired = {name for name in files if name.endswith(EMBED)}
    latents = [name for name in files if name.endswith(LATENT)]
    stems = [stem for name in latents for stem in _stems(name)]
    partners = Names(files, looked_up=[stem + suffix for stem in stems for suffix in (EMBED, TEXT)])
    ids: dict[str, Path] = {}
    for name in latents:
        try:
            unpaired.discard(_add_pair(name, files, partners, ids, pair_list))
        except ManifestError as error:
            pair_list.reject(files[name], Reason.BAD_PAIR, f"{path_text(files[name])}: {error}")
    embeds = [
        (pair.embed.name, pair.latent.name.removesuffix(LATENT) + EMBED) for pair in pair_list.pairs if pair.embed
    ]
    if others := [embed for embed, expected in embeds if embed != expected]:
        message = (
            f"{len(others)} names differ from those of their latents only by their Unicode form: {join_names(others)}"
        )
        log.warning("%s", printable(f"{folder}: {message}", 2000))
    for name in sorted(unpaired):
        detail = f"{path_text(files[name])} belongs to no {LATENT} file"
        pair_list.reject(files[name], Reason.BAD_PAIR, detail)
    if tensors := [name for name in files if name.endswith(TENSORS)]:
        _add_tensors(folder, {name: files[name] for name in tensors}, ids, pair_list)
    return pair_list


def _add_tensors(folder: Path, files: Mapping[str, Path], ids: dict[str, Path], pair_list: PairList) -> None:
    """Add the clips of V1.0's layout, with the captions that metadata.csv lists for them.

    Rejected are clips of a name that is taken or not UTF-8, clips with two captions, and rows without a file, which the
    published trainer passes over.

    Raises:
        ManifestError: metadata.csv cannot be read, or lacks a column.
    """
    metadata = folder / METADATA
    listed: dict[str, list[tuple[object, str]]] = {}  # by the name of a clip, in NFC
    if not metadata.is_file():
        log.warning("%s has no %s, so its clips have no captions; their text features are there", folder, METADATA)
    for row in read_rows(metadata, "file_name", "text") if metadata.is_file() else ():
        place = f"{METADATA}:{row.number}"
        if isinstance(row.file, str):
            listed.setdefault(nfc(row.file), []).append((row.caption, place))
        else:
            pair_list.reject(metadata, Reason.BAD_ROW, f"{place} has no usable file name: {row.preview}")
    found = set()
    for name, path in files.items():
        clip_id = name.removeprefix(f"{TRAIN}/").removesuffix(TENSORS)
        captions = listed.get(nfc(clip_id), [])
        found.add(nfc(clip_id))
        if path_text(path) != str(path):
            pair_list.reject(path, Reason.BAD_NAME, "the file's name is not UTF-8, which tables require")
        elif clip_id in ids:
            pair_list.reject(path, Reason.BAD_PAIR, f"{path} would be clip {clip_id!r}, but {ids[clip_id]} is already")
        elif len({repr(text) for text, _ in captions}) > 1:
            places = join_names([place for _, place in captions])
            pair_list.reject(path, Reason.BAD_CAPTION, f"{path} has several captions: {places}")
        else:
            ids[clip_id] = path
            pair_list.pairs.append(Pair(clip_id, path, None, None, captions[0] if captions else None))
    for clip_id, captions in listed.items():
        if clip_id not in found:
            detail = f"{captions[0][1]} lists {clip_id!r:.200}; there is no {TRAIN}/{clip_id:.200}{TENSORS}"
            pair_list.reject(metadata, Reason.BAD_ROW, detail)


def _stems(name: str) -> list[str]:
    """Return the places of a latent file's features and caption, without their suffixes, in the order of preference."""
    stem = name.removesuffix(LATENT)
    clip_id = stem.removeprefix(f"{VIDEOS}/")
    return [stem] if clip_id == stem else [f"{CAPTIONS}/{clip_id}", stem]


def _add_pair(name: str, files: Mapping[str, Path], partners: Names, ids: dict[str, Path], pair_list: PairList) -> str:
    """Add the pair of a latent file to the list, or reject the file; return the name of its features, empty if none.

    Raises:
        ManifestError: the names of several files differ from that of its features or caption only by Unicode form.
    """
    path, stems = files[name], _stems(name)
    clip_id = stems[-1].removeprefix(f"{VIDEOS}/")
    embed = next(filter(None, (partners.find(stem + EMBED) for stem in stems)), "")
    text = next((files[found] for stem in stems if (found := partners.find(stem + TEXT))), None)
    if path_text(path) != str(path):
        pair_list.reject(path, Reason.BAD_NAME, "the file's name is not UTF-8, which tables require")
    elif not embed:
        expected = " or ".join(stem + EMBED for stem in stems)
        pair_list.reject(path, Reason.BAD_PAIR, f"{path} has no features; expected {expected}")
    elif clip_id in ids:
        detail = f"{path} would be clip {clip_id!r}, but {ids[clip_id]} is already"
        pair_list.reject(path, Reason.BAD_PAIR, detail)
    else:
        ids[clip_id] = path
        pair_list.pairs.append(Pair(clip_id, path, files[embed], text))
    return embed


def path_text(path: Path | str) -> str:
    """Return a path as text; bytes that are not UTF-8 become escape sequences."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def export_stem(clip_id: str) -> str:
    """Return the path of a clip's files below `videos` and `captions`, without suffixes: the clip id itself.

    Raises:
        Rejected: the id is not a relative path, leaves the folder, or is too long for a file name.
    """
    parts = clip_id.split("/")
    if "\0" in clip_id or any(part in ("", ".", "..") for part in parts):
        raise Rejected(
            Reason.BAD_NAME, f"clip {clip_id!r} cannot be a path inside a folder; expected names separated by /"
        )
    longest = max(len(part.encode()) for part in parts)
    if longest > MAX_NAME:
        raise Rejected(
            Reason.BAD_NAME, f"clip {clip_id!r:.80} has a part of {longest} bytes; at most {MAX_NAME} are allowed"
        )
    return clip_id
