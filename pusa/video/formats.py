"""Write a video in more formats beside its mp4: what ffmpeg does for each, and how their files are checked and hashed.

One ffmpeg makes all of them from the same frames, which are handed over once. A gif is made afterwards from a lossless
copy: its palette is known only when all frames were seen, and a long video does not fit in memory.
"""

import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import imageio_ffmpeg

from pusa.errors import MediaError
from pusa.system.failures import RUN_ERRNOS
from pusa.system.files import NEGLIGIBLE, digest, remove, sha256_file
from pusa.system.processes import ending, kill
from pusa.system.text import first_line, join_names, printable

# ffmpeg on its own converts by BT.601 and states nothing, and players take a large video without tags for BT.709.
TO_BT709 = (
    "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int,format=yuv420p,"
    "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
)
# palettegen keeps a list of all colours. Six bits of each channel bound its time and memory; 0 and 255 stay.
TO_PALETTE = "lutrgb=" + ":".join(f"{c}='bitor(bitand(val,252),val/64)'" for c in "rgb") + ",palettegen"
# A fixed pattern stays in its place from frame to frame: about a third smaller than diffused errors, in half the time.
FROM_PALETTE = "paletteuse=dither=bayer:bayer_scale=3:diff_mode=rectangle"
REPRODUCIBLE = ("-fflags", "+bitexact")  # no random numbers: the same frames give the same bytes
FRAME = re.compile(r"\d+\.png")  # the name of a frame in a folder


@dataclass(frozen=True)
class VideoFormat:
    """A format: how its files' names end, its encoder, about the bits of a pixel, and ffmpeg's arguments for RGB."""

    end: str
    encoder: str
    bits: float
    arguments: tuple[str, ...] = ()


FORMATS = {
    "webm": VideoFormat(
        ".webm",
        "libvpx-vp9",
        0.5,
        ("-vf", TO_BT709, "-crf", "24", "-b:v", "0", "-row-mt", "1", "-cpu-used", "2", "-f", "webm", *REPRODUCIBLE),
    ),
    "gif": VideoFormat(".gif", "gif", 4),
    "png": VideoFormat(
        ".frames", "png", 12, ("-pix_fmt", "rgb24", "-pred", "mixed", "-start_number", "0", "-f", "image2")
    ),
    "lossless": VideoFormat(
        ".lossless.mkv",
        "ffv1",
        10,
        ("-pix_fmt", "bgr0", "-level", "3", "-g", "1", "-slicecrc", "1", "-f", "matroska", *REPRODUCIBLE),
    ),
}

PALETTE = ".palette.png"  # while a gif is made
UNFINISHED = (PALETTE, *(known.end for known in FORMATS.values()))  # what stays beside the video if a writer is killed
CLIPS = ("webm", "lossless")  # the formats that jobs can read as clips


def beside(video: Path, name: str) -> Path:
    """Return the path of a video's file, or folder of frames, in another format."""
    return video.with_suffix(FORMATS[name].end)


def require_encoders(names: Iterable[str]) -> None:
    """Check that ffmpeg can write formats.

    Raises:
        MediaError: it lacks an encoder.
    """
    missing = [f"{FORMATS[name].encoder} (for {name})" for name in names if FORMATS[name].encoder not in _encoders()]
    if missing:
        program = imageio_ffmpeg.get_ffmpeg_exe()
        raise MediaError(
            f"{program} has no encoder {', '.join(missing)}; leave out these formats, or use another ffmpeg"
        )


