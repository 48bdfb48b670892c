"""The commands of the README's page on published weights, with a small model in the same layouts on a hub."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from flows.commands import main
from pusa.generate.plan import plan
from pusa.generate.sampling import sample_job
from pusa.generate.stage import generate
from pusa.manifest.loading import load_manifest
from pusa.manifest.models import ModelSpec
from pusa.weights.convert import convert
from pusa.weights.model import Model
from pusa.weights.resolve import BUILTIN, require_model

BASE, FINE_TUNE = "genmo/mochi-1-preview", "RaphaelLiu/Pusa-V0.5"


def published_base(folder: Path) -> dict[str, bytes]:
    """Return the tiny base in the published layouts: diffusers', plain and bf16, in shards; and genmo's."""
    convert(BUILTIN / "tiny", folder / "genmo", "genmo")
    convert(folder / "genmo/dit.safetensors", folder / "diffusers", "diffusers", shard_bytes=1_000_000)
    files = {file.name: file.read_bytes() for file in (folder / "genmo").glob("*.safetensors")}
    for part in ("vae", "text_encoder", "tokenizer", "transformer"):
        source = folder / "diffusers" if part == "transformer" else BUILTIN / "tiny"
        for path in (path for path in (source / part).iterdir() if not path.name.startswith(".")):
            files[f"{part}/{path.name}"] = path.read_bytes()
            if path.suffix == ".safetensors":
                half = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
                files[f"{part}/{_bf16(path.name)}"] = save(half, {"format": "pt"})
            if path.name.endswith(".index.json"):
                index = json.loads(path.read_text())
                index["weight_map"] = {name: _bf16(file) for name, file in index["weight_map"].items()}
                files[f"{part}/{path.name.removesuffix('.json')}.bf16.json"] = json.dumps(index).encode()
    return {**files, "model_index.json": (BUILTIN / "tiny/model_index.json").read_bytes()}


def _bf16(name: str) -> str:
    return re.sub(r"^([^.-]+)", r"\1.bf16", name)


@pytest.fixture
def hub(empty_hub, tmp_path):
    """Return a hub with the two published repositories at tiny size."""
    empty_hub.add(BASE, published_base(tmp_path / "base"))
    convert(BUILTIN / "tiny-pusa", tmp_path / "pusa", "genmo")
    save_file(load_file(tmp_path / "pusa/dit.safetensors"), tmp_path / "pusa_v0_dit.safetensors")
    empty_hub.add(FINE_TUNE, {"pusa_v0_dit.safetensors": (tmp_path / "pusa_v0_dit.safetensors").read_bytes()})
    return empty_hub


def shortened(root: Path, folder: Path) -> Path:
    """Write manifests/mochi with the tiny model's sizes."""
    text = (root / "manifests/mochi/generate.yaml").read_text()
    for real, tiny in (("848", "64"), ("480", "64"), ("163", "31"), ("steps: 30", "steps: 2")):
        assert real in text
        text = text.replace(real, tiny)
    folder.mkdir(parents=True)
    (folder / "generate.yaml").write_text(text)
    (folder / "still.png").write_bytes((root / "manifests/mochi/still.png").read_bytes())
    return folder / "generate.yaml"


