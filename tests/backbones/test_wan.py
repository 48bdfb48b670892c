"""Wan's transformer with one level for each frame, against diffusers' own path with one timestep for each token."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pusa.backbones.base import find_backbone
from pusa.backbones.context import Context
from pusa.backbones.dry_run import FusedAttention, PeakMemory
from pusa.backbones.wan import transformer as module
from pusa.backbones.wan.transformer import PusaWanTransformer3DModel
from pusa.errors import ConditionError
from pusa.finetune.parallel import process_group
from pusa.finetune.trainable import base_name, build_trainable, is_lora
from pusa.manifest.models import FinetuneManifest
from pusa.weights.load import cast, load_part
from pusa.weights.model import Model
from pusa.weights.source import find_part
from tests.helpers.small_wan import TEXT_WIDTH, TRANSFORMER, new_wan_transformer, write_wan_2_1

FRAMES, EACH = 4, 2 * 3  # latent frames, and tokens in each
T_B = torch.tensor([100.0, 500.0, 900.0])
SIZES = {  # of the published models
    "1.3B": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "14B, and an expert of A14B": {},
    "5B": {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
}


@pytest.fixture
def networks():
    """Return a small Wan of diffusers and a Pusa transformer with the same random weights."""
    base = new_wan_transformer(0)
    pusa = PusaWanTransformer3DModel(**TRANSFORMER).eval()
    pusa.load_state_dict(base.state_dict())
    return base, pusa


def inputs(batch=3, frames=FRAMES, channels=16):
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, channels, frames, 4, 6, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 8, TEXT_WIDTH, generator=generator),
    }


def levels(batch=3, frames=FRAMES):
    return torch.rand(batch, frames, generator=torch.Generator().manual_seed(2)) * 1000


def per_token(t_BF, each=EACH):
    """Return the base class's own form of a level for each frame: a timestep for each token."""
    return t_BF.repeat_interleave(each, 1)


@torch.no_grad()
def run(model, timestep, **given):
    return model(timestep=timestep, **given).sample


def in_dtype(dtype, networks):
    for network in networks:
        cast(network, dtype)
    return {name: value.to(dtype) for name, value in inputs().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_levels_are_the_base_model(networks, dtype):
    given = in_dtype(dtype, networks)
    base, pusa = networks
    expected = run(base, T_B, **given)
    assert expected.std() > 0.1
    assert torch.equal(run(pusa, T_B, **given), expected)
    atol = 1e-5 if dtype == torch.float32 else 0.02 * expected.std().item()
    torch.testing.assert_close(run(pusa, T_B[:, None].expand(3, FRAMES), **given), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("part", [module.PART_NUMEL, 500])  # all frames at once, or one at a time
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unequal_levels_are_the_bits_of_the_path_per_token(networks, dtype, part, monkeypatch):
    monkeypatch.setattr(module, "PART_NUMEL", part)
    given = in_dtype(dtype, networks)
    base, pusa = networks
    expected = run(base, per_token(levels()), **given)
    assert torch.equal(run(pusa, levels(), **given), expected)
    assert torch.equal(pusa(timestep=levels(), **given).sample, expected)  # with gradients
    assert (run(base, T_B, **given) - expected).abs().max() > 0.1  # so the levels matter


def gradients(model, timestep, **given):
    model.zero_grad()
    model(timestep=timestep, **given).sample.square().mean().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def furthest(ours, theirs):
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs)


def test_gradients_are_those_of_the_path_per_token(networks):
    base, pusa = networks
    expected = gradients(base, per_token(levels()), **inputs())
    assert max(gradient.abs().max() for gradient in expected.values()) > 0.1
    assert furthest(gradients(pusa, levels(), **inputs()), expected) < 1e-7


def test_each_frame_has_its_own_level(networks):
    _, pusa = networks
    equal = T_B[:, None].repeat(1, FRAMES)
    changed = equal.clone()
    changed[:, 2] += 400
    effect = (run(pusa, changed, **inputs()) - run(pusa, equal, **inputs())).abs().mean((0, 1, 3, 4))
    assert effect.argmax() == 2
    assert effect[2] > 1.5 * effect[[0, 1, 3]].max()


def test_a_sample_does_not_depend_on_the_others_in_its_batch(networks):
    _, pusa = networks
    together = run(pusa, levels(), **inputs())
    for i in range(3):
        alone = run(pusa, levels()[i : i + 1], **{name: value[i : i + 1] for name, value in inputs().items()})
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)


