"""A file opened under a name that means nothing to a decoder."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pusa.data.schema import Reason
from pusa.errors import Rejected


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A handle of a regular file; `name_of` makes it a name.

    Raises:
        Rejected: it is missing, something else, or its name is impossible.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # to open a pipe would be to wait
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Rejected(Reason.UNREADABLE, f"{path} cannot be read: {reason}") from error
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise Rejected(Reason.UNREADABLE, f"{path} is no file")
        yield handle
    finally:
        os.close(handle)


def name_of(handle: int) -> str:
    """What a decoder is given instead of the path, in which it might see a protocol, a pattern or an option."""
    return f"/dev/fd/{handle}"
