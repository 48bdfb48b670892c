"""The videos and tables that these tests inspect."""

import pytest

from tests.helpers.inspected_tables import make_run, make_videos


@pytest.fixture(scope="session")
def videos(drawn, tmp_path_factory):
    """The sources; a test that changes them must restore them."""
    return make_videos(drawn, tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="session")
def run(videos, tmp_path_factory):
    """The folder of a run; tests must not change it."""
    return make_run(videos, tmp_path_factory.mktemp("tables") / "run")
