"""HunyuanVideo's published layouts: conversion, files of other tools, what is found where, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers
from safetensors.torch import load_file, save_file

from pusa.backbones import find_family
from pusa.backbones.base import find_backbone
from pusa.backbones.hunyuan_video.tiny import TRANSFORMER, VAE
from pusa.errors import WeightsError
from pusa.manifest.network import ModelSpec
from pusa.weights.convert import convert
from pusa.weights.export import export
from pusa.weights.hub import HubName, choose_files, fetch_model, fetch_parts
from pusa.weights.inspect import describe, format_facts
from pusa.weights.load import load_part
from pusa.weights.resolve import locate_part, require_model
from pusa.weights.source import find_part
from pusa.weights.stored import find_models, read_model
from tests.helpers.small_hunyuan_model import write_hunyuan

FAMILY = find_family("hunyuan_video")
DIT, VAE_FILE = "hunyuan_video_720_cfgdistill_bf16.safetensors", "hunyuan_video_vae_bf16.safetensors"
LLAMA, CLIP = "llava_llama3_fp16.safetensors", "clip_l.safetensors"
ORIGINAL = {"transformer": DIT, "vae": VAE_FILE, "text_encoder": LLAMA, "text_encoder_2": CLIP}
HEAD = TRANSFORMER["attention_head_dim"]
D = HEAD * TRANSFORMER["num_attention_heads"]  # the width


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Return a folder with a small model in diffusers' layout, and the same in original/."""
    root = tmp_path_factory.mktemp("models")
    write_hunyuan(root / "diffusers")
    convert(root / "diffusers", root / "original", "hunyuan_video")
    return root


def loaded(folder: Path, part: str):
    return load_part(find_backbone("hunyuan_video"), find_part(folder, part, FAMILY), torch.float32)


def same(ours, theirs) -> bool:
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def saved(path: Path, tensors, metadata=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def files_in(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix() for path in found}


def comfy_dit(name: str) -> str:
    """Rename as ComfyUI does when it loads the authors' names."""
    name = re.sub(r"^(time_in|guidance_in|txt_in\.t_embedder)\.mlp\.([02])\.", r"\1.\2_layer.", name)
    name = re.sub(r"c_embedder\.linear_([12])\.", lambda m: f"c_embedder.{2 * int(m[1]) - 2}_layer.", name)
    name = name.replace("0_layer", "in_layer").replace("2_layer", "out_layer")
    name = name.replace("_mod.linear.", "_mod.lin.").replace(".modulation.linear.", ".modulation.lin.")
    name = name.replace("_attn_qkv.", "_attn.qkv.").replace("_attn_proj.", "_attn.proj.")
    name = name.replace("mlp.fc1.", "mlp.0.").replace("mlp.fc2.", "mlp.2.")
    for short, long in (("q", "query"), ("k", "key")):
        name = name.replace(f"_attn_{short}_norm.weight", f"_attn.norm.{long}_norm.scale")
        name = name.replace(f".{short}_norm.weight", f".norm.{long}_norm.scale")
    return name


def comfy_vae(tensors):
    """Rename as ComfyUI does, and make convolutions of the attention's matrices."""
    renamed = {}
    for name, tensor in tensors.items():
        name = re.sub(r"down_blocks\.(\d)\.(resnets|downsamplers\.0)\.", r"down.\1.\2.", name)
        name = re.sub(r"up_blocks\.(\d)\.(resnets|upsamplers\.0)\.", lambda m: f"up.{3 - int(m[1])}.{m[2]}.", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        for before, after in (
            ("downsamplers.0.", "downsample."), ("upsamplers.0.", "upsample."), (".resnets.", ".block."),
            ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"), ("mid_block.attentions.0", "mid.attn_1"),
            ("group_norm", "norm"), ("to_out.0", "proj_out"), (".to_", "."),
        ):  # fmt: skip
            name = name.replace(before, after)
        is_matrix = ".attn_1." in name and tensor.ndim == 2
        renamed[name] = tensor[..., None, None, None] if is_matrix else tensor
    return renamed


def test_a_conversion_there_and_back_is_the_same_model_and_is_not_written_twice(models, tmp_path):
    original = models / "original"
    assert files_in(original) == set(ORIGINAL.values())
    convert(original, tmp_path / "diffusers", "diffusers")
    for part in ORIGINAL:
        for folder in (original, tmp_path / "diffusers"):
            assert same(loaded(folder, part), loaded(models / "diffusers", part)), (part, folder)
    shutil.copytree(original, tmp_path / "again")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "again").rglob("*.safetensors")}
    convert(models / "diffusers", tmp_path / "again", "hunyuan_video")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert loaded(original, "vae").config.norm_num_groups == VAE["norm_num_groups"]  # which does not show in the shapes
    assert loaded(original, "transformer").config.rope_axes_dim == TRANSFORMER["rope_axes_dim"]
    assert loaded(original, "text_encoder").config.rope_parameters["rope_theta"] == 10_000.0
    HunyuanVideoTransformer3DModel.from_pretrained(tmp_path / "diffusers/transformer")
    AutoencoderKLHunyuanVideo.from_pretrained(tmp_path / "diffusers/vae")


