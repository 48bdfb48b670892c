"""HunyuanVideo's transformer in training: gradients, activation checkpointing, LoRA, compilation, several processes."""

import json
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pusa.backbones.base import find_backbone
from pusa.backbones.context import Context
from pusa.backbones.dry_run import FusedAttention, PeakMemory
from pusa.backbones.hunyuan_video import FAMILY
from pusa.backbones.hunyuan_video.transformer import PusaHunyuanVideoTransformer3DModel
from pusa.errors import ConditionError
from pusa.finetune.trainable import is_lora, set_trainable, trainable_names
from pusa.manifest.training import Lora, Partial
from tests.helpers.small_hunyuan import (
    EACH,
    T_B,
    equal_levels,
    frame_levels,
    furthest,
    gradients,
    hunyuan_inputs,
    new_hunyuan_transformer,
    run,
    vectorized,
)


@pytest.fixture
def networks():
    """Return a small HunyuanVideo of diffusers and a Pusa transformer with the same random weights."""
    base = new_hunyuan_transformer()
    return base, vectorized(base)


def test_gradients_at_equal_levels_are_those_of_the_base_model(networks):
    base, pusa = networks
    expected = gradients(base, T_B, **hunyuan_inputs())
    # All weights count, but for a bias that softmax does not see: the refiner's keys have no norm.
    assert [name for name, gradient in expected.items() if gradient.abs().max() < 1e-6] == [
        "context_embedder.token_refiner.refiner_blocks.0.attn.to_k.bias"
    ]
    assert furthest(gradients(pusa, equal_levels(), **hunyuan_inputs()), expected) < 1e-6


class Shapes(TorchDispatchMode):
    """Record the size of every tensor that is made while this mode is on."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.sizes |= {leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        return result


@pytest.mark.parametrize("trained", [False, True])
def test_no_modulation_is_expanded_over_the_tokens(networks, trained):
    with Shapes() as shapes, torch.set_grad_enabled(trained):
        sample = networks[1](timestep=frame_levels(), **hunyuan_inputs()).sample
        if trained:
            sample.square().mean().backward()
    tokens, width = 3 * 4 * EACH, 16
    assert tokens * width in shapes.sizes and 3 * 4 * 6 * width in shapes.sizes
    assert not {tokens * 6 * width, tokens * 3 * width} & shapes.sizes


@pytest.mark.parametrize("every", [1, 2])
def test_gradient_checkpointing_changes_nothing_and_counts_blocks_of_both_kinds(networks, every):
    _, pusa = networks
    plain = gradients(pusa, frame_levels(), **hunyuan_inputs())
    pusa.enable_gradient_checkpointing()
    pusa.checkpoint_every_nth_block = every
    calls = [0] * len(pusa.blocks)
    for index, block in enumerate(pusa.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    assert furthest(gradients(pusa.train(), frame_levels(), **hunyuan_inputs()), plain) == 0
    assert calls == {1: [2, 2, 2, 2, 2], 2: [2, 1, 2, 1, 2]}[every]  # twice: once more for the backward pass


def method(**settings):
    return Lora(method="lora", rank=2, targets=FAMILY.recipe.lora_targets, **settings)


def test_a_new_lora_of_the_familys_targets_changes_nothing_and_can_be_trained(networks):
    _, pusa = networks
    given = {"timestep": frame_levels(), **hunyuan_inputs()}
    expected = run(pusa, **given)
    set_trainable(pusa, method())
    for name, weight in pusa.named_parameters():
        if is_lora(name):
            torch.nn.init.normal_(weight.data, std=0.0 if "lora_B" in name else 1.0)
    assert torch.equal(run(pusa, **given), expected)
    pusa(**given).sample.square().mean().backward()
    trained = {name for name, weight in pusa.named_parameters() if weight.grad is not None}
    assert len(trained) == 2 * (2 * 12 + 3 * 5) and all(map(is_lora, trained))
    assert all(weight.grad.abs().max() > 0 for name, weight in pusa.named_parameters() if "lora_B" in name)
    for weight in (w for name, w in pusa.named_parameters() if "lora_B" in name):
        torch.nn.init.normal_(weight.data, std=0.5)
    changed = run(pusa, **given)
    assert (changed - expected).abs().max() > 0.01
    for scale, same_as in ((0.0, expected), (1.0, changed)):
        torch.testing.assert_close(run(pusa, attention_kwargs={"scale": scale}, **given), same_as)
    pusa.disable_adapters()
    assert torch.equal(run(pusa, **given), expected)


def test_the_familys_targets_are_attention_and_mlp_of_the_repeated_blocks(networks):
    """Neither the refiner's layers nor the last projection, whose names have the same ends."""
    _, pusa = networks
    double = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "add_q_proj")]
    double += ["attn.to_out.0", "attn.to_add_out"]
    double += [f"{stream}.net.{layer}" for stream in ("ff", "ff_context") for layer in ("0.proj", "2")]
    single = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"]
    expected = [f"transformer_blocks.{i}.{name}" for i in range(2) for name in double]
    expected += [f"single_transformer_blocks.{i}.{name}" for i in range(3) for name in single]
    assert sorted(trainable_names(pusa, method())) == sorted(expected)


