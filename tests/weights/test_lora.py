"""LoRAs named in a manifest: merged into the weights they were trained on, complete or not at all."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from flows.commands import main
from pusa.backbones.mochi.backbone import Mochi
from pusa.errors import ManifestError, WeightsError
from pusa.manifest.loading import load_manifest
from pusa.manifest.models import ModelSpec
from pusa.system.files import write_json
from pusa.weights.export import export
from pusa.weights.load import load_part
from pusa.weights.model import Model
from pusa.weights.resolve import BUILTIN, locate_config, locate_part, require_model
from pusa.weights.source import find_part
from pusa.weights.tensors import read_file
from tests.helpers.fine_tunes import LORA_FILE, METHOD, close, edit, lineage, output, recipe, with_settings


@pytest.mark.parametrize("place", ["", "lora", f"lora/{LORA_FILE}", "peft", "peft/adapter_model.safetensors"])
def test_a_manifest_names_a_lora(lora, base, tmp_path, place):
    trained, checkpoint = lora
    export(checkpoint, tmp_path / "peft", "peft")
    where = tmp_path / place if "peft" in place else checkpoint / place
    spec = ModelSpec(weights=str(base), lora=str(where))
    require_model(spec)
    source = locate_part(spec, "transformer")
    loaded = load_part(Mochi(), source, torch.float32)
    assert close(output(loaded, (100.0, 700.0)), output(trained, (100.0, 700.0)))
    assert not any(weight.requires_grad for weight in loaded.parameters())
    assert source.record()["latent_space"] == "dit"
    assert source.fingerprint() != find_part(base, "transformer").fingerprint()


def test_the_fingerprint_includes_the_lora(lora, base):
    _, checkpoint = lora
    spec = ModelSpec(weights=str(base), lora=str(checkpoint))
    before = locate_part(spec, "transformer").fingerprint()
    edit(checkpoint, lambda tensors: tensors[next(iter(tensors))].add_(1))
    assert locate_part(spec, "transformer").fingerprint() != before


def test_another_latent_space_is_refused_with_both_names(lora, base):
    _, checkpoint = lora
    write_json(base / "checkpoint.json", {"recipe": {"latent_space": "vae"}})
    with pytest.raises(WeightsError, match=r"safetensors has latent space 'dit'; .*base/transformer has 'vae'"):
        require_model(ModelSpec(weights=str(base), lora=str(checkpoint)))


def test_a_lora_and_its_base_may_lie_on_a_hub(lora, base, empty_hub):
    trained, checkpoint = lora
    files = {str(path.relative_to(base)): path.read_bytes() for path in base.glob("*/*") if path.is_file()}
    empty_hub.add("org/base", {**files, "model_index.json": (BUILTIN / "tiny/model_index.json").read_bytes()})
    empty_hub.add("org/lora", {LORA_FILE: (checkpoint / "lora" / LORA_FILE).read_bytes()})
    for name in (str(checkpoint), f"hf:org/lora:{LORA_FILE}"):
        spec = ModelSpec(weights="hf:org/base", lora=name)
        empty_hub.sent.clear()
        require_model(spec)
        assert locate_config(spec, "transformer").adapters == ()
        assert not any("safetensors" in sent.file for sent in empty_hub.sent)
        loaded = load_part(Mochi(), locate_part(spec, "transformer"), torch.float32)
        assert close(output(loaded, (100.0, 700.0)), output(trained, (100.0, 700.0)))
    with pytest.raises(WeightsError, match="has latent_space 'dit'; the manifest has 'vae'"):
        require_model(ModelSpec(weights="hf:org/base", lora=str(checkpoint), latent_space="vae"))


def test_another_base_is_refused_with_both_fingerprints(lora, base, record, tmp_path):
    _, checkpoint = lora
    path = base / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["proj_out.bias"].add_(1)
    save_file(tensors, path, {"format": "pt"})
    wanted, there = record["recipe"]["base"], find_part(base, "transformer").fingerprint()
    spec = ModelSpec(weights=str(base), lora=str(checkpoint))
    for attempt in (
        lambda: require_model(spec),
        lambda: load_part(Mochi(), locate_part(spec, "transformer"), torch.float32),
        lambda: export(checkpoint, tmp_path / "out", "genmo", str(base)),
    ):
        with pytest.raises(WeightsError, match=rf"trained on .* fingerprint {wanted}; .* has {there}"):
            attempt()
    edit(checkpoint, lambda tensors: None, keep=("lora_adapter_metadata",))  # now it records no base
    load_part(Mochi(), locate_part(spec, "transformer"), torch.float32)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t, n: t.update({n.replace("blocks.0", "blocks.9"): t.pop(n) for n in list(t)}), r"has no .*blocks\.9"),
        (lambda t, n: t.update({n: torch.ones(4, 3)}), r"has other shapes of .* \(\d+, 3\), the transformer's"),
        (lambda t, n: t.pop(n), "not a complete LoRA .*to_out"),
        (lambda t, n: t.update({n: torch.ones(9, 16)}), "not a complete LoRA .*to_out"),
        (lambda t, n: t.update(x=torch.ones(1)), "not a complete LoRA .*'x'"),
    ],
    ids=["no such layer", "another shape", "half", "ranks differ", "unknown"],
)
def test_a_lora_that_does_not_fit_is_refused_as_a_whole(lora, base, change, message):
    _, checkpoint = lora
    name = "transformer.transformer_blocks.0.attn1.to_out.0.lora_A.weight"
    edit(checkpoint, lambda tensors: change(tensors, name))
    spec = ModelSpec(weights=str(base), lora=str(checkpoint))
    with pytest.raises(WeightsError, match=message):
        load_part(Mochi(), locate_part(spec, "transformer"), torch.float32)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: with_settings(path, '{"lora_alpha": 0}'), "lora_alpha 0"),
        (lambda path: edit(path, lambda t: t.pop(next(iter(t)))), "not a complete LoRA"),
        (lambda path: (path / "lora" / LORA_FILE).write_bytes(b"no"), "safetensors"),
    ],
    ids=["settings", "half", "torn"],
)
def test_a_lora_is_read_before_anything_is_loaded_or_downloaded(lora, base, empty_hub, damage, message):
    files = {str(path.relative_to(base)): path.read_bytes() for path in base.glob("*/*") if path.is_file()}
    empty_hub.add("org/base", {**files, "model_index.json": (BUILTIN / "tiny/model_index.json").read_bytes()})
    damage(lora[1])
    for weights in (str(base), "hf:org/base"):
        with pytest.raises(WeightsError, match=message):
            require_model(ModelSpec(weights=weights, lora=str(lora[1])))
    assert not any("safetensors" in sent.file for sent in empty_hub.sent)


def test_a_lora_that_does_not_fit_is_refused_by_headers_alone(lora, base, tmp_path, capsys):
    name = "transformer.transformer_blocks.0.attn1.to_out.0.lora_A.weight"
    edit(lora[1], lambda tensors: tensors.update({name: torch.ones(4, 3)}))
    manifest = tmp_path / "generate.yaml"
    manifest.write_text(
        f'kind: generate\nmodel: {{weights: "{base}", lora: "{lora[1]}"}}\n'
        "jobs: [{id: a, task: text_to_video, prompt: x, width: 64, height: 64, num_frames: 13}]\n"
    )
    assert main(["check", str(manifest)]) == 1
    assert "has other shapes of" in capsys.readouterr().err


def test_each_key_has_one_meaning(full, lora, base, empty_hub):
    empty_hub.add("org/lora", {LORA_FILE: (lora[1] / "lora" / LORA_FILE).read_bytes()})
    weights = str(base)
    cases = [
        *(({"checkpoint": str(lora[1] / place)}, "is a LoRA; name it as `lora:`") for place in ("", "lora")),
        ({"checkpoint": str(lora[1] / "lora" / LORA_FILE)}, "is a LoRA; name it as `lora:`"),
        ({"checkpoint": f"hf:org/lora:{LORA_FILE}"}, "is a LoRA; name it as `lora:`"),
        ({"lora": str(full[1])}, "is not a LoRA; name a whole fine-tuned transformer as `checkpoint:`"),
        ({"lora": "builtin:tiny"}, "is not a LoRA; .* `checkpoint:`"),
        ({"lora": str(base / "no")}, "lora .*no does not exist; was the fine-tune run?"),
        ({"lora": "hf:org/lora"}, "does not name a file; expected hf:org/lora:FILE"),
        ({"lora": "hf:org/lora:x.safetensors"}, "no file 'x.safetensors'"),
    ]
    for keys, message in cases:
        spec = ModelSpec(weights=weights, **keys)
        if not keys.get("checkpoint", "").startswith("hf:"):  # its kind is known only after the download
            with pytest.raises(WeightsError, match=message):
                require_model(spec)
        with pytest.raises(WeightsError, match=message):
            locate_part(spec, "transformer")


def test_a_lora_is_merged_into_the_checkpoint_that_it_was_trained_on(full, lora, base, tmp_path):
    """The checkpoint replaces the transformer of the weights, whose fingerprint the LoRA does not record."""
    checkpoint, adapter = full[1], lora[1]
    path = adapter / "lora" / LORA_FILE
    trained_on = find_part(checkpoint.resolve(), "transformer").fingerprint()
    facts = {**read_file(path)[1], "pusa": json.dumps({"latent_space": "dit", "recipe": recipe(trained_on)})}
    save_file(load_file(path), path, facts)
    spec = ModelSpec(weights=str(base), checkpoint=str(checkpoint), lora=str(adapter))
    require_model(spec)
    with pytest.raises(WeightsError, match=rf"trained on .* of fingerprint {trained_on}"):
        require_model(spec.model_copy(update={"checkpoint": None}))
    loaded, tuned = (
        load_part(Mochi(), source, torch.float32)
        for source in (locate_part(spec, "transformer"), locate_part(spec, "transformer").base)
    )
    name = "transformer_blocks.0.attn1.to_q"
    halves = load_file(path)
    down, up = (halves[f"transformer.{name}.lora_{half}.weight"] for half in "AB")
    expected = tuned.state_dict()[f"{name}.weight"] + METHOD.alpha / METHOD.rank * up @ down
    torch.testing.assert_close(loaded.state_dict()[f"{name}.weight"], expected)
    export(adapter, tmp_path / "out", "diffusers", str(checkpoint))
    merged = load_part(Mochi(), find_part(tmp_path / "out", "transformer"), torch.float32)
    assert close(output(merged), output(loaded))
    assert lineage(tmp_path / "out/transformer")["base_record"]["step"] == 7


def test_a_lora_is_not_trained_on_top_of_another(tmp_path):
    manifest = tmp_path / "finetune.yaml"
    text = 'kind: finetune\nbase: {weights: "builtin:tiny", lora: RUN/checkpoints/last}\n'
    manifest.write_text(text)
    load_manifest(manifest, tmp_path)
    manifest.write_text(text + "train: {method: lora}\n")
    with pytest.raises(ManifestError, match=r"merge it first: .* export .*/last FOLDER .*--base builtin:tiny$"):
        load_manifest(manifest, tmp_path)
    loras = "loras: [{weights: RUN/a, strength: 1.4}, {weights: RUN/b}]}"
    manifest.write_text(text.replace("lora: RUN/checkpoints/last}", loras) + "train: {method: lora}\n")
    with pytest.raises(ManifestError, match=r"--base builtin:tiny --strength 1.4 and so on for the others"):
        load_manifest(manifest, tmp_path)


def test_a_lora_of_peft_is_read_with_its_settings(lora, base, tmp_path, empty_hub):
    trained, checkpoint = lora
    export(checkpoint, tmp_path / "peft", "peft")
    files = {path.name: path.read_bytes() for path in (tmp_path / "peft").glob("adapter*")}
    empty_hub.add("org/peft", files)
    empty_hub.add("org/half", {name: files[name] for name in files if name.endswith(".safetensors")})
    spec = ModelSpec(weights=str(base), lora="hf:org/peft:adapter_model.safetensors")
    require_model(spec)
    found = locate_part(spec, "transformer")
    cached = locate_part(
        spec.model_copy(update={"lora": str(found.adapters[0].path)}), "transformer"
    )  # a link to a blob whose name tells nothing
    for source in (found, cached):
        loaded = load_part(Mochi(), source, torch.float32)
        assert close(output(loaded, (100.0, 700.0)), output(trained, (100.0, 700.0)))
    with pytest.raises(WeightsError, match=r"no file 'adapter_config.json'"):
        locate_part(spec.model_copy(update={"lora": "hf:org/half:adapter_model.safetensors"}), "transformer")
    (tmp_path / "peft/adapter_config.json").unlink()
    with pytest.raises(WeightsError, match=r"has no alpha: PEFT keeps it in adapter_config.json; put .* beside"):
        require_model(spec.model_copy(update={"lora": str(tmp_path / "peft")}))


def test_without_a_recorded_latent_space_the_lora_has_that_of_its_base(lora, base):
    write_json(base / "checkpoint.json", {"recipe": {"latent_space": "vae"}})
    path = lora[1] / "lora" / LORA_FILE
    save_file(load_file(path), path, {**read_file(path)[1], "pusa": json.dumps({"step": 7, "recipe": {}})})
    assert Model(ModelSpec(weights=str(base), lora=str(lora[1]))).space_name == "vae"


def test_a_lora_in_the_original_names_is_split_as_the_weights_are(networks, base, tmp_path):
    """genmo has q, k and v in one matrix, whose B has three parts, and the halves of w1 in the other order."""
    torch.manual_seed(3)
    width = networks[0].state_dict()["transformer_blocks.0.attn1.to_q.weight"].shape[0]
    half = networks[0].state_dict()["transformer_blocks.0.ff.net.0.proj.weight"].shape[0] // 2
    tensors = {
        "diffusion_model.blocks.0.attn.qkv_x.lora_down.weight": torch.randn(2, width),
        "diffusion_model.blocks.0.attn.qkv_x.lora_up.weight": torch.randn(3 * width, 2),
        "diffusion_model.blocks.0.mlp_x.w1.diff": torch.randn(2 * half, width),
    }
    down, up, delta = tensors.values()
    save_file(tensors, tmp_path / "x.safetensors")
    spec = ModelSpec(weights=str(base), loras=({"weights": str(tmp_path / "x.safetensors"), "strength": 0.5},))
    require_model(spec)
    weights = load_part(Mochi(), locate_part(spec, "transformer"), torch.float32).state_dict()
    expected = networks[0].state_dict()
    for number, name in enumerate(("to_q", "to_k", "to_v")):
        part = up[number * width : (number + 1) * width]
        expected[f"transformer_blocks.0.attn1.{name}.weight"] += 0.5 * part @ down
    expected["transformer_blocks.0.ff.net.0.proj.weight"] += 0.5 * torch.cat([delta[half:], delta[:half]])
    torch.testing.assert_close(weights, dict(expected), rtol=1e-5, atol=1e-5)


def test_a_lora_of_joined_weights_becomes_one_of_the_joined_weight(lora, base, tmp_path):
    _, checkpoint = lora
    (file,) = export(checkpoint, tmp_path / "out", "original-lora")
    tensors = load_file(file)
    down, up = (tensors[f"diffusion_model.blocks.0.attn.qkv_x.lora_{half}.weight"] for half in "AB")
    queries, others = up.split([len(up) // 3, 2 * len(up) // 3])  # only to_q is adapted
    assert len(down) == METHOD.rank and queries.any() and not others.any()
    ours, theirs = (
        load_part(Mochi(), locate_part(ModelSpec(weights=str(base), lora=str(path)), "transformer"), torch.float32)
        for path in (checkpoint, file)
    )
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], weight, rtol=1e-6, atol=1e-6)


def test_a_lora_of_swapped_halves_is_written_in_the_original_names(networks, base, tmp_path):
    layers = ("attn1.to_out.0", "norm1.linear", "ff.net.0.proj")  # of the last, the halves are in the other order
    torch.manual_seed(4)
    tensors = {}
    for layer in layers:
        out, width = networks[0].state_dict()[f"transformer_blocks.0.{layer}.weight"].shape
        tensors[f"transformer.transformer_blocks.0.{layer}.lora_A.weight"] = torch.randn(2, width)
        tensors[f"transformer.transformer_blocks.0.{layer}.lora_B.weight"] = torch.randn(out, 2)
    save_file(tensors, tmp_path / "x.safetensors")
    (file,) = export(tmp_path / "x.safetensors", tmp_path / "out", "original-lora")
    assert "diffusion_model.blocks.0.mlp_x.w1.lora_B.weight" in load_file(file)
    ours, theirs = (
        load_part(Mochi(), locate_part(ModelSpec(weights=str(base), lora=str(path)), "transformer"), torch.float32)
        for path in (tmp_path / "x.safetensors", file)
    )
    assert torch.equal(output(ours), output(theirs))
