"""Read the header of a video: its streams, size, colours and field order. Libav reads them, in the child process."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pusa.errors import Reason, Rejected
from pusa.system.text import first_line
from pusa.video.child import this_threads_child
from pusa.video.ffmpeg import CONTAINERS, fd_path, open_regular_file

if TYPE_CHECKING:  # only the child process loads libav
    from av.container import InputContainer
    from av.video.codeccontext import VideoCodecContext
    from av.video.format import VideoFormat
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# ffmpeg's names of the code points of ITU-T H.273. Code points that are not here are unknown to ffmpeg's filters. Those
# that are reserved state nothing.
UNSPECIFIED = "unspecified"
MATRICES = {
    0: "gbr", 1: "bt709", 2: UNSPECIFIED, 3: UNSPECIFIED, 4: "fcc", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m",
    8: "ycgco", 9: "bt2020nc", 10: "bt2020c", 12: "chroma-derived-nc", 13: "chroma-derived-c", 14: "ictcp",
}  # fmt: skip
PRIMARIES = {
    0: UNSPECIFIED, 1: "bt709", 2: UNSPECIFIED, 3: UNSPECIFIED, 4: "bt470m", 5: "bt470bg", 6: "smpte170m",
    7: "smpte240m", 8: "film", 9: "bt2020", 10: "smpte428", 11: "smpte431", 12: "smpte432", 22: "jedec-p22",
}  # fmt: skip
TRANSFERS = {
    0: UNSPECIFIED, 1: "bt709", 2: UNSPECIFIED, 3: UNSPECIFIED, 4: "bt470m", 5: "bt470bg", 6: "smpte170m",
    7: "smpte240m", 8: "linear", 9: "log100", 10: "log316", 11: "iec61966-2-4", 12: "bt1361e", 13: "iec61966-2-1",
    14: "bt2020-10", 15: "bt2020-12", 16: "smpte2084", 17: "smpte428", 18: "arib-std-b67",
}  # fmt: skip
RANGES = {0: UNSPECIFIED, 1: "limited", 2: "full"}
# AVFieldOrder: which field is displayed first. 4 and 5 name the coded field, then the displayed one.
FIELD_ORDERS = {1: "progressive", 2: "top_first", 3: "bottom_first", 4: "bottom_first", 5: "top_first"}
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # WebM's alpha is a second picture, which only these decode
# HEVC's alpha is a second layer. libav does not say that it is there, but ffmpeg decodes it. The container's header
# holds a message (SEI) that announces it: type 165, "alpha channel information".
HEVC_ALPHA = b"\x4e\x01\xa5"
MAX_LEADING_PACKETS = 1000  # packets that are decoded until the first frame appears


@dataclass(frozen=True)
class Header:
    """The video stream that is used, upright as it is displayed. All fields are plain values, which JSON can store."""

    container: str  # libav's first name for it
    stream: int  # index in the container
    video_streams: int  # without cover art and thumbnails
    codec: str
    decoder: str  # that ffmpeg must be given; "" for its own choice
    width: int
    height: int
    pixel_aspect: float  # width / height of a pixel
    fps: float | None
    rotation: int  # degrees counter-clockwise, 0..359
    duration: float | None  # seconds, of the longest stream
    is_only_stream: bool  # then `duration` is that of the video
    other_codecs: tuple[str, ...]  # names of the other streams' codecs and decoders
    pixel_format: str
    bit_depth: int  # of each colour
    has_alpha: bool
    colour_model: str  # "rgb", "gray" or "yuv"
    matrix: str  # a value of MATRICES, as the file states it; so are the next three
    primaries: str
    transfer: str
    range: str
    only_container_states_colours: bool  # the matrix or the range, and the pictures state none
    field_order: str  # a value of FIELD_ORDERS; "progressive" if the file states none
    dolby_vision_only: bool  # the pictures mean nothing without Dolby Vision's metadata

    @property
    def is_turned(self) -> bool:
        """Return whether rows of the decoded picture are columns of the displayed one."""
        return self.rotation % 180 == 90


def read_header(path: Path, seconds: float, longest: float = float("inf")) -> Header:
    """Return what libav reads in the header of a file and in its first frame, within `seconds`.

    Args:
        path: the file.
        seconds: time limit.
        longest: a stated duration above this many seconds is checked by looking for the last packet, because streamed
            files state placeholders.

    Raises:
        Rejected: EMPTY_FILE, UNREADABLE, NOT_A_VIDEO, NO_VIDEO_STREAM, DAMAGED (the index is missing),
            TIMEOUT, CRASHED.
    """
    with open_regular_file(path) as handle:
        if os.fstat(handle).st_size == 0:
            raise Rejected(Reason.EMPTY_FILE, f"{path} is empty")
    name = os.fspath(path.absolute())
    arguments = {"path": name, "longest": min(longest, 1e12)}
    facts = this_threads_child().call(f"{__name__}:describe", arguments, name, seconds).facts
    return Header(**{**facts, "other_codecs": tuple(facts["other_codecs"])})


# The functions below run in the child process.


def open_container(path: str, handle: int) -> "InputContainer":
    """Open a file with libav, so that it opens no other file.

    Args:
        path: the file, for messages.
        handle: its file descriptor.

    Raises:
        Rejected: NOT_A_VIDEO, DAMAGED.
    """
    import av

    av.logging.set_level(av.logging.ERROR)
    options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
    with av.logging.Capture() as logs:
        try:
            return av.open(f"file:{fd_path(handle)}", options=options, metadata_errors="replace")
        except (av.FFmpegError, ValueError) as error:
            causes = [text.strip() for _, _, text in logs]
            if any("moov atom not found" in cause for cause in causes):  # the file is an mp4, whose index is its end
                detail = f"{path} lacks its index; the end of the file may be missing"
                raise Rejected(Reason.DAMAGED, detail) from error
            cause = first_line(getattr(error, "strerror", None) or error)
            raise Rejected(Reason.NOT_A_VIDEO, f"{path} is not a video that ffmpeg knows: {cause}") from error


def describe(path: str, longest: float) -> tuple[dict[str, Any], None]:
    """Return the fields of a `Header`, and no array."""
    with open_regular_file(Path(path)) as handle, open_container(path, handle) as container:
        stream, count = _choose_stream(path, container)
        codec = stream.codec_context
        stated = _code_points(codec)
        frame = _first_frame(container, stream)
        turned = frame is not None and frame.rotation % 180 == 90
        width, height = codec.width, codec.height
        aspect = float(stream.sample_aspect_ratio or 1)
        pixels = frame.format if frame is not None else codec.format
        if pixels is None or not width:  # libav has not met what frames need, such as a keyframe
            raise Rejected(Reason.DAMAGED, f"{path} holds no frame that can be decoded ({codec.name:.80})")
        alpha_decoder = ALPHA_DECODERS.get(codec.codec.canonical_name) if _has_second_picture(stream) else None
        others = [other for other in container.streams if other is not stream]
        facts = {
            "container": container.format.name.partition(",")[0],
            "stream": stream.index,
            "video_streams": count,
            "codec": codec.codec.canonical_name,
            "decoder": alpha_decoder or "",
            "width": height if turned else width,
            "height": width if turned else height,
            "pixel_aspect": 1 / aspect if turned else aspect,
            "fps": float(stream.average_rate or stream.guessed_rate or 0) or None,
            "rotation": frame.rotation % 360 if frame is not None else 0,
            "is_only_stream": not others,
            "other_codecs": [name for other in others for name in _codec_names(other)],
            "pixel_format": pixels.name,
            "bit_depth": max(component.bits for component in pixels.components),
            "has_alpha": alpha_decoder is not None or _has_alpha(codec, pixels, frame),
            **_colours(pixels, stated, stated if frame is None else _code_points(frame)),
            "field_order": _field_order(stream, frame),
            "dolby_vision_only": str(codec.codec_tag) in ("dvh1", "dvhe"),
        }
        duration = container.duration / 1e6 if container.duration and container.duration > 0 else None
        if duration is not None and duration > longest:
            duration = _measure_duration(container, stream)
        return {**facts, "duration": duration}, None


def _choose_stream(path: str, container: "InputContainer") -> "tuple[VideoStream, int]":
    """Return the default video stream, else the first, and the number of video streams without pictures."""
    from av.stream import Disposition

    pictures = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
    streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
    if not streams:
        first = container.streams[0] if container.streams else None
        if first is None:
            raise Rejected(Reason.NOT_A_VIDEO, f"{path} is not a video that ffmpeg knows: it contains no stream")
        kind = " ".join([first.type, *_codec_names(first)[:1]])
        raise Rejected(Reason.NO_VIDEO_STREAM, f"{path} has no video stream; its first stream is {kind:.80}")
    # One that begins between two keyframes, or late, has no size yet.
    usable = [stream for stream in streams if stream.codec_context is not None]
    if not usable:
        raise Rejected(Reason.NOT_A_VIDEO, f"{path} has a video stream of a codec that ffmpeg does not know")
    default = next((stream for stream in usable if stream.disposition & Disposition.default), usable[0])
    return default, len(streams)


def _codec_names(stream: Any) -> list[str]:
    """Return the names of a stream's codec and decoder: mp3 and mp3float, for example."""
    codec = stream.codec_context
    return [] if codec is None else list(dict.fromkeys((codec.codec.canonical_name, codec.name)))


