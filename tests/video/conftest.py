"""Videos that several tests read."""

from pathlib import Path

import pytest

from tests.helpers.media import MOVING, PICTURE, X264, encoded_video, ffmpeg


@pytest.fixture(scope="session")
def kinds(tmp_path_factory) -> dict[str, Path]:
    """The same picture (a red corner, a green disc on white) in many kinds of intact files."""
    folder = tmp_path_factory.mktemp("kinds")
    plain = encoded_video(folder / "plain.mp4", *X264, source=PICTURE)
    made = {"plain": plain}
    for turn, back in ((90, "transpose=clock"), (180, "hflip,vflip"), (270, "transpose=cclock")):
        # Turned in the file, with a rotation in the header that makes it upright when displayed.
        turned = encoded_video(folder / f"t{turn}.mp4", *X264, source=f"{PICTURE},{back}")
        made[f"rotated{turn}"] = folder / f"rotated{turn}.mp4"
        ffmpeg("-display_rotation", turn, "-i", turned, "-c", "copy", made[f"rotated{turn}"])
    squeezed = f"{PICTURE},scale=80:96,setsar=2"
    made["anamorphic"] = encoded_video(folder / "anamorphic.mp4", *X264, source=squeezed)
    made["odd"] = encoded_video(
        folder / "odd.mp4", "-c:v", "libx264", "-pix_fmt", "yuv444p", source=f"{PICTURE},scale=65:49"
    )
    made["hevc10"] = encoded_video(
        folder / "hevc10.mp4", "-c:v", "libx265", "-x265-params", "log-level=none", "-pix_fmt", "yuv420p10le",
        source=PICTURE,
    )  # fmt: skip
    made["av1"] = encoded_video(folder / "av1.mp4", "-c:v", "libsvtav1", "-preset", "12", "-crf", "20", source=PICTURE)
    made["vp9"] = encoded_video(folder / "vp9.webm", "-c:v", "libvpx-vp9", "-deadline", "realtime", source=PICTURE)
    made["fullrange"] = encoded_video(
        folder / "full.mp4", *X264[:4], "-pix_fmt", "yuvj420p", "-color_range", "pc", source=PICTURE
    )
    made["avi"] = encoded_video(folder / "a.avi", "-c:v", "mpeg4", "-q:v", "2", source=PICTURE)
    for suffix in ("mkv", "ts", "mov"):
        made[suffix] = folder / f"a.{suffix}"
        ffmpeg("-i", plain, "-c", "copy", made[suffix])
    return made


@pytest.fixture(scope="session")
def moving(tmp_path_factory) -> Path:
    """48 different frames of 160x96."""
    return encoded_video(tmp_path_factory.mktemp("moving") / "moving.mp4", *X264, "-g", "12", source=MOVING)
