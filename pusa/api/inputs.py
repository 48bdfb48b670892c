"""Write pictures and clips that are in memory to files, which a job then names as it names any other file."""

import hashlib
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

from pusa.api.video import Video
from pusa.errors import MediaError
from pusa.system.files import atomic

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # of Pillow, that a PNG holds as they are


def as_files(settings: dict[str, Any], folder: Path, fps: float) -> dict[str, Any]:
    """Return a job's settings with files in place of pictures, arrays and videos.

    The files are named by their content, so equal pixels give equal jobs. Pictures become PNG and clips FFV1 in RGB:
    both are read again bit for bit.

    Args:
        settings: the job's keys. A picture is one of Pillow, or an array (H, W, 3) or (H, W, 4) uint8; a clip is an
            array (T, H, W, 3) uint8, a list of pictures of one size, or a video that was made before. A tensor counts
            as an array. `frames` may have a picture where a manifest has a mapping with `image`, and `levels` an array.
        folder: where the files are written; it is created if needed.
        fps: the frames per second of clips.

    Raises:
        MediaError: an array is neither a picture nor a clip, pictures of a list differ in size, or a picture is of a
            mode that a PNG does not hold.
        OSError: a file cannot be written.
    """
    settings = {key: _as_file(value, folder, fps, key) for key, value in settings.items()}
    if isinstance(frames := settings.get("frames"), dict):
        short = {place: {"image": given} for place, given in frames.items() if isinstance(given, str | Path)}
        settings["frames"] = {**frames, **short}
    return settings


def _as_file(value: Any, folder: Path, fps: float, key: str) -> Any:
    if isinstance(value, dict):
        return {name: _as_file(item, folder, fps, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()  # which has no bfloat16
    if key == "levels" and isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, list | tuple) and value and all(map(_is_picture, value)):
        frames = [np.asarray(item.convert("RGB") if isinstance(item, Image.Image) else item) for item in value]
        if len(shapes := {frame.shape for frame in frames}) > 1:
            raise MediaError(f"{key}: pictures of the shapes {sorted(shapes)}; expected a clip's, of one size")
        value = np.stack(frames)
    if isinstance(value, list | tuple):
        return [_as_file(item, folder, fps, f"{key}.{i}") for i, item in enumerate(value)]
    if isinstance(value, Video):
        return value.path
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim < 2):
        return value.tolist()  # numbers, as np.linspace gives
    if isinstance(value, Image.Image):
        if value.mode not in MODES:  # Pillow would clip floats, and ignore the profile of CMYK
            modes = ", ".join(MODES)
            raise MediaError(f"{key}: a picture of mode {value.mode}; expected {modes}: convert it, or give its file")
        return _write_picture(value, folder)
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype == np.uint8 and value.size and value.ndim == 3 and value.shape[-1] in (3, 4):
        return _write_picture(Image.fromarray(value), folder)
    if value.dtype == np.uint8 and value.size and value.ndim == 4 and value.shape[-1] == 3:
        return _write_clip(np.ascontiguousarray(value), folder, fps)
    raise MediaError(
        f"{key}: an array of shape {value.shape} and dtype {value.dtype}; expected a picture (height, width, 3) or "
        "a clip (frames, height, width, 3), of dtype uint8 with values from 0 to 255"
    )


def _is_picture(value: Any) -> bool:
    return isinstance(value, Image.Image) or (isinstance(value, np.ndarray) and value.ndim == 3)


def _write_picture(picture: Image.Image, folder: Path) -> Path:
    """Write a picture with its colour profile and orientation, and return its file."""
    content = BytesIO()
    picture.save(content, "PNG", exif=picture.getexif(), icc_profile=picture.info.get("icc_profile"))
    path = folder / f"{hashlib.sha256(content.getvalue()).hexdigest()[:16]}.png"
    if not path.exists():
        with atomic(path) as partial:
            partial.write_bytes(content.getvalue())
    return path


def _write_clip(frames_THWC: np.ndarray, folder: Path, fps: float) -> Path:
    """Write a clip without loss, and return its file."""
    rate = Fraction(fps).limit_denominator()
    facts = f"{frames_THWC.shape} {rate} ".encode()
    path = folder / f"{hashlib.sha256(facts + frames_THWC.tobytes()).hexdigest()[:16]}.mkv"
    if path.exists():
        return path
    # Without `bitexact` each file would have a random number in it, and equal clips would be other inputs.
    with atomic(path) as partial, av.open(partial, "w", "matroska", options={"fflags": "bitexact"}) as container:
        stream = container.add_stream("ffv1", rate, options={"threads": "1"})
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = "bgr0"
        for frame in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24").reformat(format="bgr0")))
        container.mux(stream.encode())
    return path
