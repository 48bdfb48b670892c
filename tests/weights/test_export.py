"""Exports are loaded by the libraries they are for, and compute the same as the trained model."""

import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel
from peft import PeftModel
from safetensors.torch import load_file

from flows.commands import main
from pusa.backbones.mochi.backbone import Mochi
from pusa.backbones.mochi.transformer import PusaMochiTransformer3DModel
from pusa.errors import StageError, WeightsError
from pusa.manifest.models import ModelSpec
from pusa.system.files import write_json
from pusa.weights.adapters import find_adapter, read_lora
from pusa.weights.convert import convert
from pusa.weights.export import export
from pusa.weights.inspect import describe
from pusa.weights.load import load_part
from pusa.weights.model import Model
from pusa.weights.resolve import BUILTIN
from pusa.weights.source import PartFiles, find_part
from pusa.weights.stored import read_model
from pusa.weights.write import config_of, write_transformer
from tests.helpers.fine_tunes import LORA_FILE, close, edit, layers_of, lineage, output, plain


def test_diffusers_loads_a_full_fine_tune(full, record, tmp_path):
    trained, checkpoint = full
    export(checkpoint, tmp_path / "out", "diffusers")
    for folder in (checkpoint / "transformer", tmp_path / "out/transformer"):
        assert json.loads((folder / "config.json").read_text())["_class_name"] == "MochiTransformer3DModel"
        kept = lineage(folder)
        assert kept["step"] == 7 and kept["recipe"] == record["recipe"] and kept["versions"] == record["versions"]
        loaded, info = MochiTransformer3DModel.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        assert torch.equal(output(loaded), output(plain(trained)))
        ours = load_part(Mochi(), PartFiles("transformer", (folder,)), torch.float32)
        assert torch.equal(output(ours, (100.0, 700.0)), output(trained, (100.0, 700.0)))
        assert ours.config.max_sequence_length == trained.config.max_sequence_length
    assert len(list((checkpoint / "transformer").glob("*-of-*.safetensors"))) > 3
    assert (tmp_path / "out/transformer/diffusion_pytorch_model.safetensors").is_file()


def test_a_full_fine_tune_is_exported_to_a_single_file_of_genmo(full, record, tmp_path):
    trained, checkpoint = full
    (file,) = export(checkpoint, tmp_path / "out", "genmo")
    loaded = load_part(Mochi(), PartFiles("transformer", (file,)), torch.float32)
    assert torch.equal(output(loaded, (100.0, 700.0)), output(trained, (100.0, 700.0)))
    assert lineage(file)["recipe"] == record["recipe"]
    assert describe(file)[0]["latent_space"] == "dit"


def test_a_checkpoint_without_records_in_its_files_is_exported_with_its_record(networks, record, tmp_path):
    networks[1].save_pretrained(tmp_path / "old/transformer")
    write_json(tmp_path / "old/checkpoint.json", {**record, "files": {"x": [1, "y"]}})
    export(tmp_path / "old", tmp_path / "out", "diffusers")
    kept = lineage(tmp_path / "out/transformer")
    assert kept["recipe"] == record["recipe"] and kept["latent_space"] == "dit" and "files" not in kept
    config = json.loads((tmp_path / "out/transformer/config.json").read_text())
    assert config["_class_name"] == "MochiTransformer3DModel"


def test_the_record_in_the_files_has_precedence_over_the_one_beside_them(full):
    _, checkpoint = full
    write_json(checkpoint / "checkpoint.json", {"step": 8, "recipe": {"latent_space": "vae"}})
    kept = PartFiles("transformer", (checkpoint / "transformer",)).record()
    assert (kept["step"], kept["latent_space"]) == (7, "dit")


def test_a_written_transformer_has_the_given_dtype(networks, record, tmp_path):
    trained = networks[1]
    write_transformer(tmp_path / "t", trained.state_dict(), config_of(trained), record, torch.bfloat16)
    (file,) = (tmp_path / "t").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}


def test_diffusers_loads_an_exported_lora(networks, lora, record, tmp_path):
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


