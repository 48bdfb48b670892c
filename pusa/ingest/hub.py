"""Download a data set of a model hub: only its videos and captions, into the hub's own cache."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pusa.errors import ManifestError, WeightsError
from pusa.video.media import VIDEO_SUFFIXES
from pusa.weights.hub import HUB_PREFIX, HubName, fetch


def fetch_dataset(text: str) -> Path:
    """Return the snapshot folder of hf:ORG/NAME[@revision]. Files that the cache lacks are downloaded.

    If the hub cannot be reached, a complete snapshot in the cache is used.

    Raises:
        ManifestError: the name is invalid or the data set cannot be downloaded. The message says why, and what to do.
    """
    try:
        name = HubName.parse(text)
        if name.file is not None:
            raise WeightsError(f"{name} names one file; expected a data set: {HUB_PREFIX}ORG/NAME[@revision]")
        return fetch(name, _choose_sources, "dataset")
    except WeightsError as error:
        raise ManifestError(str(error)) from error


def _choose_sources(files: Sequence[str]) -> list[str]:
    suffixes = {*VIDEO_SUFFIXES, ".txt"}
    return [file for file in files if file.startswith("metadata.") or PurePosixPath(file).suffix.lower() in suffixes]
