"""Which latent frames are denoised when, and which of them the network sees together: all, pieces, or a ring.

Plain numbers, no torch: tasks choose here, `pusa.diffusion.sampler` does it.
A step is one row of the level matrix to the next.
"""

from collections.abc import Callable
from dataclasses import dataclass

from pusa.errors import ConditionError

# Latent frames that the network sees as one clip. None stands where a clip's first latent frame would and is unknown:
# pure noise. In the VAE's eyes the first is another kind, one picture where each other is several, so that a stretch
# from the middle of a clip must not begin with one of its own.
Window = tuple[int | None, ...]

GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Course:
    """When each latent frame starts (a step), and what is seen at each step."""

    starts: tuple[int, ...]
    windows: Callable[[int], list[Window]]

    @property
    def delay(self) -> int:
        """The steps that are added to a run in which all frames start at once."""
        return max(self.starts)


def whole(frames: int) -> Course:
    """All at once, all seen."""
    return Course((0,) * frames, lambda step: [tuple(range(frames))])


def pieces(
    frames: int, steps: int, window: int, overlap: int, stagger: int | None = None, backwards: bool = False
) -> Course:
    """A long clip, of which the network sees `window` latent frames at a time.

    Args:
        frames: latent frames of the whole.
        steps: denoising steps of each frame.
        window: latent frames seen at once.
        overlap: how many finished ones, at least, each new piece goes on from.
        stagger: start each frame so many steps after the one before it, instead of piece by piece. The result is a
            staircase of levels (SkyReels-V2's asynchronous schedule, arXiv:2504.13074).
        backwards: make the end first.

    Raises:
        ConditionError: the window is too small for the overlap, or for all frames that are in the making at once.
    """
    if frames <= window and stagger is None:
        return whole(frames)
    new = window - 1 - overlap
    if new < 1:
        raise ConditionError(
            f"a window of {window} latent frames and an overlap of {overlap} leave nothing to make; such an overlap "
            f"wants {overlap + 2} or more"
        )
    if stagger is None:
        first = window - backwards  # going backwards, the first piece is from the middle of the clip
        order = [0 if i < first else (1 + (i - first) // new) * steps for i in range(frames)]
    else:
        stagger = min(stagger, steps)
        busy = -(-steps // stagger)
        if busy > new:
            least = -(-steps // new)
            raise ConditionError(
                f"stagger {stagger} would have {busy} latent frames in the making at once; window and overlap leave "
                f"room for {new}: {least} or more"
            )
        order = [i * stagger for i in range(frames)]
    starts = tuple(order[::-1] if backwards else order)
    return Course(starts, lambda step: [_stretch(starts, step, steps, window, backwards)])


def _stretch(starts: tuple[int, ...], step: int, steps: int, window: int, backwards: bool) -> Window:
    """The frames in the making, and as many finished ones beside them as the window takes."""
    making = [f for f, start in enumerate(starts) if start <= step < start + steps]
    size = min(window, len(starts))
    low = making[0] if backwards else making[-1] + 1 - (size - 1)
    low = min(low, len(starts) - (size - 1))
    if low <= 1 and (not backwards or making[0] == 0):
        return tuple(range(size))
    return (None, *range(low, low + size - 1))


def ring(frames: int, window: int) -> Course:
    """A cycle: the last frame is followed by the first, and at each step the network sees it cut elsewhere.

    The cuts move by the golden ratio, so that no place of the ring is near one for long. Where the window is smaller
    than the ring, several windows go round it.
    """
    size = min(frames, window - 1)
    count = -(-frames // size)

    def windows(step: int) -> list[Window]:
        cut = int(step * frames * GOLDEN)
        begins = [cut + i * frames // count for i in range(count)]
        return [(None, *((begin + i) % frames for i in range(size))) for begin in begins]

    return Course((0,) * frames, windows)
