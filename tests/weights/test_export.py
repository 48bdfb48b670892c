"""What is exported is loaded by those it is for, and computes what was trained."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel
from peft import PeftModel
from safetensors.torch import load_file, save_file

from flows.cli import main
from pusa.backbones.mochi import Mochi, PusaMochiTransformer3DModel
from pusa.errors import WeightsError
from pusa.files import write_json
from pusa.manifest import ModelSpec
from pusa.training.settings import Lora
from pusa.training.trained import choose, is_added
from pusa.weights import ENCODERS
from pusa.weights.describe import describe
from pusa.weights.export import export
from pusa.weights.lora import write_lora
from pusa.weights.resolve import BUILTIN, locate, locate_config, require
from pusa.weights.source import Source, find_part
from pusa.weights.tensors import read_file
from pusa.weights.write import config_of, write_transformer

METHOD = Lora(method="lora", rank=4, alpha=6, targets=("to_q", "to_out.0", "norm1.linear"))
LORA_FILE = "pytorch_lora_weights.safetensors"


def output(transformer, levels=(100.0, 100.0)) -> torch.Tensor:
    """Of fixed inputs; diffusers' own class knows one level a clip."""
    transformer = fresh(transformer)
    generator = torch.Generator().manual_seed(5)
    timestep = torch.tensor([levels]) if len(set(levels)) > 1 else torch.tensor(levels[:1])
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(1, 12, 2, 4, 4, generator=generator),
            encoder_hidden_states=torch.randn(1, 8, 16, generator=generator),
            timestep=timestep,
            encoder_attention_mask=torch.ones(1, 8),
            return_dict=False,
        )[0]


def fresh(transformer):
    """The same with weights in memory of its own: where a mapped file's lie askew, kernels differ in the last bit."""
    transformer.load_state_dict({name: w.clone() for name, w in transformer.state_dict().items()}, assign=True)
    return transformer


def plain(trained) -> MochiTransformer3DModel:
    """diffusers' own, with the same weights."""
    own = MochiTransformer3DModel.from_config(trained.config).eval()
    own.load_state_dict(trained.state_dict())
    return own


def recipe(base: str) -> dict:
    return {"base": base, "latents": "0ff1ce", "latent_space": "dit", "backbone": "mochi", "train": {}}


@pytest.fixture
def base(networks, tmp_path) -> Path:
    """A model's folder with a small transformer, fp32."""
    networks[0].save_pretrained(tmp_path / "base/transformer")
    for part in ENCODERS:
        (tmp_path / "base" / part).symlink_to(BUILTIN / "tiny" / part)
    return tmp_path / "base"


@pytest.fixture
def record(base) -> dict:
    """What a fine-tune of that base says of itself."""
    fingerprint = find_part(base, "transformer").fingerprint()
    return {"step": 7, "recipe": recipe(fingerprint), "versions": {"torch": "2"}}


@pytest.fixture
def full(networks, record, tmp_path) -> tuple[torch.nn.Module, Path]:
    """A fully fine-tuned transformer, and its checkpoint."""
    trained = networks[1]
    with torch.no_grad():
        for weight in trained.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    folder = tmp_path / "full/checkpoints/00000007"
    write_transformer(folder / "transformer", trained.state_dict(), config_of(trained), record, torch.float32, 20_000)
    (folder.parent / "last").symlink_to(folder.name)
    return trained, folder.parent / "last"


@pytest.fixture
def lora(networks, record, tmp_path) -> tuple[torch.nn.Module, Path]:
    """A transformer with a trained LoRA beside its weights, and its checkpoint."""
    trained = networks[1]
    choose(trained, METHOD)
    added = {name: weight for name, weight in trained.named_parameters() if is_added(name)}
    with torch.no_grad():
        for weight in added.values():
            weight.normal_(std=0.3)
    folder = tmp_path / "lora-run/checkpoints/00000007"
    write_lora(folder / "lora", added, METHOD, record)
    (folder.parent / "last").symlink_to(folder.name)
    return trained, folder.parent / "last"


