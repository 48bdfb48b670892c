"""The published layout: `videos/**/X.latent.pt` with `captions/**/X.embed.pt`, or both in one folder. No torch here."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pusa.errors import ManifestError, MediaError, Reason, Rejected
from pusa.manifest.models import Limits
from pusa.system.files import Stamp, stamp_of, walk
from pusa.system.text import read_text

LATENT, EMBED, TEXT = ".latent.pt", ".embed.pt", ".txt"
VIDEOS, CAPTIONS = "videos", "captions"
NO_TEXT = "no text file"
MAX_NAME = 200  # bytes of a file's name, with room for its suffix and a temporary prefix


@dataclass(frozen=True)
class Pair:
    """The files of one clip."""

    clip_id: str
    latent: Path
    embed: Path
    text: Path | None

    @property
    def stamps(self) -> list[Stamp]:
        """What stands for the files' content until they are read."""
        return [stamp_of(path) for path in (self.latent, self.embed, self.text) if path is not None]

    def caption(self) -> tuple[str, str]:
        """The caption, empty where there is none, and where it came from.

        Raises:
            Rejected: its file cannot be read, or is too long.
        """
        if self.text is None:
            return "", NO_TEXT
        longest = Limits().caption_characters
        try:
            caption = read_text(self.text, 4 * longest).strip()
        except ManifestError as error:
            raise Rejected(Reason.BAD_CAPTION, str(error)) from error
        if len(caption) > longest:
            raise Rejected(Reason.BAD_CAPTION, f"{self.text} has {len(caption)} characters; allowed are {longest}")
        return caption, self.text.name


@dataclass
class Found:
    """What a folder holds: pairs in the order of their names, and what is none, as rows of a table's rejects."""

    pairs: list[Pair] = field(default_factory=list)
    rejects: list[dict[str, str]] = field(default_factory=list)

    def reject(self, path: Path, reason: Reason, detail: str) -> None:
        """Record a file that is left out."""
        self.rejects.append({"source": shown(path), "reason": reason, "detail": detail})


def find_pairs(folder: Path) -> Found:
    """Every latent file of a folder with its features and its caption; hidden files are none.

    Raises:
        MediaError: there is no such folder.
    """
    if not folder.is_dir():
        raise MediaError(f"{folder} is no folder; wanted is one with **/*{LATENT} and **/*{EMBED}")
    found = Found()
    files = _files(folder, found)
    embeds = {name for name in files if name.endswith(EMBED)}
    ids: dict[str, Path] = {}
    for name in files:
        if name.endswith(LATENT):
            embeds.discard(_take(name, files, ids, found))
    for name in sorted(embeds):
        found.reject(files[name], Reason.BAD_PAIR, f"{shown(files[name])} belongs to no {LATENT} file")
    return found


def shown(path: Path | str) -> str:
    """A path as text, also where its bytes are no UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def export_stem(clip_id: str) -> str:
    """Where a clip's files go below `videos` and `captions`, without their suffixes: its id, as it is.

    Raises:
        Rejected: the id is no relative path, leads out of the folder, or is too long for a file's name.
    """
    parts = clip_id.split("/")
    if "\0" in clip_id or any(part in ("", ".", "..") for part in parts):
        raise Rejected(Reason.BAD_NAME, f"clip {clip_id!r} is no path inside a folder, so it has no place in one")
    longest = max(len(part.encode()) for part in parts)
    if longest > MAX_NAME:
        raise Rejected(
            Reason.BAD_NAME, f"clip {clip_id!r:.80} has a part of {longest} bytes; a file's may have {MAX_NAME}"
        )
    return clip_id


def _take(name: str, files: Mapping[str, Path], ids: dict[str, Path], found: Found) -> str:
    """Record the pair of a latent file, or why it is none; gives the name of the other half."""
    path, stem = files[name], name.removesuffix(LATENT)
    clip_id = stem.removeprefix(f"{VIDEOS}/")
    places = [stem] if clip_id == stem else [f"{CAPTIONS}/{clip_id}", stem]
    embed = next((place + EMBED for place in places if place + EMBED in files), "")
    text = next((files[place + TEXT] for place in places if place + TEXT in files), None)
    if shown(path) != str(path):
        found.reject(path, Reason.BAD_NAME, "the file's name is not UTF-8, which tables want")
    elif not embed:
        wanted = " or ".join(place + EMBED for place in places)
        found.reject(path, Reason.BAD_PAIR, f"{path} has no features: there is no {wanted}")
    elif clip_id in ids:
        found.reject(path, Reason.BAD_PAIR, f"{path} would be clip {clip_id!r}, which {ids[clip_id]} is")
    else:
        ids[clip_id] = path
        found.pairs.append(Pair(clip_id, path, files[embed], text))
    return embed


def _files(folder: Path, found: Found) -> dict[str, Path]:
    """The files below a folder by name, in order; a folder that cannot be read is a reject."""
    paths: list[Path] = []
    for inner, names in walk(folder):
        if isinstance(names, OSError):
            found.reject(inner, Reason.UNREADABLE, f"{shown(inner)} cannot be read: {names.strerror}")
        else:
            paths += (inner / name for name in names)
    return {path.relative_to(folder).as_posix(): path for path in sorted(paths)}
