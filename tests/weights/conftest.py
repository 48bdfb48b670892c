"""Fixtures: a hub on this machine, and fine-tunes of a small transformer."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from pusa.backbones import find_family
from pusa.finetune.trainable import is_lora, set_trainable
from pusa.weights.lora import write_lora
from pusa.weights.resolve import BUILTIN
from pusa.weights.source import find_part
from pusa.weights.write import config_of, write_transformer
from tests.helpers.fine_tunes import METHOD, recipe
from tests.helpers.hub_server import HubServer


@pytest.fixture
def empty_hub(tmp_path, monkeypatch):
    """Start an empty hub, with an empty cache and no token."""
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
    """Make huggingface_hub, which reads its environment only once, use this address."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    close_session()


@pytest.fixture
def base(networks, tmp_path) -> Path:
    """Return a model's folder with a small transformer, fp32."""
    networks[0].save_pretrained(tmp_path / "base/transformer")
    for part in find_family().encoders:
        (tmp_path / "base" / part).symlink_to(BUILTIN / "tiny" / part)
    return tmp_path / "base"


@pytest.fixture
def record(base) -> dict:
    """Return the record of a fine-tune of that base."""
    fingerprint = find_part(base, "transformer").fingerprint()
    return {"step": 7, "recipe": recipe(fingerprint), "versions": {"torch": "2"}}


@pytest.fixture
def full(networks, record, tmp_path) -> tuple[torch.nn.Module, Path]:
    """Return a fully fine-tuned transformer, and its checkpoint."""
    trained = networks[1]
    with torch.no_grad():
        for weight in trained.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    folder = tmp_path / "full/checkpoints/00000007"
    write_transformer(folder / "transformer", trained.state_dict(), config_of(trained), record, torch.float32, 20_000)
    (folder.parent / "last").symlink_to(folder.name)
    return trained, folder.parent / "last"


@pytest.fixture
def lora(networks, record, tmp_path) -> tuple[torch.nn.Module, Path]:
    """Return a transformer with a trained LoRA beside its weights, and its checkpoint."""
    trained = networks[1]
    set_trainable(trained, METHOD)
    added = {name: weight for name, weight in trained.named_parameters() if is_lora(name)}
    with torch.no_grad():
        for weight in added.values():
            weight.normal_(std=0.3)
    folder = tmp_path / "lora-run/checkpoints/00000007"
    write_lora(folder / "lora", added, METHOD, record)
    (folder.parent / "last").symlink_to(folder.name)
    return trained, folder.parent / "last"
