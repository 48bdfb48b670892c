"""Draw the demo's data set: H.264 videos with captions beside them, and other clips and pictures as inputs of jobs."""

from pathlib import Path

from pusa.system.files import write_text
from pusa.system.locks import sole_writer
from pusa.system.progress import track
from pusa.tiny.shapes import FPS, Scene, draw, scenes
from pusa.video.media import write_image, write_video

CLIPS = 96
FIRST_SEED = 500_000  # the tiny models were trained on lower seeds
MEDIA = {
    "ball": Scene((("red", "circle"),), "right", "dark", 900_001),
    "box": Scene((("green", "square"),), "up", "dark", 900_002),
    "roof": Scene((("yellow", "triangle"),), "left", "light", 900_003),
}


def draw_dataset(folder: Path, count: int = CLIPS) -> None:
    """Write `videos/<number>.mp4` and `.txt`, and for each of `MEDIA` a clip and its first and last frame as pictures.

    Files that exist are kept, since a drawing depends on its seed alone.

    Args:
        folder: where `videos` and `media` are written.
        count: the number of videos.

    Raises:
        StageError: another process draws in the same folder.
    """
    with sole_writer(folder / "videos"), sole_writer(folder / "media"):
        for number, scene in enumerate(track(scenes(FIRST_SEED, count), "draw", count)):
            path = folder / "videos" / f"{number:04d}.mp4"
            if not path.exists():
                write_text(path.with_suffix(".txt"), scene.caption + "\n")
                write_video(path, draw(scene), FPS)
        for name, scene in MEDIA.items():
            if not (folder / "media" / f"{name}.mp4").exists():
                frames = draw(scene)
                write_image(folder / "media" / f"{name}-first.png", frames[0])
                write_image(folder / "media" / f"{name}-last.png", frames[-1])
                write_video(folder / "media" / f"{name}.mp4", frames, FPS)
