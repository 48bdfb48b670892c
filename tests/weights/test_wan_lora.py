"""LoRAs of Wan: every published naming loads, several are summed and rounded once, and ours are exported for others."""

import itertools
import json
import re

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from pusa.backbones.base import find_backbone
from pusa.errors import WeightsError
from pusa.finetune.trainable import is_lora, set_trainable
from pusa.manifest.models import ModelSpec
from pusa.manifest.training import Lora
from pusa.system.files import digest
from pusa.weights.adapters import find_adapter, read_lora
from pusa.weights.convert import convert
from pusa.weights.export import export
from pusa.weights.inspect import describe, format_facts
from pusa.weights.load import load_part
from pusa.weights.lora import write_lora
from pusa.weights.resolve import locate_part, require_model
from pusa.weights.source import PartFiles, find_part
from pusa.weights.tensors import read_file
from pusa.weights.write import convert_pickle
from tests.helpers.small_wan import new_wan_transformer, write_wan_2_1, write_wan_2_2_a14b

# Original name of a layer -> diffusers' name, and the rank that the LoRA has there.
LAYERS = {
    "blocks.0.self_attn.q": ("blocks.0.attn1.to_q", 4),
    "blocks.0.cross_attn.o": ("blocks.0.attn2.to_out.0", 2),
    "blocks.1.cross_attn.v": ("blocks.1.attn2.to_v", 4),
    "blocks.1.ffn.0": ("blocks.1.ffn.net.0.proj", 8),
    "blocks.1.ffn.2": ("blocks.1.ffn.net.2", 3),
    "text_embedding.2": ("condition_embedder.text_embedder.linear_2", 2),
    "time_projection.1": ("condition_embedder.time_proj", 4),
    "head.head": ("proj_out", 1),
}
ALPHA = 3.0
METHOD = Lora(method="lora", rank=4, alpha=6, targets=("to_q", "to_out.0", "ffn.net.2"))


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """Return the folder of a small Wan 2.1."""
    return write_wan_2_1(tmp_path_factory.mktemp("wan") / "model")


@pytest.fixture(scope="module")
def base(wan):
    """Return the weights of its transformer by diffusers' names."""
    return load_file(wan / "transformer/diffusion_pytorch_model.safetensors")


def factors(base, seed=0):
    """Return the original name of each layer -> its random A and B."""
    torch.manual_seed(seed)
    shapes = {name: base[f"{ours}.weight"].shape for name, (ours, _) in LAYERS.items()}
    return {
        name: (torch.randn(rank, shapes[name][1]), torch.randn(shapes[name][0], rank))
        for name, (_, rank) in LAYERS.items()
    }


def loaded(wan, *loras, dtype=torch.float32, backbone="wan2.1"):
    """Return the transformer's weights with LoRAs, each a path or a mapping as in a manifest."""
    named = [lora if isinstance(lora, dict) else {"weights": str(lora)} for lora in loras]
    spec = ModelSpec(backbone=backbone, weights=str(wan), loras=tuple(named))
    require_model(spec)
    return load_part(find_backbone(backbone), locate_part(spec, "transformer"), dtype).state_dict()


