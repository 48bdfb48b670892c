"""The shipped recipes of Wan run as they are, but for sizes and steps, on small models under the published names."""

import json

import pytest
import torch
from safetensors.torch import save

from flows.commands import main
from pusa.generate.check import check_jobs
from pusa.manifest.loading import load_manifest
from pusa.tasks import TASKS
from pusa.video.media import probe
from tests.exchange.test_wan_import import tensors
from tests.exchange.test_wan_import import write as save_tensors
from tests.helpers.small_recipes import commands_of, files_of, link_videos, write_small_recipes
from tests.helpers.small_wan import TRANSFORMER, write_wan_2_1, write_wan_2_2_5b, write_wan_2_2_a14b
from tests.weights.conftest import empty_hub  # noqa: F401  a fixture

REPOSITORIES = {
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": write_wan_2_1,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": write_wan_2_1,
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": write_wan_2_2_a14b,
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": write_wan_2_2_5b,
}
WIDTH, FFN = TRANSFORMER["num_attention_heads"] * TRANSFORMER["attention_head_dim"], TRANSFORMER["ffn_dim"]
LAYERS = {
    **{f"{kind}_attn.{name}": (WIDTH, WIDTH) for kind in ("self", "cross") for name in "qkvo"},
    "ffn.0": (WIDTH, FFN),
    "ffn.2": (FFN, WIDTH),
}
LIGHTNING = "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1"


def lora(prefix: str, down: str, up: str, seed: int, rank: int = 3, alpha: float | None = None) -> bytes:
    """Return a LoRA for every layer of the small transformer, with original names and these ends."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for block in range(TRANSFORMER["num_layers"]):
        for layer, (inputs, outputs) in LAYERS.items():
            name = f"{prefix}blocks.{block}.{layer}"
            tensors[f"{name}.{down}.weight"] = 0.1 * torch.randn(rank, inputs, generator=generator)
            tensors[f"{name}.{up}.weight"] = 0.1 * torch.randn(outputs, rank, generator=generator)
            if alpha is not None:
                tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return save({name: tensor.bfloat16() for name, tensor in tensors.items()})


# The names of the published files, in the forms that their loaders take.
PUBLISHED = {
    "Kijai/WanVideo_comfy": {
        "Pusa/Wan21_PusaV1_LoRA_14B_rank512_bf16.safetensors": lora("diffusion_model.", "lora_A", "lora_B", 1),
    },
    "RaphaelLiu/Pusa-Wan2.2-V1": {
        "high_noise_pusa.safetensors": lora("", "lora_A.default", "lora_B.default", 2),
        "low_noise_pusa.safetensors": lora("", "lora_A.default", "lora_B.default", 3),
    },
    "lightx2v/Wan2.2-Lightning": {
        f"{LIGHTNING}/{expert}_noise_model.safetensors": lora(
            "diffusion_model.", "lora_down", "lora_up", seed, alpha=1.5
        )
        for seed, expert in enumerate(("high", "low"), 4)
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return the files of a small model for each published name."""
    folder, made = tmp_path_factory.mktemp("models"), {}
    for name, write in REPOSITORIES.items():
        made[name] = files_of(write(folder / name))
    return made


@pytest.fixture
def hub(empty_hub, models):  # noqa: F811
    """Return a hub with small models and LoRAs under the published names."""
    for name, files in (models | PUBLISHED).items():
        empty_hub.add(name, files)
    return empty_hub


@pytest.fixture
def recipes(root, tmp_path, monkeypatch):
    """Return the folder of the shortened manifests; the current folder is that of the runs."""
    monkeypatch.chdir(tmp_path)
    return write_small_recipes(root, "wan*", tmp_path / "manifests")


def test_the_recipes_of_14b_run_from_videos_to_every_task(recipes, hub, drawn, tmp_path, capsys):
    link_videos(drawn, recipes / "wan2.1")
    for stage in ("ingest", "precompute", "finetune", "generate"):
        assert main(["check", f"manifests/wan2.1/{stage}.yaml"]) == 0, capsys.readouterr().err
        assert main([stage, f"manifests/wan2.1/{stage}.yaml", "--no-prefect"]) == 0, capsys.readouterr().err
    run = tmp_path / "runs/wan2.1"
    jobs = load_manifest(recipes / "wan2.1/generate.yaml", run).jobs
    assert {job.task for job in jobs} == set(TASKS)
    for job in jobs:
        facts = probe(run / f"videos/{job.id}.mp4")
        assert (facts.width, facts.height) == (64, 32)
    record = json.loads((run / "videos/sail.json").read_text())
    assert record["status"] == "done" and "Bright tones, overexposed" in json.dumps(record)
    assert (run / "checkpoints/last").is_dir()
    transformers = {sent.file for sent in hub.sent if "Pusa" in sent.file}
    assert transformers == {"Pusa/Wan21_PusaV1_LoRA_14B_rank512_bf16.safetensors"}


@pytest.mark.slow
def test_1_3b_is_trained_and_its_checkpoint_makes_the_other_tasks(recipes, hub, drawn, tmp_path, capsys):
    folder, run = recipes / "wan2.1", tmp_path / "runs/wan2.1-1.3b"
    link_videos(drawn, folder)
    precompute = (folder / "precompute.yaml").read_text().replace("T2V-14B", "T2V-1.3B")
    (folder / "precompute-1.3b.yaml").write_text(precompute)
    for stage in ("ingest", "precompute-1.3b", "finetune-1.3b", "generate-1.3b"):
        command = [stage.split("-")[0], str(folder / f"{stage}.yaml"), "--run-dir", str(run), "--no-prefect"]
        assert main(command) == 0, capsys.readouterr().err
    text = (folder / "generate-1.3b.yaml").read_text()
    with_checkpoint = text.replace('-Diffusers"}', '-Diffusers", checkpoint: ../../runs/wan2.1-1.3b/checkpoints/last}')
    assert with_checkpoint != text
    (folder / "again.yaml").write_text(with_checkpoint)
    assert main(["generate", str(folder / "again.yaml"), "--run-dir", str(run), "--no-prefect"]) == 0
    assert "made: lake, rain" in capsys.readouterr().out


