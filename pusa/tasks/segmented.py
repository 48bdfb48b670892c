"""What the tasks share that make more than the network can see at once."""

from typing import TYPE_CHECKING

from pydantic import Field

from pusa.errors import ConditionError
from pusa.tasks.base import MAX_FRAMES, Job
from pusa.windows import Course, pieces, whole

if TYPE_CHECKING:
    from pusa.backbones.geometry import Geometry


class Segmented(Job):
    """A video of any length: segments that overlap in latent frames, which are carried on as they are."""

    window: int = Field(
        163,
        ge=1,
        le=MAX_FRAMES,
        description="frames that the network sees at once: 163 for Mochi, 31 for the tiny ones",
    )
    overlap: int = Field(3, ge=1, description="latent frames that each segment is given of the one before")
    stagger: int | None = Field(
        None, ge=1, description="instead of segments: each latent frame starts so many steps after the one before"
    )

    def course(self, geometry: "Geometry", backwards: bool = False) -> Course:
        """The order in which the latent frames are made.

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
                f"window {self.window} is too small for overlap {self.overlap}; it wants {least} or more"
            )
        return pieces(latent_frames, self.steps, seen, self.overlap, self.stagger, backwards)


def latent_window(window: int, geometry: "Geometry") -> int:
    """A window's latent frames.

    Raises:
        ConditionError: no clip has so many frames.
    """
    geometry.check_length("window", window)
    return geometry.latent_frames(window)