def lineage(path: Path) -> dict:
    """What every file at a path says of itself, which must be one and the same."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    (told,) = {read_file(file)[1]["pusa"] for file in files}
    return json.loads(told)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_full_fine_tune_is_a_transformer_of_diffusers(full, record, tmp_path):
    trained, checkpoint = full
    export(checkpoint, tmp_path / "out", "diffusers")
    for folder in (checkpoint / "transformer", tmp_path / "out/transformer"):
        assert json.loads((folder / "config.json").read_text())["_class_name"] == "MochiTransformer3DModel"
        told = lineage(folder)
        assert told["step"] == 7 and told["recipe"] == record["recipe"] and told["versions"] == record["versions"]
        loaded, info = MochiTransformer3DModel.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        assert torch.equal(output(loaded), output(plain(trained)))
        ours = Mochi().load("transformer", Source("transformer", (folder,)), torch.float32)
        assert torch.equal(output(ours, (100.0, 700.0)), output(trained, (100.0, 700.0)))
        assert ours.config.max_sequence_length == trained.config.max_sequence_length
    assert len(list((checkpoint / "transformer").glob("*-of-*.safetensors"))) > 3
    assert (tmp_path / "out/transformer/diffusion_pytorch_model.safetensors").is_file()


def test_a_full_fine_tune_is_a_single_file_of_genmo(full, record, tmp_path):
    trained, checkpoint = full
    (file,) = export(checkpoint, tmp_path / "out", "genmo")
    loaded = Mochi().load("transformer", Source("transformer", (file,)), torch.float32)
    assert torch.equal(output(loaded, (100.0, 700.0)), output(trained, (100.0, 700.0)))
    assert lineage(file)["recipe"] == record["recipe"]
    assert describe(file)[0]["latent_space"] == "dit"


def test_a_checkpoint_of_old_is_exported_with_its_record(networks, record, tmp_path):
    networks[1].save_pretrained(tmp_path / "old/transformer")
    write_json(tmp_path / "old/checkpoint.json", {**record, "files": {"x": [1, "y"]}})
    export(tmp_path / "old", tmp_path / "out", "diffusers")
    told = lineage(tmp_path / "out/transformer")
    assert told["recipe"] == record["recipe"] and told["latent_space"] == "dit" and "files" not in told
    config = json.loads((tmp_path / "out/transformer/config.json").read_text())
    assert config["_class_name"] == "MochiTransformer3DModel"


def test_what_the_files_say_goes_before_what_lies_beside_them(full):
    _, checkpoint = full
    write_json(checkpoint / "checkpoint.json", {"step": 8, "recipe": {"latent_space": "vae"}})
    told = Source("transformer", (checkpoint / "transformer",)).record()
    assert (told["step"], told["latent_space"]) == (7, "dit")


def test_a_written_result_has_the_dtype_that_was_asked_for(networks, record, tmp_path):
    trained = networks[1]
    write_transformer(tmp_path / "t", trained.state_dict(), config_of(trained), record, torch.bfloat16)
    (file,) = (tmp_path / "t").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}


def test_a_lora_is_one_of_diffusers(networks, lora, record, tmp_path):
    trained, checkpoint = lora
    (file,) = export(checkpoint, tmp_path / "out", "lora")
    for place in (checkpoint / "lora", file.parent):
        for model_class in (MochiTransformer3DModel, PusaMochiTransformer3DModel):
            loaded = model_class.from_config(networks[0].config).eval()
            loaded.load_state_dict(networks[0].state_dict())
            assert not close(output(loaded), output(trained))
            parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
            pipeline = MochiPipeline(transformer=loaded, scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
            pipeline.load_lora_weights(place)
            assert close(output(loaded), output(trained))
        assert lineage(place)["recipe"] == record["recipe"]


def test_diffusers_class_loads_a_lora_too(networks, lora):
    loaded, (trained, checkpoint) = networks[0], lora
    # without use_safetensors diffusers 0.42 drops the file's metadata, and so its alpha
    loaded.load_lora_adapter(checkpoint / "lora", prefix="transformer", use_safetensors=True)
    assert close(output(loaded), output(trained))


def test_a_lora_is_one_of_peft(networks, lora, record, tmp_path):
    trained, checkpoint = lora
    export(checkpoint, tmp_path / "out", "peft")
    loaded = PeftModel.from_pretrained(networks[0], tmp_path / "out")
    assert close(output(loaded), output(trained))
    assert lineage(tmp_path / "out")["recipe"] == record["recipe"]


@pytest.mark.parametrize("to", ["diffusers", "genmo"])
def test_a_lora_merged_is_a_transformer(lora, base, record, tmp_path, to, capsys):
    trained, checkpoint = lora
    for _ in range(2):  # the second time it is there
        words = ["weights", "export", str(checkpoint), str(tmp_path / "out"), "--to", to, "--base", str(base)]
        assert main(words) == 0, capsys.readouterr().err
    written = find_part(tmp_path / "out", "transformer")
    loaded = Mochi().load("transformer", written, torch.float32)
    assert close(output(loaded, (100.0, 700.0)), output(trained, (100.0, 700.0)))
    assert lineage(written.paths[0])["recipe"] == record["recipe"]
    assert not list((tmp_path / "out").glob(".partial-*"))
    if to == "diffusers":
        assert close(output(MochiTransformer3DModel.from_pretrained(written.folder)), output(trained))


@pytest.mark.parametrize("place", ["", "lora", f"lora/{LORA_FILE}", "peft", "peft/adapter_model.safetensors"])
def test_a_manifests_checkpoint_may_be_a_lora(lora, base, tmp_path, place):
    trained, checkpoint = lora
    export(checkpoint, tmp_path / "peft", "peft")
    where = tmp_path / place if "peft" in place else checkpoint / place
    spec = ModelSpec(weights=str(base), checkpoint=str(where))
    require(spec)
    source = locate(spec, "transformer")
    loaded = Mochi().load("transformer", source, torch.float32)
    assert close(output(loaded, (100.0, 700.0)), output(trained, (100.0, 700.0)))
    assert not any(weight.requires_grad for weight in loaded.parameters())
    assert source.record()["latent_space"] == "dit"
    assert source.fingerprint() != find_part(base, "transformer").fingerprint()


def test_a_fingerprint_is_of_the_lora_too(lora, base):
    _, checkpoint = lora
    spec = ModelSpec(weights=str(base), checkpoint=str(checkpoint))
    before = locate(spec, "transformer").fingerprint()
    edit(checkpoint, lambda tensors: tensors[next(iter(tensors))].add_(1))
    assert locate(spec, "transformer").fingerprint() != before


def test_another_latent_space_is_refused_with_both_names(lora, base):
    _, checkpoint = lora
    write_json(base / "checkpoint.json", {"recipe": {"latent_space": "vae"}})
    with pytest.raises(WeightsError, match=r"safetensors has latent space 'dit'; .*base/transformer has 'vae'"):
        require(ModelSpec(weights=str(base), checkpoint=str(checkpoint)))


def test_a_lora_and_its_base_may_lie_on_a_hub(lora, base, empty_hub):
    trained, checkpoint = lora
    files = {str(path.relative_to(base)): path.read_bytes() for path in base.glob("*/*") if path.is_file()}
    empty_hub.add("org/base", {**files, "model_index.json": (BUILTIN / "tiny/model_index.json").read_bytes()})
    empty_hub.add("org/lora", {LORA_FILE: (checkpoint / "lora" / LORA_FILE).read_bytes()})
    for name in (str(checkpoint), f"hf:org/lora:{LORA_FILE}"):
        spec = ModelSpec(weights="hf:org/base", checkpoint=name)
        empty_hub.sent.clear()
        require(spec)
        assert locate_config(spec, "transformer").adapter is None
        assert not any("safetensors" in sent.file for sent in empty_hub.sent)
        loaded = Mochi().load("transformer", locate(spec, "transformer"), torch.float32)
        assert close(output(loaded, (100.0, 700.0)), output(trained, (100.0, 700.0)))
    with pytest.raises(WeightsError, match="has latent_space 'dit'; wanted is 'vae'"):
        require(ModelSpec(weights="hf:org/base", checkpoint=str(checkpoint), latent_space="vae"))


def edit(checkpoint: Path, change, keep=("pusa", "lora_adapter_metadata")) -> None:
    path = checkpoint / "lora" / LORA_FILE
    tensors, metadata = load_file(path), read_file(path)[1]
    change(tensors)
    save_file(tensors, path, {key: value for key, value in metadata.items() if key in keep})


def test_another_base_is_refused_with_both_fingerprints(lora, base, record, tmp_path):
    _, checkpoint = lora
    path = base / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["proj_out.bias"].add_(1)
    save_file(tensors, path, {"format": "pt"})
    wanted, there = record["recipe"]["base"], find_part(base, "transformer").fingerprint()
    spec = ModelSpec(weights=str(base), checkpoint=str(checkpoint))
    for attempt in (
        lambda: require(spec),
        lambda: Mochi().load("transformer", locate(spec, "transformer"), torch.float32),
        lambda: export(checkpoint, tmp_path / "out", "genmo", str(base)),
    ):
        with pytest.raises(WeightsError, match=rf"learnt on .* fingerprint {wanted}; .* has {there}"):
            attempt()
    edit(checkpoint, lambda tensors: None, keep=("lora_adapter_metadata",))  # now it records nothing
    Mochi().load("transformer", locate(spec, "transformer"), torch.float32)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t, n: t.update({n.replace("blocks.0", "blocks.9"): t.pop(n) for n in list(t)}), r"has no .*blocks\.9"),
        (lambda t, n: t.update({n: torch.ones(4, 3)}), r"has other shapes of .* \(\d+, 3\), not"),
        (lambda t, n: t.pop(n), "no whole LoRA .*to_out"),
        (lambda t, n: t.update({n: torch.ones(9, 16)}), "no whole LoRA .*to_out"),
        (lambda t, n: t.update(x=torch.ones(1)), "no whole LoRA .*'x'"),
    ],
    ids=["no such layer", "another shape", "half", "ranks differ", "unknown"],
)
def test_a_lora_that_does_not_fit_is_never_added_in_part(lora, base, change, said):
    _, checkpoint = lora
    name = "transformer.transformer_blocks.0.attn1.to_out.0.lora_A.weight"
    edit(checkpoint, lambda tensors: change(tensors, name))
    spec = ModelSpec(weights=str(base), checkpoint=str(checkpoint))
    with pytest.raises(WeightsError, match=said):
        Mochi().load("transformer", locate(spec, "transformer"), torch.float32)


@pytest.mark.parametrize(
    "settings, said",
    [({"use_dora": True}, "has 'use_dora'"), ({"lora_alpha": "x"}, "lora_alpha 'x'"), ([], "not a JSON object")],
)
def test_settings_by_which_another_sum_is_meant_are_refused(lora, base, settings, said):
    _, checkpoint = lora
    path = checkpoint / "lora" / LORA_FILE
    save_file(load_file(path), path, {"lora_adapter_metadata": json.dumps(settings)})
    with pytest.raises(WeightsError, match=said):
        source = locate(ModelSpec(weights=str(base), checkpoint=str(checkpoint)), "transformer")
        Mochi().load("transformer", source, torch.float32)


def test_each_rule_of_strength_is_told_and_followed(networks, lora, base):
    trained, checkpoint = lora
    spec = ModelSpec(weights=str(base), checkpoint=str(checkpoint))

    def told() -> str:
        return describe(checkpoint)[0]["strength"]

    def loaded() -> torch.Tensor:
        return output(Mochi().load("transformer", locate(spec, "transformer"), torch.float32))

    assert told() == "alpha / rank * B A, with alpha 6 in the settings"
    assert describe(checkpoint)[0]["family"] == "mochi" and describe(checkpoint)[0]["lineage"]["step"] == 7

    alphas = {f"transformer.{name}.alpha": torch.tensor(6.0) for name in layers_of(trained)}
    edit(checkpoint, lambda tensors: tensors.update(alphas), keep=("pusa",))
    assert told() == "alpha / rank * B A, with each layer's alpha in a tensor"
    assert close(loaded(), output(trained))

    edit(checkpoint, lambda tensors: [tensors.pop(name) for name in alphas], keep=("pusa",))
    assert told() == "B A: no alpha is recorded"
    ours = loaded()
    networks[0].load_lora_adapter(checkpoint / "lora" / LORA_FILE, prefix="transformer")
    assert close(ours, output(networks[0])) and not close(ours, output(trained))


def layers_of(trained) -> list[str]:
    return [name for name, module in trained.named_modules() if hasattr(module, "lora_A")]


def test_what_cannot_be_made_is_one_clear_error(full, lora, base, tmp_path, capsys):
    (_, checkpoint), (_, adapter) = full, lora
    cases = [
        (checkpoint, "lora", None, "holds no LoRA, and --to lora is for LoRAs; allowed are --to diffusers and genmo"),
        (checkpoint, "genmo", str(base), "holds no LoRA, and --base is for LoRAs"),
        (adapter, "genmo", None, "is a LoRA: .*asked for is --to genmo alone"),
        (adapter, "peft", str(base), "is a LoRA: .*asked for is --to peft with --base"),
        (tmp_path / "nowhere", "genmo", None, "neither a file nor a folder"),
        (BUILTIN / "tiny/vae", "genmo", None, "holds 0 transformers"),
    ]
    for path, to, onto, said in cases:
        with pytest.raises(WeightsError, match=said):
            export(path, tmp_path / "out", to, onto)
    assert main(["weights", "export", str(adapter), str(tmp_path / "out"), "--to", "genmo"]) == 1
    assert "is a LoRA" in capsys.readouterr().err
