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


class PusaError(Exception):
    """Anything Pusa refuses by name."""


class ManifestError(PusaError, ValueError):
    """A manifest cannot be read, or asks for what is not possible."""


class ConditionError(PusaError, ValueError):
    """A job's sizes, positions or multipliers are out of range."""


class MediaError(PusaError, ValueError):
    """A video, image or caption cannot be used."""


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
