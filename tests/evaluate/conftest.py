"""A small video, for runs that nobody made."""

import numpy as np
import pytest

from pusa.video.media import write_video


@pytest.fixture(scope="session")
def small_video(tmp_path_factory):
    """A video of 9 frames: a bright square on grey that moves by 4 pixels from frame to frame, of 48x32."""
    frames = np.full((9, 32, 48, 3), 100, np.uint8)
    for number, frame in enumerate(frames):
        frame[8:24, 4 * number : 4 * number + 12] = 230
    path = tmp_path_factory.mktemp("small") / "small.mp4"
    write_video(path, frames, 12)
    return path