def test_weights_of_either_kind_of_block_can_be_named(networks):
    _, pusa = networks
    names = ("transformer_blocks.1.norm1.linear.*", "single_transformer_blocks.[02].proj_out.bias")
    assert trainable_names(pusa, Partial(method="partial", names=names)) == [
        "transformer_blocks.1.norm1.linear.weight",
        "transformer_blocks.1.norm1.linear.bias",
        "single_transformer_blocks.0.proj_out.bias",
        "single_transformer_blocks.2.proj_out.bias",
    ]


@pytest.mark.slow
def test_a_compiled_transformer_computes_the_same():
    pusa = vectorized(new_hunyuan_transformer(num_layers=1, num_single_layers=1))
    given = hunyuan_inputs((8, 8, 8))
    expected, theirs = run(pusa, frame_levels(), **given), gradients(pusa, frame_levels(), **given)
    whole = torch.compile(pusa, backend="aot_eager")  # the same graphs, without minutes in a compiler of C++
    torch.testing.assert_close(run(whole, frame_levels(), **given), expected, atol=1e-5, rtol=0)
    for block in pusa.blocks:
        block.compile(fullgraph=True)
    assert furthest(gradients(pusa, frame_levels(), **given), theirs) < 1e-5
    torch.testing.assert_close(run(pusa, frame_levels(), **given), expected, atol=1e-5, rtol=0)


def test_at_the_published_width_a_checkpointed_block_of_either_kind_keeps_its_input_only():
    """Video of 129 frames 544x960 and 256 tokens of text, in bf16; the two sizes of conditioning vectors are small."""
    backbone, kept = find_backbone("hunyuan_video"), {}
    for blocks in ((1, 1), (2, 1), (1, 2)):
        with torch.device("meta"):
            model = PusaHunyuanVideoTransformer3DModel(num_layers=blocks[0], num_single_layers=blocks[1])
            model.bfloat16().train().enable_gradient_checkpointing()
            z, sigma = torch.empty(1, 16, 33, 68, 120, dtype=torch.bfloat16), torch.empty(1, 33)
            text = backbone.longest_text(model, 1)
            with FusedAttention(), PeakMemory() as memory:
                velocity = backbone.predict(model, z, sigma, text)
                kept[blocks] = memory.now
        assert velocity.shape == z.shape and velocity.requires_grad
    each = (33 * 34 * 60 + 256) * 3072 * 2
    assert [kept[more] - kept[1, 1] for more in ((2, 1), (1, 2))] == pytest.approx([each, each], rel=0.001)


def test_heads_that_cannot_be_divided_are_refused_with_the_allowed_numbers(networks):
    with pytest.raises(ConditionError, match="3 processes cannot split 2 heads evenly; allowed are 1, 2"):
        networks[1].share_frames(Context(0, 3, None))


# Two of the three are enough to divide unevenly; three only take longer to start.
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_that_share_frames_or_weights_compute_the_same_and_resume(root, tmp_path, size):
    """5 frames cannot be divided evenly. The weights are sharded with FSDP2."""
    commands = [
        [sys.executable, "-m", "tests.helpers.hunyuan_worker", str(rank), str(size), str(tmp_path)]
        for rank in range(size)
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
            assert len(differences) > 100 and max(differences.values()) < 1e-5, max(differences, key=differences.get)
        for way, differences in found["sharded"].items():
            assert differences.pop("output") < 0.02, way
            assert max(differences.values()) < 0.02, (way, max(differences, key=differences.get))
        for way, differences in found["resumed"].items():
            assert len(differences) > 100 and max(differences.values()) == 0, (
                way,
                max(differences, key=differences.get),
            )
