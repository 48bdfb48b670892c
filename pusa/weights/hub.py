"""Weights from a model hub by name: only the files that are wanted, kept in the hub's own cache."""

import difflib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from json import JSONDecodeError
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub import errors as hub_errors
from huggingface_hub.file_download import http_get, repo_folder_name, try_to_load_from_cache
from huggingface_hub.utils import WeakFileLock, build_hf_headers, validate_repo_id

from pusa.backbones import all_families, all_parts
from pusa.errors import WeightsError
from pusa.system.files import sha256_file

log = logging.getLogger(__name__)

_BF16 = re.compile(r"[^.]+(\.bf16[^.]*\.safetensors|\.safetensors\.index\.bf16\.json)")
_PLAIN = re.compile(r"[^.]+\.safetensors(\.index\.json)?")
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})")


def choose(files: Sequence[str], parts: Sequence[str]) -> list[str]:
    """Of a repository's `files`, those that `parts` need: never pickles, and bf16 where there is a choice.

    Raises:
        WeightsError: a part is missing or not whole.
    """
    index = [file for file in files if file == "model_index.json"]
    return list(dict.fromkeys(index + [file for part in parts for file in _files_of(part, files)]))


def parts_in(files: Sequence[str]) -> list[str]:
    """The parts that a repository has, in whatever layout."""
    folders = {file.partition("/")[0] for file in files if "/" in file}
    single = {file.part for family in all_families() for file in family.layout.files if file.name in files}
    return [part for part in all_parts() if part in folders | single]


def _files_of(part: str, files: Sequence[str]) -> list[str]:
    if part in files or PurePosixPath(part).suffix:
        return [one(files, part)]
    folder = [file for file in files if str(PurePosixPath(file).parent) == part]
    layouts = [[file.name for file in family.layout.files_of(part)] for family in all_families()]
    for single in layouts:
        if not folder and single and set(single) <= set(files):
            return single
    if not folder:
        forms = " or ".join(filter(None, ("a folder", *(" and ".join(single) for single in layouts))))
        raise WeightsError(f"there is no {part!r} ({forms}), but {_some([file.split('/')[0] for file in files])}")
    weights = _weights(folder)
    texts = [file for file in folder if file.endswith((".json", ".txt", ".model")) and ".index." not in file]
    # Networks alone call it config.json: without weights, such a folder was downloaded in part, or has but pickles.
    vocabularies = list(dict.fromkeys(name for family in all_families() for name in family.vocabularies))
    tokenizers = {name for family in all_families() for name in family.tokenizers}
    if part in tokenizers and not any(f"{part}/{name}" in texts for name in vocabularies):
        raise WeightsError(f"there is no {' or '.join(vocabularies)} in {part!r}, but {_some(folder)}")
    if not (_whole(weights) if weights else texts and f"{part}/config.json" not in folder):
        raise WeightsError(f"there are no whole safetensors in {part!r}, but {_some(folder)}")
    return texts + weights


def _weights(folder: Sequence[str]) -> list[str]:
    """The safetensors of a folder with their index: those of variant bf16, else those of no variant."""
    for form in (_BF16, _PLAIN):
        found = [file for file in folder if form.fullmatch(PurePosixPath(file).name)]
        if any(file.endswith(".safetensors") for file in found):
            return found
    return []


def _whole(weights: Sequence[str]) -> bool:
    """Whether no shard is missing, nor the index that leads to them."""
    shards = Counter(match.groups() for file in weights if (match := _SHARD.match(file)))
    indexed = not shards or any(".index." in file for file in weights)
    return indexed and all(count == int(total) for (_, total), count in shards.items())


def one(files: Sequence[str], file: str) -> str:
    """The file, if it is among `files`.

    Raises:
        WeightsError: it is not; near misses are named.
    """
    if file not in files:
        near = difflib.get_close_matches(file, files, n=8)
        raise WeightsError(f"there is no file {file!r}, but {_some(near or files)}")
    return file


def _some(names: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:8] or ["nothing"]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


PREFIX = "hf:"
_NAME = re.compile(PREFIX + r"([^/@:]+/[^/@:]+)(?:@([^@:]+))?(?::([^:]+))?")
_BUSY = {408, 429, 500, 502, 503, 504}
# HTTPError is that of whichever HTTP client the library has: it changed twice.
FAILURES = (hub_errors.HTTPError, hub_errors.OfflineModeIsEnabled, hub_errors.LocalEntryNotFoundError, JSONDecodeError)
Pick = Callable[[Sequence[str]], list[str]]


