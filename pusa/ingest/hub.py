"""A data set of a model hub by name: its videos and captions alone, kept in the hub's own cache."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from tqdm import tqdm

from pusa.errors import ManifestError, WeightsError
from pusa.video.media import VIDEO_SUFFIXES
from pusa.weights.hub import FAILURES, PREFIX, HubName, may_pass, why

log = logging.getLogger(__name__)


class _OnTerminals(tqdm):
    """A bar on a terminal alone."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{**settings, "disable": None})


def fetch_dataset(text: str) -> Path:
    """The snapshot folder of hf:ORG/NAME[@revision], downloaded where the cache lacks it.

    Raises:
        ManifestError: that is no name, or the data set cannot be had; the message says why, and what to do.
    """
    name = _parse(text)
    try:
        info = HfApi().dataset_info(name.repo, revision=name.revision, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    except FAILURES as error:
        if may_pass(error) and (folder := _cached(name)) is not None:
            return folder
        raise _refusal(name, error) from error
    try:
        _download(name, info.sha)
        return _download(name, name.revision)  # offline, a branch is what it named last: so only now that all is there
    except FAILURES as error:
        raise _refusal(name, error) from error


def _parse(text: str) -> HubName:
    try:
        name = HubName.parse(text)
    except WeightsError as error:
        raise ManifestError(str(error)) from error
    if name.file is not None:
        raise ManifestError(f"{name} names one file; a data set is {PREFIX}ORG/NAME[@revision]")
    return name


def _download(name: HubName, revision: str | None, from_cache: bool = False) -> Path:
    patterns = ["metadata.*", *map(_any_case, (*VIDEO_SUFFIXES, ".txt"))]
    folder = snapshot_download(
        name.repo, repo_type="dataset", revision=revision, allow_patterns=patterns, local_files_only=from_cache,
        tqdm_class=_OnTerminals,
    )  # fmt: skip
    return Path(folder)


def _cached(name: HubName) -> Path | None:
    try:
        folder = _download(name, name.revision, from_cache=True)
    except LocalEntryNotFoundError:
        return None
    log.info("%s: using what is cached in %s", name, folder)
    return folder


def _refusal(name: HubName, error: Exception) -> ManifestError:
    place = replace(name, repo=f"datasets/{name.repo}")  # where a person finds it on the hub
    return ManifestError(f"{name}: {why(place, error)}")


def _any_case(suffix: str) -> str:
    return "*" + "".join(f"[{c}{c.upper()}]" if c.isalpha() else c for c in suffix)
