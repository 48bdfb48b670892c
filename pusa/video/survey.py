"""Survey a video: decode every frame once, keep its time and a thumbnail, and find what is damaged or interlaced."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from pusa.errors import Reason, Rejected
from pusa.manifest.models import Limits
from pusa.video.compare import LUMA
from pusa.video.conversion import NONE, THUMBNAIL_SIDE, TRANSPOSE, Conversion, choose_conversion
from pusa.video.damage import HARMLESS_ERRORS, MISSING_SHARE, PLACEHOLDER, check_end, find_damage
from pusa.video.decoders.with_ffmpeg import read
from pusa.video.ffmpeg import METADATA_PIPE, find_error, run_ffmpeg
from pusa.video.fields import IDET, MIN_LINES, FieldMarks, judge_pairs
from pusa.video.fit import flatten
from pusa.video.header import Header, read_header

_FRAME = re.compile(r"frame:(\d+) +pts:(\S+) ")
_SCENE = "lavfi.scd.time="
_CORRUPT = re.compile(r"\[warning\] corrupt (?:decoded frame|input packet in stream (\d+))")
# In these containers ffmpeg itself reports missing parts, and the last frame may stand for any length of time.
CONTAINERS_THAT_REPORT_GAPS = ("mov", "matroska")
MAX_FPS = 240  # the most that clip settings may ask for. Sources with more frames are refused: all are in memory


@dataclass(frozen=True)
class Survey:
    """A source whose usable frames can be decoded. Frames are numbered from 0 in the order of their times."""

    header: Header
    conversion: Conversion  # the frames below were converted so
    fps: float  # average
    times: np.ndarray  # (T,) float64 seconds
    thumbnails: np.ndarray  # (T, 8, 8, 3) uint8
    scene_starts: tuple[int, ...]  # frames that begin a new scene
    usable: np.ndarray  # (T,) bool, false for frames that are damaged
    damage: str = ""  # what is lost, for the user; "" if nothing

    @property
    def width(self) -> int:
        """Return the width of a decoded, upright frame."""
        return self.header.width

    @property
    def height(self) -> int:
        """Return the height of a decoded, upright frame."""
        return self.header.height

    @property
    def pixel_aspect(self) -> float:
        """Return the width / height of a pixel."""
        return self.header.pixel_aspect


def survey_video(
    path: Path,
    limits: Limits,
    scenes: float | None = None,
    background: str = "black",
    hdr: Literal["tone_map", "reject"] = "tone_map",
    interlaced: Literal["deinterlace", "reject"] = "deinterlace",
) -> Survey:
    """Decode a whole video, within `limits.decoding_seconds` for each pass. Interlaced ones need up to three.

    Args:
        path: the file.
        limits: longer and larger videos are refused.
        scenes: the score from which ffmpeg's scdet reports a new scene; None reports none.
        background: the colour behind transparent frames.
        hdr: what to do with HDR.
        interlaced: what to do with frames that are woven of two fields.

    Raises:
        Rejected: for the reasons of `read_header` and `choose_conversion`, and TOO_LARGE, TOO_LONG, INTERLACED, and
            DAMAGED if no frame can be used.
    """
    header = read_header(path, limits.decoding_seconds, limits.source_seconds)
    if header.width * header.height > limits.source_pixels:
        allowed = f"{limits.source_pixels} pixels (limits.source_pixels)"
        detail = f"{path} has frames of {header.width}x{header.height}; allowed are {allowed}"
        raise Rejected(Reason.TOO_LARGE, detail)
    if header.duration and header.duration > limits.source_seconds:
        raise _too_long(path, header.duration, limits.source_seconds)
    conversion = choose_conversion(path, header, background, hdr)
    idet = [TRANSPOSE, IDET, TRANSPOSE] if header.is_turned else [IDET]
    survey = _Pass(path, limits, header, conversion).run(idet, scenes)
    order, deinterlace = _judge_fields(survey)
    if deinterlace == NONE:
        return survey.result()
    if interlaced == "reject":
        flags = f"its flags say {header.field_order}"
        raise Rejected(
            Reason.INTERLACED, f"{path} is interlaced ({order}; {flags}); the clips setting `interlaced` is reject"
        )
    conversion = replace(conversion, field_order=order, deinterlace=deinterlace)
    return _Pass(path, limits, header, conversion).run((), scenes).result()


def _judge_fields(survey: "_Pass") -> tuple[str, str]:
    """Return the field order, and how frames are made of fields, from the flags and the pictures."""
    marks, header = survey.fields, survey.header
    flagged, seen = header.field_order, marks.suspected
    if flagged == "progressive" and (header.width if header.is_turned else header.height) < MIN_LINES:
        return flagged, NONE
    whole = (flagged, NONE)
    if flagged == seen == "progressive":
        return whole
    bwdif = "bwdif_turned" if header.is_turned else "bwdif"
    film = marks.film_order()
    if film != "progressive" and not header.is_turned:
        return film, "film"
    shown = ""
    if firsts := marks.pairs(flagged, header.width * header.height):
        frames = sorted({frame + step for frame in firsts for step in (0, 1)})
        decoded = read(survey.path, frames, survey.limits.decoding_seconds, conversion=survey.conversion)
        grey = dict(zip(frames, ((frame @ LUMA).astype(np.uint8) for frame in decoded), strict=True))
        turn = np.transpose if header.is_turned else np.asarray
        pairs = np.array([[turn(grey[frame + step]) for step in (0, 1)] for frame in firsts])
        shown = judge_pairs(pairs, flagged != "progressive", seen != "progressive")
    shown = shown or marks.clear
    if shown == "progressive" or (not shown and flagged == "progressive"):
        return whole
    return next(order for order in (seen, shown, flagged) if order not in ("progressive", "")), bwdif


def _too_long(path: Path, seconds: float, allowed: float) -> Rejected:
    detail = f"{path} lasts {seconds:.6g} s or more; allowed are {allowed:g} s (limits.source_seconds)"
    return Rejected(Reason.TOO_LONG, detail)


@dataclass
class _Pass:
    """Decodes a video once, and collects a survey from the lines of ffmpeg's log and metadata."""

    path: Path
    limits: Limits
    header: Header
    conversion: Conversion
    times: list[float] = field(default_factory=list)
    scene_starts: list[int] = field(default_factory=list)
    fields: FieldMarks = field(default_factory=FieldMarks)
    errors: list[str] = field(default_factory=list)
    doubtful: list[str] = field(default_factory=list)  # errors of this stream or of another one of the same codec
    break_off: str = ""  # why frames after the last of `times` cannot be used
    thumbnails: np.ndarray = field(default_factory=lambda: np.empty(0))

    def run(self, filters: Sequence[str], scenes: float | None = None) -> "_Pass":
        """Decode with these filters after those of the fields."""
        # Each frame's time in microseconds, and what filters report, go to the pipe. Tags of the author do not.
        conversion, seconds = self.conversion, self.limits.decoding_seconds
        chain = [*conversion.first_filters(), "metadata=mode=delete", *filters, "settb=AVTB"]
        chain += [] if scenes is None else [f"scdet=threshold={scenes:g}"]
        chain += ["metadata=mode=add:key=seen:value=1", f"metadata=mode=print:file={METADATA_PIPE}:direct=1"]
        output = ("-map", f"0:{conversion.stream}", "-vf", ",".join([*chain, *conversion.thumbnail_filters()]),
                  "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", conversion.pixel_format,
                  "pipe:1")  # fmt: skip
        # The stream may be larger than its header states.
        options = ("-max_pixels", str(self.limits.source_pixels), *conversion.input_options)
        with run_ffmpeg(self.path, output, seconds, self._read_log, self._read_metadata, options) as process:
            assert process.stdout is not None
            pixels = process.stdout.read()
        if process.returncode and not self.errors:
            self.errors.append(f"ffmpeg ended with exit code {process.returncode}")
        channels = len(conversion.pixel_format.rstrip("24"))
        arrived = len(pixels) / (THUMBNAIL_SIDE * THUMBNAIL_SIDE * channels)
        if arrived < len(self.times):
            fault = f"{len(self.times)} frames were decoded, but {arrived:g} thumbnails arrived"
            raise self._damaged(self.errors[0] if self.errors else fault)
        pictures = np.frombuffer(pixels, np.uint8).reshape(-1, THUMBNAIL_SIDE, THUMBNAIL_SIDE, channels)
        flat = [flatten(picture, conversion.background) for picture in pictures[: len(self.times)]]
        self.thumbnails = np.array(flat, np.uint8).reshape(-1, THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3)
        return self

    def _read_log(self, line: str) -> None:
        corrupt = _CORRUPT.search(line)
        if corrupt and corrupt[1] in (None, str(self.conversion.stream)):
            error: str | None = "a part of a frame is missing"
        else:
            error = find_error(line)
        if error is None or error.startswith(HARMLESS_ERRORS):
            return
        # Lines name a codec, not a stream: where another stream has the same one, it may be that stream's error.
        of_another = find_error(line, self.header.other_codecs) is None
        of_this = not of_another or find_error(line, (self.header.codec, self.header.decoder)) is None
        if of_this:
            errors = self.doubtful if of_another else self.errors
            errors[len(errors) :] = [error] * (len(errors) < 3)

    def _read_metadata(self, line: str) -> None:
        if self.break_off:
            return
        if match := _FRAME.match(line):
            self._add_frame(int(match[1]), match[2])
        elif line.startswith(_SCENE) and len(self.times) > 1:
            self.scene_starts.append(len(self.times) - 1)
        else:
            self.fields.read(line)

    def _add_frame(self, number: int, microseconds: str) -> None:
        index, longest = len(self.times), self.limits.source_seconds
        if index >= longest * MAX_FPS:
            allowed = f"{MAX_FPS} for each of {longest:g} s (limits.source_seconds)"
            raise Rejected(Reason.TOO_LONG, f"{self.path} has {index} frames or more; allowed are {allowed}")
        if number != index:  # ffmpeg restarted its count
            self.break_off = f"from frame {index} on, frames have another size or format"
        elif microseconds == "NOPTS":
            self.break_off = f"frame {index} has no time"
        elif self.times and int(microseconds) / 1e6 <= self.times[-1]:
            now = int(microseconds) / 1e6
            self.break_off = f"frame {index} is at {now:.6g} s, and the one before at {self.times[-1]:.6g} s"
        else:
            self.times.append(int(microseconds) / 1e6)
            if self.times[-1] - self.times[0] > longest:
                raise _too_long(self.path, self.times[-1] - self.times[0], longest)

    def result(self) -> Survey:
        """Return the survey, or raise `Rejected` if no frame can be used."""
        times, usable, losses = np.array(self.times), np.ones(len(self.times), bool), []
        damage = None
        if self.errors or self.doubtful:
            damage = find_damage(self.path, self.conversion.stream, self.limits.decoding_seconds)
        if damage is not None and (damage.error or self.errors):
            usable = damage.usable(times)
            if not damage.error:  # nobody knows where it is
                usable[:] = False
            count = f"{damage.lost} frame{'s' * (damage.lost != 1)} cannot be decoded: " if damage.lost else ""
            losses.append(count + (damage.error or self.errors[0]))
            if self.conversion.deinterlace != NONE:  # lines are taken from the frames before and after
                lost = ~usable
                usable[1:] &= ~lost[:-1]
                usable[:-1] &= ~lost[1:]
        if self.break_off and len(times):
            usable[-1] = False  # its time may be wrong instead of the next one's
        losses += filter(None, (self.break_off, self._missing_end()))
        if not usable.any():
            raise self._damaged("; ".join(losses) or "it holds no frames")
        return Survey(
            header=self.header,
            conversion=self.conversion,
            fps=self._rate(times, bool(losses)),
            times=times,
            thumbnails=self.thumbnails,
            scene_starts=tuple(self.scene_starts),
            usable=usable,
            damage="; ".join(losses),
        )

    def _rate(self, times: np.ndarray, has_gaps: bool) -> float:
        """Return the average number of frames a second; with gaps, that of the median interval."""
        if len(times) < 2:
            return self.header.fps or 1.0
        return float(1 / np.median(np.diff(times)) if has_gaps else (len(times) - 1) / (times[-1] - times[0]))

    def _missing_end(self) -> str:
        """Return what is missing at the end of the file, or ""."""
        header = self.header
        if not self.times:
            return ""
        missing, states_lengths = check_end(self.path, header.container)
        # With sound, the duration in the header may be the sound's.
        trusted = header.container in CONTAINERS_THAT_REPORT_GAPS and not self.errors
        if header.is_only_stream and states_lengths and not trusted:
            stated, end = header.duration or 0.0, self.times[-1] + 1 / (header.fps or 1.0)
            if end < stated * (1 - MISSING_SHARE) and stated < end * PLACEHOLDER:
                return f"it ends after {end:.6g} of {stated:.6g} s"
        return missing

    def _damaged(self, fault: str) -> Rejected:
        return Rejected(Reason.DAMAGED, f"{self.path} is damaged: {fault}")
