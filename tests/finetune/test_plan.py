from pathlib import Path

import pytest
import torch
from diffusers import MochiTransformer3DModel

from pusa.backbones.dry_run import PeakMemory
from pusa.backbones.mochi.backbone import Mochi
from pusa.errors import ConditionError, ManifestError, TrainingError
from pusa.finetune.loss import frame_errors
from pusa.finetune.plan import legal_contexts, plan
from pusa.finetune.sharding import Sharding
from pusa.manifest.models import Bucket, FinetuneManifest, ModelSpec
from pusa.weights.load import load_part
from pusa.weights.resolve import locate_part
from tests.benchmarks.training_memory import compare

SHAPE = Bucket(width=64, height=64, num_frames=31)
LORA = {"method": "lora", "rank": 4}
WIDE = [
    {"activation_checkpointing": 1, "ema_decay": 0.9},
    {"train": LORA},
    {"parallel": {"processes": 2}, "batch_size": 2},
]


def manifest(weights="builtin:tiny", **settings) -> FinetuneManifest:
    return FinetuneManifest.model_validate({"base": {"weights": str(weights)}, "batch_size": 1, **settings})


def need(shape=SHAPE, compute=torch.float32, **settings):
    return plan(manifest(**settings), shape, compute)


@pytest.mark.parametrize("every", [0, 1, 2])
def test_the_dry_run_counts_what_a_real_run_holds(every):
    mochi = Mochi()
    transformer = load_part(mochi, locate_part(ModelSpec(weights="builtin:tiny"), "transformer"), torch.float32)
    transformer.train().requires_grad_(True)
    if every:
        transformer.enable_gradient_checkpointing()
        transformer.checkpoint_every_nth_block = every
    memory = PeakMemory()
    sharding = Sharding(transformer, 1, accumulates=False, memory=memory)
    with memory:
        z, text = torch.randn(1, 12, 6, 8, 8), mochi.longest_text(transformer, 1)
        frame_errors(mochi.predict(transformer, z, torch.ones(1, 6), text), z).mean().backward()
    needed = need(activation_checkpointing=every)
    assert needed.gathered == sharding.gathered
    assert needed.activations == pytest.approx(memory.peak, rel=0.03)
    assert needed.total == pytest.approx(needed.weights + needed.optimizer + memory.total, rel=0.03)


@pytest.mark.slow  # the test before compares the plan with what a real run of the small model holds
@pytest.mark.parametrize("settings", [{}, *WIDE], ids=str)
def test_a_real_process_takes_the_planned_memory(settings):
    planned, taken = compare(blocks=1, heads=4, shape=Bucket(width=256, height=256, num_frames=19), settings=settings)
    assert planned == pytest.approx(taken, rel=0.12)


def test_weights_gradients_and_moments_are_sharded():
    alone, four = need(ema_decay=0.9), need(ema_decay=0.9, batch_size=4, parallel={"processes": 4})
    assert alone.parameters == alone.trainable == 1_700_376
    assert alone.weights == alone.gradients == alone.average == alone.optimizer // 2 == 4 * 1_700_376
    for part in ("weights", "gradients", "average", "optimizer"):
        assert getattr(four, part) == getattr(alone, part) // 4
    assert four.activations == alone.activations
    assert four.gathered > alone.gathered  # with several, the next block is gathered while one computes
    assert need().average == 0


def test_only_trainable_weights_have_gradients_and_moments():
    full, lora = need(compute=torch.bfloat16), need(compute=torch.bfloat16, train=LORA)
    assert lora.trainable == lora.parameters - full.parameters < full.trainable / 10
    assert lora.gradients == 4 * lora.trainable
    assert lora.weights == 2 * full.parameters + 4 * lora.trainable
    named = need(train={"method": "partial", "names": ["proj_out.*"]})
    assert 0 < named.trainable < lora.trainable and named.total < full.total
    with pytest.raises(TrainingError, match="proj_in"):
        need(train={"method": "partial", "names": ["proj_in.*"]})


def test_accumulated_gradients_are_counted():
    at_once, one_by_one = need(batch_size=4), need(batch_size=4, micro_batch_size=1)
    assert one_by_one.activations == need().activations
    assert at_once.activations > 3 * one_by_one.activations
    assert 0 < one_by_one.total - need().total <= one_by_one.gradients


def test_activation_checkpointing_and_shared_frames_save_activations():
    every, second, none = (need(activation_checkpointing=n).activations for n in (1, 2, 0))
    assert every < second < none
    wide = Bucket(width=256, height=256, num_frames=31)  # beside which the text, which all have whole, is short
    two = {"batch_size": 2, "micro_batch_size": 1}
    whole, half = (need(wide, parallel={"processes": 2, "context": n}, **two).activations for n in (1, 2))
    assert 0.5 * whole < half < 0.6 * whole
    assert need(compute=torch.bfloat16).activations < 0.8 * none  # norms and rotations are fp32 either way


def test_at_mochis_width_a_checkpointed_block_keeps_its_input_only(tmp_path):
    found = {}
    for blocks in (2, 4):
        with torch.device("meta"):
            MochiTransformer3DModel(num_layers=blocks).save_config(tmp_path / f"{blocks}/transformer")
        mochi = manifest(tmp_path / f"{blocks}", activation_checkpointing=1)
        found[blocks] = plan(mochi, Bucket(width=848, height=480, num_frames=163), torch.bfloat16)
    kept = 2 * (44_520 * 3072 + 256 * 1536) * 2  # of two blocks, both streams, in bf16
    assert found[4].activations - found[2].activations == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"parallel": {"processes": 4, "context": 3}}, ManifestError, "parallel.context is 3; it must divide the 4"),
        ({"parallel": {"processes": 8, "context": 8}}, ManifestError, "is 8; clips of 6 latent frames allow no more"),
        ({"parallel": {"processes": 5, "context": 5}}, ConditionError, "5 processes cannot split"),
        ({"batch_size": 6, "parallel": {"processes": 8, "context": 2}}, ManifestError, "must be a multiple of 4"),
    ],
)
def test_work_that_cannot_be_divided_evenly_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        need(**settings)


def test_legal_contexts_divide_the_heads_and_the_processes():
    heads = Mochi.classes["transformer"].load_config(
        Path(locate_part(ModelSpec(weights="builtin:tiny"), "transformer").folder)
    )["num_attention_heads"]
    legal = legal_contexts(manifest(parallel={"processes": 24}), 12)
    assert legal == [size for size in range(1, 13) if 24 % size == 0 and heads % size == 0]
    assert legal_contexts(manifest(parallel={"processes": 2}), 1) == [1]
