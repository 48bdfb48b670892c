"""Finding and loading parts: missing, foreign and misshaped ones are refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pusa.backbones.mochi.backbone import Mochi
from pusa.errors import WeightsError
from pusa.manifest.models import ModelSpec
from pusa.weights.load import build, load_part
from pusa.weights.resolve import BUILTIN, locate_part, require_model
from pusa.weights.source import BASE_KEY, find_part


@pytest.fixture
def copy(tmp_path):
    """A copy of the tiny model to break."""
    return shutil.copytree(BUILTIN / "tiny", tmp_path / "tiny")


def change(folder, edit):
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "edit, named",
    [
        (lambda t: t.pop("proj_out.bias"), "missing.*proj_out.bias"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected.*extra"),
        (lambda t: t.update({"proj_out.bias": torch.zeros(3)}), "proj_out.bias"),
    ],
    ids=["missing", "unexpected", "mis-shaped"],
)
def test_a_missing_unexpected_or_misshaped_tensor_refuses_the_whole_part(copy, edit, named):
    change(copy, edit)
    with pytest.raises(WeightsError, match=named):
        load_part(Mochi(), find_part(copy, "transformer"), torch.float32)


def test_an_incomplete_file_and_a_missing_part_are_refused(copy):
    path = copy / "transformer/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="is not a complete safetensors file"):
        load_part(Mochi(), find_part(copy, "transformer"), torch.float32)
    shutil.rmtree(copy / "vae")
    with pytest.raises(WeightsError, match=r"has no vae/ and no encoder\.safetensors and no decoder.*; found"):
        find_part(copy, "vae")
    (copy / "vae").mkdir()
    with pytest.raises(WeightsError, match=r"has no config\.json"):
        load_part(Mochi(), find_part(copy, "vae"), torch.float32)


def test_the_built_in_fine_tune_has_the_other_parts_of_its_base():
    pusa = ModelSpec(weights="builtin:tiny-pusa")
    assert locate_part(pusa, "transformer").folder == BUILTIN / "tiny-pusa/transformer"
    assert locate_part(pusa, "vae").folder == BUILTIN / "tiny/vae"


def test_a_fingerprint_depends_on_content_not_on_place(copy):
    ours, theirs = (find_part(model, "vae").fingerprint() for model in (copy, BUILTIN / "tiny"))
    assert ours == theirs != find_part(copy, "transformer").fingerprint()


def test_a_fingerprint_covers_only_the_files_that_are_loaded(copy):
    before = find_part(copy, "vae").fingerprint()
    weights = copy / "vae/diffusion_pytorch_model.safetensors"
    (copy / "vae/.lock").touch()
    shutil.copy(weights, copy / "vae/diffusion_pytorch_model.fp16.safetensors")
    assert find_part(copy, "vae").fingerprint() == before
    change(copy, lambda t: t["proj_out.bias"].add_(1))
    assert find_part(copy, "transformer").fingerprint() != find_part(BUILTIN / "tiny", "transformer").fingerprint()


@pytest.mark.parametrize("base", ["/etc", "..", "../..", ".", "../../x", 5, ["../tiny"]])
def test_an_index_leads_only_to_a_neighbouring_folder(copy, base):
    (copy / "model_index.json").write_text(json.dumps({BASE_KEY: base}))
    shutil.rmtree(copy / "vae")
    with pytest.raises(WeightsError, match="has no vae/"):
        find_part(copy, "vae")


def test_a_tokenizer_without_a_vocabulary_is_refused(copy):
    (copy / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(WeightsError, match="has no vocabulary; expected one of tokenizer"):
        Mochi().load_tokenizer("tokenizer", copy / "tokenizer")


@pytest.mark.parametrize(
    "record, message",
    [
        ('{"recipe": {"latent_space": "foo"}}', "has latent_space 'foo'; expected dit or vae"),
        ('{"recipe": {"backbone": "wan"}}', "has backbone 'wan'; the manifest has 'mochi'"),
        ('{"recipe": null}', "incomplete"),
        ('{"recipe": ', "incomplete"),
        ("{}", "incomplete"),
    ],
)
def test_a_checkpoint_with_an_invalid_record_is_refused(copy, record, message):
    (copy / "checkpoint.json").write_text(record)
    with pytest.raises(WeightsError, match=message):
        require_model(ModelSpec(weights="builtin:tiny", checkpoint=str(copy)))


def test_an_invalid_configuration_is_refused(copy):
    config = json.loads((copy / "transformer/config.json").read_text())
    (copy / "transformer/config.json").write_text(json.dumps({**config, "num_layers": "x"}))
    for load in (lambda source: load_part(Mochi(), source, torch.float32), lambda source: build(Mochi(), source)):
        with pytest.raises(WeightsError, match=r"transformer/config\.json: num_layers: .*integer \(given: 'x'"):
            load(find_part(copy, "transformer"))
