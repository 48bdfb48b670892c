"""Manifests for the commands."""

import pytest

from tests.helpers.short_demo import shortened_demo


@pytest.fixture
def short_manifests(root, drawn, tmp_path):
    """Return a folder of the demo's manifests with two steps, and a run folder with their data."""
    folder = shortened_demo(root, tmp_path / "manifests", {"steps": 2, "batch_size": 4})
    (tmp_path / "run").mkdir()
    (tmp_path / "run/drawn").symlink_to(drawn)
    return folder, tmp_path / "run"
