"""Find pairs of files in the published layout, without importing torch.

The layout is `videos/**/X.latent.pt` and `captions/**/X.embed.pt`, or both files in one folder.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pusa.errors import ManifestError, MediaError, Reason, Rejected
from pusa.manifest.models import Limits
from pusa.system.files import Stamp, stamp_of, walk
from pusa.system.names import Names
from pusa.system.text import join_names, printable, read_text
from pusa.video.ffmpeg import open_regular_file

log = logging.getLogger(__name__)
LATENT, EMBED, TEXT = ".latent.pt", ".embed.pt", ".txt"
VIDEOS, CAPTIONS = "videos", "captions"
NO_TEXT = "no text file"
MAX_NAME = 200  # bytes of a file's name; leaves room for its suffix and a temporary prefix


@dataclass(frozen=True)
class Pair:
    """The files of one clip."""

    clip_id: str
    latent: Path
    embed: Path
    text: Path | None

    @property
    def stamps(self) -> list[Stamp]:
        """Sizes and times of the files, which identify their content before it is read."""
        return [stamp_of(path) for path in (self.latent, self.embed, self.text) if path is not None]

    def caption(self) -> tuple[str, str]:
        """Return the caption (empty if there is no text file) and the name of its file.

        Raises:
            Rejected: the file cannot be read, or the caption is too long.
        """
        if self.text is None:
            return "", NO_TEXT
        longest = Limits().caption_characters
        try:
            with open_regular_file(self.text):  # a named pipe would wait for its writer
                caption = read_text(self.text, 4 * longest).strip()
        except (ManifestError, Rejected) as error:
            raise Rejected(Reason.BAD_CAPTION, str(error)) from error
        if len(caption) > longest:
            raise Rejected(Reason.BAD_CAPTION, f"{self.text} has {len(caption)} characters; {longest} are allowed")
        return caption, self.text.name


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
    """
    if not folder.is_dir():
        raise MediaError(f"{folder} is not a folder; expected a folder with **/*{LATENT} and **/*{EMBED}")
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
    embeds = ((pair.embed.name, pair.latent.name.removesuffix(LATENT) + EMBED) for pair in pair_list.pairs)
    if others := [embed for embed, expected in embeds if embed != expected]:
        message = (
            f"{len(others)} names differ from those of their latents only by their Unicode form: {join_names(others)}"
        )
        log.warning("%s", printable(f"{folder}: {message}", 2000))
    for name in sorted(unpaired):
        detail = f"{path_text(files[name])} belongs to no {LATENT} file"
        pair_list.reject(files[name], Reason.BAD_PAIR, detail)
    return pair_list


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