def test_the_original_file_has_the_joined_weights(models):
    """The first matrix of a single block, whose split diffusers' converter has built in, is [q; k; v; mlp]."""
    original = load_file(models / "original" / DIT)
    ours = load_file(models / "diffusers/transformer/diffusion_pytorch_model.safetensors")
    block = "single_transformer_blocks.1"
    for kind in ("weight", "bias"):
        parts = [ours[f"{block}.{name}.{kind}"] for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
        assert torch.equal(original[f"single_blocks.1.linear1.{kind}"], torch.cat(parts))
    rest = {name: tensor for name, tensor in original.items() if "linear1" not in name}
    theirs = convert_hunyuan_video_transformer_to_diffusers(rest)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    split = re.compile(r"single_transformer_blocks\..*(attn\.to_|proj_mlp)")
    assert theirs.keys() == {name for name in ours if not split.match(name)}


def comfy(models: Path, folder: Path, prefix: str = "model.model.") -> Path:
    """Write the files of ComfyUI's users, who have no configuration."""
    stated = {name: read_model(models / "original" / name).metadata for name in ORIGINAL.values()}  # of the small sizes
    originals = {name: load_file(models / "original" / name) for name in ORIGINAL.values()}
    dit = {prefix + comfy_dit(name): tensor for name, tensor in originals[DIT].items()}
    saved(folder / "hunyuan_video_t2v_720p_bf16.safetensors", dit, stated[DIT])
    saved(folder / "hunyuan_vae.safetensors", comfy_vae(originals[VAE_FILE]), stated[VAE_FILE])
    llama = {f"model.{name}": tensor for name, tensor in originals[LLAMA].items()}
    saved(folder / "llava.safetensors", llama | {"lm_head.weight": torch.ones(3, 64)}, stated[LLAMA])
    clip = {f"text_model.{name}": tensor for name, tensor in originals[CLIP].items()}
    others = {
        "text_model.embeddings.position_ids": torch.arange(16)[None],
        "text_projection.weight": torch.ones(32, 32),
    }
    saved(folder / "clip.safetensors", clip | others, stated[CLIP])
    return folder


@pytest.mark.parametrize("prefix", ["model.model.", "model.diffusion_model.", ""])
def test_comfyuis_files_are_recognised_by_their_tensors(models, tmp_path, prefix):
    folder = comfy(models, tmp_path / "comfy", prefix)
    assert {part: find_part(folder, part, FAMILY).paths[0].name for part in ORIGINAL} == {
        "transformer": "hunyuan_video_t2v_720p_bf16.safetensors",
        "vae": "hunyuan_vae.safetensors",
        "text_encoder": "llava.safetensors",
        "text_encoder_2": "clip.safetensors",
    }
    for part in ORIGINAL:
        assert same(loaded(folder, part), loaded(models / "diffusers", part)), part
    convert(folder, tmp_path / "diffusers", "diffusers")
    for part in ORIGINAL:
        assert same(loaded(tmp_path / "diffusers", part), loaded(models / "diffusers", part)), part
    facts = {Path(model["path"]).name: model for model in describe(folder)}
    assert {(facts[name]["family"], facts[name]["layout"]) for name in facts} == {("hunyuan_video", "hunyuan_video")}
    assert {model["part"] for model in facts.values()} == set(ORIGINAL)


def test_comfyuis_later_names_are_read(models, tmp_path):
    tensors = {
        comfy_dit(n).replace("_norm.scale", "_norm.weight"): t for n, t in load_file(models / "original" / DIT).items()
    }
    saved(tmp_path / "x/dit.safetensors", tensors, read_model(models / "original" / DIT).metadata)
    assert same(loaded(tmp_path / "x", "transformer"), loaded(models / "diffusers", "transformer"))


def test_a_published_folder_has_clip_in_the_names_of_an_older_library(models, tmp_path):
    shutil.copytree(models / "diffusers", tmp_path / "model")
    path = tmp_path / "model/text_encoder_2/model.safetensors"
    saved(path, {f"text_model.{name}": tensor for name, tensor in load_file(path).items()}, {"format": "pt"})
    assert same(loaded(tmp_path / "model", "text_encoder_2"), loaded(models / "diffusers", "text_encoder_2"))
    assert read_model(path.parent).layout == "diffusers"
    assert read_model(path.parent).config()["eos_token_id"] == 1  # from its config.json


def test_a_file_in_a_parts_own_folder_keeps_its_configuration(models):
    spec = ModelSpec(
        backbone="hunyuan_video",
        weights=str(models / "original"),
        vae=str(models / "diffusers/vae/diffusion_pytorch_model.safetensors"),
        text_encoder=str(models / "diffusers"),
    )
    require_model(spec)
    assert locate_part(spec, "vae").folder == models / "diffusers/vae"
    assert locate_part(spec, "transformer").paths == (models / "original" / DIT,)


def test_a_transformer_is_exported_in_the_original_names(models, tmp_path):
    (path,) = export(models / "diffusers/transformer", tmp_path / "out", "hunyuan_video")
    assert path.name == DIT and read_model(path).record()["exported"] == "hunyuan_video"
    assert same(loaded(tmp_path / "out", "transformer"), loaded(models / "diffusers", "transformer"))
    with pytest.raises(WeightsError, match=r"whose original layout is hunyuan_video; got --to wan"):
        export(models / "diffusers/transformer", tmp_path / "wan", "wan")


# On a hub.


def in_shards(folder: Path, stem: str) -> None:
    """Store a part as it is published: in two shards with an index."""
    tensors = load_file(folder / f"{stem}.safetensors")
    names = sorted(tensors)
    files = {f"{stem}-{i:05}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for file, own in files.items():
        saved(folder / file, {name: tensors[name] for name in own}, {"format": "pt"})
    weight_map = {name: file for file, own in files.items() for name in own}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / f"{stem}.safetensors").unlink()


def test_a_published_repository_is_fetched_and_loaded(models, empty_hub, tmp_path):
    folder = tmp_path / "published"
    shutil.copytree(models / "diffusers", folder)
    in_shards(folder / "transformer", "diffusion_pytorch_model")
    in_shards(folder / "text_encoder", "model")
    files = {name: (folder / name).read_bytes() for name in files_in(folder)} | {"README.md": b"# HunyuanVideo"}
    empty_hub.add("hunyuanvideo-community/HunyuanVideo", files)
    spec = ModelSpec(backbone="hunyuan_video", weights="hf:hunyuanvideo-community/HunyuanVideo")
    require_model(spec)
    assert not empty_hub.sent
    for part in ORIGINAL:
        source = locate_part(spec, part)
        assert same(load_part(find_backbone("hunyuan_video"), source, torch.float32), loaded(folder, part)), part
    assert {sent.file for sent in empty_hub.sent} == {
        name for name in files if name.partition("/")[0] in {"model_index.json", *ORIGINAL}
    }
    snapshot = fetch_model(HubName.parse(spec.weights))
    assert files_in(snapshot) == set(files) - {"README.md", "scheduler/scheduler_config.json"}
    assert format_facts(describe(snapshot)).count("family       hunyuan_video,") == 4


def test_the_authors_names_are_fetched_from_a_repository_of_single_files(models, empty_hub):
    names = (DIT, VAE_FILE)
    files = {name: (models / "original" / name).read_bytes() for name in names}
    fp8 = {"hunyuan_video_720_cfgdistill_fp8_e4m3fn.safetensors": b"not needed"}
    empty_hub.add("Kijai/HunyuanVideo_comfy", files | fp8)
    name = HubName.parse("hf:Kijai/HunyuanVideo_comfy")
    folder = fetch_parts(name, ("transformer", "vae"), FAMILY)
    assert {sent.file for sent in empty_hub.sent} == set(names)
    assert same(loaded(folder, "vae"), loaded(models / "diffusers", "vae"))


def test_the_authors_pickles_are_refused_with_what_to_use(tmp_path):
    base = "hunyuan-video-t2v-720p"
    pickles = {
        "transformer": (f"{base}/transformers/mp_rank_00_model_states.pt", "weights"),
        "vae": (f"{base}/vae/pytorch_model.pt", "vae"),
    }
    for part, (path, key) in pickles.items():
        advice = rf'\.pt is a pickle, .*; hunyuanvideo-community/HunyuanVideo has .* `{key}: "hf:hunyuanvideo-comm'
        with pytest.raises(WeightsError, match=advice):
            choose_files([path, "config.json"], (part,), FAMILY)
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(b"pickle")
        with pytest.raises(WeightsError, match=advice):
            find_part(tmp_path, part, FAMILY)


# What is refused.


def respelt(tensors):
    return {comfy_dit(name): tensor.clone() for name, tensor in tensors.items()}


REFUSED = {
    "missing": (lambda t: t.pop("single_blocks.1.linear2.bias"), "missing 'single_blocks.1.linear2.bias'"),
    "unknown": (lambda t: t.update(x=torch.ones(1)), "unexpected 'x'"),
    "block left out": (lambda t: t.pop("double_blocks.1.img_attn_qkv.weight"), "unexpected 'double_blocks.1"),
    "shape": (
        lambda t: t.update({"img_in.proj.bias": torch.ones(3)}),
        rf"misshaped x_embedder\.proj\.bias: expected \({D},\), got \(3,\)|misshaped 'x_embedder",
    ),
    "few rows": (
        lambda t: t.update({"single_blocks.0.linear1.weight": torch.ones(3 * D, D)}),
        rf"single_blocks\.0\.linear1\.weight: {3 * D} rows cannot be split into 3 times {D} rows and a rest",
    ),
    "scalar bias": (
        lambda t: t.update({"single_blocks.0.linear1.bias": torch.tensor(1.0)}),
        r"single_blocks\.0\.linear1\.bias: 0 rows cannot be split",
    ),
    "a vector": (
        lambda t: t.update({"single_blocks.0.linear1.weight": torch.ones(6 * D)}),
        r"linear1\.\w+: the inputs of the layer are not known",
    ),
    "odd halves": (
        lambda t: t.update({"final_layer.adaLN_modulation.1.bias": torch.ones(2 * D - 1)}),
        rf"final_layer\.adaLN_modulation\.1\.bias: {2 * D - 1} rows cannot be split into 2 equal parts",
    ),
    "two spellings": (lambda t: t.update(respelt(t)), "twice, in two spellings; remove one"),
    "two prefixes": (lambda t: t.update({"model.model.img_in.proj.bias": torch.ones(1)}), "both with and without"),
    "fp8": (
        lambda t: t.update({"img_in.proj.bias": torch.ones(D).to(torch.float8_e4m3fn)}),
        "is quantised to 8 bits",
    ),
    "scaled fp8": (lambda t: t.update({"scaled_fp8": torch.ones(2)}), "is quantised to 8 bits"),
    "Flux": (lambda t: t.update({"txt_in.weight": torch.ones(2, 2)}), "a transformer of Flux, which makes pictures"),
    "image to video": (
        lambda t: t.update({"img_in.proj.weight": torch.ones(D, 33, 1, 2, 2)}),
        r"in_channels is 33; expected 16.* image-to-video",
    ),
}


@pytest.mark.parametrize("edit, message", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("spelling", ["authors'", "ComfyUI's"])
def test_what_is_no_whole_text_to_video_transformer_is_refused(models, tmp_path, edit, message, spelling):
    tensors = load_file(models / "original" / DIT)
    edit(tensors)
    if spelling == "ComfyUI's" and "two spellings" not in message:
        tensors = respelt(tensors)
    saved(tmp_path / "x.safetensors", tensors, read_model(models / "original" / DIT).metadata)
    with pytest.raises(WeightsError, match=message):
        loaded(tmp_path, "transformer")


def test_a_file_with_some_names_of_each_tool_is_read(models, tmp_path):
    """Each name is known whatever the others are; only a tensor that is there twice is unclear."""
    tensors = load_file(models / "original" / DIT)
    some = respelt({name: tensors.pop(name) for name in list(tensors)[::3]})
    saved(tmp_path / "x.safetensors", tensors | some, read_model(models / "original" / DIT).metadata)
    assert same(loaded(tmp_path, "transformer"), loaded(models / "diffusers", "transformer"))


@pytest.mark.parametrize(
    "file, message",
    [
        (DIT, rf"a head is {HEAD} wide, but .* \[16, 56, 56\], sum to 128; add rope_axes_dim"),
        (VAE_FILE, r"block_out_channels has 16, which is not a multiple of norm_num_groups, 32"),
        (LLAMA, r"the width 64 is not a multiple of 128, .* add num_attention_heads"),
        (CLIP, r"the width 32 is not a multiple of 64, .* add num_attention_heads"),
    ],
)
def test_settings_that_no_shape_shows_are_not_guessed_for_other_sizes(models, tmp_path, file, message):
    saved(tmp_path / file, load_file(models / "original" / file))
    part = next(part for part, name in ORIGINAL.items() if name == file)
    with pytest.raises(WeightsError, match=message):
        loaded(tmp_path, part)


@pytest.mark.parametrize(
    "stated", ["[4, 8]", '"x"', "[4, 8, 8, 0.5]", "not json", "[" * 5000, f"[{HEAD - 8}, 4, 4.0]", "null"]
)
def test_what_a_stranger_wrote_into_the_metadata_is_checked(models, tmp_path, stated):
    saved(tmp_path / DIT, load_file(models / "original" / DIT), {"rope_axes_dim": stated})
    with pytest.raises(WeightsError, match=r"cannot be derived|rope_axes_dim"):
        loaded(tmp_path, "transformer")


def test_the_vae_of_another_version_is_refused(models, tmp_path):
    tensors = load_file(models / "original" / VAE_FILE)
    tensors["encoder.down_blocks.0.resnets.0.norm1.gamma"] = torch.ones(16, 1, 1, 1)
    saved(tmp_path / "vae.safetensors", tensors)
    with pytest.raises(WeightsError, match=r"norm1\.gamma: it is the VAE of HunyuanVideo 1\.5"):
        loaded(tmp_path, "vae")
    assert len(find_models(tmp_path)) == 1