def test_the_transformer_class_of_diffusers_loads_a_lora(networks, lora):
    loaded, (trained, checkpoint) = networks[0], lora
    # without use_safetensors diffusers 0.42 drops the file's metadata, and so its alpha
    loaded.load_lora_adapter(checkpoint / "lora", prefix="transformer", use_safetensors=True)
    assert close(output(loaded), output(trained))


def test_peft_loads_an_exported_lora(networks, lora, record, tmp_path):
    trained, checkpoint = lora
    export(checkpoint, tmp_path / "out", "peft")
    loaded = PeftModel.from_pretrained(networks[0], tmp_path / "out")
    assert close(output(loaded), output(trained))
    assert lineage(tmp_path / "out")["recipe"] == record["recipe"]


@pytest.mark.parametrize("to", ["diffusers", "genmo"])
def test_a_merged_lora_is_a_transformer(lora, base, record, tmp_path, to, capsys):
    trained, checkpoint = lora
    for _ in range(2):  # the second time it replaces the first
        words = ["weights", "export", str(checkpoint), str(tmp_path / "out"), "--to", to, "--base", str(base)]
        assert main(words) == 0, capsys.readouterr().err
    written = find_part(tmp_path / "out", "transformer")
    loaded = load_part(Mochi(), written, torch.float32)
    assert close(output(loaded, (100.0, 700.0)), output(trained, (100.0, 700.0)))
    assert lineage(written.paths[0])["recipe"] == record["recipe"]
    assert not list((tmp_path / "out").glob(".partial-*"))
    if to == "diffusers":
        assert close(output(MochiTransformer3DModel.from_pretrained(written.folder)), output(trained))


def test_an_impossible_export_is_one_clear_error(full, lora, base, tmp_path, capsys):
    (_, checkpoint), (_, adapter) = full, lora
    cases = [
        (
            checkpoint,
            "lora",
            None,
            r"has no LoRA; --to lora is for a LoRA alone\. A whole .* with --to diffusers, genmo",
        ),
        (checkpoint, "genmo", str(base), "has no LoRA; --base .*base is for merging a LoRA: leave it out"),
        (
            adapter,
            "genmo",
            None,
            r"--to genmo needs --base, the weights to merge it into\. Without --base: --to lora, peft, original-lora$",
        ),
        (
            adapter,
            "peft",
            str(base),
            "--to peft writes it alone: leave out --base .*, or merge it with --to diffusers, genmo",
        ),
        (adapter, "genmo", str(tmp_path / "no"), "checkpoint .*no does not exist"),
        (tmp_path / "nowhere", "genmo", None, "neither a file nor a folder"),
        (BUILTIN / "tiny/vae", "genmo", None, "has 0 transformers"),
    ]
    for path, to, onto, message in cases:
        with pytest.raises(WeightsError, match=message):
            export(path, tmp_path / "new/out", to, onto)
        assert not (tmp_path / "new").exists()
    assert main(["weights", "export", str(adapter), str(tmp_path / "out"), "--to", "genmo"]) == 1
    assert "is a LoRA" in capsys.readouterr().err


def checkpoint_of(lora) -> Path:
    """Return a checkpoint with its record, as the trainer writes it."""
    folder = lora[1].resolve()
    write_json(folder / "checkpoint.json", {"step": 7, "recipe": {}})
    return folder


@pytest.mark.parametrize("named", ["weights", "checkpoint"])
def test_a_merged_transformer_records_its_base_apart_from_the_lora(lora, record, base, tmp_path, named):
    """The base is a fine-tune too; the LoRA does not record its latent space."""
    old = {**record, "step": 3, "recipe": {**record["recipe"], "latent_space": "vae"}, "skipped": 2}
    write_json(base / "checkpoint.json", old)
    edit(lora[1], lambda tensors: None, keep=("lora_adapter_metadata",))
    onto = base if named == "weights" else base / "transformer"
    assert Model(ModelSpec(weights=str(base), lora=str(lora[1]))).space_name == "vae"
    export(lora[1], tmp_path / "out", "diffusers", str(onto))
    kept = lineage(tmp_path / "out/transformer")
    assert kept["latent_space"] == "vae" and kept["base_record"]["step"] == 3
    assert not {"step", "recipe", "skipped"} & set(kept)
    for spec in ({"weights": str(tmp_path / "out")}, {"weights": str(base), "checkpoint": str(tmp_path / "out")}):
        assert Model(ModelSpec(**spec)).space_name == "vae"


