import math

import peft
import pytest
import torch

from pusa.backbones.mochi.transformer import PusaMochiTransformer3DModel
from pusa.errors import TrainingError
from pusa.finetune.recipe import versions
from pusa.finetune.trainable import base_name, initial_lora, is_lora, set_trainable, trainable_names
from pusa.manifest.training import Full, Lora, Partial
from tests.conftest import SMALL

DEEP = {**SMALL, "num_layers": 8}  # with many targets PEFT compresses their names


@pytest.fixture
def unbuilt() -> PusaMochiTransformer3DModel:
    """A transformer on the meta device."""
    with torch.device("meta"):
        return PusaMochiTransformer3DModel(**DEEP)


def trainable(transformer) -> set[str]:
    return {name for name, weight in transformer.named_parameters() if weight.requires_grad}


def test_full_trains_every_weight(unbuilt):
    unbuilt.requires_grad_(False)
    set_trainable(unbuilt, Full())
    assert trainable(unbuilt) == {name for name, _ in unbuilt.named_parameters()}


def test_partial_trains_exactly_the_weights_that_match_its_patterns(unbuilt):
    set_trainable(
        unbuilt, Partial(method="partial", names=("transformer_blocks.[67].attn1.to_[qk].*", "proj_out.bias"))
    )
    block = "transformer_blocks.{}.attn1.to_{}.weight"
    assert trainable(unbuilt) == {block.format(i, k) for i in (6, 7) for k in "qk"} | {"proj_out.bias"}


@pytest.mark.parametrize(
    "targets", [("to_q",), ("to_q", "to_k", "to_v", "to_out.0"), ("attn1.to_v", "norm_out.linear")]
)
def test_a_lora_is_added_to_its_targets_and_only_it_is_trained(unbuilt, targets):
    plain = {name for name, _ in unbuilt.named_parameters()}
    method = Lora(method="lora", rank=3, alpha=6, targets=targets)
    layers = trainable_names(unbuilt, method)
    assert layers == [
        name
        for name, module in unbuilt.named_modules()
        if isinstance(module, torch.nn.Linear) and f".{name}".endswith(tuple(f".{target}" for target in targets))
    ]
    set_trainable(unbuilt, method)
    assert trainable(unbuilt) == {f"{layer}.lora_{half}.default.weight" for layer in layers for half in "AB"}
    weights = dict(unbuilt.named_parameters())
    assert all(weight.is_meta for weight in weights.values())
    assert {name for name in weights if is_lora(name)} == trainable(unbuilt)
    assert {base_name(name) for name in weights if not is_lora(name)} == plain
    assert unbuilt.get_submodule(layers[0]).scaling == {"default": 2}


@pytest.mark.parametrize(
    "method, message",
    [
        (Partial(method="partial", names=("proj_out.*", "*.norm1.liner.weight")), r"'\*\.norm1\.liner\.weight'.*norm1"),
        (
            Partial(method="partial", names=("transformer_blocks.4[0-7].*",)),
            r"4\[0-7\].*names are transformer_blocks\.",
        ),
        (Lora(method="lora", targets=("to_q", "to_qu")), r"'to_qu'.*similar names are .*to_q"),
        (Lora(method="lora", targets=("attn1.add_to_q",)), r"'attn1\.add_to_q'.*add_q_proj"),
        (Lora(method="lora", targets=("patch_embed.proj",)), r"'patch_embed\.proj'"),  # a convolution
    ],
)
def test_a_name_that_matches_nothing_is_refused_before_anything_is_changed(unbuilt, method, message):
    before = [name for name, _ in unbuilt.named_parameters()]
    with pytest.raises(TrainingError, match=message):
        set_trainable(unbuilt, method)
    assert [name for name, _ in unbuilt.named_parameters()] == before


def test_alpha_defaults_to_the_rank(unbuilt):
    set_trainable(unbuilt, Lora(method="lora", rank=5, targets=("to_q",)))
    assert unbuilt.transformer_blocks[0].attn1.to_q.scaling == {"default": 1}


def test_initial_lora_values_depend_on_name_and_seed_only():
    name = "transformer_blocks.{}.attn1.to_q.lora_A.default.weight"
    start = initial_lora(name.format(0), (4, 100), 7)
    assert start.dtype == torch.float32 and torch.equal(start, initial_lora(name.format(0), (4, 100), 7))
    for other in (initial_lora(name.format(1), (4, 100), 7), initial_lora(name.format(0), (4, 100), 8)):
        assert not torch.equal(start, other)
    bound = 1 / math.sqrt(100)
    assert 0.9 * bound < start.abs().max() <= bound
    assert not initial_lora(name.format(0).replace("lora_A", "lora_B"), (100, 4), 7).any()


def test_a_checkpoint_records_the_versions_of_peft_and_torch():
    assert versions()["peft"] == peft.__version__ and versions()["torch"] == torch.__version__


def test_an_initial_lora_does_not_change_the_output(networks):
    _, pusa = networks
    given = dict(
        hidden_states=torch.randn(1, 12, 2, 4, 4),
        encoder_hidden_states=torch.randn(1, 8, 16),
        timestep=torch.tensor([[100.0, 700.0]]),
        encoder_attention_mask=torch.ones(1, 8),
        return_dict=False,
    )
    before = pusa(**given)[0]
    set_trainable(pusa, Lora(method="lora", rank=2, targets=("to_q", "norm1.linear")))
    with torch.no_grad():
        for name, weight in pusa.named_parameters():
            if is_lora(name):
                weight.copy_(initial_lora(name, tuple(weight.shape), 0))
    assert torch.equal(before, pusa(**given)[0])
