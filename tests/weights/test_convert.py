"""Conversion between genmo's and diffusers' layouts: every byte, both ways, also after a kill."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLMochi, MochiTransformer3DModel
from diffusers.loaders.single_file_utils import convert_mochi_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

from pusa.backbones.mochi.backbone import Mochi
from pusa.backbones.mochi.layout import LAYOUT
from pusa.errors import StageError, WeightsError
from pusa.system.locks import sole_writer
from pusa.weights.convert import convert, diffusers_config
from pusa.weights.inspect import describe
from pusa.weights.load import load_part
from pusa.weights.resolve import BUILTIN
from pusa.weights.source import PartFiles, find_part
from pusa.weights.stored import StoredModel, find_models
from pusa.weights.tensors import ByteRange, StoredTensor, write_file

TINY = BUILTIN / "tiny"


@pytest.fixture(scope="module")
def genmo(tmp_path_factory) -> Path:
    """Return the tiny model in genmo's layout."""
    folder = tmp_path_factory.mktemp("genmo")
    convert(TINY, folder, "genmo")
    return folder


def state(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def on_meta(model_class) -> StoredModel:
    """Return the names and shapes of a model of published size, without content."""
    part = "vae" if model_class is AutoencoderKLMochi else "transformer"
    files = tuple(file for file in LAYOUT.files if file.part == part)
    with torch.device("meta"):
        weights = model_class().state_dict()
    nowhere = {
        n: StoredTensor("F32", tuple(w.shape), (ByteRange(Path(), 0, w.numel() * 4),)) for n, w in weights.items()
    }
    return StoredModel(Path("published"), nowhere, {}, "diffusers", files)


def test_diffusers_own_converter_agrees(tmp_path):
    torch.manual_seed(0)
    model = MochiTransformer3DModel(  # with Mochi's 48 layers, the only number that the converter accepts
        num_attention_heads=2, attention_head_dim=4, pooled_projection_dim=6, text_embed_dim=8, time_embed_dim=4
    )
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path / "transformer")
    convert(tmp_path, tmp_path / "genmo", "genmo")
    theirs = convert_mochi_transformer_checkpoint_to_diffusers(load_file(tmp_path / "genmo/dit.safetensors"))
    assert same(theirs, model.state_dict())


def test_every_name_of_the_published_transformer_is_converted():
    model = on_meta(MochiTransformer3DModel)
    dit = model.in_original_names(LAYOUT.files[0])
    assert len(dit) == 19 + 18 * 47 + 14
    shapes = {
        "blocks.0.attn.qkv_x.weight": (9216, 3072),
        "blocks.0.attn.qkv_y.weight": (9216, 1536),
        "blocks.0.mod_y.weight": (6144, 3072),
        "blocks.47.mod_y.weight": (1536, 3072),
        "blocks.46.mlp_y.w1.weight": (8192, 1536),
        "t5_y_embedder.to_kv.weight": (8192, 4096),
        "final_layer.mod.bias": (6144,),
        "pos_frequencies": (3, 24, 64),
    }
    assert {name: dit[name].shape for name in shapes} == shapes
    assert not {"blocks.47.attn.proj_y.weight", "blocks.47.mlp_y.w1.weight"} & set(dit)


def test_every_name_of_the_published_vae_is_converted():
    vae = on_meta(AutoencoderKLMochi)
    encoder, decoder = (vae.in_original_names(file) for file in LAYOUT.files[1:])
    assert encoder["layers.0.weight"].shape == (64, 15)
    assert encoder["layers.4.layers.0.weight"].shape == (128, 64, 1, 2, 2)
    assert encoder["layers.6.layers.6.attn_block.attn.qkv.weight"].shape == (3 * 384, 384)
    assert encoder["layers.9.stack.5.bias"].shape == (384,)
    assert decoder["blocks.0.3.stack.2.weight"].shape == (768, 768, 3, 3, 3)
    assert decoder["blocks.1.blocks.5.stack.0.bias"].shape == (768,)
    assert decoder["blocks.1.proj.weight"].shape == (512 * 3 * 4, 768)
    assert decoder["blocks.4.2.stack.3.weight"].shape == (128,)
    assert len(encoder) + len(decoder) + 2 * (3 + 4 + 6 + 3) == len(vae.tensors)


@pytest.mark.parametrize("model_class", [MochiTransformer3DModel, AutoencoderKLMochi])
def test_the_shapes_give_the_published_configuration(model_class):
    model = on_meta(model_class)
    shapes = {name: stored.shape for name, stored in model.tensors.items()}
    derived = {name: value for file in model.files for name, value in file.config(shapes, {}).items()}
    with torch.device("meta"):
        published = model_class().config
    plain = json.loads(json.dumps(dict(published)))  # lists for tuples
    assert {name: value for name, value in derived.items() if name[0] != "_" and plain[name] not in (None, value)} == {}


