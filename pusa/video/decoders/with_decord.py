"""Decode with decord in a child process. It is fast and exact in most files; in some it hangs, crashes or errs."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pusa.errors import Reason, Rejected
from pusa.system.text import first_line
from pusa.video.child import Answer, this_threads_child
from pusa.video.conversion import Conversion
from pusa.video.ffmpeg import fd_path, open_regular_file
from pusa.video.fit import Collected, Placement

CHUNK_BYTES = 2**26  # of decoded frames in memory at a time


def read(
    path: Path,
    frames: Sequence[int],
    seconds: float,
    placement: Placement | None = None,
    start_time: float | None = None,
    conversion: Conversion | None = None,
) -> np.ndarray:
    """Return frames; see `Decoder`. `start_time` and `conversion` are not used."""
    answer = _call("decode", path, seconds, frames=list(frames), placement=placement and asdict(placement))
    assert answer.array is not None
    return answer.array


def read_thumbnails(
    path: Path, frames: Sequence[int], seconds: float, side: int
) -> tuple[tuple[int, int, int], np.ndarray]:
    """Return the video's (frames, width, height) as decord sees them, and thumbnails (T, side, side, 3) of `frames`.

    Raises:
        Rejected: UNREADABLE, DAMAGED, TIMEOUT, CRASHED.
    """
    answer = _call("decode_thumbnails", path, seconds, frames=list(frames), side=side)
    assert answer.array is not None
    return (answer.facts["num_frames"], answer.facts["width"], answer.facts["height"]), answer.array


def _call(function: str, path: Path, seconds: float, **arguments: Any) -> Answer:
    name = os.fspath(path.absolute())
    return this_threads_child().call(f"{__name__}:{function}", {"path": name, **arguments}, name, seconds)


# The functions below run in the child process.


def decode(path: str, frames: Sequence[int], placement: Mapping[str, Any] | None) -> tuple[dict[str, Any], np.ndarray]:
    """Return no facts, and the frames of `read`."""
    place = Placement(**{**placement, "box": tuple(placement["box"])}) if placement else None
    collected = Collected(Path(path), len(frames))
    for frame in _frames(path, _open_reader(path), frames):
        collected.add(frame if place is None else place.apply(frame))
    return {}, collected.frames


def decode_thumbnails(path: str, frames: Sequence[int], side: int) -> tuple[dict[str, Any], np.ndarray]:
    """Return num_frames, width and height, and the thumbnails of `read_thumbnails`."""
    reader = _open_reader(path)
    height, width, _ = _batch(path, reader, [0])[0].shape
    small = [
        np.asarray(Image.fromarray(frame).resize((side, side), Image.Resampling.BOX))
        for frame in _frames(path, reader, frames)
    ]
    facts = {"num_frames": len(reader), "width": width, "height": height}
    return facts, np.array(small, np.uint8).reshape(-1, side, side, 3)


def _open_reader(path: str) -> Any:  # decord has no type hints
    from decord import DECORDError, VideoReader, cpu

    with open_regular_file(Path(path)) as handle:
        try:
            reader = VideoReader(fd_path(handle), ctx=cpu(0), num_threads=1)
        except (DECORDError, RuntimeError) as error:
            raise Rejected(Reason.DAMAGED, f"{path} cannot be opened as a video: {first_line(error)}") from error
    if len(reader) == 0:
        raise Rejected(Reason.DAMAGED, f"{path} holds no frames")
    return reader


def _frames(path: str, reader: Any, frames: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield frames (H, W, 3), decoded in batches of about `CHUNK_BYTES`."""
    size = max(1, CHUNK_BYTES // _batch(path, reader, [0]).nbytes)
    for start in range(0, len(frames), size):
        yield from _batch(path, reader, frames[start : start + size])


def _batch(path: str, reader: Any, frames: Sequence[int]) -> np.ndarray:
    from decord import DECORDError

    try:
        batch: np.ndarray = reader.get_batch(list(frames)).asnumpy()
    except (DECORDError, IndexError) as error:
        detail = f"frames {frames[0]}..{frames[-1]} cannot be decoded: {first_line(error)}"
        raise Rejected(Reason.DAMAGED, f"{path}: {detail}") from error
    return batch
