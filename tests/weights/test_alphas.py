"""The scale of a LoRA: alpha / rank wherever alpha is recorded; values out of range are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pusa.backbones.mochi.backbone import Mochi
from pusa.errors import WeightsError
from pusa.manifest.models import ModelSpec
from pusa.weights.adapters import find_adapter, read_lora
from pusa.weights.export import export
from pusa.weights.inspect import describe
from pusa.weights.load import load_part
from pusa.weights.resolve import locate_part, require_model
from tests.helpers.fine_tunes import LORA_FILE, close, edit, layers_of, output, with_settings

NO_ALPHA = r"lora_alpha .*above 0 up to 1000000|settings cannot be read"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"use_dora": True}, "has the settings 'use_dora'"),
        ({"lora_alpha": "x"}, "lora_alpha 'x'"),
        ([], "not a JSON object"),
    ],
)
def test_settings_for_another_formula_are_refused(lora, base, settings, message):
    _, checkpoint = lora
    path = checkpoint / "lora" / LORA_FILE
    save_file(load_file(path), path, {"lora_adapter_metadata": json.dumps(settings)})
    with pytest.raises(WeightsError, match=message):
        source = locate_part(ModelSpec(weights=str(base), lora=str(checkpoint)), "transformer")
        load_part(Mochi(), source, torch.float32)


def test_the_reported_strength_is_the_one_applied(networks, lora, base):
    trained, checkpoint = lora
    spec = ModelSpec(weights=str(base), lora=str(checkpoint))

    def reported() -> str:
        return describe(checkpoint)[0]["strength"]

    def loaded() -> torch.Tensor:
        return output(load_part(Mochi(), locate_part(spec, "transformer"), torch.float32))

    assert reported() == "alpha / rank * B A, with alpha 6 in the settings"
    assert describe(checkpoint)[0]["family"] == "mochi" and describe(checkpoint)[0]["lineage"]["step"] == 7

    alphas = {f"transformer.{name}.alpha": torch.tensor(6.0) for name in layers_of(trained)}
    edit(checkpoint, lambda tensors: tensors.update(alphas), keep=("pusa",))
    assert reported() == "alpha / rank * B A, with each layer's alpha in a tensor"
    assert close(loaded(), output(trained))

    edit(checkpoint, lambda tensors: [tensors.pop(name) for name in alphas], keep=("pusa",))
    assert reported() == "B A: no alpha is recorded"
    ours = loaded()
    networks[0].load_lora_adapter(checkpoint / "lora" / LORA_FILE, prefix="transformer")
    assert close(ours, output(networks[0])) and not close(ours, output(trained))


@pytest.mark.parametrize(
    "alpha",
    [
        "Infinity",
        "-Infinity",
        "NaN",
        "0",
        "-1",
        "true",
        '"6"',
        "[6]",
        "1e7",
        "1e999",
        "1" + 400 * "0",
        "1" + 5000 * "0",
    ],
    ids=lambda alpha: alpha[:9] + str(len(alpha)),
)
def test_an_alpha_out_of_range_is_refused(lora, base, tmp_path, alpha):
    export(lora[1], tmp_path / "peft", "peft")
    with_settings(lora[1], f'{{"transformer.r": 4, "transformer.lora_alpha": {alpha}}}')
    (tmp_path / "peft/adapter_config.json").write_text(f'{{"lora_alpha": {alpha}}}')
    for place in (lora[1], tmp_path / "peft"):
        with pytest.raises(WeightsError, match=NO_ALPHA):
            require_model(ModelSpec(weights=str(base), lora=str(place)))
        with pytest.raises(WeightsError, match=NO_ALPHA):
            export(place, tmp_path / "out", "lora")


@pytest.mark.parametrize(
    "alpha",
    [
        *(torch.tensor(value) for value in (float("inf"), float("nan"), 0.0, -1.0, 1e7)),
        torch.tensor(float("inf"), dtype=torch.bfloat16),
        torch.tensor(True),
        torch.tensor([6]),
    ],
    ids=str,
)
def test_an_alpha_out_of_range_in_a_tensor_is_refused(lora, base, alpha):
    edit(lora[1], lambda tensors: tensors.update({f"transformer.{layers_of(lora[0])[0]}.alpha": alpha}))
    with pytest.raises(WeightsError, match=r"has \S+\.alpha .*; expected a number above 0 up to 1000000"):
        require_model(ModelSpec(weights=str(base), lora=str(lora[1])))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_an_alpha_in_a_tensor_is_read_exactly(lora, dtype):
    names = [f"transformer.{name}.alpha" for name in layers_of(lora[0])]
    edit(lora[1], lambda tensors: tensors.update({name: torch.tensor([1.5], dtype=dtype) for name in names}))
    layers = read_lora(find_adapter(lora[1])).layers
    assert {layer.alpha for layer in layers.values()} == {1.5} and len(layers) == len(names)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_sum_that_is_not_finite_is_refused(lora, base, value):
    name = f"transformer.{layers_of(lora[0])[0]}.lora_B.weight"
    edit(lora[1], lambda tensors: tensors[name].fill_(value))
    source = locate_part(ModelSpec(weights=str(base), lora=str(lora[1])), "transformer")
    dtype = torch.float16 if value == 1e30 else torch.float32
    with pytest.raises(WeightsError, match=rf"{LORA_FILE}: merged into \S+\.weight, .*not finite"):
        load_part(Mochi(), source, dtype)