def test_a_merged_transformer_keeps_the_lineage_of_the_lora(lora, record, base, tmp_path):
    export(lora[1], tmp_path / "out", "genmo", str(base))
    kept = lineage(tmp_path / "out/dit.safetensors")
    assert (kept["step"], kept["recipe"], kept["latent_space"]) == (7, record["recipe"], "dit")
    assert "base_record" not in kept


def test_a_merged_transformer_has_the_dtype_of_its_base(networks, lora, base, tmp_path, capsys):
    networks[0].bfloat16().save_pretrained(base / "transformer")
    edit(lora[1], lambda tensors: None, keep=("lora_adapter_metadata",))
    export(lora[1], tmp_path / "out", "diffusers", str(base))
    assert {s.dtype for s in read_model(tmp_path / "out/transformer").tensors.values()} == {"BF16"}
    assert main(["weights", "export", "--help"]) == 0
    assert "dtype" in capsys.readouterr().out


@pytest.mark.parametrize("victim", ["write_file", "_write_config"])
@pytest.mark.parametrize("before", ["lora", "peft"])
def test_a_kill_does_not_mix_a_lora_with_an_earlier_one(lora, tmp_path, monkeypatch, before, victim):
    def killed(*_):
        raise KeyboardInterrupt

    export(lora[1], tmp_path / "out", before)
    edit(lora[1], lambda tensors: tensors[next(iter(tensors))].add_(1))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(f"pusa.weights.lora.{victim}", killed)
        export(lora[1], tmp_path / "out", "peft")
    assert find_adapter(tmp_path / "out") is None
    export(lora[1], tmp_path / "out", "peft")
    assert read_lora(find_adapter(tmp_path / "out")).layers.keys() == set(layers_of(lora[0]))


@pytest.mark.parametrize("order", [("lora", "peft"), ("peft", "lora")])
def test_a_second_exported_lora_replaces_the_first(lora, tmp_path, order):
    out = tmp_path / "out"
    export(lora[1], out, order[0])
    old = find_adapter(out).read_bytes()
    edit(lora[1], lambda tensors: [tensor.add_(1) for tensor in tensors.values()])
    files = export(lora[1], out, order[1])
    assert {path for path in out.iterdir() if path.name[0] != "."} == {*files, out / "README.md"}
    assert find_adapter(out).read_bytes()[-1000:] != old[-1000:]


def test_a_lora_in_a_folder_has_precedence_over_one_below_it(lora, tmp_path):
    for place in (".", "lora"):
        export(lora[1], tmp_path / "out" / place, "lora")
    assert find_adapter(tmp_path / "out") == tmp_path / "out" / LORA_FILE


@pytest.mark.parametrize("place", [".", "lora", "lora/deeper"])
def test_nothing_is_written_into_a_checkpoint(full, lora, base, tmp_path, place):
    checkpoint = checkpoint_of(lora)
    before = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    attempts = [
        *(lambda to=to: export(lora[1], lora[1] / place, to) for to in ("lora", "peft")),
        *(lambda to=to: export(lora[1], lora[1] / place, to, str(base)) for to in ("diffusers", "genmo")),
        *(lambda to=to: export(full[1], checkpoint / place, to) for to in ("diffusers", "genmo")),
        lambda: convert(full[1], checkpoint / place, "genmo"),
    ]
    for attempt in attempts:
        with pytest.raises(WeightsError, match=r"lies in the checkpoint .*00000007, which must not change"):
            attempt()
    assert {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()} == before


def test_an_input_of_an_export_is_never_overwritten(full, lora, base, tmp_path):
    export(lora[1], tmp_path / "out", "lora")
    export(full[1], tmp_path / "full-out", "diffusers")
    edit(lora[1], lambda tensors: None, keep=("lora_adapter_metadata",))
    cases = [
        (tmp_path / "out", tmp_path / "out", "peft", None),
        (tmp_path / "out" / LORA_FILE, tmp_path / "out", "lora", None),
        (lora[1], tmp_path / "full-out", "diffusers", str(tmp_path / "full-out")),
        (tmp_path / "full-out", tmp_path / "full-out/transformer", "genmo", None),
    ]
    for source, folder, to, onto in cases:
        with pytest.raises(WeightsError, match=r"holds .*, an input of the export; name another folder"):
            export(source, folder, to, onto)


