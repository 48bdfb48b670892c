"""A model hub on this machine, as the tests of weights use it."""

from tests.weights.conftest import empty_hub

__all__ = ["empty_hub"]
