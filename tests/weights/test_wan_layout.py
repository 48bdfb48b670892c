"""Wan's published layouts: names both ways, conversion, what is found where, and a sentence for what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel

from pusa.backbones import find_family
from pusa.backbones.base import find_backbone
from pusa.errors import WeightsError
from pusa.manifest.network import ModelSpec
from pusa.weights.convert import convert
from pusa.weights.export import export
from pusa.weights.hub import HubName, choose_files, fetch_model, fetch_parts
from pusa.weights.inspect import describe
from pusa.weights.load import build, load_part
from pusa.weights.model import Model, require_settings
from pusa.weights.resolve import locate_config, locate_part, require_model
from pusa.weights.source import BUILTIN, PartFiles, find_part
from pusa.weights.stored import StoredModel, read_model
from pusa.weights.tensors import ByteRange, StoredTensor
from tests.helpers.small_wan import write_wan_2_1, write_wan_2_2_5b, write_wan_2_2_a14b

WRITERS = {"wan2.1": write_wan_2_1, "wan2.2-a14b": write_wan_2_2_a14b, "wan2.2-5b": write_wan_2_2_5b}
DIT = "diffusion_pytorch_model.safetensors"
T5 = "models_t5_umt5-xxl-enc-bf16.safetensors"
ORIGINAL_FILES = {
    "wan2.1": {DIT, "config.json", "Wan2.1_VAE.safetensors", T5},
    "wan2.2-a14b": {
        *(f"{noise}_noise_model/{name}" for noise in ("high", "low") for name in (DIT, "config.json")),
        "Wan2.1_VAE.safetensors",
        T5,
    },
    "wan2.2-5b": {DIT, "config.json", "Wan2.2_VAE.safetensors", T5},
}
VAE_5B = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
SMALL_14B = {"num_attention_heads": 2, "ffn_dim": 8, "num_layers": 2, "text_dim": 8, "freq_dim": 8}  # heads of 128


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Return a folder with a small model of each family in diffusers' layout, and the same in wan/FAMILY originally."""
    root = tmp_path_factory.mktemp("models")
    for name, write in WRITERS.items():
        write(root / name)
        convert(root / name, root / "wan" / name, "wan")
    return root


def networks(family: str) -> list[str]:
    return [*find_family(family).transformers, "vae", "text_encoder"]


def loaded(family: str, folder: Path, part: str):
    return load_part(find_backbone(family), find_part(folder, part, find_family(family)), torch.float32)


def same(ours, theirs) -> bool:
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def files_in(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix() for path in found}


def on_meta(model_class, *args, **settings) -> tuple[StoredModel, dict]:
    """Return the names and shapes of a published model without content, and its configuration."""
    with torch.device("meta"):
        model = model_class(*args, **settings)
    tensors = {
        name: StoredTensor("F32", tuple(w.shape), (ByteRange(Path(), 0, w.numel() * 4),))
        for name, w in model.state_dict().items()
    }
    kinds = [file for name in WRITERS for file in find_family(name).layout.files if file.diffusers_mark in tensors]
    return StoredModel(Path("published"), tensors, {}, "diffusers", (kinds[0],)), json.loads(
        model.config.to_json_string() if hasattr(model.config, "to_json_string") else json.dumps(dict(model.config))
    )


