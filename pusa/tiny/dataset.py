"""The demo's data: drawn clips as real H.264 files with captions beside them, and unseen ones to condition on."""

from pathlib import Path

from pusa.system.files import write_text
from pusa.system.locks import sole_writer
from pusa.system.progress import track
from pusa.tiny.shapes import FPS, Scene, draw, scenes
from pusa.video.media import write_image, write_video

CLIPS = 96
FIRST_SEED = 500_000  # the family itself was trained on seeds below
MEDIA = {
    "ball": Scene((("red", "circle"),), "right", "dark", 900_001),
    "box": Scene((("green", "square"),), "up", "dark", 900_002),
    "roof": Scene((("yellow", "triangle"),), "left", "light", 900_003),
}


def draw_dataset(folder: Path, count: int = CLIPS) -> None:
    """Write `videos/<number>.mp4` + `.txt`, and for each of `MEDIA` its clip and its first and last frame.

    What is there stays: the drawings depend on nothing but their seeds.
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
