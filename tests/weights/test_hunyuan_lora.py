"""LoRAs of HunyuanVideo: those of joined weights are split and joined again exactly, in every published naming."""

import re

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.loaders.lora_conversion_utils import _convert_hunyuan_video_lora_to_diffusers
from safetensors.torch import load_file, save_file

from pusa.backbones.base import find_backbone
from pusa.backbones.hunyuan_video.tiny import TRANSFORMER
from pusa.errors import WeightsError
from pusa.weights.adapters import read_lora
from pusa.weights.convert import convert
from pusa.weights.export import export
from pusa.weights.inspect import describe
from pusa.weights.load import load_part
from pusa.weights.source import Adapter, PartFiles
from tests.weights.test_hunyuan_layout import DIT, D, comfy_dit

# Layer in the authors' names -> rank.
LAYERS = {
    "double_blocks.0.img_attn_qkv": 4,
    "double_blocks.1.txt_attn_qkv": 3,
    "double_blocks.1.img_mlp.fc1": 2,
    "double_blocks.0.txt_mod.linear": 2,
    "double_blocks.0.img_attn_proj": 2,
    "single_blocks.0.linear1": 5,
    "single_blocks.1.linear2": 2,
    "single_blocks.1.modulation.linear": 2,
    "txt_in.individual_token_refiner.blocks.0.self_attn_qkv": 2,
    "final_layer.adaLN_modulation.1": 2,
    "guidance_in.mlp.2": 1,
}
ALPHA, STRENGTH = 0.5, 0.5
M = int(D * TRANSFORMER["mlp_ratio"])  # the width of the MLP
Q, MLP = "single_transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a transformer of whole numbers, in diffusers' layout and the original one."""
    root = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(**TRANSFORMER)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randint(-8, 9, weight.shape))
    model.save_pretrained(root / "transformer")
    convert(root / "transformer", root / "original", "hunyuan_video")
    return root


@pytest.fixture(scope="module")
def original(folder):
    """Return its weights in the authors' names."""
    return load_file(folder / "original" / DIT)


def saved(path, tensors, metadata=None):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def factors(original):
    """Return for each layer A and B of whole numbers, so that every sum in fp32 is exact."""
    generator = torch.Generator().manual_seed(1)

    def whole(*shape):
        return torch.randint(-3, 4, shape, generator=generator).float()

    shapes = {layer: original[f"{layer}.weight"].shape for layer in LAYERS}
    return {n: (whole(rank, shapes[n][1]), whole(shapes[n][0], rank)) for n, rank in LAYERS.items()}


def merged(folder, path, strength=1.0):
    """Return the weights with a LoRA, by diffusers' names."""
    source = PartFiles("transformer", (folder / "transformer",), (Adapter(path, strength),))
    return load_part(find_backbone("hunyuan_video"), source, torch.float32).state_dict()


def joined(folder, weights, tmp_path):
    """Return weights in the authors' names."""
    (tmp_path / "merged/transformer").mkdir(parents=True)
    saved(tmp_path / "merged/transformer/diffusion_pytorch_model.safetensors", weights, {"format": "pt"})
    (tmp_path / "merged/transformer/config.json").write_bytes((folder / "transformer/config.json").read_bytes())
    convert(tmp_path / "merged", tmp_path / "joined", "hunyuan_video")
    return load_file(tmp_path / "joined" / DIT)


def kohya(name):
    return name.replace(".", "_")


def comfy(layer):
    return comfy_dit(f"{layer}.weight").removesuffix(".weight")


NAMINGS = {
    # Prefix, name of a layer, halves, does it have alphas.
    "the authors'": ("", str, ("lora_A", "lora_B"), False),
    "diffusion-pipe's": ("transformer.", str, ("lora_A", "lora_B"), False),
    "diffusion-pipe's older": ("diffusion_model.", str, ("lora_A", "lora_B"), False),
    "musubi's": ("lora_unet_", kohya, ("lora_down", "lora_up"), True),
    "ComfyUI's": ("diffusion_model.", comfy, ("lora_A", "lora_B"), False),
    "ComfyUI's, with alpha": ("diffusion_model.", comfy, ("lora_down", "lora_up"), True),
    "kohya's of ComfyUI": ("lora_unet_", lambda layer: kohya(comfy(layer)), ("lora_down", "lora_up"), True),
    "PEFT's": ("base_model.model.", str, ("lora_A.default", "lora_B.default"), True),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_adds_exactly_strength_alpha_rank_b_a_to_the_joined_weights(folder, original, tmp_path, naming):
    prefix, name, (a, b), has_alpha = NAMINGS[naming]
    tensors, expected = {}, dict(original)
    for layer, (down, up) in factors(original).items():
        module, alpha = prefix + name(layer), ALPHA * len(down)
        tensors |= {f"{module}.{a}.weight": down, f"{module}.{b}.weight": up}
        tensors |= {f"{module}.alpha": torch.tensor(alpha)} if has_alpha else {}
        expected[f"{layer}.weight"] = expected[f"{layer}.weight"] + STRENGTH * (ALPHA if has_alpha else 1) * (up @ down)
    path = saved(tmp_path / "x.safetensors", tensors)
    ours = joined(folder, merged(folder, path, STRENGTH), tmp_path)
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)
    (facts,) = describe(path)
    assert facts["family"] == "hunyuan_video" and facts["names"].startswith("of hunyuan_video")
    assert facts["kind"] == f"LoRA of rank 1..5 ({len(LAYERS)} layers)"


