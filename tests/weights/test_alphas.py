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
        ({"use_dora": True}, "only alpha / rank .* has use_dora True"),
        ({"transformer.init_lora_weights": "pissa"}, "lora_adapter_metadata in .* has init_lora_weights 'pissa'"),
        ({"r": 4}, "has lora_alpha None; expected a number"),
        ({"r": 8, "lora_alpha": 8}, "does not fit the tensors of .*: r is 8, but the tensors have rank 4"),
        ({"lora_alpha": 8, "transformer.lora_alpha": 4}, "the same setting both with and without"),
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

    assert reported() == "W + strength * alpha / rank * B A, with alpha 6 in the settings"
    assert describe(checkpoint)[0]["family"] == "mochi" and describe(checkpoint)[0]["lineage"]["step"] == 7

    alphas = {f"transformer.{name}.alpha": torch.tensor(6.0) for name in layers_of(trained)}
    edit(checkpoint, lambda tensors: tensors.update(alphas), keep=("pusa",))
    assert reported() == "W + strength * alpha / rank * B A, with each layer's alpha in a tensor"
    assert close(loaded(), output(trained))

    edit(checkpoint, lambda tensors: [tensors.pop(name) for name in alphas], keep=("pusa",))
    assert reported() == "W + strength * B A: no alpha is recorded, so alpha = rank"
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
        torch.tensor(0),
        torch.tensor(-6),
        torch.tensor(2**40),
    ],
    ids=str,
)
def test_an_alpha_out_of_range_in_a_tensor_is_refused(lora, base, alpha):
    edit(lora[1], lambda tensors: tensors.update({f"transformer.{layers_of(lora[0])[0]}.alpha": alpha}))
    with pytest.raises(WeightsError, match=r"has \S+\.alpha .*; expected a number above 0 up to 1000000"):
        require_model(ModelSpec(weights=str(base), lora=str(lora[1])))


FLOATS = torch.float64, torch.float32, torch.float16, torch.bfloat16
WHOLE = torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8


@pytest.mark.parametrize("value, dtype", [*((1.5, dtype) for dtype in FLOATS), *((100, dtype) for dtype in WHOLE)])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=len)
def test_an_alpha_in_a_tensor_is_read_exactly(lora, value, dtype, shape):
    names = [f"transformer.{name}.alpha" for name in layers_of(lora[0])]
    alpha = torch.full(shape, value, dtype=dtype)
    edit(lora[1], lambda tensors: tensors.update({name: alpha.clone() for name in names}), keep=())
    layers = read_lora(find_adapter(lora[1])).layers
    assert {layer.alpha for layer in layers.values()} == {value} and len(layers) == len(names)


def add_alphas(tensors, value, first=0, suffix="alpha"):
    names = sorted(name.removesuffix("lora_A.weight") for name in tensors if name.endswith("lora_A.weight"))
    tensors.update({f"{name}{suffix}": torch.tensor(value) for name in names[first:]})


@pytest.mark.parametrize(
    "metadata, change, expected",
    [
        ({}, lambda t: add_alphas(t, 5.0, 1), r"an alpha for some layers, but none for '\S+'; expected all or none"),
        ({}, lambda t: t.update({"x.alpha": torch.tensor(2)}), r"an alpha without its lora_A and lora_B: 'x'"),
        ({}, lambda t: add_alphas(t, [4.0, 4.0]), r"an alpha that is not one number: '\S+to_q'"),
        ({}, lambda t: add_alphas(t, 4.0, suffix="lora_alpha"), r"unknown: '\S+\.lora_alpha'"),
        (
            {"lora_adapter_metadata": '{"lora_alpha": 6}'},
            lambda t: add_alphas(t, 5.0),
            r"two alphas: 6 in lora_adapter_metadata in .*, 5 in \S+\.alpha; remove the wrong one",
        ),
        ({"lora_adapter_metadata": '{"lora_alpha": 6}'}, lambda t: add_alphas(t, 6, 1), 6),
        ({"lora_adapter_metadata": '{"lora_alpha": 6}', "lora_alpha": "5"}, len, r"two alphas: 6 in .*, 5 in the meta"),
        ({"lora_alpha": "5"}, len, 5),
        ({"lora_alpha": "five"}, len, r"the metadata of .* has lora_alpha 'five'; expected a number"),
        ({"ss_network_alpha": "5.0"}, len, r"has ss_network_alpha '5.0', but no tensor has an alpha; .* LAYER\.alpha"),
        ({"ss_network_alpha": "4.0"}, len, 4),
        ({"ss_network_alpha": "Dynamic"}, len, 4),
        ({"ss_network_alpha": "5.0", "ss_network_dim": "4"}, len, r"has ss_network_alpha '5.0', but no tensor has an"),
        ({"ss_network_alpha": "5.0", "ss_network_dim": "x"}, len, r"has ss_network_alpha '5.0', but no tensor has an"),
        ({"ss_network_alpha": "5.0", "ss_network_dim": "64"}, len, 4),  # before its rank was changed
        ({"ss_network_alpha": "5.0"}, lambda t: add_alphas(t, 7.0), 7),
    ],
)
def test_no_recorded_alpha_is_ignored(lora, metadata, change, expected):
    path = find_adapter(lora[1])
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)
    if isinstance(expected, str):
        with pytest.raises(WeightsError, match=expected):
            read_lora(path)
        assert describe(lora[1])[0]["strength"].startswith("refused: ")
    else:
        assert {layer.alpha for layer in read_lora(path).layers.values()} == {expected}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_sum_that_is_not_finite_is_refused(lora, base, value):
    name = f"transformer.{layers_of(lora[0])[0]}.lora_B.weight"
    edit(lora[1], lambda tensors: tensors[name].fill_(value))
    source = locate_part(ModelSpec(weights=str(base), lora=str(lora[1])), "transformer")
    dtype = torch.float16 if value == 1e30 else torch.float32
    with pytest.raises(WeightsError, match=rf"{LORA_FILE}: .* \S+\.weight,? .*not finite"):
        load_part(Mochi(), source, dtype)
