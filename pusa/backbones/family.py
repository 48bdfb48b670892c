"""How each base model's latents lie to pixels: known without loading anything of it, or even torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from pusa.errors import ConditionError


@dataclass(frozen=True)
class Geometry:
    """How pixels become latents: compression in space and time, the transformer's patch, and latent channels."""

    spatial: int
    temporal: int
    patch: int
    channels: int

    @property
    def pixel_step(self) -> int:
        """Width and height must be multiples of this."""
        return self.spatial * self.patch

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames F of a clip of `num_frames` = temporal * (F - 1) + 1 frames."""
        return (num_frames - 1) // self.temporal + 1

    def num_frames(self, latent_frames: int) -> int:
        """Frames that `latent_frames` decode to."""
        return self.temporal * (latent_frames - 1) + 1

    def frames_of(self, latent_frame: int) -> list[int]:
        """The frames of a clip that a latent frame stands for: the first for one, each other for `temporal`."""
        end = self.num_frames(latent_frame + 1)
        return list(range(max(0, end - self.temporal), end))

    def frames_of_ring(self, latent_frame: int, latent_frames: int) -> list[int]:
        """The same in a loop of so many latent frames, which `Model.decode_ring` starts in the middle of the first."""
        first = latent_frame * self.temporal - self.temporal // 2
        return [(first + i) % (latent_frames * self.temporal) for i in range(self.temporal)]

    def latent_shape(self, width: int, height: int, num_frames: int) -> tuple[int, int, int, int]:
        """(C, F, h, w)."""
        return self.channels, self.latent_frames(num_frames), height // self.spatial, width // self.spatial

    def tokens(self, latent_shape: Sequence[int]) -> int:
        """Tokens of latents (..., F, h, w), all samples together; `latent_shape` begins with (B, C)."""
        samples, _, frames, height, width = latent_shape
        return samples * frames * (height // self.patch) * (width // self.patch)

    def check(self, width: int, height: int, num_frames: int) -> None:
        """Refuse what the model cannot take.

        Raises:
            ConditionError: all that is wrong, with the nearest legal sizes and the two nearest legal lengths.
        """
        wrong = [self._wrong_size(name, value) for name, value in (("width", width), ("height", height))]
        try:
            self.check_length("num_frames", num_frames)
        except ConditionError as error:
            wrong.append(str(error))
        if any(wrong):
            raise ConditionError("; ".join(filter(None, wrong)))

    def check_length(self, name: str, num_frames: int) -> None:
        """Refuse a number of frames that no clip has.

        Raises:
            ConditionError: the two nearest.
        """
        if num_frames < 1 or (num_frames - 1) % self.temporal:
            below = max(0, num_frames - 1) // self.temporal * self.temporal + 1
            legal = f"{self.temporal}k + 1; the nearest are {below} and {below + self.temporal}"
            raise ConditionError(f"{name} {num_frames} is not {legal}")

    def _wrong_size(self, name: str, value: int) -> str:
        if value >= self.pixel_step and value % self.pixel_step == 0:
            return ""
        nearest = max(self.pixel_step, round(value / self.pixel_step) * self.pixel_step)
        return f"{name} {value} is not a multiple of {self.pixel_step}; the nearest is {nearest}"


GEOMETRIES = {
    "mochi": Geometry(spatial=8, temporal=6, patch=2, channels=12),
}
