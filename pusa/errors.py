"""The exception tree. Every message names the value, where it came from and what is allowed.

PusaError
├── ManifestError    (ValueError)    a manifest cannot be read, or asks for what is not possible
├── ConditionError   (ValueError)    a job's sizes, positions or multipliers are out of range
├── MediaError       (ValueError)    a video, image or caption cannot be used
│   └── Rejected                     and a stage records it, with its reason
├── TableError       (ValueError)    a table is missing, incomplete, damaged or made for another model
├── WeightsError     (ValueError)    weights cannot be found or do not fit
├── TrainingError    (RuntimeError)  a fine-tune cannot go on
└── StageError       (RuntimeError)  a stage ended, and some of its work failed
"""

from collections.abc import Callable
from enum import StrEnum
from typing import Any


class PusaError(Exception):
    """Anything Pusa refuses by name."""


class ManifestError(PusaError, ValueError):
    """A manifest cannot be read, or asks for what is not possible."""


class ConditionError(PusaError, ValueError):
    """A job's sizes, positions or multipliers are out of range."""


class MediaError(PusaError, ValueError):
    """A video, image or caption cannot be used."""


class Reason(StrEnum):
    """Why a source gave no clip, or a clip no latents: a closed list."""

    EMPTY_FILE = "empty_file"  # zero bytes
    UNREADABLE = "unreadable"  # the system refuses it: gone, no permission, no regular file
    BAD_NAME = "bad_name"  # not UTF-8
    BAD_ROW = "bad_row"  # a line of a metadata file that names no video
    NOT_A_VIDEO = "not_a_video"  # nothing in it that a decoder knows, or a suffix that is no video's
    NO_VIDEO_STREAM = "no_video_stream"  # sound alone
    DAMAGED = "damaged"  # fewer frames than promised, frames that cannot be decoded, times that go back
    TOO_SHORT = "too_short"  # for one clip of any allowed shape
    TOO_LONG = "too_long"  # beyond limits.source_seconds
    TOO_LARGE = "too_large"  # beyond limits.source_pixels
    TIMEOUT = "timeout"  # the decoder was killed
    CRASHED = "crashed"  # the decoder died
    NO_CAPTION = "no_caption"
    BAD_CAPTION = "bad_caption"  # no text, not UTF-8, too long
    DUPLICATE = "duplicate"  # the same bytes as another source
    NEAR_DUPLICATE = "near_duplicate"  # looks like another source
    CHANGED = "changed"  # not the file that was ingested, or gone since
    NOT_FINITE = "not_finite"  # NaN or infinite latents
    BAD_PAIR = "bad_pair"  # of imported files: a half is missing, or not what it should be


class Rejected(MediaError):
    """A source that gives no clip, or a clip that gives no latents: the stage records it and goes on."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class TableError(PusaError, ValueError):
    """A table is missing, incomplete, damaged or made for another model."""


class WeightsError(PusaError, ValueError):
    """Weights cannot be found or do not fit."""


class TrainingError(PusaError, RuntimeError):
    """A fine-tune cannot go on."""


class StageError(PusaError, RuntimeError):
    """A stage ended, and some of its work failed; what succeeded is on disk."""


def refusal(check: Callable[[], Any], kind: type[PusaError] = PusaError) -> list[str]:
    """What a check says, of that kind."""
    try:
        check()
    except PusaError as error:
        return [str(error)] if isinstance(error, kind) else []
    return []