@pytest.mark.parametrize(
    "model_class, settings",
    [
        (WanTransformer3DModel, {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
        (WanTransformer3DModel, {}),
        (AutoencoderKLWan, {}),
        (AutoencoderKLWan, VAE_5B),
    ],
    ids=["1.3B", "14B", "2.1 VAE", "2.2 VAE"],
)
def test_the_shapes_of_published_models_give_their_settings_and_every_name_goes_both_ways(model_class, settings):
    model, published = on_meta(model_class, **settings)
    (file,) = model.files
    original = model.in_original_names(file)
    assert len(original) == len(model.tensors) and file.mark in original
    back = replace(model, tensors=original, layout="wan")
    assert back.in_diffusers_names().keys() == model.tensors.keys()
    derived = back.config()
    told = {name: derived[name] for name in derived if name[0] != "_" and "latents" not in name}
    assert {name: (value, published[name]) for name, value in told.items() if published[name] != value} == {}


def test_the_text_encoder_of_published_size_goes_both_ways_and_its_settings_are_derived():
    settings = {"vocab_size": 256384, "d_model": 4096, "d_ff": 10240, "num_heads": 64, "d_kv": 64, "num_layers": 3}
    model, published = on_meta(UMT5EncoderModel, UMT5Config(**settings))
    (file,) = model.files
    original = model.in_original_names(file)
    assert original["blocks.2.ffn.gate.0.weight"].shape == (10240, 4096)
    assert original["blocks.1.pos_embedding.embedding.weight"].shape == (32, 64)
    derived = replace(model, tensors=original, layout="wan").config()
    keys = [*settings, "relative_attention_num_buckets", "relative_attention_max_distance", "feed_forward_proj"]
    assert {key: derived[key] for key in keys} == {key: published[key] for key in keys}


def test_diffusers_own_converters_agree(models):
    folder = models / "wan/wan2.1"
    theirs = convert_wan_transformer_to_diffusers(load_file(folder / DIT))
    ours = load_file(models / "wan2.1/transformer" / DIT)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    deep, _ = on_meta(AutoencoderKLWan)  # the converter has the published depth built in
    names = dict.fromkeys(deep.in_original_names(deep.files[0]), torch.empty(0))
    assert convert_wan_vae_to_diffusers(names).keys() == deep.tensors.keys()


@pytest.mark.parametrize("family", WRITERS)
def test_a_conversion_there_and_back_is_the_same_model_and_is_not_written_twice(models, family, tmp_path):
    original = models / "wan" / family
    assert files_in(original) == ORIGINAL_FILES[family]
    convert(original, tmp_path / "diffusers", "diffusers")
    for part in networks(family):
        for folder in (original, tmp_path / "diffusers"):
            assert same(loaded(family, folder, part), loaded(family, models / family, part))
        assert (tmp_path / "diffusers" / part / "config.json").is_file()
    shutil.copytree(original, tmp_path / "again")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "again").rglob("*.safetensors")}
    convert(models / family, tmp_path / "again", "wan")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for name in files_in(original):
        assert (tmp_path / "again" / name).read_bytes() == (original / name).read_bytes()
    UMT5EncoderModel.from_pretrained(tmp_path / "diffusers/text_encoder")  # with the names of transformers' files


@pytest.mark.parametrize("family", WRITERS)
def test_the_statistics_of_a_vae_of_our_own_stay_with_its_file(models, family, tmp_path):
    vae = models / family / "vae"
    settings = json.loads((vae / "config.json").read_text())
    channels = settings["z_dim"]
    shutil.copytree(vae, tmp_path / "vae")
    own = {"latents_mean": [0.25] * channels, "latents_std": [2.0] * channels}
    (tmp_path / "vae/config.json").write_text(json.dumps(settings | own))
    convert(tmp_path / "vae", tmp_path / "out", "wan")
    (path,) = (tmp_path / "out").glob("*.safetensors")
    assert {name: read_model(path).config()[name] for name in own} == own
    (published,) = find_family(family).layout.files_of("vae")
    assert read_model(models / "wan" / family / published.name).config()["latents_mean"] == settings["latents_mean"]


def test_a_published_model_has_no_metadata_so_that_a_conversion_restores_every_byte(tmp_path):
    torch.manual_seed(0)
    WanTransformer3DModel(**SMALL_14B).save_pretrained(tmp_path / "transformer")
    AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 2, 2], num_res_blocks=1).save_pretrained(tmp_path / "vae")
    convert(tmp_path, tmp_path / "wan", "wan")
    assert [read_model(tmp_path / "wan" / name).metadata for name in (DIT, "Wan2.1_VAE.safetensors")] == [{}, {}]