def saved(path, tensors, metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def plain(tmp_path, base, seed, scale=1.0, name="lora"):
    """Write a LoRA in original names without alphas, as Pusa's own are."""
    tensors = {}
    for layer, (down, up) in factors(base, seed).items():
        tensors |= {f"{layer}.lora_A.weight": down * scale, f"{layer}.lora_B.weight": up}
    return saved(tmp_path / f"{name}{seed}.safetensors", tensors)


def expected(base, loras):
    """Return W + the sum of strength * B A in fp32. `loras` are pairs of factors and strength."""
    result = dict(base)
    for layer, (ours, _) in LAYERS.items():
        for pairs, strength in loras:
            down, up = pairs[layer]
            result[f"{ours}.weight"] = result[f"{ours}.weight"] + strength * (up @ down)
    return result


def same(ours, theirs):
    torch.testing.assert_close(ours, {name: tensor for name, tensor in theirs.items()}, rtol=1e-5, atol=1e-5)


def original(layer, ours):
    return layer


def diffusers(layer, ours):
    return ours


NAMINGS = {
    # What the file's names are made of: prefix, name of the layer, halves, does it have alphas.
    "Pusa's": ("", original, ("lora_A", "lora_B"), False),
    "a dump of PEFT's modules": ("", original, ("lora_A.default", "lora_B.default"), False),
    "DiffSynth's older": ("pipe.dit.", original, ("lora_A.default", "lora_B.default"), False),
    "ComfyUI's": ("diffusion_model.", original, ("lora_A", "lora_B"), False),
    "ComfyUI's longer": ("model.diffusion_model.", original, ("lora_A", "lora_B"), True),
    "LightX2V's": ("diffusion_model.", original, ("lora_down", "lora_up"), True),
    "LightX2V's without alpha": ("diffusion_model.", original, ("lora_down", "lora_up"), False),
    "no prefix, with alpha": ("", original, ("lora_down", "lora_up"), True),
    "musubi's": ("lora_unet_", lambda layer, ours: layer.replace(".", "_"), ("lora_down", "lora_up"), True),
    "VideoX-Fun's": ("lora_unet__", lambda layer, ours: layer.replace(".", "_"), ("lora_down", "lora_up"), True),
    "kohya's of diffusers": ("lora_unet_", lambda layer, ours: ours.replace(".", "_"), ("lora_down", "lora_up"), True),
    "diffusers'": ("transformer.", diffusers, ("lora_A", "lora_B"), False),
    "PEFT's": ("base_model.model.", original, ("lora_A", "lora_B"), True),
    "PEFT's of diffusers": ("base_model.model.", diffusers, ("lora_A.default", "lora_B.default"), True),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_adds_the_same(wan, base, tmp_path, naming):
    prefix, name, (a, b), has_alpha = NAMINGS[naming]
    tensors = {}
    for layer, (down, up) in (pairs := factors(base)).items():
        module = prefix + name(layer, LAYERS[layer][0])
        tensors |= {f"{module}.{a}.weight": down, f"{module}.{b}.weight": up}
        if has_alpha:
            tensors[f"{module}.alpha"] = torch.tensor(ALPHA)
    path = saved(tmp_path / "x.safetensors", tensors)
    scaled = {layer: (down * (ALPHA / len(down) if has_alpha else 1), up) for layer, (down, up) in pairs.items()}
    same(loaded(wan, path), expected(base, [(scaled, 1)]))
    same(loaded(wan, {"weights": str(path), "strength": -1.5}), expected(base, [(scaled, -1.5)]))
    (facts,) = describe(path)
    assert facts["family"] == "wan" and facts["kind"] == "LoRA of rank 1..8 (8 layers)"
    has = "with each layer's alpha in a tensor" if has_alpha else "no alpha is recorded, so alpha = rank"
    assert has in facts["strength"] and "strength" in facts["strength"]
    assert (
        naming == "ComfyUI's longer" or prefix.rstrip("_") in facts["names"]
    )  # the longer one is of whole models, too
    assert facts["names"].startswith("of wan" if name is original else ("of wan", "of diffusers"))


def test_whole_deltas_are_added_with_the_strength(wan, base, tmp_path):
    torch.manual_seed(1)
    names = {
        "diffusion_model.blocks.1.norm3.diff": "blocks.1.norm2.weight",
        "diffusion_model.blocks.1.norm3.diff_b": "blocks.1.norm2.bias",
        "diffusion_model.blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
        "diffusion_model.blocks.0.self_attn.q.diff_b": "blocks.0.attn1.to_q.bias",
        "diffusion_model.blocks.0.diff_m": "blocks.0.scale_shift_table",
        "diffusion_model.blocks.1.modulation.diff": "blocks.1.scale_shift_table",
        "diffusion_model.head.diff_m": "scale_shift_table",
        "diffusion_model.patch_embedding.diff": "patch_embedding.weight",
        "diffusion_model.time_embedding.0.diff_b": "condition_embedder.time_embedder.linear_1.bias",
    }
    deltas = {name: torch.randn_like(base[ours]) for name, ours in names.items()}
    after = dict(base) | {ours: base[ours] + 0.5 * deltas[name] for name, ours in names.items()}
    path = saved(tmp_path / "deltas.safetensors", deltas)
    same(loaded(wan, {"weights": str(path), "strength": 0.5}), after)
    (facts,) = describe(path)
    counts = {"diff": 4, "diff_b": 3, "diff_m": 2}
    assert all(f"{count} whole deltas named *.{end}" in facts["kind"] for end, count in counts.items())
    assert facts["strength"] == "W + strength * delta"
    low_rank = {
        f"diffusion_model.blocks.0.self_attn.q.lora_{half}.weight": tensor
        for half, tensor in zip(("down", "up"), factors(base)["blocks.0.self_attn.q"], strict=True)
    }
    both = saved(tmp_path / "both.safetensors", {**deltas, **low_rank})
    (facts,) = describe(both)
    assert facts["strength"].endswith("so alpha = rank; W + strength * delta")
    down, up = low_rank.values()
    after["blocks.0.attn1.to_q.weight"] = base["blocks.0.attn1.to_q.weight"] + 0.5 * up @ down
    same(loaded(wan, {"weights": str(both), "strength": 0.5}), after)


@pytest.mark.parametrize("trailing", [(), (1, 1, 1)], ids=["up of a matrix", "up of a convolution"])
def test_a_lora_of_a_convolution_is_added(wan, base, tmp_path, trailing):
    torch.manual_seed(2)
    weight = base["patch_embedding.weight"]
    down, up = torch.randn(3, *weight.shape[1:]), torch.randn(weight.shape[0], 3)
    names = ("patch_embedding.lora_down.weight", "patch_embedding.lora_up.weight")
    path = saved(tmp_path / "conv.safetensors", dict(zip(names, (down, up.reshape(*up.shape, *trailing)), strict=True)))
    update = torch.einsum("or,rcthw->octhw", up, down)
    torch.testing.assert_close(loaded(wan, path)["patch_embedding.weight"], weight + update)
    flat = saved(tmp_path / "flat.safetensors", dict(zip(names, (down.flatten(1), up), strict=True)))
    with pytest.raises(WeightsError, match=r"has other shapes of .patch_embedding.weight: the LoRA's is \(48, 64\)"):
        loaded(wan, flat)


# Several.


def test_several_are_summed_in_fp32_and_rounded_once_in_any_order(wan, base, tmp_path):
    strengths = (1.4, -0.6, 1.0)
    paths = [plain(tmp_path, base, seed, scale=0.05) for seed in range(3)]
    named = [{"weights": str(path), "strength": strength} for path, strength in zip(paths, strengths, strict=True)]
    ours = loaded(wan, *named, dtype=torch.bfloat16)
    halves = [{name: (a * 0.05, b) for name, (a, b) in factors(base, seed).items()} for seed in range(3)]
    changed = [f"{layer}.weight" for layer, _ in LAYERS.values()]

    def equal(theirs):
        return all(torch.equal(ours[name], theirs[name].bfloat16()) for name in changed)

    terms = list(zip(halves, strengths, strict=True))
    assert any(equal(expected(base, order)) for order in itertools.permutations(terms))
    for order in itertools.permutations(terms):
        rounded = base
        for term in order:  # what merging one after another would give
            rounded = {name: weight.bfloat16().float() for name, weight in expected(rounded, [term]).items()}
        assert not equal(rounded)
    for order in itertools.permutations(named):
        again = loaded(wan, *order, dtype=torch.bfloat16)
        assert all(torch.equal(again[name], ours[name]) for name in ours)


def test_strength_0_is_the_base_to_the_bit(wan, base, tmp_path):
    path = plain(tmp_path, base, 0)
    folder = tmp_path / "negative/transformer"
    folder.mkdir(parents=True)
    negative = {name: torch.where(weight > 0, weight, -0.0) for name, weight in base.items()}
    saved(folder / "diffusion_pytorch_model.safetensors", negative, {"format": "pt"})
    (folder / "config.json").write_bytes((wan / "transformer/config.json").read_bytes())
    for part in ("vae", "text_encoder", "tokenizer"):
        (tmp_path / "negative" / part).symlink_to(wan / part)
    for dtype in (torch.float32, torch.bfloat16):
        ours = loaded(tmp_path / "negative", {"weights": str(path), "strength": 0.0}, dtype=dtype)
        without = loaded(tmp_path / "negative", dtype=dtype)
        for name, weight in ours.items():
            assert torch.equal(weight.view(torch.uint8), without[name].view(torch.uint8)), name


def test_a_single_lora_of_strength_1_keeps_its_fingerprint_and_others_have_their_own(wan, base, tmp_path):
    """The literal is the rule of `lora:` since the first version: results that are made already stay valid."""
    paths = [plain(tmp_path, base, seed) for seed in range(2)]
    own = [PartFiles("transformer", (path,)).fingerprint() for path in paths]
    plain_base = find_part(wan, "transformer").fingerprint()

    def fingerprint(*loras, short=None):
        spec = ModelSpec(backbone="wan2.1", weights=str(wan), loras=loras, lora=short)
        return locate_part(spec, "transformer").fingerprint()

    a, b = ({"weights": str(path)} for path in paths)
    assert fingerprint(short=str(paths[0])) == fingerprint(a) == digest([plain_base, own[0]])[:16]
    assert fingerprint(a, b) == fingerprint(b, a)
    found = [
        plain_base,
        fingerprint(a),
        fingerprint(b),
        fingerprint({**a, "strength": 1.4}),
        fingerprint({**a, "strength": -1}),
        fingerprint(a, b),
        fingerprint(a, {**b, "strength": 1.4}),
        fingerprint({**a, "strength": 1.4}, b),
    ]
    assert len(set(found)) == len(found)


@pytest.fixture(scope="module")
def a14b(tmp_path_factory):
    """Return the folder of a small Wan 2.2 A14B."""
    return write_wan_2_2_a14b(tmp_path_factory.mktemp("a14b") / "model")


def test_a_lora_changes_its_own_expert_alone(a14b, base, tmp_path):
    path = plain(tmp_path, base, 0)
    none = ModelSpec(backbone="wan2.2-a14b", weights=str(a14b))
    parts = {"high": "transformer", "low": "transformer_2"}
    for expert, part in parts.items():
        spec = none.model_validate({**none.model_dump(), "loras": [{"weights": str(path), "expert": expert}]})
        require_model(spec)
        for each in parts.values():
            before, after = locate_part(none, each), locate_part(spec, each)
            assert (before.fingerprint() == after.fingerprint()) == (each != part)
            assert bool(after.adapters) == (each == part)
        own = load_file(a14b / part / "diffusion_pytorch_model.safetensors")
        ours = load_part(find_backbone("wan2.2-a14b"), locate_part(spec, part), torch.float32).state_dict()
        same(ours, expected(own, [(factors(base), 1)]))
    both = [{"weights": str(path), "expert": expert, "strength": 1.4} for expert in parts]
    require_model(ModelSpec(backbone="wan2.2-a14b", weights=str(a14b), loras=both))


def test_a_lora_of_an_expert_is_refused_for_the_other(a14b, base, tmp_path):
    tensors = load_file(plain(tmp_path, base, 0))
    record = {"backbone": "wan2.2-a14b", "expert": "high", "recipe": {}}
    path = saved(tmp_path / "high.safetensors", tensors, {"pusa": json.dumps(record)})
    for expert, message in (
        ("high", None),
        ("low", r"expert 'high'.* has 'low'|trained on expert 'high', and is named"),
    ):
        loras = ({"weights": str(path), "expert": expert},)
        spec = ModelSpec(backbone="wan2.2-a14b", weights=str(a14b), loras=loras)
        if message is None:
            require_model(spec)
            continue
        with pytest.raises(WeightsError, match=message):
            require_model(spec)
        with pytest.raises(WeightsError, match="trained on expert 'high', and is named with expert 'low'"):
            locate_part(spec, "transformer_2").additions()


def test_a_manifest_names_each_lora_once_with_its_expert():
    cases = [
        (
            "wan2.2-a14b",
            [{"weights": "a", "strength": 1.4}],
            "has no expert; .* needs expert: high or low, in `loras:`",
        ),
        ("wan2.1", [{"weights": "a", "expert": "high"}], "has expert .high.; .* needs none"),
        ("wan2.1", [{"weights": "a"}, {"weights": "a", "strength": 0.5}], "LoRA 'a' is named twice"),
        ("wan2.1", [{"weights": str(n)} for n in range(17)], "at most 16"),
        ("wan2.1", [{"weights": "a", "strength": 1e9}], "less than or equal to 100"),
        ("wan2.1", [{"weights": "a", "strength": float("nan")}], "finite"),
        ("wan2.1", [{"weights": "a", "scale": 2}], "scale"),
    ]
    for backbone, loras, message in cases:
        with pytest.raises(ValidationError, match=message):
            ModelSpec.model_validate({"backbone": backbone, "weights": "w", "loras": loras})
    ModelSpec.model_validate(
        {"backbone": "wan2.2-a14b", "weights": "w", "loras": [{"weights": "a", "expert": e} for e in ("high", "low")]}
    )


def test_resized_ranks_make_the_alpha_of_the_metadata_that_of_another_file(wan, base, tmp_path, caplog):
    pairs, tensors = factors(base), {}
    for layer, (down, up) in pairs.items():  # ranks differ, no tensor has an alpha, as in Kijai's resized files
        module = f"diffusion_model.{layer}"
        tensors |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
    path = saved(tmp_path / "resized.safetensors", tensors, {"ss_network_alpha": "64", "ss_network_dim": "512"})
    same(loaded(wan, path), expected(base, [(pairs, 1)]))
    assert "has no tensor with an alpha, so alpha = rank" in caplog.text and "ss_network_alpha '64'" in caplog.text
    assert describe(path)[0]["strength"] == "W + strength * B A: no alpha is recorded, so alpha = rank"


def test_sixteen_loras_are_summed(wan, base, tmp_path):
    paths = [plain(tmp_path, base, seed, scale=0.1) for seed in range(16)]
    halves = [{name: (a * 0.1, b) for name, (a, b) in factors(base, seed).items()} for seed in range(16)]
    same(loaded(wan, *paths), expected(base, [(pairs, 1) for pairs in halves]))


# What is refused.


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.update({"blocks.0.self_attn.q.dora_scale": torch.ones(3)}),
            r"unknown: 'blocks.0.self_attn.q.dora_s",
        ),
        (lambda t: t.update({"img_emb.proj.1.diff": torch.ones(3)}), r"has no 'img_emb.proj.1.weight'"),
        (
            lambda t: t.update({"blocks.0.cross_attn.k_img.diff_b": torch.ones(3)}),
            r"has no 'blocks.0.cross_attn.k_img.b",
        ),
        (
            lambda t: t.update({"blocks.0.norm3.diff": torch.ones(3)}),
            r"has other shapes of .blocks.0.norm2.weight: .*\(3,",
        ),
        (
            lambda t: t.update({"blocks.0.diff_m": torch.ones(6, 48)}),
            r"other shapes of .blocks.0.scale_shift_table: .*\(6,",
        ),
        (lambda t: t.update({"text_encoder.x.lora_A.weight": torch.ones(3, 3)}), "without the other: 'text_encoder.x'"),
        (
            lambda t: t.update({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(4, 48)}),
            "the same twice, under different names: .*self_attn",
        ),
        (
            lambda t: t.update({f"blocks.0.attn1.to_q.lora_{h}.weight": torch.ones(48, 48) for h in "AB"}),
            r"has no 'blocks.0.attn1.to_q.weight'|of one kind twice to 'blocks.0.attn1.to_q.weight'",
        ),
        (
            lambda t: t.update({f"blocks.7.self_attn.q.lora_{h}.weight": torch.ones(48, 48) for h in "AB"}),
            "blocks.7.attn1",
        ),
        (
            lambda t: t.update({f"blocks.99999999999.ffn.0.lora_{h}.weight": torch.ones(48, 48) for h in "AB"}),
            "has no 'blocks.99999999999.ffn.0.weight'",
        ),
        (lambda t: t.clear(), "transformer.* is not a LoRA|it has no tensors|is not a LoRA"),
        (
            lambda t: t.update({"blocks.0.self_attn.q.alpha": torch.tensor(2.0)}),
            "an alpha for some layers, but none for",
        ),
    ],
)
def test_a_tensor_that_cannot_be_used_is_named(wan, base, tmp_path, change, message):
    tensors = load_file(plain(tmp_path, base, 0))
    change(tensors)
    path = saved(tmp_path / "x.safetensors", tensors)
    with pytest.raises(WeightsError, match=message):
        require_model(ModelSpec(backbone="wan2.1", weights=str(wan), loras=({"weights": str(path)},)))


