import math

import peft
import pytest
import torch

from pusa.backbones.mochi.transformer import PusaMochiTransformer3DModel
from pusa.errors import TrainingError
from pusa.finetune.recipe import versions
from pusa.finetune.trainable import base_name, choose, chosen, initial, is_added
from pusa.manifest.training import Full, Lora, Partial
from tests.conftest import SMALL

DEEP = {**SMALL, "num_layers": 8}  # with so many targets PEFT looks for a shorter way to name them


@pytest.fixture
def unbuilt() -> PusaMochiTransformer3DModel:
    """A transformer on the meta device."""
    with torch.device("meta"):
        return PusaMochiTransformer3DModel(**DEEP)


def learning(transformer) -> set[str]:
    return {name for name, weight in transformer.named_parameters() if weight.requires_grad}


def test_full_means_all(unbuilt):
    unbuilt.requires_grad_(False)
    choose(unbuilt, Full())
    assert learning(unbuilt) == {name for name, _ in unbuilt.named_parameters()}


def test_partial_means_what_its_patterns_match_and_nothing_else(unbuilt):
    choose(unbuilt, Partial(method="partial", names=("transformer_blocks.[67].attn1.to_[qk].*", "proj_out.bias")))
    block = "transformer_blocks.{}.attn1.to_{}.weight"
    assert learning(unbuilt) == {block.format(i, k) for i in (6, 7) for k in "qk"} | {"proj_out.bias"}


@pytest.mark.parametrize(
    "targets", [("to_q",), ("to_q", "to_k", "to_v", "to_out.0"), ("attn1.to_v", "norm_out.linear")]
)
def test_a_lora_is_added_where_it_is_wanted_and_alone_learns(unbuilt, targets):
    plain = {name for name, _ in unbuilt.named_parameters()}
    method = Lora(method="lora", rank=3, alpha=6, targets=targets)
    layers = chosen(unbuilt, method)
    assert layers == [
        name
        for name, module in unbuilt.named_modules()
        if isinstance(module, torch.nn.Linear) and f".{name}".endswith(tuple(f".{target}" for target in targets))
    ]
    choose(unbuilt, method)
    assert learning(unbuilt) == {f"{layer}.lora_{half}.default.weight" for layer in layers for half in "AB"}
    weights = dict(unbuilt.named_parameters())
    assert all(weight.is_meta for weight in weights.values())
    assert {name for name in weights if is_added(name)} == learning(unbuilt)
    assert {base_name(name) for name in weights if not is_added(name)} == plain
    assert unbuilt.get_submodule(layers[0]).scaling == {"default": 2}


@pytest.mark.parametrize(
    "method, said",
    [
        (Partial(method="partial", names=("proj_out.*", "*.norm1.liner.weight")), r"'\*\.norm1\.liner\.weight'.*norm1"),
        (Partial(method="partial", names=("transformer_blocks.4[0-7].*",)), r"4\[0-7\].*near are transformer_blocks\."),
        (Lora(method="lora", targets=("to_q", "to_qu")), r"'to_qu'.*near are .*to_q"),
        (Lora(method="lora", targets=("attn1.add_to_q",)), r"'attn1\.add_to_q'.*add_q_proj"),
        (Lora(method="lora", targets=("patch_embed.proj",)), r"'patch_embed\.proj'"),  # a convolution
    ],
)
def test_a_name_that_means_nothing_is_refused_before_anything_is_changed(unbuilt, method, said):
    before = [name for name, _ in unbuilt.named_parameters()]
    with pytest.raises(TrainingError, match=said):
        choose(unbuilt, method)
    assert [name for name, _ in unbuilt.named_parameters()] == before


def test_alpha_is_the_rank_where_none_is_said(unbuilt):
    choose(unbuilt, Lora(method="lora", rank=5, targets=("to_q",)))
    assert unbuilt.transformer_blocks[0].attn1.to_q.scaling == {"default": 1}


def test_what_is_added_starts_from_its_name_and_seed_alone():
    name = "transformer_blocks.{}.attn1.to_q.lora_A.default.weight"
    start = initial(name.format(0), (4, 100), 7)
    assert start.dtype == torch.float32 and torch.equal(start, initial(name.format(0), (4, 100), 7))
    for other in (initial(name.format(1), (4, 100), 7), initial(name.format(0), (4, 100), 8)):
        assert not torch.equal(start, other)
    bound = 1 / math.sqrt(100)
    assert 0.9 * bound < start.abs().max() <= bound
    assert not initial(name.format(0).replace("lora_A", "lora_B"), (100, 4), 7).any()


def test_what_makes_a_lora_is_among_the_versions_that_a_checkpoint_tells():
    assert versions()["peft"] == peft.__version__ and versions()["torch"] == torch.__version__


def test_at_its_start_a_lora_adds_nothing(networks):
    _, pusa = networks
    given = dict(
        hidden_states=torch.randn(1, 12, 2, 4, 4),
        encoder_hidden_states=torch.randn(1, 8, 16),
        timestep=torch.tensor([[100.0, 700.0]]),
        encoder_attention_mask=torch.ones(1, 8),
        return_dict=False,
    )
    before = pusa(**given)[0]
    choose(pusa, Lora(method="lora", rank=2, targets=("to_q", "norm1.linear")))
    with torch.no_grad():
        for name, weight in pusa.named_parameters():
            if is_added(name):
                weight.copy_(initial(name, tuple(weight.shape), 0))
    assert torch.equal(before, pusa(**given)[0])
