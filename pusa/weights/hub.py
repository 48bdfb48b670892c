"""Download weights from a model hub by name: only the files that are needed, kept in the hub's own cache.

huggingface_hub downloads, over Xet where the repository offers it. Each download writes to a temporary file of its own,
which replaces nothing until it is complete, under a lock. So processes that share a cache do not spoil each other's
files, and a file that is half there is never used. Within a call a broken connection is resumed. After the call has
failed or was killed, finished files are kept, and the broken one is downloaded again from its beginning. A kill leaves
its temporary file in the cache; `hf cache prune` removes it.
"""

import difflib
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from json import JSONDecodeError
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub import errors as hub_errors
from huggingface_hub.file_download import repo_folder_name, try_to_load_from_cache
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import validate_repo_id

from pusa.backbones import all_families, all_parts
from pusa.errors import WeightsError
from pusa.system.files import sha256_file
from pusa.system.text import first_line
from pusa.weights.adapters import PEFT_CONFIG
from pusa.weights.tensors import refuse_pickle

log = logging.getLogger(__name__)

HUB_PREFIX = "hf:"
_NAME = re.compile(HUB_PREFIX + r"([^/@:]+/[^/@:]+)(?:@([^@:]+))?(?::([^:]+))?")
_BF16 = re.compile(r"[^.]+(\.bf16[^.]*\.safetensors|\.safetensors\.index\.bf16\.json)")
_PLAIN = re.compile(r"[^.]+\.safetensors(\.index\.json)?")
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})")
_TEMPORARY_STATUS = {408, 429, 500, 502, 503, 504}
# huggingface_hub's HTTPError is that of its HTTP client, which has changed twice.
HUB_ERRORS = (
    hub_errors.HTTPError, hub_errors.OfflineModeIsEnabled, hub_errors.LocalEntryNotFoundError, JSONDecodeError,
)  # fmt: skip
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
        components = re.split(r"[/\\]", "/".join(filter(None, match.groups()))) if match else []
        try:
            if match is None or any(component.strip() in ("", ".", "..") for component in components):
                raise hub_errors.HFValidationError
            validate_repo_id(match[1])
        except hub_errors.HFValidationError as error:
            form = f"{HUB_PREFIX}ORG/NAME[@revision][:file] without '..' or empty components"
            raise WeightsError(f"{text!r} is not a valid name on a model hub; expected {form}") from error
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
    return _fetch(name, lambda files: [require_file(files, file), *({config} - {file}).intersection(files)]) / file


def fetch_parts(name: HubName, parts: Sequence[str]) -> Path:
    """Return the snapshot folder with `parts` (folders or single files), after a download if the cache lacks any.

    Raises:
        WeightsError: they cannot be downloaded. The message says why, and what to do.
    """
    if name.file is not None:
        raise WeightsError(f"{name} names one file; expected a whole model: {HUB_PREFIX}ORG/NAME[@revision]")
    return _fetch(name, lambda files: choose_files(files, parts))


def fetch_model(name: HubName) -> Path:
    """Return the snapshot folder with every part that the repository has.

    Raises:
        WeightsError: the repository has no part, or cannot be downloaded. The message says why, and what to do.
    """
    return _fetch(name, lambda files: choose_files(files, _parts_in(files) or all_parts()))


def require_on_hub(name: HubName, parts: Sequence[str]) -> None:
    """Check that the hub has the named file, or `parts`. Nothing is downloaded.

    If the hub cannot be reached, the cache is checked instead.

    Raises:
        WeightsError: a file or part is missing. The message says why, and what to do.
    """
    file = name.file
    _fetch(name, lambda files: [require_file(files, file)] if file else choose_files(files, parts), download=False)


def cached_file(name: HubName) -> Path | None:
    """Return the path of the one file of `name` in the cache, or None if it was not downloaded yet."""
    path = try_to_load_from_cache(name.repo, name.file or "", revision=name.revision)
    if not isinstance(path, str):
        return None
    snapshots = _cache_folder(name) / "snapshots"
    commit, _, file = Path(path).relative_to(snapshots).as_posix().partition("/")
    return None if _unchecked_mark(snapshots / commit, file).exists() else Path(path)