@lru_cache(maxsize=1)
def _encoders() -> frozenset[str]:
    """Return the names of ffmpeg's encoders."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-encoders"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)  # noqa: S603
    return frozenset(line.split()[1] for line in listed.stdout.splitlines() if len(line.split()) > 1)


def with_sources(names: Sequence[str]) -> list[str]:
    """Return the formats that are encoded from the frames themselves: instead of a gif, what it is made from."""
    return list(dict.fromkeys("lossless" if name == "gif" else name for name in names))


def output_arguments(video: Path, names: Iterable[str], tags: Sequence[str] = ()) -> list[str]:
    """Return ffmpeg's arguments for more outputs beside a video's, with its tags. Folders of frames are created.

    Raises:
        OSError: a folder cannot be created.
    """
    arguments = []
    for name in names:
        target = f"file:{beside(video, name)}"
        if name == "png":
            beside(video, name).mkdir()
            target = target.replace("%", "%%") + "/%05d.png"
        arguments += ["-an", "-c:v", FORMATS[name].encoder, *FORMATS[name].arguments, *tags, target]
    return arguments


def make_gif(video: Path, rate: Fraction) -> None:
    """Make a gif beside a video from its lossless copy: 256 colours for all frames, shown again and again.

    Raises:
        OSError: ffmpeg failed; with the `errno` of a full disk or another cause that it names.
    """
    gif, palette = beside(video, "gif"), video.with_suffix(PALETTE)
    frames = ["-r", str(rate), "-i", f"file:{beside(video, 'lossless')}"]  # the file's own times are in milliseconds
    looks = ["-i", f"file:{palette}", "-lavfi", FROM_PALETTE]
    try:
        _run([*frames, "-vf", TO_PALETTE, "-frames:v", "1", "-update", "1", f"file:{palette}"], gif)
        _run([*frames, *looks, "-loop", "0", *REPRODUCIBLE, f"file:{gif}"], gif)
    finally:
        remove(palette)


def _run(arguments: Sequence[str], path: Path) -> None:
    process = start_ffmpeg(arguments, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        messages = process.communicate()[1].decode("utf-8", "replace")
    finally:
        kill(process)
    if process.returncode:
        raise writing_error(path, messages, process)


def start_ffmpeg(arguments: Sequence[str], stdin: int, stderr: int) -> subprocess.Popen[bytes]:
    """Start an ffmpeg that reports errors alone, in English, and leads a group of processes."""
    return subprocess.Popen(  # noqa: S603
        [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostats", "-v", "error", "-y", *arguments],
        stdin=stdin, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True,
        env={**os.environ, "LC_ALL": "C", "AV_LOG_FORCE_NOCOLOR": "1"},
    )  # fmt: skip


def writing_error(path: Path, messages: str, process: "subprocess.Popen[bytes]") -> OSError:
    """Return why an ffmpeg that has ended wrote no complete file, from its messages."""
    for number in RUN_ERRNOS:
        if os.strerror(number) in messages:
            return OSError(number, os.strerror(number), str(path))
    cause = messages.strip().splitlines()[0] if messages.strip() else ending(process)
    return OSError(f"{path} was not written completely; ffmpeg: {printable(cause)}")


def require_frames(path: Path, count: int) -> None:
    """Check that a video file, or a folder of frames, has `count` frames: one without its end would pass for a video.

    Raises:
        OSError: it lacks frames, or cannot be read.
    """
    if path.is_dir():
        written = sum(FRAME.fullmatch(inner.name) is not None and inner.stat().st_size > 0 for inner in path.iterdir())
    else:
        try:
            written, _ = imageio_ffmpeg.count_frames_and_secs(str(path))
        except (OSError, RuntimeError) as error:
            raise OSError(f"{path} was not written completely: {first_line(error)}") from error
    if written != count:
        raise OSError(f"{path} was not written completely: {written} of {count} frames")


def remove_output(path: Path) -> None:
    """Remove a file, or a folder of frames, if it exists.

    Raises:
        MediaError: the folder holds something else as well, which somebody put there.
    """
    inner = path.iterdir() if path.is_dir() and not path.is_symlink() else ()
    others = sorted(one.name for one in inner if not FRAME.fullmatch(one.name) and one.name not in NEGLIGIBLE)
    if others:
        raise MediaError(f"{path} is to be replaced, and has {join_names(others)} beside frames: move it elsewhere")
    remove(path)


def hash_output(path: Path) -> str:
    """Return the hash of a file, or of the names and hashes of a folder's frames.

    Raises:
        OSError: it cannot be read.
    """
    if not path.is_dir():
        return sha256_file(path)
    return digest(sorted((inner.name, sha256_file(inner)) for inner in path.iterdir() if FRAME.fullmatch(inner.name)))
