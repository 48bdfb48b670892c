"""The demo's manifests, cut down to a size for tests."""

import re
from pathlib import Path


def shortened_demo(root: Path, folder: Path, numbers: dict[str, int]) -> Path:
    """A copy of manifests/tiny in `folder`, with these numbers wherever a key has this name."""
    folder.mkdir()
    for path in (root / "manifests/tiny").glob("*.yaml"):
        text = path.read_text()
        for key, value in numbers.items():
            text = re.sub(rf"\b{key}: \d+", f"{key}: {value}", text)
        (folder / path.name).write_text(text)
    return folder
