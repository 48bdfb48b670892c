"""Define the exceptions that Pusa raises on purpose. Messages name the value, where it came from, and what is allowed.

PusaError
├── ManifestError    (ValueError)    a manifest cannot be read, or asks for something impossible
├── ConditionError   (ValueError)    a job's sizes, positions or multipliers are out of range
├── MediaError       (ValueError)    a video, image or caption cannot be used
│   └── Rejected                     the same, with a reason: the stage records it and continues
├── TableError       (ValueError)    a table is missing, incomplete, damaged or made for another model
├── WeightsError     (ValueError)    weights cannot be found or do not fit
├── NotFiniteError   (ValueError)    a model computed values that are NaN or infinite
├── NoMemoryError    (MemoryError)   one item does not fit in memory, in however small parts
├── TrainingError    (RuntimeError)  a fine-tune cannot continue
└── StageError       (RuntimeError)  a stage cannot work
    └── PartlyFailed                 a stage ended, and a part of its work failed: all else is made
"""

from collections.abc import Callable
from enum import StrEnum
from typing import Any


class PusaError(Exception):
    """The base class of every error that Pusa raises on purpose. Its message is written for the user."""

    def __str__(self) -> str:
        """Return the message, with file names that are not UTF-8 escaped: no server and no table takes them."""
        return super().__str__().encode("utf-8", "backslashreplace").decode()


class ManifestError(PusaError, ValueError):
    """A manifest cannot be read, or asks for something impossible."""


class ConditionError(PusaError, ValueError):
    """A job's sizes, positions or multipliers are out of range."""


class MediaError(PusaError, ValueError):
    """A video, image or caption cannot be used."""


class Reason(StrEnum):
    """Why a source gave no clip, or a clip no latents. Tables store these values, so they never change."""

    EMPTY_FILE = "empty_file"  # zero bytes
    UNREADABLE = "unreadable"  # the operating system refuses: missing, no permission, not a regular file
    BAD_NAME = "bad_name"  # the file name is not UTF-8
    BAD_ROW = "bad_row"  # a line of a metadata file that names no video
    NOT_A_VIDEO = "not_a_video"  # no decoder knows its content, or its suffix is not one of a video
    NO_VIDEO_STREAM = "no_video_stream"  # only audio
    HDR = "hdr"  # and the clip settings reject HDR
    INTERLACED = "interlaced"  # and the clip settings reject fields
    UNKNOWN_COLOURS = "unknown_colours"  # that no filter converts to sRGB
    DAMAGED = "damaged"  # no part that can be decoded gives a clip, or the clip settings reject damage
    TOO_SHORT = "too_short"  # for one clip of any allowed shape
    TOO_LONG = "too_long"  # beyond limits.source_seconds
    TOO_LARGE = "too_large"  # beyond limits.source_pixels
    TIMEOUT = "timeout"  # the decoder exceeded its time limit and was killed
    CRASHED = "crashed"  # the decoder died
    NO_CAPTION = "no_caption"
    BAD_CAPTION = "bad_caption"  # not text, not UTF-8, or too long
    DUPLICATE = "duplicate"  # the same bytes as another source
    NEAR_DUPLICATE = "near_duplicate"  # looks like another source
    CHANGED = "changed"  # the file was changed or deleted since it was ingested
    NOT_FINITE = "not_finite"  # NaN or infinite latents or text features
    BAD_PAIR = "bad_pair"  # of imported files: one half is missing or invalid
    FAILED = "failed"  # an unexpected error, of Pusa or a library; the next run tries again


class Rejected(MediaError):
    """A source that gives no clip, or a clip that gives no latents. The stage records it and continues."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, str(self)  # as UTF-8 text, which tables need

    def __reduce__(self) -> tuple[type["Rejected"], tuple[str, str]]:
        """Return how to make an equal one in another process."""
        return type(self), (self.reason, self.detail)


class TableError(PusaError, ValueError):
    """A table is missing, incomplete, damaged or made for another model."""


class WeightsError(PusaError, ValueError):
    """Weights cannot be found or do not fit."""


class NotFiniteError(PusaError, ValueError):
    """A model computed values that are NaN or infinite."""


class NoMemoryError(PusaError, MemoryError):
    """One item does not fit in memory, although less of it at a time was tried."""


class TrainingError(PusaError, RuntimeError):
    """A fine-tune cannot continue."""


class StageError(PusaError, RuntimeError):
    """A stage cannot work: its folder is taken, cannot be locked, or is not Pusa's."""


class PartlyFailed(StageError):
    """A stage ended, and a part of its work failed. Each failure is recorded; everything that succeeded is on disk.

    Attributes:
        result: what `pusa.run` would have returned: what is made, and what failed. None where a command raises it.
    """

    result: Any = None


def error_messages(check: Callable[[], Any], kind: type[PusaError] = PusaError) -> list[str]:
    """Call `check`, and return the message of the error that it raises: a list of one or none.

    A `PusaError` of another kind is ignored, because another check reports it. All other exceptions are raised.
    """
    try:
        check()
    except PusaError as error:
        return [str(error)] if isinstance(error, kind) else []
    return []
