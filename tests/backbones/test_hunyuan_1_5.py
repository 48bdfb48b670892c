"""HunyuanVideo 1.5's transformer with one level for each frame, against diffusers' class and its own modules."""

import re
import threading
from copy import deepcopy

import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel, HunyuanVideoTransformer3DModel
from safetensors.torch import save_file

from pusa.backbones import OTHER_MARKS, find_family
from pusa.backbones.context import Context
from pusa.backbones.hunyuan_video.transformer_1_5 import PusaHunyuanVideo15Transformer3DModel
from pusa.errors import ConditionError
from pusa.weights.inspect import describe
from pusa.weights.load import cast

FRAMES, CHANNELS, EACH = 4, 2, 2 * 3  # latent frames and channels, and tokens in each frame
TRANSFORMER = {
    "in_channels": 2 * CHANNELS + 1,
    "out_channels": CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 3,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": 16,
    "text_embed_2_dim": 12,
    "image_embed_dim": 10,
    "rope_axes_dim": (4, 2, 2),
}
T_B = torch.tensor([100.0, 500.0, 900.0])


@pytest.fixture(scope="module")
def pair():
    """Return a small HunyuanVideo 1.5 of diffusers and a Pusa transformer with the same random weights."""
    torch.manual_seed(0)
    base = HunyuanVideo15Transformer3DModel(**TRANSFORMER)
    with torch.no_grad():
        for name, weight in base.named_parameters():
            if weight.ndim == 1:  # biases start as 0 and norms as 1, which would hide what is left out
                weight.add_(torch.randn_like(weight), alpha=0.1)
            elif not name.startswith("cond_type_embed"):
                weight.mul_(1.5)
    pusa = PusaHunyuanVideo15Transformer3DModel(**TRANSFORMER)
    pusa.load_state_dict(base.state_dict())
    return base.eval(), pusa.eval()


@pytest.fixture
def networks(pair):
    """Return copies of the pair, which a test may change."""
    return deepcopy(pair)


def inputs(picture=False, qwen=("111100", "010010", "000001"), byt5=("0110", "0000", "1111"), frames=FRAMES):
    """Return a batch of texts with these valid tokens, and pictures or zeros in their place."""
    generator = torch.Generator().manual_seed(1)
    batch = len(qwen)

    def draw(*shape):
        return torch.randn(batch, *shape, generator=generator)

    return {
        "hidden_states": draw(TRANSFORMER["in_channels"], frames, 2, 3),
        "encoder_hidden_states": draw(len(qwen[0]), TRANSFORMER["text_embed_dim"]),
        "encoder_attention_mask": torch.tensor([[int(c) for c in text] for text in qwen]),
        "encoder_hidden_states_2": draw(len(byt5[0]), TRANSFORMER["text_embed_2_dim"]),
        "encoder_attention_mask_2": torch.tensor([[int(c) for c in text] for text in byt5]),
        "image_embeds": draw(5, TRANSFORMER["image_embed_dim"]) * picture,
    }


def only(given, i):
    return {name: value[i : i + 1] for name, value in given.items()}


def levels(frames=FRAMES):
    return torch.rand(3, frames, generator=torch.Generator().manual_seed(2)) * 1000


def equal_levels():
    return T_B[:, None].expand(3, FRAMES)


@torch.no_grad()
def run(model, timestep, **given):
    return model(timestep=timestep, **given).sample


