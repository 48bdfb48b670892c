"""Fixtures of the tests of expansion: load a manifest with these jobs, or return the lines of its error."""

import os
import re
from pathlib import Path

import pytest

from pusa.errors import ManifestError
from pusa.manifest.loading import load_manifest

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")
FREE_NAMES = pytest.mark.skipif(os.uname().sysname == "Darwin", reason="its file systems change names")
PICTURE = "task: image_to_video, image: a.png"


@pytest.fixture
def load(tmp_path):
    def load(*jobs: str, defaults: str = "{}"):
        text = f'kind: generate\nmodel: {{weights: "builtin:tiny"}}\ndefaults: {defaults}\njobs:\n'
        (tmp_path / "m.yaml").write_text(text + "".join(f"  - {job}\n" for job in jobs), encoding="utf-8")
        return load_manifest(tmp_path / "m.yaml", tmp_path / "run").jobs

    return load


@pytest.fixture
def refused(load):
    """Return a function that returns the lines of the error, without the first, which names the manifest."""

    def refused(*jobs: str, **more: str) -> list[str]:
        with pytest.raises(ManifestError) as error:
            load(*jobs, **more)
        return [line.removeprefix("  ") for line in str(error.value).splitlines()[1:]]

    return refused


def fill(folder: Path, *names: str, text: str = "some words") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def ids(jobs) -> list[str]:
    return [job.id for job in jobs]