@dataclass(frozen=True)
class HubName:
    """A repository of a model hub, perhaps at a revision, perhaps one file of it."""

    repo: str
    revision: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> "HubName":
        """Read hf:ORG/NAME[@revision][:file].

        Raises:
            WeightsError: it is not of that form, or leads out of the repository.
        """
        match = _NAME.fullmatch(text)
        pieces = re.split(r"[/\\]", "/".join(filter(None, match.groups()))) if match else []
        try:
            if match is None or any(piece.strip() in ("", ".", "..") for piece in pieces):
                raise hub_errors.HFValidationError
            validate_repo_id(match[1])
        except hub_errors.HFValidationError as error:
            form = f"{PREFIX}ORG/NAME[@revision][:file], with no '..' and no empty part"
            raise WeightsError(f"{text!r} names nothing on a model hub; the form is {form}") from error
        return cls(*match.groups())

    def __str__(self) -> str:
        revision, file = f"@{self.revision}" if self.revision else "", f":{self.file}" if self.file else ""
        return f"{PREFIX}{self.repo}{revision}{file}"


def fetch_file(name: HubName) -> Path:
    """The one file that `name` names, downloaded if it is not in the cache.

    Raises:
        WeightsError: it cannot be had; the message says why, and what to do.
    """
    if (file := name.file) is None:
        raise WeightsError(f"{name} names no file; the form is {name}:file")
    return _fetch(name, lambda files: [one(files, file)]) / file


def fetch_parts(name: HubName, parts: Sequence[str]) -> Path:
    """The snapshot folder that holds `parts`, folders or single files, downloaded if they are not in the cache.

    Raises:
        WeightsError: they cannot be had; the message says why, and what to do.
    """
    if name.file is not None:
        raise WeightsError(f"{name} names one file; a whole model is {PREFIX}ORG/NAME[@revision]")
    return _fetch(name, lambda files: choose(files, parts))


def fetch_model(name: HubName) -> Path:
    """The snapshot folder with every part that the repository has.

    Raises:
        WeightsError: it has none, or it cannot be had; the message says why, and what to do.
    """
    return _fetch(name, lambda files: choose(files, parts_in(files) or all_parts()))


def cached_file(name: HubName) -> Path | None:
    """The one file that `name` names, if it was downloaded already."""
    found = try_to_load_from_cache(name.repo, name.file or "", revision=name.revision)
    return Path(found) if isinstance(found, str) else None


def look(name: HubName, parts: Sequence[str]) -> None:
    """Refuse what the hub, or where that cannot be reached the cache, does not have; nothing is downloaded.

    Raises:
        WeightsError: it is not there; the message says why, and what to do.
    """
    file = name.file
    _fetch(name, lambda files: [one(files, file)] if file else choose(files, parts), download=False)


def _fetch(name: HubName, pick: Pick, download: bool = True) -> Path:
    try:
        return _snapshot_with(name, pick, download)
    except (*FAILURES, WeightsError) as error:
        raise WeightsError(f"{name}: {why(name, error)}") from error


def _snapshot_with(name: HubName, pick: Pick, download: bool) -> Path:
    """The snapshot folder with what `pick` wants of the repository's files in it."""
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    try:
        info = HfApi().model_info(name.repo, revision=name.revision, files_metadata=True, timeout=timeout)
    except FAILURES as error:
        if not may_pass(error):
            raise
        return _cached(name, pick, error)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    files = pick(list(sizes))
    if not download:
        return Path()
    missing = [f for f in files if not isinstance(try_to_load_from_cache(name.repo, f, revision=info.sha), str)]
    if missing:
        log.info("%s: downloading %d files, %d bytes", name, len(missing), sum(sizes[file] for file in missing))
    for file in missing:
        # The library hands out pieces of this size: of a smaller file, nothing is ever kept to go on from.
        if constants.DOWNLOAD_CHUNK_SIZE < sizes[file] <= constants.MAX_HTTP_DOWNLOAD_SIZE:
            _download(name, file, hf_hub_url(name.repo, file, revision=info.sha))
        hf_hub_download(name.repo, file, revision=info.sha)
    if _snapshot(name) != (folder := _snapshot(replace(name, revision=info.sha))):
        # Offline, a branch is what the last call that named it found: so one names it only now that all is there.
        hf_hub_download(name.repo, files[0], revision=name.revision)
    assert folder is not None
    return folder


