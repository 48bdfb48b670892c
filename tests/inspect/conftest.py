"""What these tests look at: the videos, and the tables that were made of them."""

import pytest

from tests.helpers.inspected_tables import make_run, make_videos


@pytest.fixture(scope="session")
def videos(drawn, tmp_path_factory):
    """The sources; who changes them puts them back."""
    return make_videos(drawn, tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="session")
def run(videos, tmp_path_factory):
    """The folder of a run, for looking at only."""
    return make_run(videos, tmp_path_factory.mktemp("tables") / "run")