def test_diffusers_own_loader_splits_a_lora_alike(original, tmp_path):
    """Its converter has the width of single blocks built in, splits the refiner's A, and swaps the halves of an A."""
    tensors = {}
    for layer, (down, up) in factors(original).items():
        if not re.search(r"linear1|self_attn_qkv|adaLN", layer):
            tensors |= {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
    lora = read_lora(saved(tmp_path / "x.safetensors", tensors))
    theirs = _convert_hunyuan_video_lora_to_diffusers(tensors)
    ours = {
        f"transformer.{name}.lora_{half}.weight": torch.frombuffer(stored.read(), dtype=torch.float32).view(
            stored.shape
        )
        for name, layer in lora.layers.items()
        for half, stored in (("A", layer.down), ("B", layer.up))
    }
    assert len(ours) > len(LAYERS) and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_lora_in_original_names_comes_back_byte_for_byte(folder, original, tmp_path):
    tensors = {}
    for layer, (down, up) in factors(original).items():
        module = f"diffusion_model.{layer}"
        tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        tensors[f"{module}.alpha"] = torch.tensor(2.0)
    tensors["diffusion_model.single_blocks.0.linear1.diff"] = torch.ones(3 * D + M, D)
    tensors["diffusion_model.single_blocks.0.linear1.diff_b"] = torch.arange(3.0 * D + M)
    path = saved(tmp_path / "x.safetensors", tensors)
    (file,) = export(path, tmp_path / "out", "original-lora")
    back = load_file(file)
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in back)
    bias = (
        merged(folder, path)[f"{MLP}.bias"]
        - load_file(folder / "transformer/diffusion_pytorch_model.safetensors")[f"{MLP}.bias"]
    )
    assert torch.equal(bias, torch.arange(3.0 * D, 3.0 * D + M))


def of_diffusers(tmp_path, layers, name="x"):
    """Write a LoRA of diffusers' names: layer -> rank, alpha, shape of the weight, dtype."""
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for layer, (rank, alpha, (rows, inputs), dtype) in layers.items():
        module = f"transformer.{layer}"
        tensors[f"{module}.lora_A.weight"] = torch.randint(-3, 4, (rank, inputs), generator=generator).to(dtype)
        tensors[f"{module}.lora_B.weight"] = torch.randint(-3, 4, (rows, rank), generator=generator).to(dtype)
        tensors[f"{module}.alpha"] = torch.tensor(float(alpha))
    return saved(tmp_path / f"{name}.safetensors", tensors)


WHOLE = {
    **{f"single_transformer_blocks.0.attn.to_{n}": (4, 2, (D, D), torch.bfloat16) for n in "qkv"},
    MLP: (4, 2, (M, D), torch.bfloat16),
    "single_transformer_blocks.0.proj_out": (4, 2, (D, D + M), torch.bfloat16),
    **{f"transformer_blocks.1.attn.add_{n}_proj": (4, 2, (D, D), torch.bfloat16) for n in "qkv"},
    "transformer_blocks.1.ff_context.net.2": (4, 2, (D, M), torch.bfloat16),
    "norm_out.linear": (4, 2, (2 * D, D), torch.bfloat16),
}
WRITTEN = {
    # What a LoRA is made of, the joined layer to look at, its rank, its alpha, and the dtype of its B.
    "one rank and alpha": (WHOLE, "single_blocks.0.linear1", 16, 8, torch.bfloat16),
    "ranks of one scale": (
        {**WHOLE, Q: (8, 4, (D, D), torch.bfloat16), MLP: (2, 1, (M, D), torch.bfloat16)},
        "single_blocks.0.linear1", 18, 9, torch.bfloat16,
    ),
    "other alphas": (
        {**WHOLE, MLP: (4, 1, (M, D), torch.bfloat16)}, "single_blocks.0.linear1", 16, 8, torch.float32,
    ),
    "q alone": (
        {"transformer_blocks.0.attn.to_q": (4, 2, (D, D), torch.float16)},
        "double_blocks.0.img_attn_qkv", 4, 2, torch.float16,
    ),
    "q and the MLP": (
        {Q: WHOLE[Q], MLP: (6, 3, (M, D), torch.bfloat16)}, "single_blocks.0.linear1", 10, 5, torch.bfloat16,
    ),
}  # fmt: skip


