"""decord: fast, exact in most files, and in some it hangs, crashes or errs; so it runs in a child process."""

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
from pusa.video.ffmpeg import name_of, opened
from pusa.video.fit import Placement

CHUNK_BYTES = 2**26  # of decoded frames, at once in memory
Arrays = tuple[dict[str, Any], np.ndarray | None]


def read(
    path: Path,
    frames: Sequence[int],
    seconds: float,
    placement: Placement | None = None,
    start_time: float | None = None,
) -> np.ndarray:
    """Some frames, each as `placement` says.

    Args:
        path: the file.
        frames: indices in the order of time, each once.
        seconds: time it may take.
        placement: None leaves them as they are decoded.
        start_time: nothing that matters here.

    Returns:
        (T, H, W, 3) uint8.

    Raises:
        Rejected: UNREADABLE, DAMAGED, TIMEOUT, CRASHED.
    """
    found = _call("decode", path, seconds, frames=list(frames), placement=placement and asdict(placement)).array
    assert found is not None
    return found


def glance(path: Path, frames: Sequence[int], seconds: float, side: int) -> tuple[dict[str, Any], np.ndarray]:
    """What decord takes the file for: num_frames, fps, width, height; and thumbnails (T, side, side, 3) of `frames`.

    Raises:
        Rejected: as `read`.
    """
    answer = _call("summarize", path, seconds, frames=list(frames), side=side)
    assert answer.array is not None
    return answer.facts, answer.array


def decode(path: str, frames: Sequence[int], placement: Mapping[str, Any] | None) -> Arrays:
    """`read`, in the child."""
    place = Placement(**{**placement, "box": tuple(placement["box"])}) if placement else None
    decoded = _frames(path, _open(path), frames)
    return {}, np.stack([frame if place is None else place.apply(frame) for frame in decoded])


def summarize(path: str, frames: Sequence[int], side: int) -> Arrays:
    """`glance`, in the child."""
    reader = _open(path)
    height, width, _ = _batch(path, reader, [0])[0].shape
    small = [_thumbnail(frame, side) for frame in _frames(path, reader, frames)]
    facts = {"num_frames": len(reader), "fps": float(reader.get_avg_fps()), "width": width, "height": height}
    return facts, np.array(small, np.uint8).reshape(-1, side, side, 3)


def _call(function: str, path: Path, seconds: float, **arguments: Any) -> Answer:
    name = os.fspath(path.absolute())
    return this_threads_child().call(f"{__name__}:{function}", {"path": name, **arguments}, name, seconds)


def _open(path: str) -> Any:  # decord has no types
    from decord import DECORDError, VideoReader, cpu

    with opened(Path(path)) as handle:
        try:
            reader = VideoReader(name_of(handle), ctx=cpu(0), num_threads=1)
        except (DECORDError, RuntimeError) as error:
            raise Rejected(Reason.DAMAGED, f"{path} cannot be opened as a video: {first_line(error)}") from error
    if len(reader) == 0:
        raise Rejected(Reason.DAMAGED, f"{path} holds no frames")
    return reader


def _frames(path: str, reader: Any, frames: Sequence[int]) -> Iterator[np.ndarray]:
    size = max(1, CHUNK_BYTES // _batch(path, reader, [0]).nbytes)
    for start in range(0, len(frames), size):
        yield from _batch(path, reader, frames[start : start + size])


def _batch(path: str, reader: Any, frames: Sequence[int]) -> np.ndarray:
    from decord import DECORDError

    try:
        batch: np.ndarray = reader.get_batch(list(frames)).asnumpy()
    except (DECORDError, IndexError) as error:
        told = f"frames {frames[0]}..{frames[-1]} cannot be decoded: {first_line(error)}"
        raise Rejected(Reason.DAMAGED, f"{path}: {told}") from error
    return batch


def _thumbnail(frame: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(frame).resize((side, side), Image.Resampling.BOX))