@pytest.mark.parametrize("shard_bytes", [10**9, 500_000])
def test_a_conversion_there_and_back_restores_every_byte(genmo, tmp_path, shard_bytes):
    convert(genmo, tmp_path / "diffusers", "diffusers", shard_bytes=shard_bytes)
    for part in ("transformer", "vae"):
        assert same(state(tmp_path / "diffusers" / part), state(TINY / part))
        assert len(list((tmp_path / "diffusers" / part).glob("*.safetensors"))) == 1 or shard_bytes < 10**9
    convert(tmp_path / "diffusers", tmp_path / "genmo", "genmo")
    for file in LAYOUT.files:
        assert (tmp_path / "genmo" / file.name).read_bytes() == (genmo / file.name).read_bytes()


def test_a_published_file_without_metadata_is_restored_byte_for_byte(genmo, tmp_path):
    save_file(load_file(genmo / "dit.safetensors"), tmp_path / "pusa_v0_dit.safetensors")
    convert(tmp_path / "pusa_v0_dit.safetensors", tmp_path / "diffusers", "diffusers")
    convert(tmp_path / "diffusers", tmp_path / "genmo", "genmo")
    ours, theirs = tmp_path / "genmo/dit.safetensors", tmp_path / "pusa_v0_dit.safetensors"
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_both_layouts_load_as_the_same_model(genmo, part):
    ours, theirs = (load_part(Mochi(), find_part(folder, part), torch.float32) for folder in (genmo, TINY))
    assert same(ours.state_dict(), theirs.state_dict())
    if part == "vae":
        z = torch.randn(1, 12, 2, 4, 4)
        assert torch.equal(*(torch.cat(list(Mochi().decode_video(vae, z)), 2) for vae in (ours, theirs)))
        assert all(torch.equal(*pair) for pair in zip(*map(Mochi().latent_statistics, (ours, theirs)), strict=True))
    else:
        assert ours.config.num_attention_heads == theirs.config.num_attention_heads


def test_a_comfy_prefix_is_removed(genmo, tmp_path):
    prefixed = {f"model.diffusion_model.{name}": t for name, t in load_file(genmo / "dit.safetensors").items()}
    save_file(prefixed, tmp_path / "comfy.safetensors")
    convert(tmp_path / "comfy.safetensors", tmp_path / "out", "diffusers")
    assert same(state(tmp_path / "out/transformer"), state(TINY / "transformer"))


def change(path: Path, edit) -> Path:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t.pop("blocks.1.mod_y.bias"), r"missing 'blocks.1.mod_y.bias'$"),
        (lambda t: t.update(extra=torch.ones(1)), r"dit.safetensors: unexpected 'extra'$"),
        (
            lambda t: t.update({"final_layer.linear.bias": torch.ones(5)}),
            r"misshaped 'proj_out.bias: expected .*, got \(5,\)'",
        ),
    ],
    ids=["missing", "unexpected", "misshaped"],
)
def test_a_missing_unexpected_or_misshaped_tensor_refuses_a_single_file(genmo, tmp_path, edit, message):
    path = tmp_path / "dit.safetensors"
    path.write_bytes((genmo / "dit.safetensors").read_bytes())
    with pytest.raises(WeightsError, match=message):
        load_part(Mochi(), PartFiles("transformer", (change(path, edit),)), torch.float32)


def test_the_message_names_why_nothing_can_be_converted(genmo, tmp_path):
    with pytest.raises(WeightsError, match="has nothing in diffusers layout"):
        convert(genmo, tmp_path / "out", "genmo")
    (tmp_path / "half").mkdir()
    (tmp_path / "half/encoder.safetensors").write_bytes((genmo / "encoder.safetensors").read_bytes())
    with pytest.raises(WeightsError, match=r"made of encoder.safetensors and decoder.safetensors; found encoder"):
        convert(tmp_path / "half", tmp_path / "out", "diffusers")
    with pytest.raises(WeightsError, match="neither a file nor a folder"):
        convert(tmp_path / "none", tmp_path / "out", "diffusers")
    with sole_writer(tmp_path / "busy"), pytest.raises(StageError, match="another process"):
        convert(genmo, tmp_path / "busy", "diffusers")


