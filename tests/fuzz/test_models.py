"""Whatever the files of a model hold, they are read, or end in a WeightsError."""

import contextlib
import json
import shutil
from math import prod
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from pusa.backbones.mochi.backbone import Mochi
from pusa.errors import WeightsError
from pusa.system.failures import PANIC
from pusa.weights.adapters import PEFT_CONFIG, PEFT_FILE, describe_strength, read_lora
from pusa.weights.convert import convert
from pusa.weights.inspect import describe, format_facts
from pusa.weights.load import build, stored_tensors
from pusa.weights.resolve import BUILTIN
from pusa.weights.source import PartFiles, find_part
from pusa.weights.stored import read_model
from pusa.weights.tensors import read_file, write_file
from tests.fuzz import examples

TINY = BUILTIN / "tiny"
PARTS = ("transformer", "vae", "text_encoder")
SHARED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]

# Numbers at and beyond every limit, texts that mean something elsewhere, and any JSON.
ODD = st.one_of(
    st.sampled_from([None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 2**64, 10**30, -(2**63), 0.5, 1e308, -0.0]),
    st.sampled_from([float("nan"), float("inf"), "", "1", "relu", "\x00", "\ud800", "\x1b[2J", "../x", "a" * 1000]),
    st.integers(-4, 64),
    st.floats(),
    st.text(max_size=5),
)
JSON = st.recursive(
    ODD,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


def fields(value, place=()):
    """Yield the place of every value inside a JSON value, but of no more than the first five in a list or object."""
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items)[:5]:
        yield from fields(inner, (*place, key))


def changed(value, place, new):
    """Return a copy with another value at a place."""
    if not place:
        return new
    own = dict(value) if isinstance(value, dict) else list(value)
    own[place[0]] = changed(own[place[0]], place[1:], new)
    return own


def write(path, value):
    path.write_text(json.dumps(value), encoding="utf-8", errors="surrogatepass")


# Settings.

CONFIGS = {part: json.loads((TINY / part / "config.json").read_text()) for part in PARTS}
KEYS = [(part, key) for part in PARTS for key in CONFIGS[part]]


@settings(deadline=None, max_examples=examples(60), suppress_health_check=SHARED)
@given(
    st.lists(st.tuples(st.sampled_from(KEYS), JSON | st.lists(st.integers(0, 64), max_size=6)), min_size=1, max_size=3)
)
def test_any_settings_build_a_part_or_are_refused(tmp_path, changes):
    part = changes[0][0][0]
    (tmp_path / part).mkdir(exist_ok=True)
    write(tmp_path / part / "config.json", CONFIGS[part] | {key: value for (_, key), value in changes})
    with contextlib.suppress(WeightsError):
        build(Mochi(), find_part(tmp_path, part))


# Tokenizers.

TOKENIZER = json.loads((TINY / "tokenizer/tokenizer.json").read_text())
STEPS = st.sampled_from(
    ["Sequence", "Precompiled", "Replace", "Metaspace", "Whitespace", "Split", "ByteLevel", "TemplateProcessing", "NFC"]
)
STEP = st.fixed_dictionaries(
    {"type": STEPS},
    optional={
        "normalizers": st.just([{"type": "NFC"}]), "pattern": st.fixed_dictionaries({"String": st.text(max_size=3)}),
        "content": st.text(max_size=3), "precompiled_charsmap": st.text("AB/=", max_size=60), "replacement": ODD,
        "prepend_scheme": st.sampled_from(["always", "first", "never"]), "split": ODD, "single": JSON, "pair": JSON,
        "special_tokens": JSON,
    },
)  # fmt: skip


@settings(deadline=None, max_examples=examples(40), suppress_health_check=SHARED)
@given(st.sampled_from(list(fields(TOKENIZER))), JSON | STEP)
@example(("model", "vocab", "<pad>"), 4_000_000_000)  # the library allots a table as long as the largest number
def test_any_tokenizer_is_loaded_or_refused(tmp_path, place, new):
    folder = tmp_path / "tokenizer"
    folder.mkdir(exist_ok=True)
    shutil.copy(TINY / "tokenizer/tokenizer_config.json", folder)
    write(folder / "tokenizer.json", changed(TOKENIZER, place, new))
    try:
        tokenizer = Mochi().load_tokenizer("tokenizer", folder)
    except WeightsError as error:
        assert len(str(error)) < 2000
        return
    try:
        ids = tokenizer("a red \u2581 circle " * 20, truncation=True, max_length=16).input_ids
    except BaseException as error:  # noqa: BLE001  # of this text alone: the stages record it with the job
        assert isinstance(error, Exception) or type(error).__name__ == PANIC
    else:
        assert len(ids) <= 16


