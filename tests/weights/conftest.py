"""A hub on this machine for the tests that download."""

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from tests.weights.hub_server import HubServer


@pytest.fixture
def empty_hub(tmp_path, monkeypatch):
    """A hub with nothing on it, an empty cache, and no token."""
    with HubServer(tmp_path / "hub") as server:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        point_at(server.url, monkeypatch)
        yield server
        close_session()


def point_at(url, monkeypatch):
    """Make huggingface_hub, which reads its environment once, speak to this address."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    close_session()
