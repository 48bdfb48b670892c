"""Mochi's transformer with one level for each frame, and its tokenizer."""

import copy
import json
import shutil
import subprocess
import sys

import pytest
import sentencepiece
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pusa.backbones.mochi.backbone import Mochi
from pusa.backbones.mochi.transformer import PusaMochiTransformer3DModel
from pusa.tiny.shapes import COLOURS, SHAPES
from tests.benchmarks.mochi_block import ExpandFirst


def inputs(batch=3, frames=4, tokens=8, width=16):
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(tokens)[None] < torch.tensor([5, 8, 2])[:batch, None]
    return {
        "hidden_states": torch.randn(batch, 12, frames, 4, 6, generator=generator),
        "encoder_hidden_states": torch.randn(batch, tokens, width, generator=generator),
        "encoder_attention_mask": mask,
    }


@torch.no_grad()
def run(model, timestep, **given):
    return model(timestep=timestep, **given).sample


T_B = torch.tensor([100.0, 500.0, 900.0])


def test_equal_levels_are_the_base_model(networks):
    base, pusa = networks
    expected = run(base, T_B, **inputs())
    assert expected.std() > 0.1
    torch.testing.assert_close(run(pusa, T_B, **inputs()), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(run(pusa, T_B[:, None].expand(3, 4), **inputs()), expected, atol=1e-5, rtol=0)


def test_each_frame_has_its_own_level(networks):
    _, pusa = networks
    equal = T_B[:, None].repeat(1, 4)
    changed = equal.clone()
    changed[:, 2] += 400
    effect = run(pusa, changed, **inputs()) - run(pusa, equal, **inputs())
    difference = effect.abs().mean((0, 1, 3, 4))
    assert difference.argmax() == 2
    assert difference[2] > 1.5 * difference[[0, 1, 3]].max()


def test_a_sample_does_not_depend_on_the_others_in_its_batch(networks):
    _, pusa = networks
    t_BF = torch.rand(3, 4, generator=torch.Generator().manual_seed(2)) * 1000
    together = run(pusa, t_BF, **inputs())
    for i in range(3):
        alone = run(pusa, t_BF[i : i + 1], **{name: value[i : i + 1] for name, value in inputs().items()})
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)


def test_padding_of_the_text_changes_nothing(networks):
    _, pusa = networks
    given = inputs()
    expected = run(pusa, T_B, **given)
    noise = torch.where(given["encoder_attention_mask"][..., None], 0.0, 100.0)
    given["encoder_hidden_states"] = given["encoder_hidden_states"] + noise
    torch.testing.assert_close(run(pusa, T_B, **given), expected, atol=1e-5, rtol=0)


def test_padding_may_lie_anywhere(networks):
    _, pusa = networks
    given = inputs()
    expected = run(pusa, T_B, **given)
    for name in ("encoder_hidden_states", "encoder_attention_mask"):
        given[name] = given[name].roll(3, dims=1)
    torch.testing.assert_close(run(pusa, T_B, **given), expected, atol=1e-5, rtol=0)


def test_no_valid_text_at_all_is_allowed(networks):
    base, pusa = networks
    given = inputs()
    given["encoder_attention_mask"] = torch.zeros_like(given["encoder_attention_mask"])
    torch.testing.assert_close(run(pusa, T_B, **given), run(base, T_B, **given), atol=1e-5, rtol=0)


def test_gradients_match_finite_differences(networks):
    _, pusa = networks
    pusa = pusa.double()
    given = {name: value.double() if value.is_floating_point() else value for name, value in inputs(1, 2).items()}
    given["hidden_states"] = given["hidden_states"][..., :2, :2]
    timestep = torch.tensor([[100.0, 700.0]], dtype=torch.float64)
    bias = pusa.transformer_blocks[0].norm1.linear.bias
    weights = torch.randn(given["hidden_states"].shape, dtype=torch.float64)

    def loss():
        return (pusa(timestep=timestep, **given).sample.double() * weights).sum()

    loss().backward()
    step = 1e-2  # the norms work in fp32, whatever the model does: a smaller step drowns
    for index in (0, 17, 40):
        with torch.no_grad():
            bias[index] += step
            above = loss()
            bias[index] -= 2 * step
            below = loss()
            bias[index] += step
        assert ((above - below) / (2 * step)).item() == pytest.approx(bias.grad[index].item(), rel=0.02, abs=1e-3)