@settings(deadline=None, max_examples=examples(24), suppress_health_check=SHARED)
@given(
    st.dictionaries(st.sampled_from(["pad_token", "model_max_length", "padding_side", "extra_ids", "auto_map"]), JSON)
)
def test_any_settings_of_a_tokenizer_are_used_or_refused(tmp_path, changes):
    folder = tmp_path / "tokenizer"
    folder.mkdir(exist_ok=True)
    shutil.copy(TINY / "tokenizer/tokenizer.json", folder)
    write(folder / "tokenizer_config.json", changes)
    with contextlib.suppress(WeightsError):
        Mochi().load_tokenizer("tokenizer", folder)("a red circle", truncation=True, max_length=16)


# Safetensors.

NAMES = st.sampled_from(
    ["t5_yproj.weight", "blocks.0.0.weight", "layers.0.weight", "pos_frequencies", "patch_embed.proj.weight",
     "time_embed.caption_proj.weight", "a.lora_A.weight", "a.lora_B.weight", "a.alpha",
     "transformer.a.lora_down.weight", "base_model.model.a.lora_up.weight", "model.diffusion_model.layers.0.weight"]
) | st.text(max_size=4)  # fmt: skip
TWO_MARKS = ("t5_yproj.weight", "blocks.0.0.weight")  # each of which only one file of the original layout has
SIZE = st.integers(0, 4)
ENTRY = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "I64", "X"]), "shape": st.lists(SIZE, max_size=4),
     "data_offsets": st.lists(st.integers(0, 64), min_size=2, max_size=2)}
)  # fmt: skip
METADATA = st.fixed_dictionaries(
    {},
    optional={
        "format": st.just("pt"),
        "pusa": JSON.map(json.dumps) | st.text(max_size=5),
        "latents_mean": JSON.map(json.dumps),
        "lora_alpha": st.text(max_size=5),
        "ss_network_alpha": st.sampled_from(["1", "nan", "x"]),
        "lora_adapter_metadata": JSON.map(json.dumps) | st.just('{"transformer.r": 1, "r": 1}'),
    },
)
READERS = (
    read_file,
    lambda path: read_model(path).config(),
    lambda path: read_model(path).in_diffusers_names(),
    lambda path: read_model(path).record(),
    lambda path: format_facts(describe(path)),
    read_lora,
)


def read_all(path: Path) -> None:
    for read in READERS:
        with contextlib.suppress(WeightsError):
            read(path)


