"""Videos that several tests look at."""

from pathlib import Path

import pytest

from tests.helpers.decoder_stand_ins import MOVING, PICTURE, X264, ffmpeg, video


@pytest.fixture(scope="session")
def kinds(tmp_path_factory) -> dict[str, Path]:
    """One picture (a red corner, a green disc on white), as it comes in many kinds of files; whole all of them."""
    folder = tmp_path_factory.mktemp("kinds")
    plain = video(folder / "plain.mp4", *X264, source=PICTURE)
    made = {"plain": plain}
    for turn, back in ((90, "transpose=clock"), (180, "hflip,vflip"), (270, "transpose=cclock")):
        # What lies turned in the file and says so is upright when shown.
        turned = video(folder / f"t{turn}.mp4", *X264, source=f"{PICTURE},{back}")
        made[f"rotated{turn}"] = folder / f"rotated{turn}.mp4"
        ffmpeg("-display_rotation", turn, "-i", turned, "-c", "copy", made[f"rotated{turn}"])
    squeezed = f"{PICTURE},scale=80:96,setsar=2"
    made["anamorphic"] = video(folder / "anamorphic.mp4", *X264, source=squeezed)
    made["odd"] = video(folder / "odd.mp4", "-c:v", "libx264", "-pix_fmt", "yuv444p", source=f"{PICTURE},scale=65:49")
    made["hevc10"] = video(
        folder / "hevc10.mp4", "-c:v", "libx265", "-x265-params", "log-level=none", "-pix_fmt", "yuv420p10le",
        source=PICTURE,
    )  # fmt: skip
    made["av1"] = video(folder / "av1.mp4", "-c:v", "libsvtav1", "-preset", "12", "-crf", "20", source=PICTURE)
    made["vp9"] = video(folder / "vp9.webm", "-c:v", "libvpx-vp9", "-deadline", "realtime", source=PICTURE)
    made["fullrange"] = video(
        folder / "full.mp4", *X264[:4], "-pix_fmt", "yuvj420p", "-color_range", "pc", source=PICTURE
    )
    made["avi"] = video(folder / "a.avi", "-c:v", "mpeg4", "-q:v", "2", source=PICTURE)
    for suffix in ("mkv", "ts", "mov"):
        made[suffix] = folder / f"a.{suffix}"
        ffmpeg("-i", plain, "-c", "copy", made[suffix])
    return made


@pytest.fixture(scope="session")
def moving(tmp_path_factory) -> Path:
    """48 frames that all differ, 160x96."""
    return video(tmp_path_factory.mktemp("moving") / "moving.mp4", *X264, "-g", "12", source=MOVING)