def choose_files(files: Sequence[str], parts: Sequence[str]) -> list[str]:
    """Return those of a repository's `files` that `parts` need: no pickles, and bf16 weights where there is a choice.

    Raises:
        WeightsError: a part is missing or incomplete.
    """
    index = [file for file in files if file == "model_index.json"]
    return list(dict.fromkeys(index + [file for part in parts for file in _files_of_part(part, files)]))


def _parts_in(files: Sequence[str]) -> list[str]:
    """Return the parts that a repository has, in any layout."""
    folders = {file.partition("/")[0] for file in files if "/" in file}
    single = {file.part for family in all_families() for file in family.layout.files if file.name in files}
    return [part for part in all_parts() if part in folders | single]


def _files_of_part(part: str, files: Sequence[str]) -> list[str]:
    if part in files or PurePosixPath(part).suffix:
        return [require_file(files, part)]
    folder = [file for file in files if str(PurePosixPath(file).parent) == part]
    layouts = [[file.name for file in family.layout.files_of(part)] for family in all_families()]
    for single in layouts:
        if not folder and single and set(single) <= set(files):
            return single
    if not folder:
        forms = " or ".join(filter(None, ("a folder", *(" and ".join(single) for single in layouts))))
        raise WeightsError(f"no {part!r} (expected {forms}); found {_preview([f.split('/')[0] for f in files])}")
    texts = [file for file in folder if file.endswith((".json", ".txt", ".model")) and ".index." not in file]
    vocabularies = list(dict.fromkeys(name for family in all_families() for name in family.vocabularies))
    tokenizers = {name for family in all_families() for name in family.tokenizers}
    if part in tokenizers and not any(f"{part}/{name}" in texts for name in vocabularies):
        raise WeightsError(f"no {' or '.join(vocabularies)} in {part!r}; found {_preview(folder)}")
    weights: list[str] = []
    for form in (_BF16, _PLAIN):
        matching = [file for file in folder if form.fullmatch(PurePosixPath(file).name)]
        if not weights and any(file.endswith(".safetensors") for file in matching):
            weights = matching
    shards = Counter(match.groups() for file in weights if (match := _SHARD.match(file)))
    indexed = not shards or any(".index." in file for file in weights)
    complete = indexed and all(count == int(total) for (_, total), count in shards.items())
    # Only networks have a config.json: such a folder without weights is incomplete, or has only pickles.
    if not (complete if weights else texts and f"{part}/config.json" not in folder):
        raise WeightsError(f"no complete set of safetensors files in {part!r}; found {_preview(folder)}")
    return texts + weights


def require_file(files: Sequence[str], file: str) -> str:
    """Return `file` if it is among `files`.

    Raises:
        WeightsError: it is missing, or a pickle. The message names similar files.
    """
    if file not in files:
        near = difflib.get_close_matches(file, files, n=8)
        raise WeightsError(f"no file {file!r}; found {_preview(near or files)}")
    refuse_pickle(file)
    return file


def _preview(names: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:8] or ["nothing"]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _fetch(name: HubName, choose: ChooseFiles, download: bool = True) -> Path:
    """Return the snapshot folder with the files that `choose` takes from the repository's list of files."""
    try:
        try:
            info = HfApi().model_info(
                name.repo, revision=name.revision, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            )
        except HUB_ERRORS as error:
            if not is_temporary(error):
                raise
            return _cached_snapshot(name, choose, error)
        listed = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        files = choose(list(listed))
        pinned = replace(name, revision=info.sha)
        folder = _cache_folder(name) / "snapshots" / str(info.sha)
        if not download:
            return folder
        missing = [file for file in files if cached_file(replace(pinned, file=file)) is None]
        if missing:
            size = sum(listed[file].size or 0 for file in missing)
            log.info("%s: downloading %d files, %d bytes", name, len(missing), size)
        for file in missing:
            _download(pinned, listed[file], _unchecked_mark(folder, file))
        if _snapshot(name) != folder:
            # Offline, a branch resolves to the commit recorded by the last call that used its name. So record the
            # commit only now that all files are there.
            hf_hub_download(name.repo, files[0], revision=name.revision)
    except (*HUB_ERRORS, WeightsError) as error:
        raise WeightsError(f"{name}: {explain(name, error)}") from error
    return folder