def test_after_a_kill_over_another_model_its_configuration_is_gone(models, tmp_path, monkeypatch):
    convert(models / "wan2.1/transformer", tmp_path, "wan")
    changed = {name: tensor + 1 for name, tensor in load_file(models / "wan2.1/transformer" / DIT).items()}
    shutil.copytree(models / "wan2.1/transformer", tmp_path / "other")
    save_file(changed, tmp_path / "other" / DIT)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pusa.weights.convert.write_file", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "other", tmp_path, "wan")
    assert not (tmp_path / DIT).exists() and not (tmp_path / "config.json").exists()


def shard(path: Path) -> None:
    """Store an original transformer as it is published: in three shards with an index."""
    tensors = load_file(path)
    names = sorted(tensors)
    files = {f"{path.stem}-{i:05}-of-00003.safetensors": names[i - 1 :: 3] for i in (1, 2, 3)}
    for file, own in files.items():
        save_file({name: tensors[name] for name in own}, path.with_name(file))
    weight_map = {name: file for file, own in files.items() for name in own}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    path.unlink()


def publish(source: Path, folder: Path) -> Path:
    """Write a model as Wan-AI publishes it: transformers in shards, VAE and text encoder as pickles."""
    shutil.copytree(source, folder)
    for path in list(folder.rglob(DIT)):
        shard(path)
    for path in list(folder.glob("*.safetensors")):
        if "-of-" not in path.name:
            path.with_suffix(".pth").write_bytes(b"pickle")
            path.unlink()
    shutil.copytree(source.parent.parent / source.name / "tokenizer", folder / "google/umt5-xxl")
    (folder / "README.md").write_text("# Wan")
    return folder


