"""PEFT's settings of a LoRA: applied, or refused by name; and the file in which PEFT keeps them."""

import dataclasses
import json
import logging

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from pusa.errors import WeightsError
from pusa.manifest.models import ModelSpec
from pusa.weights.adapters import PEFT_CONFIG, PEFT_FILE, lora_files, read_lora
from pusa.weights.inspect import describe
from pusa.weights.load import read_merged
from pusa.weights.lora_settings import HARMLESS, INITIAL, KEPT_BASE, REFUSED, find_refused
from pusa.weights.resolve import locate_part, require_model
from pusa.weights.tensors import read_file

LAYER = "blocks.0.to_q"
SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["to_q"]}
PREFIX = "base_model.model."


def adapter(path, prefix=PREFIX, layer=LAYER, rank=2, settings=None, metadata=None):
    """Write a LoRA of one layer; with settings, PEFT's file of them beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    factors = {
        f"{prefix}{layer}.lora_A.weight": torch.ones(rank, 3),
        f"{prefix}{layer}.lora_B.weight": torch.ones(4, rank),
    }
    save_file(factors, path, metadata)
    if settings is not None:
        (path.parent / PEFT_CONFIG).write_text(json.dumps(settings))
    return path


def alpha_of(path):
    (layer,) = read_lora(path).layers.values()
    return layer.alpha


# The settings.


def test_every_setting_of_peft_is_judged_and_its_default_is_harmless():
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields == HARMLESS | REFUSED.keys() | {"lora_alpha", "init_lora_weights", "peft_type"}
    assert find_refused(peft.LoraConfig(target_modules=["to_q"]).to_dict()) == []


@pytest.mark.parametrize(
    "name, value",
    [
        *((name, True) for name in REFUSED),
        ("alpha_pattern", {"to_q": 4}),
        ("bias", "lora_only"),
        ("peft_type", "ADALORA"),
        ("modules_to_save", ["proj_out"]),
        *(("init_lora_weights", value) for value in (*INITIAL, "pissa_niter_16", "OLoRA", "magic", ["pissa"])),
        ("a_setting_of_next_year", 3),
    ],
)
def test_a_setting_that_changes_more_than_the_formula_is_refused_by_name(tmp_path, name, value):
    path = adapter(tmp_path / PEFT_FILE, settings={**SETTINGS, name: value})
    with pytest.raises(WeightsError) as caught:
        read_lora(path)
    assert f"{path.with_name(PEFT_CONFIG)} has {name} {value!r}: " in str(caught.value)
    if name == "init_lora_weights" and str(value).lower().startswith(("pissa", "olora", "corda", "lora_ga")):
        assert "path_initial_model_for_weight_conversion" in str(caught.value)
    assert str(caught.value) in describe(tmp_path)[0]["strength"]


@pytest.mark.parametrize(
    "more",
    [
        *({"init_lora_weights": value} for value in (True, False, None, *KEPT_BASE)),
        *({name: off} for name in ("alpha_pattern", "modules_to_save", "new") for off in (None, False, {}, [], "")),
        {"bias": "none", "lora_dropout": 0.5, "loftq_config": {"loftq_bits": 4}, "layers_to_transform": [0]},
        {"target_modules": r".*\.to_k"},
        {"r": 16, "rank_pattern": {"to_q": 2}},
    ],
    ids=str,
)
def test_a_setting_that_leaves_the_formula_is_accepted(tmp_path, more):
    assert alpha_of(adapter(tmp_path / PEFT_FILE, settings={**SETTINGS, **more})) == 8


@pytest.mark.parametrize("initial", ["olora", "pissa"])
def test_what_peft_converts_is_what_peft_trained(tmp_path, initial):
    """The mend that the refusal names: PEFT's own conversion adds to the unchanged base what was trained."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q = torch.nn.Linear(6, 5, bias=False)

    torch.manual_seed(0)
    block = Block()
    base = block.to_q.weight.detach().clone()
    settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"], init_lora_weights=initial)
    trained = peft.get_peft_model(block, settings)
    trained.peft_config["default"].init_lora_weights = True  # else PEFT decomposes again when it loads the initial one
    trained.save_pretrained(tmp_path / "initial")
    trained.peft_config["default"].init_lora_weights = initial
    with torch.no_grad():
        block.to_q.lora_B["default"].weight.add_(torch.randn(5, 2))
    trained.save_pretrained(tmp_path / "plain")
    trained.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    expected = trained.merge_and_unload().to_q.weight

    with pytest.raises(WeightsError, match=rf"has init_lora_weights '{initial}'"):
        read_lora(tmp_path / "plain" / PEFT_FILE)
    ((name, (layer,)),) = read_lora(tmp_path / "converted" / PEFT_FILE).additions.items()
    save_file({name: base}, tmp_path / "base.safetensors")
    stored = read_file(tmp_path / "base.safetensors")[0][name]
    torch.testing.assert_close(read_merged(name, stored, torch.float32, [(1.0, layer)], "cpu"), expected)


# The file of the settings.


@pytest.mark.parametrize("prefix", [PREFIX, ""], ids=["names of PEFT", "names without a prefix"])
def test_a_renamed_file_has_the_settings_beside_it(tmp_path, caplog, prefix):
    path = adapter(tmp_path / "mystyle.safetensors", prefix, settings=SETTINGS)
    with caplog.at_level(logging.WARNING):
        assert alpha_of(path) == 8 and alpha_of(path) == 8
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"{path} has the alpha 8 of {tmp_path / PEFT_CONFIG}, which lies beside it"]
    assert lora_files(path) == (path, tmp_path / PEFT_CONFIG)
    assert describe(tmp_path)[0]["strength"] == "W + strength * alpha / rank * B A, with alpha 8 in adapter_config.json"
    (tmp_path / PEFT_CONFIG).write_text(json.dumps({**SETTINGS, "init_lora_weights": "pissa"}))
    with pytest.raises(WeightsError, match="init_lora_weights 'pissa'"):
        read_lora(path)