def _download(name: HubName, listed: RepoSibling, mark: Path) -> None:
    """Download one file into the cache and compare it with the hub's listing: its SHA-256 if there is one, its size.

    The library compares the size only. `mark` exists until the file is checked, so that a kill before that leaves no
    file that would be used unchecked.

    Raises:
        WeightsError: the file arrived incomplete or damaged; it is not in the cache.
    """
    file = listed.rfilename
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    try:
        path = Path(hf_hub_download(name.repo, file, revision=name.revision))
    except HUB_ERRORS:
        raise
    except (OSError, RuntimeError) as error:  # the library's size check; errors of Xet
        if isinstance(error, OSError) and error.errno is not None:
            if error.filename is not None or isinstance(error, ConnectionError | TimeoutError):
                raise
            # Such as a file system that cannot lock; HF_HUB_CACHE names another folder.
            raise OSError(error.errno, str(error.strerror), f"{constants.HF_HUB_CACHE} (HF_HUB_CACHE)") from error
        raise WeightsError(
            f"{file} could not be downloaded whole ({first_line(error)}); run the same command again"
        ) from error
    try:
        same_size = listed.size is None or path.stat().st_size == listed.size
        intact = same_size and (listed.lfs is None or sha256_file(path) == listed.lfs.sha256)
    except FileNotFoundError:  # another process found it damaged and has removed it
        intact = False
    if not intact:
        while path.is_symlink():  # the snapshot's link to the blob; a shared blob is itself a link
            link, path = path, path.parent / path.readlink()
            link.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    mark.unlink(missing_ok=True)
    if not intact:
        raise WeightsError(f"{file} arrived damaged and was removed; run the same command again to download it")


def _cache_folder(name: HubName) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name.repo, repo_type="model")


def _unchecked_mark(snapshot: Path, file: str) -> Path:
    """Return the path of the mark, beside the library's own folders, that a file of a snapshot is not checked yet."""
    return snapshot.parents[1] / "unchecked" / f"{snapshot.name}-{file.replace('/', '--')}"


def _snapshot(name: HubName) -> Path | None:
    """Return the cache's folder for this revision, complete or not."""
    try:
        return Path(snapshot_download(name.repo, revision=name.revision, local_files_only=True, allow_patterns=[]))
    except hub_errors.LocalEntryNotFoundError:
        return None


def _cached_snapshot(name: HubName, choose: ChooseFiles, error: Exception) -> Path:
    """Return the cache's folder for this revision if it has the files that `choose` takes."""
    folder = _snapshot(name)
    try:
        if folder is None:
            raise WeightsError("no finished download")
        files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        choose([file for file in files if not _unchecked_mark(folder, file).exists()])
    except WeightsError as lack:
        raise WeightsError(f"in the cache {constants.HF_HUB_CACHE}: {lack}. Also, {explain(name, error)}") from error
    log.info("%s: using the cached files in %s", name, folder)
    return folder


def is_temporary(error: BaseException) -> bool:
    """Return whether a later request may succeed. Then the cache is used in place of the hub."""
    return not isinstance(error, hub_errors.HfHubHTTPError) or error.response.status_code in _TEMPORARY_STATUS


def explain(name: HubName, error: BaseException) -> str:
    """Return one sentence that says what is wrong and what to do."""
    hub, repo, token = constants.ENDPOINT, name.repo, "HF_TOKEN or `hf auth login`"
    match error:
        case WeightsError():
            return str(error)
        case hub_errors.LocalEntryNotFoundError(__cause__=BaseException() as cause):
            return explain(name, cause)
        case hub_errors.OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE=1 forbids requests to the hub; unset it to download"
        case hub_errors.GatedRepoError():
            return f"the repository is gated; ask for access at {hub}/{repo}, then give your token by {token}"
        case hub_errors.RevisionNotFoundError():
            revision = name.revision or "main"
            return f"{hub}/{repo} has no revision {revision!r}; expected a branch, a tag or a commit"
        case hub_errors.HfHubHTTPError() if error.response.status_code in (401, 403, 404):
            return f"{hub} has no such repository, or it is private; check the name, or give a token by {token}"
        case hub_errors.HfHubHTTPError():
            status = f"{error.response.status_code} {error.response.reason_phrase}"
            return f"the hub {hub} answered {status}; run the same command again later"
        case JSONDecodeError():
            return f"the server at {hub} does not answer as a model hub; check HF_ENDPOINT and the proxy"
    reason = str(error) or type(error).__name__
    return f"the connection to the hub {hub} broke ({reason}); run the same command again"