@pytest.mark.parametrize("picture", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_levels_are_the_base_model(networks, dtype, picture):
    for network in networks:
        cast(network, dtype)
    given = {name: value.to(dtype) if "mask" not in name else value for name, value in inputs(picture).items()}
    base, pusa = networks
    expected = run(base, T_B.to(dtype), **given)
    assert expected.std() > 0.1
    atol = 1e-5 if dtype == torch.float32 else 0.02 * expected.std().item()
    for timestep in (T_B, equal_levels()):
        torch.testing.assert_close(run(pusa, timestep, **given), expected, atol=atol, rtol=0)


@torch.no_grad()
def reference(base, t_BF, picture, **given):
    """Compute frame by frame, and sample by sample, with the base's own modules and processors."""
    samples = []
    for i, t_F in enumerate(t_BF):
        one = only(given, i)
        c_FD = base.time_embed(t_F)
        mean = c_FD.mean(0, keepdim=True)
        qwen = one["encoder_hidden_states"][one["encoder_attention_mask"].bool()][None]
        byt5 = one["encoder_hidden_states_2"][one["encoder_attention_mask_2"].bool()][None]
        texts = [base.context_embedder(qwen, t_F.mean()[None]), base.context_embedder_2(byt5)]
        texts += [base.image_embedder(one["image_embeds"])] if picture else []
        y = torch.cat([text + base.cond_type_embed.weight[kind] for kind, text in enumerate(texts)], 1)
        frames = list(base.x_embedder(one["hidden_states"]).chunk(len(t_F), 1))
        rope = base.rope(one["hidden_states"])
        for block in base.transformer_blocks:
            normed = [block.norm1(x, emb=c[None]) for x, c in zip(frames, c_FD, strict=True)]
            text = block.norm1_context(y, emb=mean)
            video, attended = block.attn(
                torch.cat([n[0] for n in normed], 1), text[0], torch.ones(1, y.shape[1]), image_rotary_emb=rope
            )
            for f, (part, (_, gate, shift, scale, gate_mlp)) in enumerate(
                zip(video.chunk(len(t_F), 1), normed, strict=True)
            ):
                x = frames[f] + gate * part
                frames[f] = x + gate_mlp * block.ff(block.norm2(x) * (1 + scale) + shift)
            _, gate, shift, scale, gate_mlp = text
            y = y + gate * attended
            y = y + gate_mlp * block.ff_context(block.norm2_context(y) * (1 + scale) + shift)
        out = torch.cat([base.norm_out(x, c[None]) for x, c in zip(frames, c_FD, strict=True)], 1)
        samples.append(base.proj_out(out).mT.unflatten(2, one["hidden_states"].shape[2:]))
    return torch.cat(samples)


@pytest.mark.parametrize("picture", [False, True])
def test_unequal_levels_are_the_base_models_modules_frame_by_frame(networks, picture):
    base, pusa = networks
    expected = reference(base, levels(), picture, **inputs(picture))
    torch.testing.assert_close(run(pusa, levels(), **inputs(picture)), expected, atol=1e-5, rtol=0)
    assert (run(base, levels().mean(1), **inputs(picture)) - expected).abs().max() > 0.1  # so the levels matter


def test_a_sample_does_not_depend_on_the_others_in_its_batch(networks):
    """The first has a picture, the second none, the third no text in quotes and no picture."""
    base, pusa = networks
    given = inputs(picture=True, byt5=("0110", "1000", "0000"))
    given["image_embeds"][1:] = 0
    together = run(pusa, levels(), **given)
    for i in range(3):
        alone = run(pusa, levels()[i : i + 1], **only(given, i))
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)
        expected = run(base, T_B[i : i + 1], **only(given, i))
        torch.testing.assert_close(run(pusa, T_B, **given)[i : i + 1], expected, atol=1e-5, rtol=0)
    assert (run(base, T_B, **given)[1:] - run(pusa, T_B, **given)[1:]).abs().max() > 0.1  # the base looks at the batch


def test_no_picture_is_a_picture_of_zeros(networks):
    given = inputs()
    without = {**given, "image_embeds": None}
    assert torch.equal(run(networks[1], levels(), **given), run(networks[1], levels(), **without))
    changed = run(networks[1], levels(), **inputs(picture=True)) - run(networks[1], levels(), **given)
    assert changed.abs().max() > 0.1


def test_padding_does_not_matter(networks):
    given = inputs(picture=True)
    other = {name: value.clone() for name, value in given.items()}
    for end in ("", "_2"):
        other[f"encoder_hidden_states{end}"][given[f"encoder_attention_mask{end}"] == 0] = 1e4
        assert (given[f"encoder_hidden_states{end}"] != other[f"encoder_hidden_states{end}"]).any()
    assert torch.equal(run(networks[1], levels(), **given), run(networks[1], levels(), **other))
    more = {
        name: torch.nn.functional.pad(value, (0, 0) * (value.ndim - 2) + (0, 7))
        for name, value in given.items()
        if name.startswith("encoder")
    }
    torch.testing.assert_close(
        run(networks[1], levels(), **{**given, **more}), run(networks[1], levels(), **given), atol=1e-5, rtol=0
    )


def gradients(model, timestep, **given):
    model.zero_grad()
    model(timestep=timestep, **given).sample.square().mean().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def furthest(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs)


def test_texts_without_any_valid_token_give_finite_numbers(networks):
    _, pusa = networks
    empty = inputs(qwen=("000000", "100000", "000000"), byt5=("0000", "0000", "0000"))
    out = run(pusa, levels(), **empty)
    assert out.isfinite().all()
    alone = run(pusa, levels()[:1], **only(empty, 0))
    torch.testing.assert_close(out[:1], alone, atol=1e-5, rtol=0)
    for weight in gradients(pusa, levels(), **empty).values():
        assert weight.isfinite().all()
    tokenless = {name: value[:, :0] if name.startswith("encoder") else value for name, value in empty.items()}
    torch.testing.assert_close(run(pusa, levels(), **tokenless)[0], out[0], atol=1e-5, rtol=0)