@pytest.mark.parametrize("name", ["mystyle.safetensors", PEFT_FILE])
def test_names_of_peft_without_their_settings_have_no_alpha(tmp_path, name):
    path = adapter(tmp_path / name)
    with pytest.raises(WeightsError, match=r'no alpha: PEFT keeps it in adapter_config\.json; .*"r": 2, "lora_alpha"'):
        read_lora(path)
    assert alpha_of(adapter(path, metadata={"lora_alpha": "3"})) == 3
    factors = load_file(adapter(path))
    save_file({**factors, f"{PREFIX}{LAYER}.alpha": torch.tensor(5)}, path)
    assert alpha_of(path) == 5


@pytest.mark.parametrize("name", ["mystyle.safetensors", PEFT_FILE])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"r": 4}, "r is 4, but the tensors have rank 2"),
        ({"r": 4, "rank_pattern": {"to_q": 8}}, r"r is 4 and rank_pattern \{'to_q': 8\}, but the tensors have rank 2"),
        ({"target_modules": ["to_k", "o_q"]}, r"target_modules \['to_k', 'o_q'\] do not name 'blocks\.0\.to_q'"),
    ],
)
def test_the_settings_of_another_lora_are_refused(tmp_path, name, change, message):
    path = adapter(tmp_path / name, settings={**SETTINGS, **change})
    with pytest.raises(
        WeightsError, match=rf"{PEFT_CONFIG} does not fit the tensors of .*{name}: {message}; if it is an"
    ):
        read_lora(path)


def test_settings_in_both_places_must_agree(tmp_path):
    path = adapter(tmp_path / PEFT_FILE, settings=SETTINGS, metadata={"lora_adapter_metadata": '{"lora_alpha": 4}'})
    with pytest.raises(
        WeightsError, match=r"two alphas: 4 in lora_adapter_metadata in .*, 8 in .*adapter_config\.json"
    ):
        read_lora(path)


def test_the_names_of_diffusers_have_their_scale_without_the_file_beside_them(tmp_path):
    assert alpha_of(adapter(tmp_path / "x.safetensors", "transformer.", settings=SETTINGS)) == 2
    factors = load_file(tmp_path / "x.safetensors")
    kohya = {name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t for name, t in factors.items()}
    save_file(kohya, tmp_path / "x.safetensors")
    assert alpha_of(tmp_path / "x.safetensors") == 2 and lora_files(tmp_path / "x.safetensors")[1:] == ()


# Pickles, and hubs.


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_lora_weights.bin", "style.pt"])
def test_a_pickle_is_refused_by_name(base, tmp_path, name):
    (tmp_path / "lora").mkdir()
    torch.save({"x": torch.ones(1)}, tmp_path / "lora" / name)
    (tmp_path / "lora" / PEFT_CONFIG).write_text(json.dumps(SETTINGS))
    places = [tmp_path / "lora" / name, tmp_path / "lora"][: 1 + name.endswith(".bin")]
    for place in places:
        with pytest.raises(WeightsError, match=rf"{name} is a pickle, which can run code .*; expected a safetensors"):
            require_model(ModelSpec(weights=str(base), lora=str(place)))


def test_a_renamed_file_on_a_hub_comes_with_the_settings_beside_it(base, tmp_path, empty_hub):
    layer = "transformer_blocks.0.attn1.to_q"
    tensors = load_file(base / "transformer/diffusion_pytorch_model.safetensors")
    size = tensors[f"{layer}.weight"].shape[0]
    factors = {
        f"{PREFIX}{layer}.lora_A.weight": torch.ones(2, size),
        f"{PREFIX}{layer}.lora_B.weight": torch.ones(size, 2),
    }
    save_file(factors, tmp_path / "x.safetensors")
    content, settings = (tmp_path / "x.safetensors").read_bytes(), json.dumps(SETTINGS).encode()
    empty_hub.add("org/a", {"styles/x.safetensors": content, f"styles/{PEFT_CONFIG}": settings, "x.bin": b"no"})
    empty_hub.add("org/b", {PEFT_FILE: content})
    spec = ModelSpec(weights=str(base), lora="hf:org/a:styles/x.safetensors")
    require_model(spec)
    assert not any("safetensors" in sent.file for sent in empty_hub.sent)
    source = locate_part(spec, "transformer")
    assert {layer.alpha for additions in source.additions().values() for _, layer in additions} == {8}
    for file in source.adapters[0].path.parent.glob("*.json"):
        file.unlink()
    require_model(spec)  # the cache has not all that the hub has
    assert locate_part(spec, "transformer").fingerprint() == source.fingerprint()
    for name, message in {"a:x.bin": "x.bin is a pickle", f"b:{PEFT_FILE}": f"no file '{PEFT_CONFIG}'"}.items():
        empty_hub.sent.clear()
        for attempt in (require_model, lambda spec: locate_part(spec, "transformer")):
            with pytest.raises(WeightsError, match=message):
                attempt(ModelSpec(weights=str(base), lora=f"hf:org/{name}"))
        assert not any(sent.file.endswith(("bin", "safetensors")) for sent in empty_hub.sent)