def _has_second_picture(stream: "VideoStream") -> bool:
    tags: Mapping[str, str] = stream.metadata
    return any(name.lower() == "alpha_mode" and value == "1" for name, value in tags.items())


def _first_frame(container: "InputContainer", stream: "VideoStream") -> "VideoFrame | None":
    """Return the first frame that can be decoded. Only frames state a rotation, for example."""
    return next(_frames(container, stream), None)


def _frames(container: "InputContainer", stream: "VideoStream") -> "Iterator[VideoFrame]":
    import av

    stream.codec_context.thread_count = 1
    packets = container.demux(stream)
    for _ in range(MAX_LEADING_PACKETS):
        try:
            yield from next(packets).decode()
        except StopIteration:
            return
        except av.FFmpegError:  # the survey reports what cannot be decoded
            continue


def _has_alpha(codec: "VideoCodecContext", pixels: "VideoFormat", frame: "VideoFrame | None") -> bool:
    if codec.codec.canonical_name == "hevc" and HEVC_ALPHA in (codec.extradata or b""):
        return True
    if pixels.has_palette and frame is not None:
        _, palette = frame.to_ndarray()
        return bool((palette[:, 0] < 255).any())  # alpha, red, green, blue
    return any(part.is_alpha for part in pixels.components)


def _code_points(source: "VideoCodecContext | VideoFrame") -> dict[str, int]:
    """Return the code points that the container states (before a frame is decoded), or a frame."""
    return {
        "matrix": int(source.colorspace),
        "primaries": int(source.color_primaries),
        "transfer": int(source.color_trc),
        "range": int(source.color_range),
    }


