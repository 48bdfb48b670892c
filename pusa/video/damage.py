"""Find which parts of a damaged video can be used. Libav decodes it packet by packet, in the child process."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
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
PLACEHOLDER = 100  # a stated length of more than 100 times the real one is a placeholder of a streamed file
MAX_PARTS = 100_000  # of a file that are followed
TS_PACKETS = (188, 192, 204)  # bytes
OGG_TAIL = 2**17  # bytes; a page of Ogg has at most 65307
ROUNDING = 1e-3  # seconds by which two readers may round a time differently


@dataclass(frozen=True)
class Damage:
    """The parts of a video that cannot be used."""

    intervals: tuple[tuple[float, float], ...]  # first and last time in seconds
    frames: tuple[float | None, ...]  # times of the frames that were decoded
    lost: int  # packets in these intervals; each is a frame, or a field of one
    error: str  # the first one; "" if none was seen

    def usable(self, times: np.ndarray) -> np.ndarray:
        """Return for each frame of the survey, from its time (T,), whether it lies outside all intervals.

        The survey's clock may start elsewhere and leave out jumps, so frames are numbered if both decoders return as
        many, and otherwise counted from the first one.
        """
        if len(self.frames) == len(times) and None not in self.frames:
            own = np.array(self.frames, float)
        else:
            own = times - times[0] + next((time for time in self.frames if time is not None), times[0])
        usable = np.ones(len(times), bool)
        for first, last in self.intervals:
            usable &= (own < first - ROUNDING) | (own > last + ROUNDING)
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
    intervals = tuple((first, last) for first, last in facts["intervals"])
    return Damage(intervals, tuple(facts["frames"]), facts["lost"], facts["error"])


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
    for _ in range(MAX_PARTS):
        if end + 8 > size or os.pread(handle, 4, end) != b"RIFF":
            break
        length = int.from_bytes(os.pread(handle, 4, end + 4), "little")
        if length == 0 or length > (size - end) * PLACEHOLDER or length == 2**32 - 1:
            return "", False
        end += 8 + length + length % 2
    missing = 1 - size / max(end, 1)
    return (f"the last {missing:.0%} of the file are missing" if missing > MISSING_SHARE else ""), True


def _check_fragments(handle: int, size: int) -> str:
    """Check a fragmented MP4: boxes that state their lengths follow one another, and their names are letters."""
    end, has_fragments = 0, False
    for _ in range(MAX_PARTS):
        if end + 8 > size:
            break
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
        packets, first_error = container.demux(video), ""
        read: list[_Packet] = []
        decoded: list[Any] = []
        while True:
            with av.logging.Capture() as logs:
                packet, error = _attempt(lambda: next(packets, None))
            cut_short = _errors(logs, error)
            with av.logging.Capture() as logs:
                frames, error = _attempt(packet.decode) if packet is not None else ([], "")
            errors = _errors(logs, error)
            if packet is not None and packet.is_corrupt:
                errors.append("a packet is marked as corrupt")
            first_error = first_error or next(iter(cut_short + errors), "")
            decoded += [(frame.pts, frame.key_frame, frame.is_corrupt) for frame in frames or ()]
            if cut_short and read:  # its end may be what follows the gap
                read[-1] = replace(read[-1], failed=True)
            if packet is None:
                break
            stamp = packet.pts if packet.pts is not None else packet.dts
            time = None if stamp is None else float(stamp * packet.time_base)
            read.append(_Packet(time, packet.pts, packet.is_keyframe, bool(errors), bool(cut_short), packet.size > 0))
        unit = float(video.time_base or 0)
    # Of the packets that follow a loss, some are marked as keyframes and are only the end of one; and a frame that was
    # decoded without an error may still lack a part.
    keyframes = {None, *(pts for pts, is_keyframe, _ in decoded if is_keyframe)}
    corrupt = {pts for pts, _, is_corrupt in decoded if is_corrupt and pts is not None}
    read = [
        replace(packet, is_keyframe=packet.is_keyframe and packet.pts in keyframes,
                failed=packet.failed or packet.pts in corrupt)
        for packet in read
    ]  # fmt: skip
    first = next((packet for packet in read if packet.holds_frame), None)
    if first is not None and not first.is_keyframe and not first.failed:
        first_error = "it starts between two keyframes"
    intervals, lost = _suspect_parts(read)
    frames = [None if pts is None else pts * unit for pts, _, _ in decoded]
    return {"intervals": intervals, "frames": frames, "lost": lost, "error": first_error}, None


@dataclass(frozen=True)
class _Packet:
    time: float | None  # seconds
    pts: int | None
    is_keyframe: bool
    failed: bool  # decoding it, or a part of it is missing
    follows_gap: bool  # it is whole, but those before it are missing
    holds_frame: bool


def _suspect_parts(packets: Iterable[_Packet]) -> tuple[list[list[float]], int]:
    """Return the intervals [first, last] of time that cannot be used, and the number of their packets."""
    intervals: list[list[float]] = []
    lost = 0
    suspect, resumes_at = True, None  # until the first keyframe; the time of the keyframe that ended a suspect part
    for packet in packets:
        time = packet.time
        if packet.failed or packet.follows_gap:
            suspect, resumes_at = True, None
        if not packet.failed and packet.is_keyframe and suspect:
            suspect, resumes_at = False, time
        elif resumes_at is not None and time is not None and time > resumes_at:
            resumes_at = None
        # Frames that follow a keyframe in the file and are shown before it are made from the frames before it.
        leads = resumes_at is not None and time is not None and time < resumes_at
        lost += bool((suspect or leads) and packet.holds_frame)
        if (suspect or leads) and time is not None:
            _add(intervals, time, follows=bool(intervals) and intervals[-1][2] == 1)
        elif intervals:
            intervals[-1][2] = 0
    return [interval[:2] for interval in intervals], lost


def _attempt(action: Callable[[], Any]) -> tuple[Any, str]:
    """Return what an action of libav returns, or None and its error."""
    import av

    try:
        return action(), ""
    except av.FFmpegError as error:
        return None, str(error)


def _errors(logs: Iterable[tuple[int, str, str]], raised: str) -> list[str]:
    """Return the errors that libav logged and raised, without those that affect no picture."""
    import av

    texts = [text.strip() for level, _, text in logs if level <= av.logging.ERROR]
    return [text for text in (*texts, raised) if text and not text.startswith(HARMLESS_ERRORS)]


def _add(intervals: list[list[float]], time: float, follows: bool) -> None:
    """Extend the last interval if the packet follows it, else begin another: [first, last, is open]."""
    if follows:
        intervals[-1][:2] = [min(intervals[-1][0], time), max(intervals[-1][1], time)]
    else:
        intervals.append([time, time, 1])
