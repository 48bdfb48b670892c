"""A hub on this machine, as for weights."""

from tests.weights.conftest import empty_hub

__all__ = ["empty_hub"]
