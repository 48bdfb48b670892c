"""Define jobs whose videos may be longer than the network can see at once: they are made in segments, or staggered."""

from pydantic import Field

from pusa.backbones.family import Geometry
from pusa.diffusion.windows import Timeline, segments, whole
from pusa.errors import ConditionError
from pusa.tasks.base import FAMILY, MAX_FRAMES, Job


class Segmented(Job):
    """A video of any length, made in segments that share latent frames."""

    window: int = Field(
        FAMILY.job.num_frames,
        ge=1,
        le=MAX_FRAMES,
        description="frames that the network sees at once: the length it was trained with (31 for the tiny models)",
    )
    overlap: int = Field(
        3, ge=1, le=MAX_FRAMES, description="latent frames of the segment before that each segment is given"
    )
    stagger: int | None = Field(
        None,
        ge=1,
        le=MAX_FRAMES,
        description="instead of segments: steps between the starts of neighbouring latent frames",
    )

    def timeline(self, geometry: Geometry, backwards: bool = False) -> Timeline:
        """Return when each latent frame is denoised.

        Raises:
            ConditionError: window, overlap and stagger do not fit together.
        """
        latent_frames = geometry.latent_frames(self.num_frames)
        if self.stagger is None and self.num_frames <= self.window:
            return whole(latent_frames)
        seen = latent_window(self.window, geometry)
        if seen < self.overlap + 2:
            least = geometry.num_frames(self.overlap + 2)
            raise ConditionError(
                f"window {self.window} is too small for overlap {self.overlap}; expected {least} or more"
            )
        return segments(latent_frames, self.steps, seen, self.overlap, self.stagger, backwards)


def latent_window(window: int, geometry: Geometry) -> int:
    """Return the latent frames of a window, which is given in frames.

    Raises:
        ConditionError: no clip can have this number of frames.
    """
    geometry.check_length("window", window)
    return geometry.latent_frames(window)