def test_after_a_kill_only_the_missing_files_are_written(genmo, tmp_path):
    files = convert(genmo, tmp_path, "diffusers", shard_bytes=500_000)
    shards = [path for path in files if path.name.startswith("diffusion_pytorch_model-")]
    assert len(shards) > 4
    before = {path: path.stat().st_mtime_ns for path in shards}
    shards[2].unlink()  # as a kill would leave it: some shards, no index, no config
    (tmp_path / "transformer/diffusion_pytorch_model.safetensors.index.json").unlink()
    (tmp_path / "transformer/.partial-1-x.safetensors").write_bytes(b"half")
    assert convert(genmo, tmp_path, "diffusers", shard_bytes=500_000) == files
    assert [path for path in shards if path.stat().st_mtime_ns != before[path]] == [shards[2]]
    assert same(state(tmp_path / "transformer"), state(TINY / "transformer"))


def other_weights(folder: Path) -> Path:
    """Write the built-in fine-tune's transformer in genmo's layout; every weight differs from the tiny model's."""
    convert(BUILTIN / "tiny-pusa", folder, "genmo")
    return folder / "dit.safetensors"


@pytest.mark.parametrize("then", [10**9, 500_000])
def test_a_model_written_over_another_is_never_mixed_with_it(genmo, tmp_path, then):
    other, out = other_weights(tmp_path / "other"), tmp_path / "out"
    convert(genmo / "dit.safetensors", out, "diffusers", shard_bytes=500_000)
    convert(other, out, "diffusers", shard_bytes=then)
    loaded = load_part(Mochi(), find_part(out, "transformer"), torch.float16)
    assert same(loaded.state_dict(), state(BUILTIN / "tiny-pusa/transformer"))
    assert same(state(out / "transformer"), state(BUILTIN / "tiny-pusa/transformer"))


