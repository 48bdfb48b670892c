"""Download weights from a model hub by name: only the files that are needed, kept in the hub's own cache.

Each download writes to a temporary file of its own, which gets its name once it is complete and has the listed hash,
under a lock. So processes that share a cache do not spoil each other's files, and a file that is half there is never
used. Within a call a broken connection is resumed. After the call has failed or was killed, finished files are kept,
and the broken one is downloaded again from its beginning. A kill leaves its temporary file in the cache;
`hf cache prune` removes it.
"""

import difflib
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Literal

from huggingface_hub import constants
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import validate_repo_id

from pusa.backbones import all_families, all_layouts, all_parts, misfit
from pusa.backbones.family import Family, Layout
from pusa.errors import WeightsError
from pusa.system.progress import Progress
from pusa.system.text import printable
from pusa.system.threads import run_in_threads
from pusa.weights.adapters import PEFT_CONFIG
from pusa.weights.hub_client import HubUnreachable
from pusa.weights.repository import COMMIT, Repository, path_fault
from pusa.weights.stored import CONFIG
from pusa.weights.tensors import INDEX, refuse_pickle

log = logging.getLogger(__name__)

HUB_PREFIX = "hf:"
_NAME = re.compile(HUB_PREFIX + r"([^/@:]+/[^/@:]+)(?:@([^@:]+))?(?::([^:]+))?")
_BF16 = re.compile(r"[^.]+(\.bf16[^.]*\.safetensors|\.safetensors\.index\.bf16\.json)")
_PLAIN = re.compile(r"[^.]+\.safetensors(\.index\.json)?")
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})")
_LOOK = 3600.0  # seconds; nothing is done while files arrive
_CLIPS_AT_ONCE = 8  # files of a data set; those of a model are large, and come one by one
_MOST_COMPARED = 10_000  # names that may be meant by a wrong one
ChooseFiles = Callable[[Sequence[str]], list[str]]


@dataclass(frozen=True)
class HubName:
    """The name of a repository on a model hub, at a revision if one is given, or of one file in it."""

    repo: str
    revision: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> "HubName":
        """Read hf:ORG/NAME[@revision][:file].

        Raises:
            WeightsError: the text has another form, or leads out of the repository.
        """
        match = _NAME.fullmatch(text)
        try:
            if match is None or any(part is not None and path_fault(part) for part in match.groups()):
                raise hub_errors.HFValidationError
            validate_repo_id(match[1])
        except hub_errors.HFValidationError as error:
            form = f"{HUB_PREFIX}ORG/NAME[@revision][:file] without '..' or empty components"
            raise WeightsError(f"{text!r:.1000} is not a valid name on a model hub; expected {form}") from error
        return cls(*match.groups())

    def __str__(self) -> str:
        revision, file = f"@{self.revision}" if self.revision else "", f":{self.file}" if self.file else ""
        return f"{HUB_PREFIX}{self.repo}{revision}{file}"


def fetch_file(name: HubName) -> Path:
    """Return the path of the one file of `name`, after a download if the cache lacks it.

    With it comes PEFT's file of settings, if the repository has one beside it: a LoRA may need it.

    Raises:
        WeightsError: the file cannot be downloaded. The message says why, and what to do.
    """
    if (file := name.file) is None:
        raise WeightsError(f"{name} does not name a file; expected {name}:file")
    config = str(PurePosixPath(file).with_name(PEFT_CONFIG))
    return fetch(name, lambda files: [require_file(files, file), *({config} - {file}).intersection(files)]) / file


def fetch_parts(name: HubName, parts: Sequence[str], family: Family | None = None) -> Path:
    """Return the snapshot folder with `parts` (folders or single files), after a download if the cache lacks any.

    Raises:
        WeightsError: they cannot be downloaded. The message says why, and what to do.
    """
    if name.file is not None:
        raise WeightsError(f"{name} names one file; expected a whole model: {HUB_PREFIX}ORG/NAME[@revision]")
    return fetch(name, lambda files: choose_files(files, parts, family))


def fetch_config(name: HubName, part: str, family: Family) -> Path:
    """Return the folder with the config.json of a part, after a download of that file alone if the cache lacks it.

    Raises:
        WeightsError: there is none, or it cannot be downloaded.
    """
    own = f"{part}/{CONFIG}"
    originals = [str(PurePosixPath(f.name).with_name(CONFIG)) for f in family.layout.files_of(part) if f.original_class]

    def choose(files: Sequence[str]) -> list[str]:
        return [require_file(files, next((path for path in (own, *originals) if path in files), own))]

    folder = fetch(name, choose)
    return next((folder / path).parent for path in (own, *originals) if (folder / path).is_file())


