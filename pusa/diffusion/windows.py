"""Choose when each latent frame is denoised, and which frames the network sees together: all, segments, or a ring.

Plain numbers, no torch: tasks choose here, `pusa.diffusion.sampler` samples. A step leads from one row of the level
matrix to the next.
"""

from collections.abc import Callable
from dataclasses import dataclass

from pusa.errors import ConditionError

# Latent frames that the network sees as one clip. To the VAE the first latent frame of a clip is of another kind: it is
# one picture, and each other is several frames. So a window from the middle of a clip must not begin with a frame of
# its own: None stands in that place for an unknown frame, pure noise.
Window = tuple[int | None, ...]

GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Timeline:
    """The step at which each latent frame starts, and the windows that the network sees at each step.

    `windows` is a value and not a closure, so that equal timelines compare equal.
    """

    starts: tuple[int, ...]
    windows: Callable[[int], list[Window]]

    @property
    def delay(self) -> int:
        """Return the steps added to a run in which all frames start at once."""
        return max(self.starts)


def whole(frames: int) -> Timeline:
    """Denoise all frames at once, all of them seen together."""
    return Timeline((0,) * frames, _Whole(frames))


@dataclass(frozen=True)
class _Whole:
    """All frames at each step."""

    frames: int

    def __call__(self, step: int) -> list[Window]:
        return [tuple(range(self.frames))]


def segments(
    frames: int, steps: int, window: int, overlap: int, stagger: int | None = None, backwards: bool = False
) -> Timeline:
    """Denoise a long clip, of which the network sees `window` latent frames at a time.

    Args:
        frames: latent frames of the whole clip.
        steps: denoising steps of each frame.
        window: latent frames seen at once.
        overlap: finished latent frames, at least, from which each new segment continues.
        stagger: instead of segments, start each frame this number of steps after the one before. The levels then form
            a staircase (SkyReels-V2's asynchronous schedule, arXiv:2504.13074).
        backwards: make the end first.

    Raises:
        ConditionError: the window is too small for the overlap, or for all frames that are denoised at the same time.
    """
    if frames <= window and stagger is None:
        return whole(frames)
    new = window - 1 - overlap
    if new < 1:
        raise ConditionError(
            f"a window of {window} latent frames with an overlap of {overlap} leaves no frame to make; "
            f"expected a window of {overlap + 2} or more"
        )
    if stagger is None:
        first = window - backwards  # going backwards, the first segment is from the middle of the clip
        order = [0 if i < first else (1 + (i - first) // new) * steps for i in range(frames)]
    else:
        stagger = min(stagger, steps)
        busy = -(-steps // stagger)
        if busy > new:
            raise ConditionError(
                f"stagger {stagger} would denoise {busy} latent frames at the same time, but window and overlap leave "
                f"room for {new}; expected stagger {-(-steps // new)} or more"
            )
        order = [i * stagger for i in range(frames)]
    starts = tuple(order[::-1] if backwards else order)
    return Timeline(starts, _Segments(starts, steps, min(window, frames), backwards))


@dataclass(frozen=True)
class _Segments:
    """At each step the frames that are denoised, and as many finished ones beside them as `size` allows."""

    starts: tuple[int, ...]
    steps: int
    size: int
    backwards: bool

    def __call__(self, step: int) -> list[Window]:
        active = [frame for frame, start in enumerate(self.starts) if start <= step < start + self.steps]
        low = active[0] if self.backwards else active[-1] + 1 - (self.size - 1)
        low = min(low, len(self.starts) - (self.size - 1))
        if low <= 1 and (not self.backwards or active[0] == 0):
            return [tuple(range(self.size))]
        return [(None, *range(low, low + self.size - 1))]


def ring(frames: int, window: int) -> Timeline:
    """Denoise a cycle: the last frame is followed by the first, and at each step the network sees it cut elsewhere.

    The cuts move by the golden ratio, so that no place of the ring stays near a cut. Where the window is smaller than
    the ring, several windows cover it.
    """
    return Timeline((0,) * frames, _Ring(frames, min(frames, window - 1)))


@dataclass(frozen=True)
class _Ring:
    """At each step windows of `size` frames that cover the ring, from another cut on."""

    frames: int
    size: int

    def __call__(self, step: int) -> list[Window]:
        cut, count = int(step * self.frames * GOLDEN), -(-self.frames // self.size)
        begins = [cut + i * self.frames // count for i in range(count)]
        return [(None, *((begin + i) % self.frames for i in range(self.size))) for begin in begins]