def test_only_an_earlier_export_is_replaced(full, lora, base, networks, tmp_path):
    export(lora[1], tmp_path / "lora-out", "lora")
    for to, file in (("diffusers", "transformer/diffusion_pytorch_model.safetensors"), ("genmo", "dit.safetensors")):
        for source in (BUILTIN / "tiny/transformer", full[1]):  # the first has no record
            export(source, tmp_path / "out", to)
        assert lineage(tmp_path / "out" / file)["step"] == 7
    copied = {"lora": lora[1] / "lora" / LORA_FILE, "genmo": tmp_path / "foreign/dit.safetensors"}
    convert(BUILTIN / "tiny/transformer", tmp_path / "foreign", "genmo")
    for to, file in copied.items():
        (tmp_path / to).mkdir()
        (tmp_path / to / file.name).write_bytes(file.read_bytes())
    networks[0].save_pretrained(tmp_path / "diffusers/transformer")
    for to in ("lora", "genmo", "diffusers"):
        (tmp_path / to / ".lock").touch()  # or the folder would be refused whatever its files are
    for to, source, message in (
        ("lora", lora[1], f"{LORA_FILE} .* made of '{LORA_FILE}'"),
        ("genmo", full[1], "dit.safetensors exists already and is not an earlier export"),
        ("diffusers", full[1], "made of 'config.json', 'diffusion_pytorch_model.safetensors'"),
    ):
        before = {path: path.read_bytes() for path in (tmp_path / to).rglob("[!.]*") if path.is_file()}
        with pytest.raises(WeightsError, match=message):
            export(source, tmp_path / to, to)
        assert {path: path.read_bytes() for path in (tmp_path / to).rglob("[!.]*") if path.is_file()} == before


@pytest.mark.parametrize("to", ["genmo", "diffusers", "lora", "peft"])
def test_equal_weights_are_equal_files(full, lora, tmp_path, to):
    for folder in ("1", "2"):
        export((lora if to in ("lora", "peft") else full)[1], tmp_path / folder, to)
    files = {path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("[!.]*") if path.is_file()}
    assert files
    for file in files:
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes(), file
    if to == "peft":  # which keeps them in a set, whose order differs from process to process
        config = json.loads((tmp_path / "1/adapter_config.json").read_text())
        assert len(config["target_modules"]) > 5 and config["target_modules"] == sorted(config["target_modules"])
        assert list(config) == sorted(config)


@pytest.mark.parametrize("to", ["genmo", "diffusers", "lora"])
def test_a_folder_of_somebody_else_is_refused_before_anything_is_written(full, lora, tmp_path, to):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/thesis.tex").touch()
    refusals = {
        tmp_path / "own": r"own is not empty, .*: it has 'thesis\.tex'",
        Path("/"): "the root of the file system",
    }
    for folder, message in refusals.items():
        for write, source in ((export, lora if to == "lora" else full), (convert, full)):
            with pytest.raises(StageError, match=message):
                write(source[1], folder, "genmo" if write == convert else to)
    assert os.listdir(tmp_path / "own") == ["thesis.tex"] and not Path("/.lock").exists()


def test_a_file_as_output_folder_is_refused(full, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/deeper"):
        for write in (export, convert):
            with pytest.raises(WeightsError, match="file is a file; expected a folder to write into"):
                write(full[1], folder, "genmo")


@pytest.mark.parametrize("to", ["diffusers", "genmo"])
def test_a_failed_export_leaves_no_empty_folders(full, tmp_path, monkeypatch, to):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pusa.weights.convert.write_file", no_space)
    (tmp_path / "there").mkdir()
    for folder in ("new/out", "there"):
        with pytest.raises(OSError, match="No space"):
            export(full[1], tmp_path / folder, to)
    assert not (tmp_path / "new").exists() and not (tmp_path / "there/transformer").exists()
    assert (tmp_path / "there").is_dir()
