"""The files of a folder and of all folders in it, whatever they link to."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from pusa.words import plain

log = logging.getLogger(__name__)


def walk(folder: Path) -> Iterator[tuple[Path, list[str] | OSError]]:
    """Every folder with its files' names in order, hidden ones left out; for what cannot be read, the error.

    Links are followed, and a folder that was listed already is not listed again.
    """
    seen: set[tuple[int, int]] = set()
    refused: list[OSError] = []
    for inner, folders, names in os.walk(folder, followlinks=True, onerror=refused.append):
        yield from _told(refused)
        try:
            stat = os.stat(inner)
        except OSError as error:  # it vanished just now
            folders.clear()
            yield Path(inner), error
            continue
        if (stat.st_dev, stat.st_ino) in seen:
            log.warning("%s is a link to a folder that was listed already", plain(inner))
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(inner), sorted(name for name in names if not name.startswith("."))
    yield from _told(refused)


def _told(refused: list[OSError]) -> Iterator[tuple[Path, OSError]]:
    yield from ((Path(error.filename), error) for error in refused)
    refused.clear()