def commands(root: Path) -> list[list[str]]:
    page = (root / "manifests/README.md").read_text().partition("## Weights")[2].partition("\n## ")[0]
    lines = [line for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def test_the_commands_of_the_readme_run_as_written(root, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shortened(root, tmp_path / "manifests/mochi")
    checkpoint = tmp_path / "runs/tiny/checkpoints"
    checkpoint.mkdir(parents=True)
    (checkpoint / "last").symlink_to(BUILTIN / "tiny-pusa")
    printed = {}
    for command in commands(root):
        words = [*command, "--no-prefect"] if command[0] == "generate" else command
        assert main(words) == 0, (command, capsys.readouterr().err)
        printed[" ".join(command[:2])] = capsys.readouterr().out
    assert "family       mochi, transformer\n  layout       genmo" in printed["weights inspect"]
    assert "home: keyframes, ok" in printed["check manifests/mochi/generate.yaml"]
    assert "one part at a time (offload: true)" in printed["plan manifests/mochi/generate.yaml"]
    assert "made: lake, sail, home" in printed["generate manifests/mochi/generate.yaml"]
    there, back = (load_file(path) for path in ("exported/dit.safetensors", tmp_path / "pusa/dit.safetensors"))
    assert all(torch.equal(there[name], back[name]) for name in back)
    assert (tmp_path / "diffusers/transformer/config.json").is_file()

    videos = tmp_path / "runs/mochi/videos"
    assert json.loads((videos / "sail.json").read_text())["weights"]["latent_space"] == "vae"
    with safe_open(videos / "sail.latents.safetensors", "pt") as file:
        assert file.metadata()["latent_space"] == "vae"
    fetched = {sent.file for sent in hub.sent}
    assert "vae/diffusion_pytorch_model.bf16.safetensors" in fetched
    transformers = {file for file in fetched if "dit" in file or "transformer" in file}
    assert transformers == {"pusa_v0_dit.safetensors"}


def test_the_hub_and_the_disk_give_the_same_video(root, hub, tmp_path):
    manifest = load_manifest(shortened(root, tmp_path / "m"), tmp_path)
    local = ModelSpec(
        weights=str(tmp_path / "local"), checkpoint=str(tmp_path / "pusa_v0_dit.safetensors"), latent_space="vae"
    )
    for name, content in published_base(tmp_path / "again").items():
        if "/" in name:
            (tmp_path / "local" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "local" / name).write_bytes(content)
    ours, theirs = Model(manifest.model), Model(local)
    assert torch.equal(*(sample_job(manifest.jobs[1], model) for model in (ours, theirs)))


def test_the_latent_space_changes_the_result_and_must_be_given(root, hub, tmp_path):
    manifest = load_manifest(shortened(root, tmp_path / "m"), tmp_path)
    spec = manifest.model.model_dump()
    spaces = {}
    for space in ("dit", "vae"):
        model = Model(ModelSpec.model_validate({**spec, "latent_space": space}))
        still = model.encode(torch.zeros(1, 64, 64, 3, dtype=torch.uint8).numpy())
        spaces[space] = still, model.decode(still)
    assert not torch.equal(spaces["dit"][0], spaces["vae"][0])
    assert abs(spaces["dit"][1].astype(int).mean() - spaces["vae"][1].astype(int).mean()) > 1
    silent = manifest.model_copy(update={"model": ModelSpec.model_validate({**spec, "latent_space": None})})
    with pytest.raises(ValueError, match="does not record its latent space; add `latent_space: dit`"):
        generate(silent, tmp_path / "run")


def test_a_whole_base_from_the_hub_in_bf16_shards(hub):
    transformer = Model(ModelSpec(weights=f"hf:{BASE}")).transformer
    exact = Model(ModelSpec(weights="builtin:tiny")).transformer
    for name, weight in exact.state_dict().items():
        assert torch.equal(transformer.state_dict()[name], weight.bfloat16().float()), name


def test_check_and_plan_download_no_weights(root, hub, tmp_path):
    manifest = load_manifest(shortened(root, tmp_path / "m"), tmp_path)
    require_model(manifest.model)
    assert not hub.sent
    planned = plan(manifest, torch.bfloat16)
    assert {sent.file for sent in hub.sent} <= {
        "model_index.json", "transformer/config.json", "vae/config.json", "text_encoder/config.json",
    }  # fmt: skip
    assert {part.part: part.parameters for part in planned.parts}["transformer"] == 1_700_376
    misspelt = manifest.model.model_copy(update={"checkpoint": f"hf:{FINE_TUNE}:pusa_v0_dot.safetensors"})
    with pytest.raises(ValueError, match=r"no file 'pusa_v0_dot\.safetensors'; found pusa_v0_dit\.safetensors"):
        generate(manifest.model_copy(update={"model": misspelt}), tmp_path / "run")
    assert not any("safetensors" in sent.file for sent in hub.sent)
