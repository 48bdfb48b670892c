"""Download a data set of a model hub: only its videos and captions, into the hub's own cache."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from tqdm import tqdm

from pusa.errors import ManifestError, WeightsError
from pusa.video.media import VIDEO_SUFFIXES
from pusa.weights.hub import HUB_ERRORS, HUB_PREFIX, HubName, explain, is_temporary

log = logging.getLogger(__name__)


class _TerminalBar(tqdm):
    """A progress bar that is drawn only on a terminal."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{**settings, "disable": None})


def fetch_dataset(text: str) -> Path:
    """Return the snapshot folder of hf:ORG/NAME[@revision]. Files that the cache lacks are downloaded.

    If the hub cannot be reached, a complete snapshot in the cache is used.

    Raises:
        ManifestError: the name is invalid or the data set cannot be downloaded. The message says why, and what to do.
    """
    try:
        name = HubName.parse(text)
    except WeightsError as error:
        raise ManifestError(str(error)) from error
    if name.file is not None:
        raise ManifestError(f"{name} names one file; expected a data set: {HUB_PREFIX}ORG/NAME[@revision]")
    try:
        info = HfApi().dataset_info(name.repo, revision=name.revision, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    except HUB_ERRORS as error:
        folder = _cached_snapshot(name) if is_temporary(error) else None
        if folder is None:
            raise _hub_error(name, error) from error
        return folder
    try:
        _download(name, info.sha)
        # Offline, a branch resolves to the commit that this call records. So make it only when all files are there.
        return _download(name, name.revision)
    except HUB_ERRORS as error:
        raise _hub_error(name, error) from error


def _download(name: HubName, revision: str | None, from_cache: bool = False) -> Path:
    patterns = ["metadata.*"]
    for suffix in (*VIDEO_SUFFIXES, ".txt"):
        any_case = "".join(f"[{c}{c.upper()}]" if c.isalpha() else c for c in suffix)
        patterns.append(f"*{any_case}")
    folder = snapshot_download(
        name.repo, repo_type="dataset", revision=revision, allow_patterns=patterns, local_files_only=from_cache,
        tqdm_class=_TerminalBar,
    )  # fmt: skip
    return Path(folder)


def _cached_snapshot(name: HubName) -> Path | None:
    try:
        folder = _download(name, name.revision, from_cache=True)
    except LocalEntryNotFoundError:
        return None
    log.info("%s: using the cached files in %s", name, folder)
    return folder


def _hub_error(name: HubName, error: Exception) -> ManifestError:
    page = replace(name, repo=f"datasets/{name.repo}")  # the address of a data set's page on the hub
    return ManifestError(f"{name}: {explain(page, error)}")
