"""Models of strangers: nothing of theirs runs, and what is out of range ends in a sentence before it is built."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from pusa.backbones.mochi.backbone import Mochi
from pusa.errors import WeightsError
from pusa.manifest.models import ModelSpec
from pusa.weights.inspect import describe, format_facts
from pusa.weights.load import build, load_part
from pusa.weights.model import Model
from pusa.weights.resolve import BUILTIN
from pusa.weights.source import PartFiles, find_part
from pusa.weights.tensors import read_file

DEEP = "[" * 100_000
MISSING = object()


@pytest.fixture
def copy(tmp_path):
    """A copy of the tiny model to break."""
    return shutil.copytree(BUILTIN / "tiny", tmp_path / "tiny")


def edit_json(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not MISSING}))


# Settings.

TWELVE = [1.0] * 12
SETTINGS = [
    *(("transformer", "num_layers", v) for v in (10**9, 0, -1, 4.0, "4", True, None, [4], {}, 10**4000, MISSING)),
    ("transformer", "num_attention_heads", 10**12),
    ("transformer", "attention_head_dim", 7),
    ("transformer", "patch_size", 0),
    ("transformer", "patch_size", 2**62),
    ("transformer", "in_channels", 16),
    ("transformer", "pooled_projection_dim", 2**40),
    ("transformer", "text_embed_dim", 0),
    ("transformer", "activation_fn", "os.system"),
    ("transformer", "_class_name", "WanTransformer3DModel"),
    ("vae", "_class_name", "AutoencoderKLWan"),
    ("vae", "latents_mean", [float("nan")] * 12),
    ("vae", "latents_mean", [1e300] * 12),
    ("vae", "latents_mean", None),
    ("vae", "latents_std", [0.0, *TWELVE[1:]]),
    ("vae", "latents_std", [-1.0, *TWELVE[1:]]),
    ("vae", "latents_std", [float("inf"), *TWELVE[1:]]),
    ("vae", "latents_std", TWELVE[1:]),
    ("vae", "latents_std", ["1", *TWELVE[1:]]),
    ("vae", "temporal_expansions", [3, 3, 1]),
    ("vae", "spatial_expansions", [0, 2, 2]),
    ("vae", "layers_per_block", [10**9] * 5),
    ("vae", "layers_per_block", [1] * 10_000),
    ("vae", "encoder_block_out_channels", [32, 32]),
    ("vae", "decoder_block_out_channels", [7, 7, 7, 7]),  # not a multiple of the norms' groups
    ("text_encoder", "model_type", "bert"),
    ("text_encoder", "d_model", 10**12),
    ("text_encoder", "num_layers", 10**9),
    ("text_encoder", "num_heads", -4),
    ("text_encoder", "feed_forward_proj", "gated-__import__"),
    ("text_encoder", "relative_attention_num_buckets", 1),
    ("text_encoder", "relative_attention_max_distance", 3),
    ("text_encoder", "layer_norm_epsilon", float("nan")),
]


@pytest.mark.parametrize("part, key, value", SETTINGS, ids=lambda value: f"{value!s:.20}")
def test_a_setting_out_of_range_is_named_before_anything_is_built(copy, part, key, value):
    edit_json(copy / part / "config.json", **{key: value})
    with pytest.raises(WeightsError) as raised:
        build(Mochi(), find_part(copy, part))
    named = f"{part}/config.json"
    assert named in str(raised.value) and (key in str(raised.value) or "Error" in str(raised.value))
    assert len(str(raised.value)) < 2000


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "5", "null", DEEP, '{"a":' * 100_000, '{"num_layers": 1e999}', "\x00", " " * (2 << 20)],
    ids=lambda text: f"{text!r:.12}",
)
def test_a_configuration_of_another_shape_is_refused(copy, content):
    (copy / "transformer/config.json").write_text(content)
    for act in (lambda: build(Mochi(), find_part(copy, "transformer")), lambda: load_all(copy)):
        with pytest.raises(WeightsError, match=r"transformer/config\.json"):
            act()


def load_all(folder):
    return load_part(Mochi(), find_part(folder, "transformer"), torch.float32)


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors", "x.safetensors.index.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_not_a_regular_file_is_never_opened(copy, name, make):
    path = copy / "transformer" / name
    path.unlink(missing_ok=True)
    make(path)
    with pytest.raises(WeightsError, match="transformer"):
        load_all(copy)
    if name.endswith("l.safetensors"):
        with pytest.raises(WeightsError, match=r"regular file|directory"):
            read_file(path)


def test_a_link_out_of_a_models_folder_is_followed_as_in_the_hubs_cache(copy, tmp_path):
    shutil.move(copy / "vae", tmp_path / "elsewhere")
    (copy / "vae").mkdir()
    for path in (tmp_path / "elsewhere").iterdir():
        (copy / "vae" / path.name).symlink_to(path)
    assert load_part(Mochi(), find_part(copy, "vae"), torch.float32).dtype == torch.float32


def test_names_of_code_and_files_of_other_uses_are_ignored(copy):
    """Each of them makes a `from_pretrained` run code, ask on standard input, fetch from the hub, or read a pickle."""
    changes = {
        "auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"},
        "quantization_config": {"quant_method": "evil", "load_in_4bit": True},
        "_attn_implementation": "evil/kernels",
        "attn_implementation": "evil/kernels",
        "_diffusers_version": {"a": 1},
        "transformers_version": "999",
        "architectures": ["Evil"],
        "torch_dtype": "os.system",
        "dtype": ["x"],
    }
    for part in ("transformer", "vae", "text_encoder"):
        edit_json(copy / part / "config.json", **changes)
        (copy / part / "evil.py").write_text("raise SystemExit(3)")
        for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.pt"):
            (copy / part / name).write_bytes(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00exitq\x00\x85q\x01R.")
        (copy / part / "adapter_config.json").write_text(
            '{"base_model_name_or_path": "evil/model", "peft_type": "LORA"}'
        )
    (copy / "model_index.json").write_text('{"_class_name": "Evil", "vae": ["evil", "Evil"], "_pusa_base": "../evil"}')
    ours, theirs = Model(ModelSpec(weights=str(copy))), Model(ModelSpec(weights="builtin:tiny"))
    for part in ("transformer", "vae"):
        weights = getattr(theirs, part).state_dict()
        assert all(torch.equal(weights[name], w) for name, w in getattr(ours, part).state_dict().items())
    assert torch.equal(*(model.encode_text(["a red circle"]).features for model in (ours, theirs)))


def test_a_text_encoder_is_read_as_transformers_reads_it(copy):
    ours = load_part(Mochi(), find_part(copy, "text_encoder"), torch.bfloat16)
    theirs = T5EncoderModel.from_pretrained(copy / "text_encoder", dtype=torch.bfloat16).state_dict()
    assert ours.shared.weight is ours.encoder.embed_tokens.weight
    assert ours.state_dict().keys() == theirs.keys()
    assert all(torch.equal(theirs[name], weight) for name, weight in ours.state_dict().items())
    path = copy / "text_encoder/model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "decoder.final_layer_norm.weight": torch.ones(3)}, path)  # a whole T5, of which half is used
    load_part(Mochi(), find_part(copy, "text_encoder"), torch.float32)
    save_file({**tensors, "encoder.extra": torch.ones(3)}, path)
    with pytest.raises(WeightsError, match=r"unexpected 'encoder\.extra'"):
        load_part(Mochi(), find_part(copy, "text_encoder"), torch.float32)


# Values.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_weight_that_is_not_finite_is_refused_by_name(copy, part, value):
    (path,) = (copy / part).glob("*.safetensors")
    tensors = load_file(path)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(WeightsError, match=rf"{path.name}: {name} has values that are not finite"):
            load_part(Mochi(), find_part(copy, part), dtype)


# What is read is what is hashed.


def replace(path, content):
    """Put a file of equal size and mtime in the place of another."""
    stat = path.stat()
    assert stat.st_size == len(content)
    other = path.with_name(".new")
    other.write_bytes(content)
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.rename(path)
    assert path.stat().st_mtime_ns == stat.st_mtime_ns


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    replace(path, bytes(content))


def weights_of(folder, part):
    return next(path for path in (folder / part).iterdir() if path.suffix == ".safetensors" or path.stem == "tokenizer")


USES = {
    "transformer": lambda model: model.transformer,
    "vae": lambda model: model.vae,
    "text_encoder": lambda model: model.text_parts,
    "tokenizer": lambda model: model.text_parts,
}


@pytest.mark.parametrize("part", USES)
def test_a_file_replaced_after_it_was_hashed_is_not_used(copy, part):
    model, path = Model(ModelSpec(weights=str(copy))), weights_of(copy, part)
    before, content = model.fingerprints(), path.read_bytes()
    if part == "tokenizer":
        replace(path, content.replace(b'"red"', b'"der"'))
    else:
        flip(path)
    with pytest.raises(WeightsError, match=rf"{part} .* was changed while it was used; run again"):
        USES[part](model)
    assert Model(ModelSpec(weights=str(copy))).fingerprints()[part] != before[part]


def test_a_file_replaced_after_it_was_loaded_is_not_hashed(copy):
    model = Model(ModelSpec(weights=str(copy)))
    assert model.vae
    flip(weights_of(copy, "vae"))
    with pytest.raises(WeightsError, match=r"vae .* was changed while it was used"):
        model.fingerprints()


def test_a_file_replaced_while_it_is_hashed_or_loaded_is_noticed(copy, monkeypatch):
    files = find_part(copy, "vae")
    monkeypatch.setattr("pusa.weights.source.sha256_file", lambda path: flip(weights_of(copy, "vae")) or "0")
    with pytest.raises(WeightsError, match="vae was changed while it was read; run again"):
        files.fingerprint()


def test_a_lora_replaced_after_it_was_hashed_is_not_used(base, lora, tmp_path):
    folder = shutil.copytree(lora[1].resolve(), tmp_path / "own")
    model = Model(ModelSpec(weights=str(base), lora=str(folder)))
    model.fingerprints("transformer")
    flip(next((folder / "lora").glob("*.safetensors")))
    with pytest.raises(WeightsError, match=r"transformer .* was changed while it was used"):
        assert model.transformer


def test_another_mode_or_time_of_a_file_does_not_end_a_run(copy):
    model, path = Model(ModelSpec(weights=str(copy))), weights_of(copy, "vae")
    model.fingerprints()
    path.chmod(0o600)
    path.touch()
    replace(path, path.read_bytes())
    assert model.vae


# Output.


def test_what_strangers_wrote_is_shown_without_control_characters(tmp_path):
    evil = "\x1b]0;evil\x07\nlayout       safe\u202e"
    save_file({"a": torch.ones(1)}, tmp_path / "m.safetensors", {"by": evil, "\x1b[2J": "x", "del": "\x7f"})
    text = format_facts(describe(tmp_path / "m.safetensors"))
    assert all(line.isprintable() for line in text.splitlines())
    assert sum(line.startswith("  layout") for line in text.splitlines()) == 1


def test_a_message_of_thousands_of_tensors_is_short(copy):
    path = weights_of(copy, "transformer")
    save_file(load_file(path) | {f"extra.{i}": torch.ones(1) for i in range(5000)}, path)
    with pytest.raises(WeightsError, match=r"unexpected 'extra\.0'.* and 4,980 more") as raised:
        load_part(Mochi(), PartFiles("transformer", (copy / "transformer",)), torch.float32)
    assert len(str(raised.value)) < 2000