class Shapes(TorchDispatchMode):
    """Record the shape of every tensor that is made while this mode is on."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen |= {tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        return result


@pytest.mark.parametrize("form", ["pusa", "pusa in training", "expand-first"])
def test_no_modulation_is_expanded_over_the_tokens(networks, form):
    _, pusa = networks
    batch, frames, tokens, width = 3, 4, 4 * 2 * 3, 16
    if form == "expand-first":  # what the test would see of the form that is to be avoided
        pusa.__class__ = ExpandFirst
    with Shapes() as shapes, torch.set_grad_enabled(form == "pusa in training"):
        sample = pusa(timestep=torch.rand(batch, frames) * 1000, **inputs()).sample
        if sample.requires_grad:
            sample.square().mean().backward()
    sizes = {torch.Size(shape).numel() for shape in shapes.seen}
    assert (batch, tokens, width) in shapes.seen
    assert (batch * tokens * 4 * width in sizes) == (form == "expand-first")


def gradient(model):
    t_BF = torch.full((3, 4), 300.0)
    t_BF[:, 1] = 800
    return torch.autograd.grad(
        model(timestep=t_BF, **inputs()).sample.square().mean(), model.transformer_blocks[0].norm1.linear.weight
    )[0]


def test_gradient_checkpointing_changes_nothing(networks):
    _, pusa = networks
    plain = gradient(pusa)
    pusa.enable_gradient_checkpointing()
    calls = []
    pusa.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(gradient(pusa.train()), plain)
    assert len(calls) == 2  # the second time for the backward pass


def test_diffusers_attention_backends_are_used(networks, monkeypatch):
    base, pusa = networks
    expected = run(base, T_B, **inputs())
    used = []

    def recorded(*args, backend, **kwargs):
        used.append(backend and backend.value)
        return dispatch_attention_fn(*args, backend=backend, **kwargs)

    monkeypatch.setattr("pusa.backbones.joint_attention.dispatch_attention_fn", recorded)
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
    expected = run(pusa, T_B, **inputs())
    pusa.requires_grad_(False)
    pusa.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "add_k_proj", "norm1.linear"]))
    torch.testing.assert_close(run(pusa, T_B, **inputs()), expected)
    pusa(timestep=T_B, **inputs()).sample.square().mean().backward()
    trained = {name for name, weight in pusa.named_parameters() if weight.grad is not None}
    assert trained and all("lora_" in name for name in trained)
    for weight in (w for name, w in pusa.named_parameters() if "lora_B" in name):
        torch.nn.init.normal_(weight.data, std=0.5)
    changed = run(pusa, T_B, **inputs())
    assert (changed - expected).abs().max() > 0.01
    for scale, same_as in ((0.0, expected), (1.0, changed)):
        scaled = run(pusa, T_B, attention_kwargs={"scale": scale}, **inputs())
        torch.testing.assert_close(scaled, same_as)
    pusa.disable_adapters()
    torch.testing.assert_close(run(pusa, T_B, **inputs()), expected)


def test_with_bf16_weights_the_norms_are_computed_in_fp32(networks):
    base, pusa = networks
    expected = run(base, T_B, **inputs())
    given = {name: v.bfloat16() if v.is_floating_point() else v for name, v in inputs().items()}
    half = run(copy.deepcopy(pusa).bfloat16(), T_B[:, None].expand(3, 4), **given)
    theirs = run(copy.deepcopy(base).bfloat16(), T_B, **given)
    assert half.dtype == torch.bfloat16
    scale = expected.abs().mean()
    assert (half.float() - expected).abs().mean() < 1.2 * (theirs.float() - expected).abs().mean() < 0.1 * scale

    seen = []
    pusa.bfloat16().transformer_blocks[0].norm1.norm.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    run(pusa, T_B, **given)
    assert seen == [torch.float32]


@pytest.mark.slow
def test_a_compiled_transformer_computes_the_same(networks):
    base, pusa = networks
    expected = run(base, T_B, **inputs())
    for block in pusa.transformer_blocks:
        block.compile(dynamic=True)
    torch.testing.assert_close(run(pusa, T_B[:, None].expand(3, 4), **inputs()), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(run(torch.compile(pusa), T_B, **inputs()), expected, atol=1e-5, rtol=0)


def test_a_saved_and_loaded_transformer_computes_the_same(networks, tmp_path):
    _, pusa = networks
    pusa.save_pretrained(tmp_path)
    loaded = PusaMochiTransformer3DModel.from_pretrained(tmp_path)
    torch.testing.assert_close(run(loaded, T_B, **inputs()), run(pusa, T_B, **inputs()), atol=0, rtol=0)


@pytest.mark.parametrize("shape", [(3, 3), (2,), (3, 4, 1)])
def test_a_timestep_of_another_shape_is_refused(networks, shape):
    with pytest.raises(ValueError, match=r"allowed are \(3,\) and \(3, 4\)"):
        run(networks[1], torch.ones(shape), **inputs())


def test_the_published_tokenizer_is_a_sentencepiece_model(tmp_path):
    """genmo/mochi-1-preview has T5's spiece.model and no tokenizer.json."""
    words = [f"a {colour} {shape} moves {way}" for colour in COLOURS for shape in SHAPES for way in ("left", "up")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_prefix=str(tmp_path / "spiece"), vocab_size=60, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 100}')
    tokenizer = Mochi().load_tokenizer("tokenizer", tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(str(tmp_path / "spiece.model"))
    for prompt in (*words[:3], "a violet hexagon"):
        assert tokenizer(prompt).input_ids == [*theirs.encode(prompt), 1]


HOSTILE = "from pathlib import Path\nPath({trace!r}).touch()\nclass Tokenizer: ...\nclass Config: ...\n"


def hostile_tokenizer(root, folder, named, tokenizer_class) -> str:
    """The tiny family's tokenizer in a folder that names code of its own, in one of two places."""
    shutil.copytree(root / "pusa/builtin/tiny/tokenizer", folder)
    (folder / "evil.py").write_text(HOSTILE.format(trace=str(folder.parent / "trace")))
    own = json.loads((folder / "tokenizer_config.json").read_text())
    own.pop("tokenizer_class")
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    there = json.loads((folder / named).read_text()) if (folder / named).exists() else {}
    remote = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"], "AutoConfig": "evil.Config"}}
    chosen = {"tokenizer_class": tokenizer_class} if tokenizer_class else {}
    (folder / named).write_text(json.dumps({**there, "model_type": "evil", **chosen, **remote}))
    return str(folder)


LOAD_ALL = """
import sys
from pathlib import Path
from pusa.backbones.mochi.backbone import Mochi
from pusa.weights.load import load_part
from pusa.weights.source import find_part
import torch
*folders, model = sys.argv[1:]
for folder in folders:
    print(Mochi().load_tokenizer("tokenizer", Path(folder))("a red circle").input_ids)
for part in Mochi.classes:
    print(type(load_part(Mochi(), find_part(Path(model), part), torch.float32)).__name__)
"""


def hostile_model(root, folder) -> str:
    """The tiny family's model, whose every part names code of its own."""
    shutil.copytree(root / "pusa/builtin/tiny", folder)
    for part in Mochi.classes:
        (folder / part / "evil.py").write_text(HOSTILE.format(trace=str(folder.parent / "trace")))
        config = json.loads((folder / part / "config.json").read_text())
        names = {f"Auto{kind}": "evil.Config" for kind in ("Config", "Model", "ModelForSeq2SeqLM")}
        (folder / part / "config.json").write_text(json.dumps({**config, "auto_map": names}))
    return str(folder)


def test_code_in_a_models_folders_never_runs_and_the_user_is_not_asked(root, tmp_path):
    kinds = [
        (name, kind) for name in ("tokenizer_config", "config") for kind in ("PreTrainedTokenizerFast", "No", None)
    ]
    folders = [hostile_tokenizer(root, tmp_path / f"{n}-{kind}", f"{n}.json", kind) for n, kind in kinds]
    command = [sys.executable, "-c", LOAD_ALL, *folders, hostile_model(root, tmp_path / "model")]
    done = subprocess.run(command, input="y\n" * 9, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    own = [part_class.__name__ for part_class in Mochi.classes.values()]
    assert done.stdout.splitlines() == ["[3, 13, 19, 1]"] * len(kinds) + own  # and no "run the custom code? [y/N]"
    assert not (tmp_path / "trace").exists()