@pytest.mark.parametrize("family", WRITERS)
def test_a_model_is_found_as_it_is_published(models, family, tmp_path):
    folder = publish(models / "wan" / family, tmp_path / "Wan")
    for part in find_family(family).transformers:
        assert same(loaded(family, folder, part), loaded(family, models / family, part))
        files = find_part(folder, part, find_family(family)).files()
        assert sorted(path.name for path in files) == [
            "config.json",
            *(f"{DIT[:-12]}-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        ]
    assert find_part(folder, "tokenizer", find_family(family)).folder == folder / "google/umt5-xxl"
    repository = find_family(family).layout.safetensors_at
    for part, key in (("vae", "vae"), ("text_encoder", "text_encoder")):
        advice = rf'pth is a pickle, .*; {repository} has the same as safetensors: add `{key}: "hf:{repository}"`'
        with pytest.raises(WeightsError, match=advice):
            find_part(folder, part, find_family(family))
    convert(folder, tmp_path / "diffusers", "diffusers")
    for part in find_family(family).transformers:
        assert same(loaded(family, tmp_path / "diffusers", part), loaded(family, models / family, part))


def test_a_missing_shard_and_two_forms_of_one_file_are_refused_with_their_names(models, tmp_path):
    folder = publish(models / "wan/wan2.1", tmp_path / "Wan")
    shutil.copy(models / "wan/wan2.1" / DIT, folder / DIT)
    with pytest.raises(WeightsError, match=r"model\.safetensors and .*index\.json both hold the transformer"):
        find_part(folder, "transformer", find_family("wan2.1"))
    with pytest.raises(WeightsError, match=r"index\.json names another .*, in shards"):
        convert(models / "wan2.1/transformer", folder, "wan")
    (folder / DIT).unlink()
    (folder / f"{DIT[:-12]}-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"index\.json names 3 files; missing: .*00002-of-00003"):
        loaded("wan2.1", folder, "transformer")


def comfy(models: Path, folder: Path, prefix: str = "") -> Path:
    """Write the files of an A14B as ComfyUI's users keep them: names of their own, no configuration."""
    folder.mkdir()
    torch.manual_seed(0)
    for noise in ("high", "low"):
        model = WanTransformer3DModel(**SMALL_14B)
        model.save_pretrained(folder / "one")
        convert(folder / "one", folder / "two", "wan")
        tensors = {prefix + name: tensor for name, tensor in load_file(folder / "two" / DIT).items()}
        save_file(tensors, folder / f"wan2.2_t2v_{noise}_noise_14B_fp16.safetensors")
        shutil.rmtree(folder / "one")
        shutil.rmtree(folder / "two")
    shutil.copy(models / "wan/wan2.2-a14b/Wan2.1_VAE.safetensors", folder / "wan_2.1_vae.safetensors")
    text = load_file(models / "wan2.2-a14b/text_encoder/model.safetensors")
    save_file({**text, "spiece_model": torch.zeros(9, dtype=torch.uint8)}, folder / "umt5_xxl_fp16.safetensors")
    return folder


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_files_of_any_name_are_recognised_by_their_tensors(models, tmp_path, prefix):
    folder, family = comfy(models, tmp_path / "comfy", prefix), find_family("wan2.2-a14b")
    found = {part: find_part(folder, part, family).paths[0].name for part in networks("wan2.2-a14b")}
    assert found == {
        "transformer": "wan2.2_t2v_high_noise_14B_fp16.safetensors",
        "transformer_2": "wan2.2_t2v_low_noise_14B_fp16.safetensors",
        "vae": "wan_2.1_vae.safetensors",
        "text_encoder": "umt5_xxl_fp16.safetensors",
    }
    assert loaded("wan2.2-a14b", folder, "transformer").config.num_attention_heads == 2
    for part in ("vae", "text_encoder"):
        assert same(loaded("wan2.2-a14b", folder, part), loaded("wan2.2-a14b", models / "wan2.2-a14b", part))
    with pytest.raises(WeightsError, match="has no transformer/"):  # the experts are of another family
        find_part(folder, "transformer", find_family("wan2.1"))
    shutil.copy(folder / "wan_2.1_vae.safetensors", folder / "copy.safetensors")
    with pytest.raises(WeightsError, match=r"has the vae twice, in copy\.safetensors and wan_2\.1_vae\.safetensors"):
        find_part(folder, "vae", family)


def test_a_text_encoder_may_have_its_embedding_under_either_name(models, tmp_path):
    theirs = loaded("wan2.1", models / "wan2.1", "text_encoder")
    tensors = load_file(models / "wan2.1/text_encoder/model.safetensors")
    embedding = tensors.pop("shared.weight")
    for names in (["encoder.embed_tokens.weight"], ["encoder.embed_tokens.weight", "shared.weight"]):
        folder = tmp_path / str(len(names))
        folder.mkdir()
        save_file(tensors | {name: embedding.clone() for name in names}, folder / "umt5.safetensors")
        assert same(loaded("wan2.1", folder, "text_encoder"), theirs)
        convert(folder, folder / "wan", "wan")
        assert load_file(folder / "wan" / T5).keys() == load_file(models / "wan/wan2.1" / T5).keys()


def test_weights_are_not_written_in_another_familys_layout(models, tmp_path):
    with pytest.raises(WeightsError, match=r"whose original layout is genmo; got --to wan"):
        convert(BUILTIN / "tiny", tmp_path / "a", "wan")
    with pytest.raises(WeightsError, match=r"whose original layout is wan; got --to genmo"):
        export(models / "wan2.1/transformer", tmp_path / "b", "genmo")
    assert not files_in(tmp_path)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda config: config.pop("ffn_dim"), r"config\.json is incomplete or wrong: KeyError\('ffn_dim'\)"),
        (lambda config: config.update(num_attention_heads="x"), "config.json is incomplete or wrong: .*num_heads 'x'"),
    ],
)
def test_a_configuration_that_cannot_be_converted_is_refused(models, tmp_path, edit, message):
    shutil.copytree(models / "wan2.1/transformer", tmp_path / "transformer")
    path = tmp_path / "transformer/config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=message):
        convert(tmp_path, tmp_path / "out", "wan")


