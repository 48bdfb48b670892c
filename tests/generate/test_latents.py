"""Latents in a file are read as they were written, and values that are not finite never become a video."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file

from pusa.errors import MediaError, NotFiniteError
from pusa.generate.check import check_jobs
from pusa.generate.latents import read_facts, read_header, read_latents, read_verified, save_latents, save_verified
from pusa.generate.stage import generate
from pusa.weights.model import Model
from tests.helpers.stub_model import TINY, StubModel, manifest_of

FACTS = {"key": "0", "latent_space": "dit", "cyclic": "false"}


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    path, latents = tmp_path / "a.latents.safetensors", torch.randn(12, 2, 4, 4)
    save_latents(path, latents, FACTS)
    whole = path.read_bytes()
    assert torch.equal(read_latents(path), latents)
    noticed = 0
    for place in range(0, len(whole), 5):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found, facts = read_latents(path), read_header(path).facts
        except MediaError:
            noticed += 1
        else:  # only the name of the hash was hit
            assert torch.equal(found, latents) and {key: facts.get(key) for key in FACTS} == FACTS
    assert noticed >= len(range(0, len(whole), 5)) - 2


def test_no_flipped_bit_of_several_tensors_goes_unnoticed(tmp_path):
    path, tensors = tmp_path / "a", {"x": torch.randn(3, 4), "y": torch.randn(3, 4).bfloat16(), "none": torch.empty(0)}
    save_verified(path, tensors, FACTS)
    found, facts = read_verified(path)
    assert facts == FACTS and found.keys() == tensors.keys() and FACTS.items() <= read_facts(path).items()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(MediaError):
            read_verified(path)
    save_file({"x": torch.ones(2, dtype=torch.int32)}, path, {"sha256": "0"})
    with pytest.raises(MediaError, match="tensors that are not floats"):
        read_verified(path)
    with pytest.raises(MediaError, match="no tensor 'latents'"):
        read_latents(path)


def test_the_hash_of_latents_is_that_of_earlier_versions(tmp_path):
    path, latents = tmp_path / "a", torch.arange(6.0).reshape(1, 1, 2, 3)
    stated = json.dumps(["torch.float32", [1, 1, 2, 3], FACTS], sort_keys=True).encode()
    written = hashlib.sha256(stated + latents.numpy().tobytes()).hexdigest()
    save_file({"latents": latents}, path, {**FACTS, "sha256": written})
    assert torch.equal(read_latents(path), latents)
    save_latents(tmp_path / "b", latents, FACTS)
    assert read_facts(tmp_path / "b") == read_facts(path)


def test_latents_of_earlier_versions_have_no_hash_and_are_read(tmp_path):
    path = tmp_path / "a.latents.safetensors"
    save_file({"latents": torch.ones(12, 2, 4, 4)}, path, FACTS)
    assert torch.equal(read_latents(path), torch.ones(12, 2, 4, 4))
    save_file({"latents": torch.full((12, 2, 4, 4), torch.inf)}, path, FACTS)
    with pytest.raises(MediaError, match="not finite"):
        read_latents(path)


def test_damaged_latents_are_sampled_again_and_are_no_input(tmp_path, caplog):
    class FailsToDecode(StubModel):
        def decode_chunks(self, z_CFhw):
            raise RuntimeError("no memory")

    manifest = manifest_of({"id": "a"})
    latents, finished = (tmp_path / f"videos/{folder}a.latents.safetensors" for folder in (".work/", ""))
    assert generate(manifest, tmp_path, FailsToDecode).failed and not finished.exists()
    whole = latents.read_bytes()
    latents.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    other = manifest_of({"id": "b", "task": "extension", "video": latents, "given": [0]})
    assert "is damaged: its content has another hash" in check_jobs(other)["b"]
    assert "is damaged: its content has another hash" in generate(other, tmp_path / "b", StubModel).failed["b"]
    assert generate(manifest, tmp_path, StubModel).made == ["a"] and "is sampled again" in caplog.text
    assert finished.read_bytes() == whole and not latents.exists()


class Diverges(StubModel):
    """Computes NaN where a prompt says, and one colour everywhere."""

    def encode_text(self, prompts, padded=True):
        text = super().encode_text(prompts, padded)
        text.features[:] = {"text": torch.nan, "step": 1}.get(prompts[0], 0)
        return text

    def encode(self, frames_THWC):
        return super().encode(frames_THWC) * torch.nan

    def decode_chunks(self, z_CFhw):
        return super().decode_chunks(z_CFhw * 0)


def test_values_that_are_not_finite_fail_the_job_and_name_where(tmp_path, drawn):
    class Backbone(type(StubModel(TINY).backbone)):
        calls = 0

        def predict(self, transformer, z_BCFhw, sigma_BF, text, embedded_guidance=None):
            self.calls += 1
            is_bad = (text.features[:, 0, 0] == 1) & (self.calls == 2)
            return torch.where(is_bad[:, None, None, None, None], torch.nan, torch.zeros_like(z_BCFhw))

    def new_model(spec):
        model = Diverges(spec)
        model.backbone = Backbone()
        return model

    picture = {"task": "image_to_video", "image": drawn / "media/ball-first.png"}
    names = ("step", "text", "input", "constant")
    jobs = [{"id": name, "prompt": name, "steps": 3, **(picture if name == "input" else {})} for name in names]
    result = generate(manifest_of(*jobs), tmp_path, new_model)
    assert result.made == ["constant"]
    for id, text in {
        "text": "the text features of prompt: 4 of 4 values are NaN or infinite",
        "input": "the latents of ball-first.png: 192 of 192 values are NaN or infinite",
        "step": "the latents after denoising step 2 of 3: 384 of 384 values are NaN or infinite",
    }.items():  # fmt: skip
        assert result.failed[id] == text
    facts = json.loads((tmp_path / "videos/constant.json").read_text())
    assert facts["warning"] == "the whole video has one colour, (100, 100, 100), as if the model had failed"


def test_the_vae_does_not_turn_nan_into_black():
    with pytest.raises(NotFiniteError, match="the VAE decodes the latents to values that are NaN"):
        Model(TINY, "cpu").decode(torch.full((12, 1, 4, 4), torch.nan))