def _download(name: HubName, file: str, url: str) -> None:
    """Bring one big file among the cache's blobs, where the library finds it; a broken download goes on.

    The library's own (2.4) begins anew: each writes to a temporary file of its own, as two on a file system without
    locks would spoil a shared one. Here it is shared, and the hash that the hub names it by tells if it was spoilt.
    """
    facts = get_hf_file_metadata(url)
    if facts.etag is None or facts.size is None:
        return
    cache, repo = Path(constants.HF_HUB_CACHE), repo_folder_name(repo_id=name.repo, repo_type="model")
    blob, lock = cache / repo / "blobs" / facts.etag, cache / ".locks" / repo / f"{facts.etag}.lock"
    partial = blob.with_name(f"{facts.etag}.incomplete")
    for path in (blob, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        if partial.exists() and partial.stat().st_size > facts.size:
            partial.unlink()
        with partial.open("ab") as out:
            told: Any = {"headers": build_hf_headers(), "expected_size": facts.size, "displayed_filename": file}
            try:
                http_get(url, out, resume_size=out.tell(), **told)
            except OSError as error:
                if error.errno is not None:
                    raise
                raise WeightsError(f"{file} came incomplete; the same command goes on from where it broke") from error
            out.flush()
            os.fsync(out.fileno())
        if len(facts.etag) == 64 and sha256_file(partial) != facts.etag:
            partial.unlink()
            raise WeightsError(f"{file} came damaged and was removed; the same command downloads it anew")
        partial.replace(blob)


def _snapshot(name: HubName) -> Path | None:
    """The folder of the cache for this revision, whatever of it is there."""
    try:
        return Path(snapshot_download(name.repo, revision=name.revision, local_files_only=True, allow_patterns=[]))
    except hub_errors.LocalEntryNotFoundError:
        return None


def _cached(name: HubName, pick: Pick, error: Exception) -> Path:
    """The snapshot folder as it is in the cache, if it has what `pick` wants."""
    folder = _snapshot(name)
    try:
        if folder is None:
            raise WeightsError("there is no finished download of it")
        pick([path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()])
    except WeightsError as lack:
        raise WeightsError(f"in the cache {constants.HF_HUB_CACHE} {lack}; and {why(name, error)}") from error
    log.info("%s: using what is cached in %s", name, folder)
    return folder


def may_pass(error: BaseException) -> bool:
    """Whether it is no refusal: then what is in the cache stands in for the hub."""
    return not isinstance(error, hub_errors.HfHubHTTPError) or error.response.status_code in _BUSY


def why(name: HubName, error: BaseException) -> str:
    """What is wrong and what to do about it, in one sentence."""
    hub, repo, token = constants.ENDPOINT, name.repo, "HF_TOKEN or `hf auth login`"
    match error:
        case WeightsError():
            return str(error)
        case hub_errors.LocalEntryNotFoundError(__cause__=BaseException() as cause):
            return why(name, cause)
        case hub_errors.OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE=1 forbids to ask the hub; unset it to download"
        case hub_errors.GatedRepoError():
            return f"the repository is gated; ask for access at {hub}/{repo}, then give your token by {token}"
        case hub_errors.RevisionNotFoundError():
            return f"{hub}/{repo} has no revision {name.revision or 'main'!r}; allowed are a branch, a tag or a commit"
        case hub_errors.HfHubHTTPError() if error.response.status_code in (401, 403, 404):
            return f"{hub} has no such repository, or it is private; check the name, or give a token by {token}"
        case hub_errors.HfHubHTTPError():
            status = f"{error.response.status_code} {error.response.reason_phrase}"
            return f"the hub {hub} answered {status}; try later, the same command goes on from where it broke"
        case JSONDecodeError():
            return f"what answers at {hub} is no hub; check HF_ENDPOINT and the proxy"
    reason = str(error) or type(error).__name__
    return f"the connection to the hub {hub} broke ({reason}); the same command goes on from where it broke"