def test_a14b_with_pusa_and_four_step_loras_on_both_experts(recipes, hub, tmp_path, capsys):
    assert main(["check", "manifests/wan2.2/generate.yaml"]) == 0, capsys.readouterr().err
    assert main(["plan", "manifests/wan2.2/generate.yaml", "--gpu-memory", "80"]) == 0
    planned = capsys.readouterr().out
    assert "transformer_2" in planned and "one part at a time (offload: true)" in planned
    assert main(["generate", "manifests/wan2.2/generate.yaml", "--no-prefect"]) == 0, capsys.readouterr().err
    assert "made: lake, sail, home, more" in capsys.readouterr().out
    record = json.loads((tmp_path / "runs/wan2.2/videos/lake.json").read_text())
    assert (record["job"]["steps"], record["job"]["guidance"]) == (4, 1)
    loras = {sent.file for sent in hub.sent if "noise" in sent.file}
    assert loras == {name for files in list(PUBLISHED.values())[1:] for name in files}


@pytest.mark.parametrize("expert", ["high", pytest.param("low", marks=pytest.mark.slow)])
def test_an_expert_of_a14b_is_trained_as_the_recipe_says(recipes, hub, drawn, tmp_path, capsys, expert):
    (recipes / "wan2.1/ingest.yaml").rename(recipes / "wan2.2/ingest.yaml")
    link_videos(drawn, recipes / "wan2.2")
    precompute = (recipes / "wan2.1/precompute.yaml").read_text()
    precompute = precompute.replace("backbone: wan2.1", "backbone: wan2.2-a14b").replace("2.1-T2V-14B", "2.2-T2V-A14B")
    (recipes / "wan2.2/precompute.yaml").write_text(precompute)
    finetune = recipes / "wan2.2/finetune.yaml"
    finetune.write_text(finetune.read_text().replace("expert: high", f"expert: {expert}"))
    for stage in ("ingest", "precompute", "finetune"):
        assert main([stage, f"manifests/wan2.2/{stage}.yaml", "--no-prefect"]) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "runs/wan2.2/checkpoints/last/checkpoint.json").read_text())
    assert record["recipe"]["expert"] == expert


@pytest.mark.slow
def test_the_commands_of_the_readme_run_as_written(root, recipes, hub, tmp_path, capsys):
    for seed, name in enumerate(("a.mp4", "b.mp4")):
        save_tensors(tmp_path / "PusaV1_training", name, tensors(seed, shape=(16, 5, 4, 8)))
    printed = {}
    for words in commands_of(root, "Wan"):
        words += ["--no-prefect"] if words[0] in ("generate", "finetune") else []
        assert main(words) == 0, (words, capsys.readouterr().err)
        printed[" ".join(words[:2])] = capsys.readouterr().out
    assert "film: long_video, ok" in printed["check manifests/wan2.1/generate.yaml"]
    assert "rows: 2" in printed["import-latents PusaV1_training"]
    record = json.loads((tmp_path / "runs/wan2.1/checkpoints/last/checkpoint.json").read_text())
    assert record["recipe"]["weighting"] == "gaussian_of_mean"


def test_5b_makes_videos_of_its_own_size(recipes, hub, tmp_path, capsys):
    assert main(["check", "manifests/wan2.2/generate-5b.yaml"]) == 0, capsys.readouterr().err
    assert main(["generate", "manifests/wan2.2/generate-5b.yaml", "--no-prefect"]) == 0, capsys.readouterr().err
    facts = probe(tmp_path / "runs/wan2.2/videos/sail.mp4")
    assert (facts.num_frames, facts.width, facts.height) == (17, 64, 32)


@pytest.mark.parametrize("name", ["wan2.1/generate", "wan2.1/generate-1.3b", "wan2.2/generate", "wan2.2/generate-5b"])
def test_the_jobs_can_be_made_at_the_published_sizes(root, tmp_path, name):
    manifest = load_manifest(root / f"manifests/{name}.yaml", tmp_path)
    assert not check_jobs(manifest, with_inputs=False, folder=tmp_path / "videos")
    assert all("walking backwards" in job.negative_prompt for job in manifest.jobs)


def test_what_a_recipe_does_not_set_is_the_familys(tmp_path):
    (tmp_path / "generate.yaml").write_text(
        'kind: generate\nmodel: {backbone: wan2.1, weights: "hf:a/b"}\njobs: [{id: a, task: text_to_video}]\n'
    )
    (job,) = load_manifest(tmp_path / "generate.yaml", tmp_path).jobs
    assert (job.width, job.height, job.num_frames, job.fps) == (832, 480, 81, 16)
    assert (job.steps, job.guidance, job.noise_schedule) == (30, 3, "shifted")
    assert job.negative_prompt.startswith("Bright tones") and job.negative_prompt.endswith("walking backwards")


def test_the_recipe_of_v1_0_is_the_published_one(root, tmp_path):
    manifest = load_manifest(root / "manifests/wan2.1/finetune.yaml", tmp_path)
    train = manifest.train
    assert (train.method, train.rank, train.alpha) == ("lora", 512, 512)
    assert set(train.targets) == {"to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"}
    assert (manifest.levels, manifest.density, manifest.weighting) == ("independent", "shifted", "gaussian_of_mean")
    assert (manifest.batch_size, manifest.learning_rate, manifest.caption_dropout) == (8, 1e-5, 0)
