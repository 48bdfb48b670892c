"""Shipped recipes with small sizes and few steps, to be run on small models; nothing else of them is changed."""

import re
import shlex
from pathlib import Path

SMALL = {
    r"width: \d+": "width: 64",
    r"height: \d+": "height: 32",
    r"num_frames: (81|121|129)": "num_frames: 17",
    r"num_frames: (241|385)": "num_frames: 33",
    r"steps: (\d{2,})": "steps: 2",
    r"processes: \d+": "processes: 1",
    "windows: all, scenes: 10": "windows: first",
    r"validation: {clips: \d+": "validation: {clips: 1",
}


def write_small_recipes(root: Path, folders: str, target: Path) -> Path:
    """Write the recipes in the `folders` of manifests/ (a glob) into `target`, and the picture that they use."""
    for source in sorted((root / "manifests").glob(f"{folders}/*.yaml")):
        text = source.read_text()
        for long, short in SMALL.items():
            text = re.sub(long, short, text)
        (target / source.parent.name).mkdir(parents=True, exist_ok=True)
        (target / source.parent.name / source.name).write_text(text)
    (target / "mochi").mkdir()
    (target / "mochi/still.png").write_bytes((root / "manifests/mochi/still.png").read_bytes())
    return target


def link_videos(drawn: Path, folder: Path) -> None:
    """Put a few of the drawn clips and their captions into the folder `videos` of a recipe."""
    (folder / "videos").mkdir()
    for path in sorted((drawn / "videos").iterdir())[:8]:
        (folder / "videos" / path.name).symlink_to(path)


def commands_of(root: Path, section: str) -> list[list[str]]:
    """Return the commands of a section of manifests/README.md, without the word pusa."""
    text = (root / "manifests/README.md").read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line, comments=True)[1:] for line in block.splitlines()]


def files_of(model: Path) -> dict[str, bytes]:
    """Return the files of a model's folder, as a hub has them."""
    return {path.relative_to(model).as_posix(): path.read_bytes() for path in model.rglob("*") if path.is_file()}