def with_header(header: bytes, content: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + content


@settings(deadline=None, max_examples=examples(60), suppress_health_check=SHARED)
@given(
    st.dictionaries(NAMES, ENTRY | JSON, max_size=4), st.none() | JSON | METADATA, st.binary(max_size=64), st.booleans()
)
@example({name: {"dtype": "F32", "shape": [], "data_offsets": []} for name in TWO_MARKS}, None, b"", True)
@example({"a": {"dtype": "F32", "shape": [], "data_offsets": [10**4299 * 9, 10**4299 * 9]}}, None, b"", False)
def test_any_header_is_read_or_refused(tmp_path, entries, metadata, content, packed):
    if packed:  # one after another, as the format demands, so that more than the header is read
        at = 0
        for entry in entries.values():
            assume(isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"})
            size = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "I64": 8, "X": 1}[entry["dtype"]]
            for length in entry["shape"]:
                size *= length
            entry["data_offsets"] = [at, at := at + size]
        content = bytes(at)
    header = {**({} if metadata is None else {"__metadata__": metadata}), **entries}
    path = tmp_path / "m.safetensors"
    path.write_bytes(with_header(json.dumps(header).encode("utf-8", "surrogatepass"), content))
    read_all(path)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Return the shapes of the tensors in each of the tiny model's files in its original layout, and of a LoRA."""
    folder = tmp_path_factory.mktemp("originals")
    files = convert(TINY, folder, "genmo")
    found = {path.name: {name: t.shape for name, t in read_file(path)[0].items()} for path in files}
    layers = {f"a.{number}.lora_{side}.weight": (2, 2) for number in range(4) for side in "AB"}
    return found | {"adapter_model.safetensors": layers | {"a.0.alpha": ()}}


def write_shapes(path, shapes, metadata):
    """Write a file of zeros, without blocks on the disk."""
    header, at = {"__metadata__": metadata}, 0
    for name, shape in shapes.items():
        end = at + 4 * prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    start = with_header(json.dumps(header).encode("utf-8", "surrogatepass"), b"")
    path.write_bytes(start)
    with path.open("r+b") as file:
        file.truncate(len(start) + at)


@settings(deadline=None, max_examples=examples(40), suppress_health_check=SHARED)
@given(st.data(), METADATA)
def test_any_shapes_in_a_known_layout_are_used_or_refused(tmp_path, originals, data, metadata):
    name = data.draw(st.sampled_from(sorted(originals, reverse=True)))
    shapes = dict(originals[name])
    for tensor in data.draw(st.lists(st.sampled_from(sorted(shapes)), max_size=3, unique=True)):
        new = data.draw(st.none() | st.lists(st.sampled_from([0, 1, 2, 3, 7, 32, 64, 1 << 20]), max_size=3))
        renamed = data.draw(st.just(tensor) | st.text(max_size=4))
        shape = shapes.pop(tensor)
        if new is not None or renamed != tensor:
            shapes[renamed] = shape if new is None else tuple(new)
    assume(sum(map(prod, shapes.values())) < 1 << 36)  # what a file system may hold
    path = tmp_path / name
    write_shapes(path, shapes, metadata)
    read_all(path)
    parts = {"dit.safetensors": "transformer", "encoder.safetensors": "vae", "decoder.safetensors": "vae"}
    if name not in parts:
        return
    beside = [other for other in parts if parts[other] == parts[name] and other != name]
    for other in beside:
        write_shapes(tmp_path / other, originals[other], {})
    source = PartFiles(parts[name], tuple(tmp_path / file for file in (name, *beside)))
    with contextlib.suppress(WeightsError):
        built = build(Mochi(), source)
        stored_tensors(source, {key: tuple(weight.shape) for key, weight in built.state_dict().items()})


@settings(deadline=None, max_examples=examples(32), suppress_health_check=SHARED)
@given(st.integers(0, 400), st.binary(max_size=8), st.integers(-20, 20))
def test_any_damage_of_a_file_is_read_or_refused(tmp_path, place, new, cut):
    data = bytearray((TINY / "vae/diffusion_pytorch_model.safetensors").read_bytes()[:30_000])
    data[place : place + len(new)] = new
    path = tmp_path / "m.safetensors"
    path.write_bytes(data[: len(data) - max(0, cut)] + bytes(max(0, -cut)))
    read_all(path)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
        b'{"__metadata__":{"pusa":"{}","pusa":"[]"},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","dtype":"I32","shape":[],"data_offsets":[0,4]}}',
    ],
)
def test_a_key_that_is_given_twice_is_refused(tmp_path, header):
    path = tmp_path / "m.safetensors"
    path.write_bytes(with_header(header, bytes(4)))
    with pytest.raises(WeightsError, match=r"m\.safetensors is not .* twice"):
        read_file(path)


# The settings of a LoRA.


@settings(deadline=None, max_examples=examples(48), suppress_health_check=SHARED)
@given(
    st.dictionaries(
        st.sampled_from(["r", "lora_alpha", "rank_pattern", "target_modules", "init_lora_weights", "use_dora", "bias",
                         "x", "peft_type", "transformer.r", "auto_mapping", "modules_to_save"]),
        JSON,
    ) | JSON,
    st.sampled_from([b"", b"\xff", b"\xef\xbb\xbf"]),
)  # fmt: skip
@example([[]] * 3, b"[" * 100_000)
@example({"r": 10**4299}, b"")
def test_any_settings_of_a_lora_are_read_or_refused(lora_file, values, before):
    config = lora_file.with_name(PEFT_CONFIG)
    config.write_bytes(before + json.dumps(values).encode("utf-8", "surrogatepass"))
    with contextlib.suppress(WeightsError):
        read_lora(lora_file)
    describe_strength(read_model(lora_file))
    format_facts(describe(lora_file))


def test_a_setting_of_a_lora_that_is_given_twice_is_refused(lora_file):
    lora_file.with_name(PEFT_CONFIG).write_text('{"r": 1, "lora_alpha": 1, "lora_alpha": 1000}')
    with pytest.raises(WeightsError, match="'lora_alpha' twice"):
        read_lora(lora_file)


@pytest.fixture
def lora_file(tmp_path):
    """Return the file of a LoRA of one layer, in PEFT's layout."""
    path = tmp_path / "plain.safetensors"
    entry = {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}
    names = [f"base_model.model.a.lora_{side}.weight" for side in "AB"]
    header = {names[0]: entry, names[1]: entry | {"data_offsets": [4, 8]}}
    path.write_bytes(with_header(json.dumps(header).encode(), bytes(8)))
    tensors, metadata = read_file(path)
    write_file(tmp_path / PEFT_FILE, tensors, metadata)
    return tmp_path / PEFT_FILE
