"""A fixture: a pipeline that is loaded once."""

import pytest

from pusa.api.pipeline import PusaPipeline


@pytest.fixture(scope="package")
def tiny():
    """Return a pipeline of the built-in tiny model, which no test changes."""
    pipe = PusaPipeline.from_pretrained("builtin:tiny")
    pipe.set_progress_bar_config(disable=True)
    return pipe