def test_names_of_another_model_are_refused_with_a_few_of_them(wan, tmp_path):
    layers = [f"lora_unet_joint_blocks_{n}_x_block_attn_qkv" for n in range(30)]
    tensors = {f"{layer}.lora_down.weight": torch.ones(2, 3) for layer in layers}
    path = saved(
        tmp_path / "x.safetensors", {**tensors, **{f"{layer}.lora_up.weight": torch.ones(3, 2) for layer in layers}}
    )
    with pytest.raises(WeightsError, match=r"has no 'lora_unet_joint_blocks_0_x_block_attn_qkv.weight'.*and \d+ more"):
        require_model(ModelSpec(backbone="wan2.1", weights=str(wan), loras=({"weights": str(path)},)))
    assert "of no known family" in format_facts(describe(path))


def test_a_pickle_is_refused_with_what_to_do(wan, tmp_path):
    torch.save({"blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 48)}, tmp_path / "pusa_v1.pt")
    with pytest.raises(WeightsError, match=r"pusa_v1.pt is a pickle, .* weights convert FILE FOLDER --to safetensors"):
        require_model(ModelSpec(backbone="wan2.1", weights=str(wan), lora=str(tmp_path / "pusa_v1.pt")))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pickle_becomes_the_same_lora(wan, base, tmp_path, wrapped):
    tensors = load_file(plain(tmp_path, base, 0))
    transposed = {name: tensor.T.contiguous().T for name, tensor in tensors.items()}  # not in C order
    torch.save({"state_dict": transposed} if wrapped else transposed, tmp_path / "pusa_v1.pt")
    path = convert_pickle(tmp_path / "pusa_v1.pt", tmp_path / "out")
    same(loaded(wan, path), expected(base, [(factors(base), 1)]))
    assert convert_pickle(tmp_path / "pusa_v1.pt", tmp_path / "out") == path  # again: it is kept
    torch.save({"x": torch.ones(1)}, tmp_path / "pusa_v1.pt")
    with pytest.raises(WeightsError, match="exists already and is another file"):
        convert_pickle(tmp_path / "pusa_v1.pt", tmp_path / "out")


class Code:
    """Would make a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    "content, message",
    [
        ([torch.ones(2)], "is list, or empty"),
        ({}, "is dict, or empty"),
        ({"a": torch.ones(2), "step": 3}, "has 'step', which is no plain tensor of floats"),
        ({"a": torch.ones(2), "b": {"c": torch.ones(2)}}, "has 'b', which"),
        ({"a": torch.ones(2), "b": torch.ones(2).int()}, "has 'b', which"),
        ({"a": torch.ones(2), 5: torch.ones(2)}, "has 5, which"),
        ({"a": torch.ones(1).expand(10**6)}, "has 'a', which"),
        ({"a": torch.eye(2).to_sparse()}, "has 'a', which"),
        (b"no pickle", "cannot be read as tensors alone"),
        (Code, "cannot be read as tensors alone"),
    ],
)
def test_a_pickle_of_anything_but_tensors_is_refused_and_runs_no_code(tmp_path, content, message):
    path = tmp_path / "x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(Code(tmp_path / "ran") if content is Code else content, path)
    with pytest.raises(WeightsError, match=message):
        convert_pickle(path, tmp_path / "out")
    assert [inner.name for inner in tmp_path.iterdir()] == ["x.pt"]


# Export.


def output(transformer):
    """Return the output of a transformer, diffusers' or ours, for one level."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(1, 16, 2, 4, 4, generator=generator),
            timestep=torch.tensor([300.0]),
            encoder_hidden_states=torch.randn(1, 8, 16, generator=generator),
            return_dict=False,
        )[0]


@pytest.fixture
def trained(wan, tmp_path):
    """Return a transformer with a trained LoRA, and its checkpoint."""
    backbone = find_backbone("wan2.1")
    source = find_part(wan, "transformer")
    transformer = load_part(backbone, source, torch.float32)
    set_trainable(transformer, METHOD)
    added = {name: weight for name, weight in transformer.named_parameters() if is_lora(name)}
    with torch.no_grad():
        for weight in added.values():
            weight.normal_(std=0.3)
    recipe = {"base": source.fingerprint(), "latent_space": "dit", "backbone": "wan2.1", "train": {}}
    write_lora(tmp_path / "run/checkpoints/00000007/lora", added, METHOD, {"step": 7, "recipe": recipe})
    return transformer.eval(), tmp_path / "run/checkpoints/00000007"


def largest(ours, theirs):
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("to", ["lora", "peft", "original-lora"])
def test_an_export_computes_what_was_trained(wan, trained, tmp_path, to):
    transformer, checkpoint = trained
    expected, plain_output = output(transformer), output(load_part(*source_of(wan)))
    assert largest(expected, plain_output) > 0.1
    export(checkpoint, tmp_path / "out", to)
    file = find_adapter(tmp_path / "out")
    assert json.loads(read_file(file)[1]["pusa"])["step"] == 7
    spec = ModelSpec(backbone="wan2.1", weights=str(wan), lora=str(tmp_path / "out"))
    require_model(spec)
    ours = load_part(find_backbone("wan2.1"), locate_part(spec, "transformer"), torch.float32)
    assert largest(output(ours), expected) <= 1e-6 * float(expected.abs().max() + 1)

    theirs = WanTransformer3DModel.from_pretrained(wan / "transformer")
    if to == "peft":
        theirs = PeftModel.from_pretrained(theirs, tmp_path / "out")
    elif to == "lora":
        theirs.load_lora_adapter(tmp_path / "out", prefix="transformer", use_safetensors=True)
    else:  # which diffusers converts
        assert all(
            re.match(r"diffusion_model\.blocks\.\d\.\w+\.\w+\.(lora_[AB]\.weight|alpha)", n) for n in load_file(file)
        )
        WanLoader().load(theirs, tmp_path / "out")
    assert largest(output(theirs.eval()), expected) <= 1e-5


def source_of(wan):
    return find_backbone("wan2.1"), find_part(wan, "transformer"), torch.float32


class WanLoader:
    """diffusers' loader of a pipeline's LoRAs, which converts original names."""

    def load(self, transformer, folder):
        from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

        parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
        pipeline = WanPipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
        pipeline.load_lora_weights(folder, weight_name="lora.safetensors")


def test_original_names_keep_ranks_alphas_and_deltas(wan, base, tmp_path):
    tensors = {}
    for number, (layer, (down, up)) in enumerate(factors(base).items()):
        flat = f"lora_unet_{layer.replace('.', '_')}"
        tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        tensors[f"{flat}.alpha"] = torch.tensor(1.0 + number)
    tensors |= {"blocks.0.diff_m": torch.ones(1, 6, 48), "blocks.0.norm3.diff_b": torch.ones(48)}
    path = saved(tmp_path / "kohya.safetensors", tensors)
    for to in ("lora", "peft"):
        with pytest.raises(WeightsError, match=r"has whole deltas of .*; use --to original-lora"):
            export(path, tmp_path / to, to)
    export(path, tmp_path / "out", "original-lora")
    same(loaded(wan, tmp_path / "out"), loaded(wan, path))
    assert load_file(tmp_path / "out/lora.safetensors").keys() >= {
        "diffusion_model.blocks.0.modulation.diff",
        "diffusion_model.blocks.0.norm3.diff_b",
        "diffusion_model.head.head.alpha",
    }
    for name in ("blocks.0.diff_m", "blocks.0.norm3.diff_b"):
        del tensors[name]
    with pytest.raises(WeightsError, match=r"has several pairs of rank and alpha, .*; use --to original-lora"):
        export(saved(tmp_path / "ranks.safetensors", tensors), tmp_path / "lora", "lora")


def test_a_merged_lora_is_a_transformer_of_its_expert(a14b, base, wan, trained, tmp_path):
    transformer, checkpoint = trained
    export(checkpoint, tmp_path / "out", "diffusers", str(wan))
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "out/transformer")
    assert largest(output(theirs), output(transformer)) <= 1e-5
    path = plain(tmp_path, base, 0)
    with pytest.raises(WeightsError, match=r"has transformer and transformer_2, and .* does not record which .*--base"):
        export(path, tmp_path / "a", "diffusers", str(a14b))
    convert(a14b, tmp_path / "original", "wan")
    with pytest.raises(
        WeightsError, match=r"has high_noise_model and low_noise_model, and .* --base .*/high_noise_mod"
    ):
        export(path, tmp_path / "a", "diffusers", str(tmp_path / "original"))
    export(path, tmp_path / "b", "diffusers", str(a14b / "transformer_2"))
    merged = load_file(tmp_path / "b/transformer/diffusion_pytorch_model.safetensors")
    own = load_file(a14b / "transformer_2/diffusion_pytorch_model.safetensors")
    same(merged, expected(own, [(factors(base), 1)]))
    export(path, tmp_path / "b", "diffusers", str(a14b / "transformer_2"), strength=1.4)
    file = tmp_path / "b/transformer/diffusion_pytorch_model.safetensors"
    same(load_file(file), expected(own, [(factors(base), 1.4)]))
    assert json.loads(read_file(file)[1]["pusa"])["strength"] == 1.4
    for to, onto, strength in (("lora", None, 1.4), ("diffusers", str(wan), float("inf"))):
        with pytest.raises(WeightsError, match=r"strength is .*; a finite number can be given, together with a base"):
            export(path, tmp_path / "c", to, onto, strength)


def test_a_lora_of_one_network_is_not_read_as_anothers(tmp_path):
    assert new_wan_transformer(0).num_parameters() > 0
    tensors = {f"diffusion_model.blocks.0.ffn.0.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    lora = read_lora(saved(tmp_path / "x.safetensors", tensors))
    assert list(lora.layers) == ["blocks.0.ffn.net.0.proj"]