def test_a_folder_of_something_else_does_not_hide_a_model(models, tmp_path):
    shutil.copytree(models / "wan2.1/vae", tmp_path / "vae")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/config.json").write_text("not JSON")
    assert [facts["part"] for facts in describe(tmp_path)] == ["vae"]


def test_a_part_named_by_its_folder_or_file_has_its_own_settings(models, tmp_path):
    model, file = tmp_path / "model", "diffusion_pytorch_model.safetensors"
    shutil.copytree(models / "wan2.1", model)
    config = json.loads((model / "vae/config.json").read_text())
    (model / "vae/config.json").write_text(json.dumps(config | {"latents_mean": [9.0] * 16}))
    for name in (model, model / "vae", model / "vae" / file):
        spec = ModelSpec(backbone="wan2.1", weights=str(model), vae=str(name))
        source = locate_part(spec, "vae")
        assert source.fingerprint() == find_part(model, "vae").fingerprint()
        assert load_part(find_backbone("wan2.1"), source, torch.float32).config.latents_mean == [9.0] * 16
    spec = ModelSpec(backbone="wan2.1", weights=str(model), checkpoint=str(model / "transformer" / file))
    assert same(
        load_part(find_backbone("wan2.1"), locate_part(spec, "transformer"), torch.float32),
        loaded("wan2.1", model, "transformer"),
    )