class Shapes(TorchDispatchMode):
    """Record the size of every tensor that is made while this mode is on."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.sizes |= {leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        return result


@pytest.mark.parametrize("form", ["pusa", "pusa in training", "per token"])
def test_no_modulation_is_expanded_over_the_tokens(networks, form):
    base, pusa = networks
    model, timestep = (base, per_token(levels())) if form == "per token" else (pusa, levels())
    with Shapes() as shapes, torch.set_grad_enabled(form == "pusa in training"):
        sample = model(timestep=timestep, **inputs()).sample
        if sample.requires_grad:
            sample.square().mean().backward()
    width = TRANSFORMER["num_attention_heads"] * TRANSFORMER["attention_head_dim"]
    tokens = 3 * FRAMES * EACH
    assert tokens * width in shapes.sizes
    assert (tokens * 6 * width in shapes.sizes) == (form == "per token")


def bytes_at_14b(model_class, timestep_shape):
    """Return the peak without gradient, and what is kept for backward, of one block at 480p and 81 frames, in bf16."""
    with torch.device("meta"):
        model = model_class(num_layers=1)
        cast(model, torch.bfloat16)
        z = torch.empty(1, 16, 21, 60, 104, dtype=torch.bfloat16)
        text, timestep = torch.empty(1, 512, 4096, dtype=torch.bfloat16), torch.empty(timestep_shape)
    with torch.no_grad(), FusedAttention(), PeakMemory() as memory:
        model(z, timestep, text)
    with FusedAttention(), PeakMemory() as training:
        sample = model(z, timestep, text).sample
        kept = training.now
    assert sample.shape == z.shape
    return memory.peak, kept


def test_memory_at_14b_width_is_well_below_that_of_the_path_per_token():
    peak, kept = bytes_at_14b(PusaWanTransformer3DModel, (1, 21))
    base_peak, base_kept = bytes_at_14b(WanTransformer3DModel, (1, 21 * 30 * 52))
    assert peak < 0.4 * base_peak
    assert kept < 0.75 * base_kept


@pytest.mark.parametrize("size", SIZES)
def test_every_published_size_has_the_names_and_shapes_of_the_base_class(size):
    with torch.device("meta"):
        models = [cls(**SIZES[size]) for cls in (WanTransformer3DModel, PusaWanTransformer3DModel)]
    base, pusa = ({name: weight.shape for name, weight in model.state_dict().items()} for model in models)
    assert base == pusa
    assert dict(models[0].config) == dict(models[1].config)


def test_the_channels_of_the_5b_model(networks):
    base = new_wan_transformer(0, in_channels=48, out_channels=48)
    pusa = PusaWanTransformer3DModel(**base.config).eval()
    pusa.load_state_dict(base.state_dict())
    given = inputs(channels=48)
    assert torch.equal(run(pusa, levels(), **given), run(base, per_token(levels()), **given))


@pytest.mark.parametrize("every", [1, 2])
def test_gradient_checkpointing_changes_nothing(networks, every):
    _, pusa = networks
    plain = gradients(pusa, levels(), **inputs())
    pusa.enable_gradient_checkpointing()
    pusa.checkpoint_every_nth_block = every
    calls = []
    for block in pusa.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    assert furthest(gradients(pusa.train(), levels(), **inputs()), plain) == 0
    assert len(calls) == {1: 4, 2: 3}[every]  # some blocks a second time, for the backward pass


def test_diffusers_attention_backends_are_used(networks, monkeypatch):
    base, pusa = networks
    expected = run(base, T_B, **inputs())
    used = []

    def recorded(*args, backend, **kwargs):
        used.append(backend and backend.value)
        return dispatch_attention_fn(*args, backend=backend, **kwargs)

    monkeypatch.setattr(module, "dispatch_attention_fn", recorded)
    try:
        for backend in ("_native_math", "native"):
            pusa.set_attention_backend(backend)
            torch.testing.assert_close(run(pusa, T_B, **inputs()), expected, atol=1e-5, rtol=0)
            assert set(used) == {backend}
            used.clear()
    finally:
        pusa.set_attention_backend("native")  # diffusers keeps the last one for the whole process, too
    pusa.reset_attention_backend()
    run(pusa, T_B, **inputs())
    assert set(used) == {None}


def test_a_new_lora_of_peft_changes_nothing_and_can_be_trained(networks):
    _, pusa = networks
    expected = run(pusa, levels(), **inputs())
    pusa.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]  # as Pusa V1.0's
    pusa.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets))
    assert torch.equal(run(pusa, levels(), **inputs()), expected)
    pusa(timestep=levels(), **inputs()).sample.square().mean().backward()
    trained = {name for name, weight in pusa.named_parameters() if weight.grad is not None}
    assert len(trained) == 2 * 2 * (8 + 2) and all("lora_" in name for name in trained)
    for weight in (w for name, w in pusa.named_parameters() if "lora_B" in name):
        torch.nn.init.normal_(weight.data, std=0.5)
    changed = run(pusa, levels(), **inputs())
    assert (changed - expected).abs().max() > 0.01
    for scale, same_as in ((0.0, expected), (1.0, changed)):
        scaled = run(pusa, levels(), attention_kwargs={"scale": scale}, **inputs())
        torch.testing.assert_close(scaled, same_as)
    pusa.disable_adapters()
    assert torch.equal(run(pusa, levels(), **inputs()), expected)


@pytest.mark.slow
def test_a_compiled_transformer_computes_the_same(networks):
    _, pusa = networks
    expected = run(pusa, levels(), **inputs())
    theirs = gradients(pusa, levels(), **inputs())
    for block in pusa.blocks:
        block.compile(dynamic=True)
    torch.testing.assert_close(run(pusa, levels(), **inputs()), expected, atol=1e-5, rtol=0)
    assert furthest(gradients(pusa, levels(), **inputs()), theirs) < 1e-5
    torch.testing.assert_close(run(torch.compile(pusa), levels(), **inputs()), expected, atol=1e-5, rtol=0)


def test_files_are_those_of_the_base_class(networks, tmp_path):
    base, pusa = networks
    base.save_pretrained(tmp_path / "base")
    pusa.save_pretrained(tmp_path / "pusa")
    for folder, model_class in (("base", PusaWanTransformer3DModel), ("pusa", WanTransformer3DModel)):
        loaded = model_class.from_pretrained(tmp_path / folder)
        assert torch.equal(run(loaded, T_B, **inputs()), run(base, T_B, **inputs()))


def test_the_tables_of_the_rotary_embedding_are_remade_after_a_build_on_the_meta_device(networks):
    _, pusa = networks
    with torch.device("meta"):
        built = PusaWanTransformer3DModel(**TRANSFORMER).eval()
        built.load_state_dict(pusa.state_dict(), assign=True)
        assert all(buffer.is_meta for buffer in built.buffers())
        built.remake_rope()
    assert {buffer.dtype for buffer in built.buffers()} == {torch.float32}
    assert torch.equal(run(built, levels(), **inputs()), run(pusa, levels(), **inputs()))
    assert not set(built.state_dict()) ^ set(pusa.state_dict())


def test_the_weights_in_fp32_are_those_of_from_pretrained(networks, tmp_path):
    base, pusa = networks
    base.save_pretrained(tmp_path)
    expected = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    cast(pusa, torch.bfloat16)
    dtypes = {name: weight.dtype for name, weight in pusa.named_parameters()}
    assert dtypes == {name: weight.dtype for name, weight in expected.named_parameters()}
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}


def test_our_loader_and_the_trainer_give_what_from_pretrained_gives(tmp_path):
    folder = write_wan_2_1(tmp_path / "model")
    expected = WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16)
    loaded = load_part(find_backbone("wan2.1"), find_part(folder, "transformer"), torch.bfloat16)

    spec = {"weights": str(folder), "backbone": "wan2.1"}
    manifest = FinetuneManifest.model_validate({"base": spec, "train": {"method": "lora", "rank": 2}})
    with process_group(manifest.parallel) as world:
        trained = build_trainable(Model(manifest.base, world.device), manifest, world, torch.bfloat16)
        given = {name: value.bfloat16() for name, value in inputs().items()}
        for model in (loaded, trained):  # a new LoRA adds nothing
            assert torch.equal(run(model, levels(), **given), run(expected, per_token(levels()), **given))
        dtypes = {base_name(name): w.dtype for name, w in trained.named_parameters() if not is_lora(name)}
    assert dtypes == {name: weight.dtype for name, weight in expected.named_parameters()}
    assert dtypes == {name: weight.dtype for name, weight in loaded.named_parameters()}


@pytest.mark.parametrize("shape", [(3, 3), (2,), (3, FRAMES, 1), (3, FRAMES * EACH)])
def test_a_timestep_of_another_shape_is_refused(networks, shape):
    with pytest.raises(ValueError, match=r"allowed are \(3,\) and \(3, 4\)"):
        run(networks[1], torch.ones(shape), **inputs())


@pytest.mark.parametrize("settings", [{"image_dim": 32}, {"added_kv_proj_dim": 48}, {"patch_size": (2, 2, 2)}])
def test_a_model_with_inputs_that_would_be_dropped_is_refused(settings):
    with pytest.raises(ValueError, match="allowed is"):
        PusaWanTransformer3DModel(**TRANSFORMER, **settings)


def test_heads_that_cannot_be_divided_are_refused_with_the_allowed_numbers(networks):
    with pytest.raises(ConditionError, match="3 processes cannot split 2 heads evenly; allowed are 1, 2"):
        networks[1].share_frames(Context(0, 3, None))


# Two of the three are enough to divide unevenly; three only take longer to start.
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_that_share_frames_or_weights_compute_the_same(root, tmp_path, size):
    """5 frames cannot be divided evenly. The weights are sharded with FSDP2, those kept in fp32 among them."""
    commands = [
        [sys.executable, "-m", "tests.helpers.wan_worker", str(rank), str(size), str(tmp_path)] for rank in range(size)
    ]
    workers = [subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True) for command in commands]
    for worker in workers:
        _, errors = worker.communicate()
        assert worker.returncode == 0, errors
    for rank in range(size):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for frames in ("3", "5"):
            differences = found["context"][frames]
            assert differences.pop("output") < 1e-5
            assert len(differences) > 50 and max(differences.values()) < 1e-4, max(differences, key=differences.get)
        assert set(found["dtypes"].values()) == {"torch.float32", "torch.bfloat16"}
        for way, differences in found["sharded"].items():
            assert differences.pop("output") == 0, way  # the bits of one process without FSDP2
            assert max(differences.values()) < 0.02, (way, max(differences, key=differences.get))