def fetch_model(name: HubName) -> Path:
    """Return the snapshot folder with every part that the repository has.

    Raises:
        WeightsError: the repository has no part, or cannot be downloaded. The message says why, and what to do.
    """
    return fetch(name, lambda files: choose_files(files, _parts_in(files) or all_parts()))


def require_on_hub(name: HubName, parts: Sequence[str], family: Family | None = None) -> None:
    """Check that the hub has the named file, or `parts`. Nothing is downloaded.

    If the hub cannot be reached, the cache is checked instead.

    Raises:
        WeightsError: a file or part is missing. The message says why, and what to do.
    """
    file = name.file
    fetch(
        name, lambda files: [require_file(files, file)] if file else choose_files(files, parts, family), download=False
    )


def cached_file(name: HubName) -> Path | None:
    """Return the path of the one file of `name` in the cache, or None if it was not downloaded yet."""
    folder = Repository(name.repo).snapshot(name.revision)
    path = folder / name.file if folder is not None and name.file is not None else None
    return path if path is not None and path.is_file() else None


def choose_files(files: Sequence[str], parts: Sequence[str], family: Family | None = None) -> list[str]:
    """Return those of a repository's `files` that `parts` need: no pickles, and bf16 weights where there is a choice.

    Args:
        files: paths in the repository.
        parts: names of parts, or paths.
        family: the family that the model must be of; default: any.

    Raises:
        WeightsError: a part is missing, incomplete or a pickle, or the model is not of the family.
    """
    index = [file for file in files if file == "model_index.json"]
    chosen = [file for part in parts for file in _files_of_part(part, files, family)]
    return list(dict.fromkeys(index + chosen))


def _parts_in(files: Sequence[str]) -> list[str]:
    """Return the parts that a repository has, in any layout. A warning names those that it has only as pickles."""
    folders = {str(PurePosixPath(file).parent) for file in files}
    parts = []
    for part in all_parts():
        places = {part, *(layout.folders.get(part, part) for layout in all_layouts())}
        if places & folders or any(_published(part, files, layout) for layout in all_layouts()):
            parts.append(part)
        elif advice := next(filter(None, (layout.pickle_advice(part, files) for layout in all_layouts())), ""):
            log.warning("the %s is left out: %s", part, advice)
    return parts


def _published(part: str, files: Sequence[str], layout: Layout) -> list[str]:
    """Return the files of a part where a family's authors publish them, with their config.json if they keep one."""
    chosen: list[str] = []
    for file in layout.files_of(part):
        path = PurePosixPath(file.name)
        if file.name in files:
            own = [file.name]
        else:
            shard = re.compile(re.escape(str(path.with_suffix(""))) + r"-\d{5}-of-(\d{5})\.safetensors")
            own = [name for name in files if shard.fullmatch(name)]
            if own and (f"{file.name}{INDEX}" not in files or not _is_complete(own)):
                raise WeightsError(f"no complete set of safetensors files of {file.name!r}; found {_preview(own)}")
            own += [f"{file.name}{INDEX}"] if own else []
        if not own:
            return []
        config = str(path.with_name(CONFIG))
        chosen += own + ([config] if file.original_class and config in files else [])
    return chosen


def _files_of_part(part: str, files: Sequence[str], family: Family | None) -> list[str]:
    if part in files or PurePosixPath(part).suffix:
        return [require_file(files, part)]
    if family and (reason := misfit(family, part, [file.partition("/")[0] for file in files])):
        raise WeightsError(f"this is not a {family.name}: {reason}")
    layouts = [family.layout] if family else all_layouts()
    for place in (part, *(layout.folders[part] for layout in layouts if part in layout.folders)):
        if folder := [file for file in files if str(PurePosixPath(file).parent) == place]:
            return _files_of_folder(part, place, folder)
    for layout in layouts:
        if own := _published(part, files, layout):
            return own
    for layout in layouts:
        if advice := layout.pickle_advice(part, files):
            raise WeightsError(f"no {part!r} that can be used: {advice}")
    places = dict.fromkeys(" and ".join(layout.places_of(part)) for layout in layouts)
    forms = " or ".join(filter(None, ("a folder", *places)))
    raise WeightsError(f"no {part!r} (expected {forms}); found {_preview([f.split('/')[0] for f in files])}")