@pytest.mark.parametrize("layers, layer, rank, alpha, dtype", WRITTEN.values(), ids=WRITTEN)
def test_loras_of_joined_weights_become_one_that_adds_the_same(folder, tmp_path, layers, layer, rank, alpha, dtype):
    path = of_diffusers(tmp_path, layers)
    (file,) = export(path, tmp_path / "out", "original-lora")
    tensors = load_file(file)
    down, up = (tensors[f"diffusion_model.{layer}.lora_{half}.weight"] for half in "AB")
    assert (len(down), up.shape[1], tensors[f"diffusion_model.{layer}.alpha"].item()) == (rank, rank, alpha)
    assert up.dtype == dtype and down.dtype == next(iter(layers.values()))[3]
    ours, theirs = merged(folder, file, STRENGTH), merged(folder, path, STRENGTH)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    plain = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    assert {name for name in plain if not torch.equal(plain[name], ours[name])} == {f"{n}.weight" for n in layers}


def refused(change):
    layers = dict(WHOLE)
    change(layers)
    return layers


def test_what_the_original_names_have_no_place_for_is_refused(tmp_path):
    path = of_diffusers(tmp_path, refused(lambda layers: layers.pop(MLP)))
    with pytest.raises(
        WeightsError, match=r"to_q.* are joined with .*proj_mlp\.weight, which it does not change, .* use --to lora or"
    ):
        export(path, tmp_path / "out", "original-lora")
    tensors = load_file(path) | {f"transformer.{Q}.diff": torch.ones(D, D)}
    path = saved(tmp_path / "delta.safetensors", {**tensors})
    with pytest.raises(WeightsError, match=r"which it does not change|whole deltas of .*to_q.*, but none of .*to_k"):
        export(path, tmp_path / "out", "original-lora")
    path = saved(tmp_path / "alone.safetensors", {f"transformer.{Q}.diff": torch.ones(D, D)})
    with pytest.raises(WeightsError, match=r"whole deltas of .*to_q.*, but none of .*to_k.*merge it with --base"):
        export(path, tmp_path / "out", "original-lora")


@pytest.mark.parametrize(
    "tensors, message",
    [
        (
            {"linear1.diff_b": (3 * D + M,)},
            rf"linear1\.bias: the inputs of the layer are not known, so its {3 * D + M} rows cannot",
        ),
        (
            {"linear1.lora_A.weight": (2, D), "linear1.lora_B.weight": (3 * D, 2)},
            rf"{3 * D} rows cannot be split into 3 times",
        ),
        (
            {"linear1.lora_A.weight": (2, D // 2), "linear1.lora_B.weight": (3 * D + M, 2)},
            r"does not fit: .* has other shapes of",
        ),
        (
            {"linear1.lora_A.weight": (2, D), "linear1.lora_B.weight": (4 * D + M, 2)},
            rf"proj_mlp.weight: the LoRA's is \({D + M},",
        ),
        (
            {"linear1.lora_A.weight": (2, D), "linear1.lora_B.weight": (3 * D + M, 2), "attn.to_q.diff": (D, D)},
            r"has no 'single_blocks.0.attn.to_q",
        ),
    ],
)
def test_a_lora_that_cannot_be_split_is_refused(folder, tmp_path, tensors, message):
    named = {f"diffusion_model.single_blocks.0.{name}": torch.ones(shape) for name, shape in tensors.items()}
    path = saved(tmp_path / "x.safetensors", named)
    with pytest.raises(WeightsError, match=message):
        merged(folder, path)


def test_a_layer_in_two_spellings_is_refused(folder, tmp_path):
    names = ("double_blocks.0.img_attn_qkv", "double_blocks.0.img_attn.qkv")
    halves = {"lora_A": (2, D), "lora_B": (3 * D, 2)}
    tensors = {f"{name}.{half}.weight": torch.ones(shape) for name in names for half, shape in halves.items()}
    with pytest.raises(WeightsError, match=r"additions of one kind twice to .*attn\.to_q\.weight"):
        merged(folder, saved(tmp_path / "x.safetensors", tensors))