def test_gradients_at_equal_levels_are_those_of_the_base_model(networks):
    base, pusa = networks
    expected = gradients(base, T_B, **inputs(picture=True))
    idle = {name for name, _ in base.named_parameters() if name not in expected or not expected[name].any()}
    # Every weight counts, except those of the last block's text output, which is not used.
    assert all(re.match(r"transformer_blocks\.2\.(ff_context|attn\.(to_add_out|(norm_)?add(ed)?_q))", n) for n in idle)
    assert furthest(gradients(pusa, equal_levels(), **inputs(picture=True)), expected) < 1e-5


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
    assert len(calls) == {1: 6, 2: 5}[every]  # some blocks a second time, for the backward pass


class OfThreads(Context):
    """A context whose processes are threads of this one, so that one backward pass goes through all of them."""

    barrier: threading.Barrier
    parts: list

    def exchange(self, x, sent, received):
        self.parts[self.rank] = x.split(list(sent))
        self.barrier.wait(30)
        mine = [part[self.rank] for part in self.parts]
        self.barrier.wait(30)
        assert [len(part) for part in mine] == list(received)
        return torch.cat(mine)


@pytest.mark.parametrize("frames", [3, 4])
def test_processes_that_share_frames_compute_the_same(networks, frames, monkeypatch):
    _, pusa = networks
    size, given = 2, inputs(picture=True, frames=frames)
    expected = gradients(pusa, levels(frames), **given)
    monkeypatch.setattr(OfThreads, "barrier", threading.Barrier(size), raising=False)
    monkeypatch.setattr(OfThreads, "parts", [None] * size, raising=False)
    models, outs = [deepcopy(pusa) for _ in range(size)], [None] * size

    def compute(rank):
        models[rank].zero_grad()
        models[rank].share_frames(OfThreads(rank, size, None))
        outs[rank] = models[rank](timestep=levels(frames), **given).sample

    threads = [threading.Thread(target=compute, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out in outs:
        torch.testing.assert_close(out, run(pusa, levels(frames), **given), atol=1e-5, rtol=0)
    sum(out.square().mean() for out in outs).backward()
    one, other = ({n: w.grad for n, w in model.named_parameters() if w.grad is not None} for model in models)
    assert furthest({name: (one[name] + other[name]) / size for name in one}, expected) < 1e-5
    with pytest.raises(ConditionError, match="3 processes cannot split 2 heads evenly; allowed are 1, 2"):
        pusa.share_frames(Context(0, 3, None))


def test_the_published_widths_have_the_names_and_shapes_of_the_base_class_and_run_on_the_meta_device():
    with torch.device("meta"):
        base, pusa = HunyuanVideo15Transformer3DModel(num_layers=2), PusaHunyuanVideo15Transformer3DModel(num_layers=2)
        like = {
            "hidden_states": torch.empty(1, 65, 31, 30, 53),
            "timestep": torch.empty(1, 31),
            "encoder_hidden_states": torch.empty(1, 1000, 3584),
            "encoder_attention_mask": torch.empty(1, 1000),
            "encoder_hidden_states_2": torch.empty(1, 256, 1472),
            "encoder_attention_mask_2": torch.empty(1, 256),
        }
        with torch.no_grad():
            assert pusa(**like).sample.shape == (1, 32, 31, 30, 53)
    theirs, ours = ({name: weight.shape for name, weight in model.state_dict().items()} for model in (base, pusa))
    assert theirs == ours
    assert dict(base.config) == dict(pusa.config)


def test_files_are_those_of_the_base_class(networks, tmp_path):
    base, pusa = networks
    base.save_pretrained(tmp_path / "base")
    pusa.save_pretrained(tmp_path / "pusa")
    pair = HunyuanVideo15Transformer3DModel, PusaHunyuanVideo15Transformer3DModel
    for folder, model_class in zip(("pusa", "base"), pair, strict=True):
        loaded = model_class.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(run(loaded, T_B, **inputs()), run(base, T_B, **inputs()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(3, 3), (2,), (3, FRAMES, 1), (3, FRAMES * EACH)])
def test_a_timestep_of_another_shape_is_refused(networks, shape):
    with pytest.raises(ValueError, match=r"allowed are \(3,\) and \(3, 4\)"):
        run(networks[1], torch.ones(shape), **inputs())


@pytest.mark.parametrize("settings", [{"use_meanflow": True}, {"patch_size_t": 2}])
def test_a_model_with_inputs_that_would_be_dropped_is_refused(settings):
    with pytest.raises(ValueError, match="allowed is"):
        PusaHunyuanVideo15Transformer3DModel(**TRANSFORMER, **settings)


# Parts of names in a double-stream block: the authors' of 1.5, the authors' of 1.0, and ComfyUI's of both.
OWN = [f"{stream}_attn_{part}" for stream in ("img", "txt") for part in ("q", "k", "v", "q_norm", "proj")]
FUSED = ["img_attn_qkv", "txt_attn_qkv", "img_attn_q_norm", "img_attn_k_norm", "img_attn_proj", "img_mod.linear"]
COMFY = ["img_attn.qkv", "txt_attn.qkv", "img_attn.norm.query_norm", "img_attn.proj", "img_mod.lin"]
BOTH = ["img_in.proj.weight", "txt_in.individual_token_refiner.blocks.0.norm1.weight", "final_layer.linear.weight"]
NEWER = ["cond_type_embedding.weight", "byt5_in.fc1.weight", "vision_in.proj.0.weight"]
SINGLE = [f"single_blocks.{i}.{part}.weight" for i in range(40) for part in ("linear1", "linear2", "modulation.linear")]


def blocks(parts, number):
    return [f"double_blocks.{i}.{part}.weight" for i in range(number) for part in parts]


def lora(names, prefix=""):
    """Return the names of a LoRA: PEFT's, or flat ones behind kohya's prefix."""
    modules = [name.removesuffix(".weight") for name in names if "norm" not in name]
    if prefix == "lora_unet_":
        return [f"{prefix}{m.replace('.', '_')}.lora_{end}.weight" for m in modules for end in ("down", "up")]
    return [f"{prefix}{module}.lora_{end}.weight" for module in modules for end in "AB"]


def diffusers_names(model_class):
    with torch.device("meta"):
        return list(model_class(num_layers=21).state_dict())


NAMES = {
    "authors' 1.5": ("hunyuan_video-1.5", lambda: BOTH + NEWER + blocks(OWN, 54)),
    "ComfyUI's 1.5": ("hunyuan_video-1.5", lambda: BOTH + NEWER + blocks(COMFY, 54)),
    "ComfyUI's 1.5 behind a prefix": (
        "hunyuan_video-1.5",
        lambda: [f"model.diffusion_model.{name}" for name in BOTH + NEWER + blocks(COMFY, 54)],
    ),
    "diffusers' 1.5": ("hunyuan_video-1.5", lambda: diffusers_names(HunyuanVideo15Transformer3DModel)),
    "LoRA of 1.5": ("hunyuan_video-1.5", lambda: lora(blocks(OWN, 54), "diffusion_model.")),
    "LoRA of 1.5, kohya's": ("hunyuan_video-1.5", lambda: lora(blocks(OWN, 54), "lora_unet_")),
    "LoRA of 1.5, ComfyUI's": ("hunyuan_video-1.5", lambda: lora(blocks(COMFY, 54), "lora_unet_")),
    "authors' 1.0": ("hunyuan_video", lambda: BOTH + blocks(FUSED, 20) + SINGLE),
    "ComfyUI's 1.0": ("hunyuan_video", lambda: BOTH + blocks(COMFY, 20) + SINGLE),
    "diffusers' 1.0": ("hunyuan_video", lambda: diffusers_names(HunyuanVideoTransformer3DModel)),
    "LoRA of 1.0": ("hunyuan_video", lambda: lora(blocks(FUSED, 20), "diffusion_model.")),
    "LoRA of 1.0, kohya's": ("hunyuan_video", lambda: lora(blocks(FUSED, 20) + SINGLE, "lora_unet_")),
}


@pytest.mark.parametrize("case", NAMES)
def test_inspect_tells_1_5_from_1_0(case, tmp_path):
    expected, names = NAMES[case][0], NAMES[case][1]()
    save_file({name: torch.zeros(1, 1) for name in names}, tmp_path / "some.safetensors")
    (facts,) = describe(tmp_path / "some.safetensors")
    assert facts["family"] == expected
    marks = {**find_family("hunyuan_video").marks, **OTHER_MARKS}
    found = {family for family, mark in marks.items() if any(re.search(mark, name) for name in names)}
    assert found == {expected}
