"""Text to video: no latent frame is given."""

from typing import Literal

from pusa.tasks.base import Job


class TextToVideo(Job):
    """A video from a prompt alone."""

    task: Literal["text_to_video"] = "text_to_video"