def test_after_a_kill_over_an_old_result_there_is_no_model(genmo, tmp_path, monkeypatch):
    convert(genmo / "dit.safetensors", tmp_path, "diffusers", shard_bytes=500_000)
    written = []

    def killed(path, *given):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        return write_file(path, *given)

    monkeypatch.setattr("pusa.weights.convert.write_file", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(other_weights(tmp_path / "other"), tmp_path, "diffusers", shard_bytes=500_000)
    with pytest.raises(WeightsError, match=r"has no config\.json"):
        load_part(Mochi(), find_part(tmp_path, "transformer"), torch.float16)


@pytest.mark.parametrize("name", ["blocks.0.attn.qkv_x.weight", "blocks.0.mlp_x.w1.weight"])
@pytest.mark.parametrize("cut", [lambda t: t[:-1], lambda t: t[0, 0]], ids=["rows", "scalar"])
def test_a_tensor_that_cannot_be_split_is_refused(genmo, tmp_path, name, cut):
    path = tmp_path / "dit.safetensors"
    path.write_bytes((genmo / "dit.safetensors").read_bytes())
    change(path, lambda t: t.update({name: cut(t[name]).clone()}))
    for call in (
        lambda: convert(path, tmp_path / "out", "diffusers"),
        lambda: load_part(Mochi(), PartFiles("transformer", (path,)), torch.float32),
    ):
        with pytest.raises(
            WeightsError, match=rf"dit\.safetensors: {name}: \d+ rows cannot be split into [23] equal parts"
        ):
            call()


def test_no_tensor_is_dropped_and_no_input_overwritten(genmo, tmp_path):
    vae = tmp_path / "vae.safetensors"
    save_file({**state(TINY / "vae"), "quant_conv.weight": torch.ones(1)}, vae)
    with pytest.raises(WeightsError, match=r"unexpected 'quant_conv\.weight'"):
        convert(vae, tmp_path / "out", "genmo")

    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        save_file(state(TINY / "transformer"), tmp_path / f"two/{name}.safetensors")
    with pytest.raises(WeightsError, match=r"would both become dit\.safetensors"):
        convert(tmp_path / "two", tmp_path / "out", "genmo")

    (tmp_path / "own").mkdir()
    (tmp_path / "own/.lock").touch()  # as an earlier conversion leaves it
    own = tmp_path / "own/encoder.safetensors"
    save_file(state(TINY / "vae"), own)
    before = own.read_bytes()
    with pytest.raises(WeightsError, match="is an input of the conversion"):
        convert(own, tmp_path / "own", "genmo")
    assert own.read_bytes() == before

    both = {f"{prefix}t5_yproj.weight": torch.ones(1) for prefix in ("model.diffusion_model.", "")}
    save_file(both, tmp_path / "both.safetensors")
    with pytest.raises(WeightsError, match="both with and without"):
        describe(tmp_path / "both.safetensors")


def test_a_folder_without_its_configuration_is_refused_with_what_is_missing(tmp_path):
    (tmp_path / "model").mkdir()
    save_file(state(TINY / "transformer"), tmp_path / "model/diffusion_pytorch_model.safetensors")
    with pytest.raises(WeightsError, match=r"have no weights; .* a folder with config\.json"):
        describe(tmp_path)


@pytest.mark.parametrize("name", ["patch_embed.proj.weight", "pos_frequencies", "time_embed.caption_proj.weight"])
@pytest.mark.parametrize("edit", [lambda t, name: t.pop(name), lambda t, name: t.update({name: torch.ones(2)})])
def test_a_single_file_without_a_configuration_in_its_shapes_is_refused(tmp_path, name, edit):
    save_file(state(TINY / "transformer"), tmp_path / "model.safetensors")
    change(tmp_path / "model.safetensors", lambda t: edit(t, name))
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        load_part(Mochi(), PartFiles("transformer", (tmp_path / "model.safetensors",)), torch.float32)


def test_after_a_kill_over_an_old_vae_its_halves_are_not_mixed(genmo, tmp_path, monkeypatch):
    other = {name: tensor + 1 for name, tensor in state(TINY / "vae").items()}
    save_file(other, tmp_path / "vae.safetensors")
    convert(TINY / "vae", tmp_path / "out", "genmo")

    def killed(path, *given):
        if path.name == "decoder.safetensors":
            raise KeyboardInterrupt
        write_file(path, *given)

    monkeypatch.setattr("pusa.weights.convert.write_file", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "vae.safetensors", tmp_path / "out", "genmo")
    with pytest.raises(WeightsError, match="has no vae/"):
        find_part(tmp_path / "out", "vae")


def test_a_conversion_keeps_the_record_of_a_fine_tune(tmp_path):
    checkpoint = tmp_path / "00000500"
    MochiTransformer3DModel.from_pretrained(TINY / "transformer").save_pretrained(checkpoint / "transformer")
    recipe = {"latent_space": "dit", "backbone": "mochi", "base": "0123"}
    (checkpoint / "checkpoint.json").write_text(json.dumps({"step": 500, "recipe": recipe}))
    convert(checkpoint, tmp_path / "genmo", "genmo")
    convert(tmp_path / "genmo/dit.safetensors", tmp_path / "diffusers", "diffusers")
    for path in (checkpoint / "transformer", tmp_path / "genmo", tmp_path / "diffusers"):
        (facts,) = describe(path)
        assert facts["latent_space"] == "dit"
        assert (facts["lineage"]["step"], facts["lineage"]["recipe"]["base"]) == (500, "0123")
    with pytest.raises(WeightsError, match="has latent space 'dit', not 'vae'"):
        convert(checkpoint, tmp_path / "other", "genmo", latent_space="vae")


def test_a_conversion_records_a_given_latent_space(genmo, tmp_path):
    convert(genmo / "dit.safetensors", tmp_path, "diffusers", latent_space="vae")
    assert describe(tmp_path / "transformer")[0]["latent_space"] == "vae"


def test_inspect_describes_each_model(genmo, tmp_path):
    tiny = {facts["part"]: facts for facts in describe(TINY)}
    assert {part: (facts["family"], facts["layout"], facts["dtypes"]) for part, facts in tiny.items()} == {
        "text_encoder": ("t5", "diffusers", {"F16": 84_032}),
        "transformer": ("mochi", "diffusers", {"F16": 1_700_376}),
        "vae": ("mochi", "diffusers", {"F16": 1_377_251}),
    }
    assert {(f["family"], f["part"], f["layout"], f["kind"]) for f in describe(genmo)} == {
        ("mochi", "transformer", "genmo", "full"),
        ("mochi", "vae", "genmo", "full"),
    }
    target = "transformer_blocks.0.attn1.add_q_proj"
    lora = {f"{target}.lora_A.weight": torch.ones(4, 96), f"{target}.lora_B.weight": torch.ones(96, 4)}
    save_file(lora, tmp_path / "lora.safetensors")
    (facts,) = describe(tmp_path / "lora.safetensors")
    assert (facts["family"], facts["kind"]) == ("mochi", "LoRA of rank 4 (1 layers)")
    assert facts["strength"] == "W + strength * B A: no alpha is recorded, so alpha = rank"
    assert [model.part for model in find_models(TINY)] == [None, "transformer", "vae"]


@pytest.mark.parametrize(
    "name", ["MochiTransformer3DModel", "PusaMochiTransformer3DModel", "FSDPPusaMochiTransformer3DModel"]
)
def test_a_written_configuration_names_diffusers_class(name):
    """While it is sharded, torch puts FSDP before the name of a model's class."""
    assert diffusers_config({"_class_name": name, "num_layers": 3}) == {
        "_class_name": "MochiTransformer3DModel",
        "num_layers": 3,
    }