def _files_of_folder(part: str, place: str, folder: Sequence[str]) -> list[str]:
    """Return the files of a part among those of its folder in diffusers' layout."""
    texts = [file for file in folder if file.endswith((".json", ".txt", ".model")) and ".index." not in file]
    vocabularies = list(dict.fromkeys(name for family in all_families() for name in family.vocabularies))
    tokenizers = {name for family in all_families() for name in family.tokenizers}
    if part in tokenizers and not any(f"{place}/{name}" in texts for name in vocabularies):
        raise WeightsError(f"no {' or '.join(vocabularies)} in {place!r}; found {_preview(folder)}")
    weights: list[str] = []
    for form in (_BF16, _PLAIN):
        matching = [file for file in folder if form.fullmatch(PurePosixPath(file).name)]
        if not weights and any(file.endswith(".safetensors") for file in matching):
            weights = matching
    is_sharded = any(_SHARD.match(file) for file in weights)
    complete = not is_sharded or (any(".index." in file for file in weights) and _is_complete(weights))
    # Only networks have a config.json: such a folder without weights is incomplete, or has only pickles.
    if not (complete if weights else texts and f"{place}/{CONFIG}" not in folder):
        raise WeightsError(f"no complete set of safetensors files in {place!r}; found {_preview(folder)}")
    return texts + weights


def _is_complete(weights: Sequence[str]) -> bool:
    """Return whether there are as many shards as their names say."""
    shards = Counter(match.groups() for file in weights if (match := _SHARD.match(file)))
    return all(count == int(total) for (_, total), count in shards.items())


def require_file(files: Sequence[str], file: str) -> str:
    """Return `file` if it is among `files`.

    Raises:
        WeightsError: it is missing, or a pickle. The message names similar files.
    """
    if file not in files:
        near = difflib.get_close_matches(file, files[:_MOST_COMPARED], n=8)
        raise WeightsError(f"no file {file!r}; found {_preview(near or files)}")
    refuse_pickle(file)
    return file


def _preview(names: Sequence[str]) -> str:
    names = [printable(name, 200) for name in dict.fromkeys(names)]
    return ", ".join(names[:8] or ["nothing"]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def fetch(
    name: HubName, choose: ChooseFiles, kind: Literal["model", "dataset"] = "model", download: bool = True
) -> Path:
    """Return the snapshot folder with the files that `choose` takes from the repository's list of files.

    If the hub cannot be reached, the cache is used: for a model, if `choose` finds its files there; for a data set,
    whose files cannot be known, if an earlier call has finished.

    Raises:
        WeightsError: the files cannot be downloaded. The message says why, and what to do.
    """
    repository = Repository(name.repo, kind)
    try:
        try:
            listing = repository.list_files(name.revision)
        except HubUnreachable as error:
            return _cached_snapshot(name, repository, choose, error)
        files = listing.check(choose(list(listing.entries)))
        folder = repository.folder / "snapshots" / listing.commit
        if not download:
            return folder
        if missing := [file for file in files if not (folder / file.path).is_file()]:
            size = sum(file.size or 0 for file in missing)
            log.info("%s: downloading %d files, %d bytes", name, len(missing), size)
            stop = Event()
            with Progress("bytes", size) as progress:
                get = partial(repository.download, listing.commit, progress=progress, stop=stop)
                try:
                    if kind == "model":
                        for file in missing:
                            get(file)
                    else:
                        list(run_in_threads(get, missing, _CLIPS_AT_ONCE, patience=_LOOK))
                finally:
                    stop.set()
        # Without the hub, a branch leads to the commit of the last call that used its name. So record the commit only
        # now that all files are there.
        is_commit = kind == "model" and name.revision is not None and COMMIT.fullmatch(name.revision)
        if not is_commit and repository.snapshot(name.revision, finished=True) != folder:
            try:
                repository.record(name.revision, listing.commit)
            except OSError as error:  # a cache that others fill and this process only reads
                log.warning("%s: the commit cannot be recorded, so it is not found without the hub: %s", name, error)
    except WeightsError as error:
        raise WeightsError(f"{name}: {error}") from error
    return folder


def _cached_snapshot(name: HubName, repository: Repository, choose: ChooseFiles, error: HubUnreachable) -> Path:
    """Return the cache's folder for this revision if it has the files that `choose` takes."""
    folder = repository.snapshot(name.revision, finished=repository.kind == "dataset")
    try:
        if folder is None:
            raise WeightsError("no finished download")
        choose([path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()])
    except WeightsError as lack:
        raise WeightsError(f"in the cache {constants.HF_HUB_CACHE}: {lack}. Also, {error}") from error
    log.info("%s: using the cached files in %s", name, folder)
    return folder
