"""Find which parts of a damaged video can be used. Libav decodes it packet by packet, in the child process."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pusa.video.child import this_threads_child
from pusa.video.ffmpeg import open_regular_file
from pusa.video.header import open_container

# ffmpeg reports these as errors, but no picture is affected. The first two are about references that a stream, cut out
# of a longer one, names and does not use. The third is about the packet before the first picture.
# The last is about times that decrease, which the survey sees itself.
HARMLESS_ERRORS = (
    "mmco: unref short failure",
    "co located POCs unavailable",
    "Invalid frame dimensions 0x0.",
    "Application provided invalid, non monotonically increasing dts",
)
MISSING_SHARE = 0.05  # of its length, that a whole file may seem to lack, because headers are rounded
PLACEHOLDER = 100  # a stated length that is more than so many times the real one is a placeholder of a streamed file
TS_PACKETS = (188, 192, 204)  # bytes
OGG_TAIL = 2**17  # bytes; a page of Ogg has at most 65307
ROUNDING = 1e-3  # seconds by which two readers may round a time differently


@dataclass(frozen=True)
class Damage:
    """The parts of a video that cannot be used."""

    intervals: tuple[tuple[float, float], ...]  # first and last time in seconds, on the survey's clock
    lost: int  # packets in these intervals; each is a frame, or a field of one
    error: str  # the first one; "" if none was seen

    def usable(self, times: np.ndarray) -> np.ndarray:
        """Return for each time (T,) whether its frame lies outside all intervals."""
        usable = np.ones(len(times), bool)
        for first, last in self.intervals:
            usable &= (times < first - ROUNDING) | (times > last + ROUNDING)
        return usable


def find_damage(path: Path, stream: int, seconds: float) -> Damage:
    """Decode a stream once more, and return where it cannot be decoded.

    After an error, every frame is suspect until the next keyframe, since frames are made from earlier ones.

    Raises:
        Rejected: UNREADABLE, NOT_A_VIDEO, DAMAGED, TIMEOUT, CRASHED.
    """
    name = os.fspath(path.absolute())
    arguments = {"path": name, "stream": stream}
    facts = this_threads_child().call(f"{__name__}:locate", arguments, name, seconds).facts
    return Damage(tuple((first, last) for first, last in facts["intervals"]), facts["lost"], facts["error"])


def check_end(path: Path, container: str) -> tuple[str, bool]:
    """Return what the structure of a file shows to be missing, or "", and whether the lengths that it states are real.

    ffmpeg does not report such losses.

    Raises:
        Rejected: UNREADABLE.
    """
    with open_regular_file(path) as handle:
        size = os.fstat(handle).st_size
        if container == "avi":
            return _check_riff(handle, size)
        if container == "mov":
            return _check_fragments(handle, size), True
        if container == "mpegts" and all(size % length for length in TS_PACKETS):
            return "it ends within a packet", True
        if container == "ogg":
            tail = os.pread(handle, OGG_TAIL, max(0, size - OGG_TAIL))
            page = tail.rfind(b"OggS")
            if not tail[page + 5 : page + 6] or not tail[page + 5] & 4:
                return "it lacks its last page", True
    return "", True


def _check_riff(handle: int, size: int) -> tuple[str, bool]:
    """Check an AVI: RIFF parts that state their lengths follow one another."""
    end = 0
    while end + 8 <= size and os.pread(handle, 4, end) == b"RIFF":
        length = int.from_bytes(os.pread(handle, 4, end + 4), "little")
        if length == 0 or length > (size - end) * PLACEHOLDER or length == 2**32 - 1:
            return "", False
        end += 8 + length + length % 2
    missing = 1 - size / max(end, 1)
    return (f"the last {missing:.0%} of the file are missing" if missing > MISSING_SHARE else ""), True


def _check_fragments(handle: int, size: int) -> str:
    """Check a fragmented MP4: boxes that state their lengths follow one another, and their names are letters."""
    end, has_fragments = 0, False
    while end + 8 <= size:
        head = os.pread(handle, 16, end)
        length, name = int.from_bytes(head[:4], "big"), head[4:8]
        has_fragments |= name == b"moof"
        length = {0: size - end, 1: int.from_bytes(head[8:16], "big")}.get(length, length)
        if length < 8 or not name.isalnum():
            break
        end += length
    if has_fragments and size - end > MISSING_SHARE * size:
        return f"its fragments after byte {end} are not where those before say"
    return ""


# The functions below run in the child process.


def locate(path: str, stream: int) -> tuple[dict[str, Any], None]:
    """Return the fields of a `Damage`, and no array."""
    import av

    with open_regular_file(Path(path)) as handle, open_container(path, handle) as container:
        video = container.streams[stream]
        video.codec_context.thread_count = 1  # so that an error is reported in the call that decodes its packet
        av.logging.set_skip_repeated(False)
        offset = (container.start_time or 0) / 1e6
        packets, first_error, lost = container.demux(video), "", 0
        intervals: list[list[float]] = []
        suspect, resumes_at = True, None  # until the first keyframe; the time of the keyframe that ended a suspect part
        while True:
            with av.logging.Capture() as logs:
                packet, error = _decode_next(packets)
            errors = [text.strip() for level, _, text in logs if level <= av.logging.ERROR]
            errors = [text for text in errors if not text.startswith(HARMLESS_ERRORS)]
            failed = bool(errors or error or (packet is not None and packet.is_corrupt))
            if packet is not None and packet.size and suspect and not packet.is_keyframe and not failed:
                first_error = first_error or "it starts between two keyframes"
            if failed:
                first_error = first_error or (errors or [error or "a packet is marked as corrupt"])[0]
            if packet is None:
                break
            stamp = packet.pts if packet.pts is not None else packet.dts
            time = None if stamp is None else float(stamp * packet.time_base) - offset
            if failed:
                suspect, resumes_at = True, None
            elif packet.is_keyframe and suspect:
                suspect, resumes_at = False, time
            elif resumes_at is not None and time is not None and time > resumes_at:
                resumes_at = None
            # Frames that follow a keyframe in the file and are shown before it are made from the frames before it.
            leads = resumes_at is not None and time is not None and time < resumes_at
            lost += bool((suspect or leads) and packet.size)
            if (suspect or leads) and time is not None:
                _add(intervals, time, follows=bool(intervals) and intervals[-1][2] == 1)
            elif intervals:
                intervals[-1][2] = 0
    return {"intervals": [interval[:2] for interval in intervals], "lost": lost, "error": first_error}, None


def _decode_next(packets: Any) -> tuple[Any, str]:
    """Return the next packet, None at the end, and the error that reading or decoding it raised."""
    import av

    try:
        packet = next(packets)
    except StopIteration:
        return None, ""
    except av.FFmpegError as error:
        return None, str(error)
    try:
        packet.decode()
    except av.FFmpegError as error:
        return packet, str(error)
    return packet, ""


def _add(intervals: list[list[float]], time: float, follows: bool) -> None:
    """Extend the last interval if the packet follows it, else begin another: [first, last, is open]."""
    if follows:
        intervals[-1][:2] = [min(intervals[-1][0], time), max(intervals[-1][1], time)]
    else:
        intervals.append([time, time, 1])