def test_without_a_configuration_a_width_that_128_does_not_divide_is_refused(models, tmp_path):
    shutil.copy(models / "wan/wan2.1" / DIT, tmp_path / "tiny.safetensors")
    with pytest.raises(WeightsError, match=r"a head is 128 wide, and the width 48 is not .* keep the config\.json"):
        loaded("wan2.1", tmp_path, "transformer")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_heads": 0}, "dim 48 is not a multiple of num_heads 0"),
        ({"patch_size": 5}, "cannot be derived"),
        ({"ffn_dim": [48]}, r"ffn_dim is 64 in the tensors, \[48\] by config.json"),
        ({"_class_name": ["WanModel"]}, "a head is 128 wide"),
        ({"num_heads": "2"}, "is not a multiple of num_heads '2'"),
        ({"num_heads": 5}, "dim 48 is not a multiple of num_heads 5"),
        ({"dim": 96}, "width is 48 in the tensors, 96 by config.json"),
        ({"num_layers": 3}, "num_layers is 2 in the tensors, 3 by config.json"),
        ({"eps": "x"}, "eps"),
    ],
)
def test_a_configuration_that_contradicts_the_tensors_is_refused(models, tmp_path, change, message):
    shutil.copy(models / "wan/wan2.1" / DIT, tmp_path)
    config = json.loads((models / "wan/wan2.1/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(WeightsError, match=message):
        loaded("wan2.1", tmp_path, "transformer")


def edited(source: Path, folder: Path, edit) -> Path:
    """Copy an original transformer with its config.json, after `edit` changed its tensors."""
    folder.mkdir()
    tensors = load_file(source / DIT)
    edit(tensors)
    save_file(tensors, folder / DIT)
    shutil.copy(source / "config.json", folder)
    return folder


REFUSED = {
    "a missing tensor": (lambda t: t.pop("blocks.1.norm3.bias"), r"missing 'blocks\.1\.norm3\.bias'$"),
    "an unknown tensor": (lambda t: t.update(extra=torch.ones(1)), "unexpected 'extra'$"),
    "another shape": (
        lambda t: t.update({"head.head.bias": torch.ones(5)}),
        r"'proj_out.bias: expected .*, got \(5,\)'",
    ),
    "both prefixes": (
        lambda t: t.update({"model.diffusion_model.head.head.bias": torch.ones(1)}),
        "both with and without",
    ),
    "scaled fp8": (lambda t: t.update({"blocks.0.ffn.0.scale_weight": torch.ones(1)}), "8 bits, .* bf16 or fp16$"),
    "plain fp8": (
        lambda t: t.update({"head.head.weight": t["head.head.weight"].to(torch.float8_e4m3fn)}),
        "8 bits, .* bf16 or fp16$",
    ),
    "image encoder": (lambda t: t.update({"img_emb.proj.0.weight": torch.ones(1)}), "image-to-video model"),
    "VACE": (lambda t: t.update({"vace_blocks.0.after_proj.bias": torch.ones(1)}), "VACE model"),
    "36 channels": (
        lambda t: t.update({"patch_embedding.weight": torch.ones(48, 36, 1, 2, 2)}),
        "in_channels is 36 in the tensors, 16 by config.json",
    ),
}


@pytest.mark.parametrize("edit, message", REFUSED.values(), ids=REFUSED)
def test_what_is_no_whole_text_to_video_transformer_is_refused(models, tmp_path, edit, message):
    folder = edited(models / "wan/wan2.1", tmp_path / "model", edit)
    with pytest.raises(WeightsError, match=message):
        loaded("wan2.1", folder, "transformer")
    if "both" not in message:
        describe(folder)  # only to use them is refused


def test_a_vae_of_another_family_and_a_lora_are_refused(models, tmp_path):
    for family, other in (("wan2.1", "wan2.2-5b"), ("wan2.2-5b", "wan2.1")):
        channels = find_family(family).geometry.channels
        for folder in (models / other, models / "wan" / other):
            source = find_part(folder, "vae")
            with pytest.raises(WeightsError, match=rf"z_dim is \d+; expected {channels}"):
                load_part(find_backbone(family), source, torch.float32)
        with pytest.raises(WeightsError, match=r"no vae/ and no Wan2\.._VAE\.safetensors; found"):
            find_part(models / "wan" / other, "vae", find_family(family))
    layer = "blocks.0.self_attn.q"
    lora = {f"{layer}.lora_A.weight": torch.ones(4, 48), f"{layer}.lora_B.weight": torch.ones(48, 4)}
    save_file(lora, tmp_path / "pusa_v1.safetensors")
    with pytest.raises(WeightsError, match=r"has no transformer/ and no .*; found pusa_v1\.safetensors"):
        find_part(tmp_path, "transformer", find_family("wan2.1"))
    with pytest.raises(WeightsError, match="is a LoRA; name it as `lora:`"):
        locate_part(
            ModelSpec(backbone="wan2.1", weights="x", checkpoint=str(tmp_path / "pusa_v1.safetensors")), "transformer"
        )


def test_a_model_of_two_experts_is_no_model_of_one_and_the_reverse(models):
    with pytest.raises(WeightsError, match=r"is not a wan2\.1: it has transformer_2, as wan2\.2-a14b has"):
        find_part(models / "wan2.2-a14b", "transformer", find_family("wan2.1"))
    for folder in (models / "wan2.1", models / "wan/wan2.1"):
        with pytest.raises(WeightsError, match=r"has no transformer_2/ and no low_noise_model/"):
            find_part(folder, "transformer_2", find_family("wan2.2-a14b"))
    with pytest.raises(WeightsError, match=r"has no transformer/ and no diffusion_pytorch_model\.safetensors"):
        find_part(models / "wan/wan2.2-a14b", "transformer", find_family("wan2.1"))


def test_inspect_names_family_size_expert_and_layout(models, tmp_path):
    facts = {f["path"].removeprefix(f"{models}/"): f for f in describe(models / "wan/wan2.2-a14b")}
    named = {
        path.removeprefix("wan/wan2.2-a14b/"): (f["family"], f["part"], f["expert"], f["layout"])
        for path, f in facts.items()
    }
    assert named == {
        f"high_noise_model/{DIT}": ("wan2.2-a14b", "transformer", "high", "wan"),
        f"low_noise_model/{DIT}": ("wan2.2-a14b", "transformer_2", "low", "wan"),
        "Wan2.1_VAE.safetensors": ("wan", "vae", None, "wan"),
        T5: ("wan", "text_encoder", None, "wan"),
    }
    (vae,) = describe(models / "wan2.2-5b/vae")
    assert (vae["family"], vae["part"], vae["layout"]) == ("wan2.2-5b", "vae", "diffusers")
    (unknown,) = describe(models / "wan2.1/transformer")
    assert (unknown["family"], unknown["size"], unknown["expert"]) == ("wan", None, None)


@pytest.mark.parametrize(
    "settings, family, size",
    [
        ({"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, "wan2.1", "1.3B"),
        ({}, "wan", "14B"),  # of Wan 2.1, or an expert of Wan 2.2
        (
            {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
            "wan2.2-5b",
            "5B",
        ),
    ],
)
def test_inspect_names_the_published_sizes(tmp_path, settings, family, size):
    """Only the header is read: a file with holes of that size."""
    model, _ = on_meta(WanTransformer3DModel, **settings)
    header, offset = {}, 0
    for name, tensor in model.tensors.items():
        header[name] = {
            "dtype": "BF16",
            "shape": tensor.shape,
            "data_offsets": [offset, offset := offset + tensor.nbytes // 2],
        }
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    (facts,) = describe(tmp_path / "model.safetensors")
    assert (facts["family"], facts["size"], facts["part"]) == (family, size, "transformer")


def test_a_fine_tune_of_an_expert_is_exported_to_its_own_place(models, tmp_path):
    checkpoint = tmp_path / "00000010"
    shutil.copytree(models / "wan2.2-a14b/transformer_2", checkpoint / "transformer")
    record = {"step": 10, "expert": "low", "recipe": {"latent_space": "vae", "backbone": "wan2.2-a14b"}}
    (checkpoint / "checkpoint.json").write_text(json.dumps(record))
    export(checkpoint, tmp_path / "wan", "wan")
    assert files_in(tmp_path / "wan") == {f"low_noise_model/{DIT}", "low_noise_model/config.json"}
    assert same(
        loaded("wan2.2-a14b", tmp_path / "wan", "transformer_2"),
        loaded("wan2.2-a14b", models / "wan2.2-a14b", "transformer_2"),
    )
    (facts,) = describe(tmp_path / "wan")
    assert (facts["family"], facts["expert"], facts["lineage"]["step"]) == ("wan2.2-a14b", "low", 10)
    export(checkpoint, tmp_path / "diffusers", "diffusers")
    assert {path.name for path in (tmp_path / "diffusers").glob("transformer*")} == {"transformer_2"}


def upload(hub, repository: str, folder: Path) -> None:
    hub.add(repository, {name: (folder / name).read_bytes() for name in files_in(folder)})


@pytest.mark.parametrize("family", WRITERS)
def test_a_hub_model_in_the_published_layout_loads_with_vae_and_text_of_another(models, family, tmp_path, empty_hub):
    upload(empty_hub, "Wan-AI/original", publish(models / "wan" / family, tmp_path / "Wan"))
    upload(empty_hub, "Wan-AI/diffusers", models / family)
    other = "hf:Wan-AI/diffusers"
    bare = ModelSpec(backbone=family, weights="hf:Wan-AI/original")
    with pytest.raises(WeightsError, match=r"hf:Wan-AI/original: no 'vae' that can be used: .* add `vae: "):
        require_model(bare.model_copy(update={"text_encoder": other}))
    spec = bare.model_copy(update={"text_encoder": other, "vae": other})
    require_model(spec)
    assert not empty_hub.sent
    for part in find_family(family).transformers:
        build(find_backbone(family), locate_config(spec, part))
        assert {sent.file.rpartition("/")[2] for sent in empty_hub.sent} == {"config.json"}
    for part in find_family(family).parts:
        ours = locate_part(spec, part)
        if part in networks(family):
            assert same(load_part(find_backbone(family), ours, torch.float32), loaded(family, models / family, part))
    assert not any(sent.file.endswith(".pth") for sent in empty_hub.sent)


def test_a_vae_may_be_one_file(models, tmp_path, empty_hub):
    file = models / "wan/wan2.1/Wan2.1_VAE.safetensors"
    empty_hub.add("Comfy/repackaged", {"split_files/vae/wan_2.1_vae.safetensors": file.read_bytes()})
    for name in (str(file), "hf:Comfy/repackaged:split_files/vae/wan_2.1_vae.safetensors"):
        spec = ModelSpec(backbone="wan2.1", weights=str(models / "wan2.2-5b"), vae=name)
        require_model(spec)
        source = locate_part(spec, "vae")
        assert same(
            load_part(find_backbone("wan2.1"), source, torch.float32), loaded("wan2.1", models / "wan2.1", "vae")
        )


def test_a_whole_model_is_fetched_without_its_pickles_and_says_so(models, tmp_path, empty_hub, caplog):
    upload(empty_hub, "Wan-AI/original", publish(models / "wan/wan2.2-a14b", tmp_path / "Wan"))
    folder = fetch_model(HubName("Wan-AI/original"))
    shards = {f"{n}_noise_model/{DIT[:-12]}-0000{i}-of-00003.safetensors" for n in ("high", "low") for i in (1, 2, 3)}
    assert shards < files_in(folder) and not any(name.endswith(".pth") for name in files_in(folder))
    assert sum("is a pickle" in message for message in caplog.messages) == 2
    assert "google/umt5-xxl/tokenizer.json" in files_in(folder)
    with pytest.raises(WeightsError, match="no 'transformer' "):
        fetch_parts(HubName("Wan-AI/original"), ["transformer"], find_family("wan2.1"))


def test_an_incomplete_set_of_original_shards_is_refused(models, tmp_path):
    files = sorted(files_in(publish(models / "wan/wan2.1", tmp_path / "Wan")))
    family = find_family("wan2.1")
    assert len(choose_files(files, ["transformer"], family)) == 5
    for missing in (f"{DIT}.index.json", f"{DIT[:-12]}-00003-of-00003.safetensors"):
        with pytest.raises(WeightsError, match=r"no complete set of safetensors files of 'diffusion_pytorch_model"):
            choose_files([name for name in files if name != missing], ["transformer"], family)


def test_the_fingerprint_of_an_original_file_covers_the_number_of_heads(models, tmp_path):
    shutil.copytree(models / "wan/wan2.1", tmp_path / "model")
    before = find_part(tmp_path / "model", "transformer").fingerprint()
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"num_heads": 1}))
    assert find_part(tmp_path / "model", "transformer").fingerprint() != before
    (tmp_path / "model/README.md").write_text("changes nothing")
    vae = find_part(tmp_path / "model", "vae")
    assert vae.files() == [tmp_path / "model/Wan2.1_VAE.safetensors"] and isinstance(vae, PartFiles)


@pytest.mark.parametrize("keys", [{"weights": "wan2.2-5b"}, {"weights": "wan2.1", "vae": "wan2.2-5b"}])
def test_a_part_of_another_family_is_refused_before_anything_is_made(models, keys):
    spec = ModelSpec(backbone="wan2.1", **{key: str(models / name) for key, name in keys.items()})
    for find_out in (lambda: require_settings(spec), Model(spec, "cpu").fingerprints):
        with pytest.raises(WeightsError, match=r"z_dim is 48; expected 16; it was read as the vae of a wan2\.1"):
            find_out()


def test_a_missing_part_is_named_with_what_to_do(models, tmp_path):
    family = find_family("wan2.2-a14b")
    with pytest.raises(WeightsError, match=r"copy the folder tokenizer of the published model there, or name"):
        find_part(models / "wan/wan2.2-a14b", "tokenizer", family)
    (tmp_path / "vae").mkdir()
    shutil.copy(models / "wan/wan2.2-a14b/Wan2.1_VAE.safetensors", tmp_path / "vae/wan_2.1_vae.safetensors")
    with pytest.raises(WeightsError, match=r"such as vae/wan_2\.1_vae\.safetensors, are not searched"):
        find_part(tmp_path, "transformer", family)