def _colours(pixels: "VideoFormat", stated: dict[str, int], shown: dict[str, int]) -> dict[str, Any]:
    """Return the fields of a `Header` for colours. What the pictures show counts, else what the container states."""
    is_rgb = pixels.is_rgb or pixels.has_palette or pixels.name.startswith("xyz")
    is_grey = sum(not part.is_alpha for part in pixels.components) == 1
    model = "rgb" if is_rgb else "gray" if is_grey else "yuv"
    facts: dict[str, Any] = {"colour_model": model, "only_container_states_colours": False}
    for name, names in {"matrix": MATRICES, "primaries": PRIMARIES, "transfer": TRANSFERS, "range": RANGES}.items():
        container, picture = (names.get(codes[name], f"unknown ({codes[name]})") for codes in (stated, shown))
        if model == "yuv":  # a YUV picture cannot be RGB
            container, picture = (UNSPECIFIED if text == "gbr" else text for text in (container, picture))
        facts[name] = container if picture == UNSPECIFIED else picture
        if name in ("matrix", "range") and picture != facts[name]:
            facts["only_container_states_colours"] = True
    return facts


def _field_order(stream: "VideoStream", frame: "VideoFrame | None") -> str:
    order = int(stream.codec_context.field_order)
    if order in FIELD_ORDERS:
        return FIELD_ORDERS[order]
    return "top_first" if frame is not None and frame.interlaced_frame else "progressive"


def _measure_duration(container: "InputContainer", stream: "VideoStream") -> float | None:
    """Return the time of the stream's last packet. A file without an index is read to its end."""
    import av

    end = None
    try:
        container.seek(2**62, backward=True)
    except av.FFmpegError:
        container.seek(0)
    try:
        for packet in container.demux(stream):
            if packet.pts is not None:
                end = max(end or 0.0, float(packet.pts * packet.time_base))
    except av.FFmpegError:  # the file breaks off
        pass
    return None if end is None else end - (container.start_time or 0) / 1e6
