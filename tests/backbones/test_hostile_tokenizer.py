"""Tokenizers of strangers: nothing of theirs runs, and none takes unbounded time or memory."""

import base64
import json
import os
import shutil

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import PreTrainedTokenizerFast, T5Tokenizer

from pusa.backbones.hunyuan_video.backbone import HunyuanVideo
from pusa.backbones.mochi.backbone import Mochi
from pusa.errors import WeightsError
from pusa.manifest.models import ModelSpec
from pusa.weights.model import Model
from pusa.weights.resolve import BUILTIN
from tests.helpers.small_tokenizers import write_clip_tokenizer, write_clip_vocabulary

DEEP = "[" * 100_000


@pytest.fixture
def folder(tmp_path):
    """A copy of the tiny model's tokenizer to break."""
    return shutil.copytree(BUILTIN / "tiny/tokenizer", tmp_path / "tokenizer")


def load(folder):
    return Mochi().load_tokenizer("tokenizer", folder)


def tokenizer_with(folder, change):
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    return load(folder)


def edit_settings(folder, **changes):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def charsmap(trie, texts):
    return base64.b64encode(len(trie).to_bytes(4, "little") + trie + texts).decode()


def template(texts):
    pieces = [{"Sequence": {"id": name, "type_id": 0}} for name in texts]
    return {"type": "TemplateProcessing", "single": pieces, "pair": PAIR, "special_tokens": {}}


def byte_level():
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def bpe(**changes):
    return {"type": "BPE", "vocab": {"<pad>": 0, "a": 1}, "merges": [], **changes}


PAIR = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
EVIL = {"Regex": "(a+)+$"}
HOSTILE = {
    "a regex to split": {"pre_tokenizer": {"type": "Split", "pattern": EVIL, "behavior": "Isolated", "invert": False}},
    "a regex in a sequence": {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": EVIL}]}
    },
    "nested sequences": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": []}]}},
    "a regex to replace": {"normalizer": {"type": "Replace", "pattern": EVIL, "content": ""}},
    "growth": {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}},
    "growth from nothing": {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "a"}},
    "two patterns": {"normalizer": {"type": "Replace", "pattern": {"String": "aa", "Regex": "a"}, "content": ""}},
    "a long prefix": {"normalizer": {"type": "Prepend", "prepend": "a" * 1000}},
    "many steps": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 1000}},
    "steps of no list": {"normalizer": {"type": "Sequence", "normalizers": "NFC"}},
    "a step of no name": {"normalizer": 5},
    "two tables": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Precompiled", "precompiled_charsmap": ""}] * 2}
    },
    "a table of no base64": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "\u00e9"}},
    "a table of no text": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": 5}},
    "a table that grows": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(b"", b"a" * 100)}},
    "a large table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(bytes(2 << 20), b"")}},
    "a trie that is longer than its table": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\xff\xff\xff\x7f123").decode()}
    },
    "a trie that leads nowhere": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(b"\xff\xff\xff\xff" * 2, b"a\0")}
    },
    "another post-processor": {"post_processor": {"type": "BertProcessing", "sep": ["</s>", 1], "cls": ["</s>", 1]}},
    "many tokens added": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, *[{"SpecialToken": {"id": "</s>", "type_id": 0}}] * 99],
            "pair": PAIR,
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        }
    },
    "a text that is taken often": {"post_processor": template(["A"] * 9)},
    "a text that is not taken": {"post_processor": template([])},
    "a template of no list": {"post_processor": {"type": "TemplateProcessing", "single": 5}},
    "bytes that are taken for characters again and again": {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [byte_level(), byte_level()]}
    },
    "another model": {"model": {"type": "WordPiece", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}},
    "a BPE without words": {"model": {"type": "BPE", "vocab": {}, "merges": []}},
    "a BPE that draws lots": {"model": bpe(dropout=0.5)},
    "a BPE that adds text to each character": {"model": bpe(continuing_subword_prefix="a" * 1000)},
    "a BPE that adds text to each word": {"model": bpe(end_of_word_suffix="a" * 1000)},
    "a BPE that joins unknown words": {"model": bpe(merges=["x y"])},
    "merges of no list": {"model": bpe(merges=5)},
    "no model": {"model": None},
    "no words": {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "<unk>"}},
    "no unknown word": {
        "model": {"type": "WordLevel", "vocab": {"<pad>": 0}, "unk_token": "<nothing>"},
        "added_tokens": [],
    },
    "an unknown word out of range": {
        "model": {"type": "Unigram", "unk_id": 7, "vocab": [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0]]}
    },
    "a huge number": {"model": {"type": "WordLevel", "vocab": {"<unk>": 4_000_000_000}, "unk_token": "<unk>"}},
    "a huge number of an added token": {"added_tokens": [{"id": 4_000_000_000, "content": "x"}]},
    "negative ids": {"model": {"type": "WordLevel", "vocab": {"<pad>": -1}, "unk_token": "<unk>"}},
    "tokens of no list": {"added_tokens": {"a": 1}},
    "another version": {"version": "9.9"},
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_tokenizer_is_refused(folder, changes):
    with pytest.raises(WeightsError, match=r"tokenizer\.json") as raised:
        tokenizer_with(folder, lambda values: values.update(changes))
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("content", ["", "[]", "{}", "{", DEEP, '{"model":' * 100_000], ids=lambda t: f"{t!r:.12}")
def test_a_vocabulary_of_another_shape_is_refused(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(WeightsError, match=r"tokenizer\.json"):
        load(folder)


def test_padding_and_truncation_of_a_file_are_ignored(folder):
    """A fixed length of 10^12 tokens would end the process."""
    tokenizer = tokenizer_with(
        folder,
        lambda values: values.update(
            padding={
                "strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": 10**9, "pad_id": 0,
                "pad_type_id": 0, "pad_token": "<pad>",
            },
            truncation={"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 0},
            decoder={"type": "Replace", "pattern": EVIL, "content": ""},
        ),
    )  # fmt: skip
    plain = load(BUILTIN / "tiny/tokenizer")
    assert tokenizer("a red circle").input_ids == plain("a red circle").input_ids


@pytest.mark.parametrize(
    "changes",
    [
        *({"model_max_length": length} for length in (0, -5, "512", float("nan"), [1])),
        *({"pad_token": token} for token in (5, "", "x" * 10**6, "nowhere")),
        {"bos_token": "x" * 101}, {"unk_token": {"a": 1}}, {"extra_ids": 10**9},
    ],
    ids=lambda changes: f"{changes!s:.40}",
)  # fmt: skip
def test_a_tokenizers_settings_out_of_range_are_refused(folder, changes):
    edit_settings(folder, **changes)
    with pytest.raises(WeightsError, match="tokenizer") as raised:
        load(folder)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("side", ["left", "up", 5])
def test_padding_is_on_the_right_whatever_the_settings_say(folder, side):
    """As all the base models were trained."""
    edit_settings(folder, padding_side=side, truncation_side=side)
    tokenizer, plain = load(folder), load(BUILTIN / "tiny/tokenizer")
    how = {"padding": "max_length", "max_length": 5, "truncation": True}
    prompts = ["a red circle", "a", "a red circle moves right"]
    assert tokenizer(prompts, **how).input_ids == plain(prompts, **how).input_ids
    assert tokenizer(prompts, **how).attention_mask[1] == [1, 1, 0, 0, 0]


def test_files_of_other_uses_beside_a_tokenizer_are_not_read(folder):
    for name in ("chat_template.jinja", "added_tokens.json", "config.json", "tokenizer.model", "tiktoken.model"):
        os.mkfifo(folder / name)
    edit_settings(folder, chat_template="{{ evil }}", tokenizer_class="Evil", backend="evil")
    plain = load(BUILTIN / "tiny/tokenizer")
    assert load(folder)("a red circle").input_ids == plain("a red circle").input_ids


def test_tokens_that_the_text_encoder_does_not_know_are_refused(folder):
    tokenizer = tokenizer_with(folder, lambda values: values["model"]["vocab"].update(red=1_000_000))
    parts = {
        "tokenizer": tokenizer,
        "text_encoder": Model(ModelSpec(weights="builtin:tiny")).text_parts["text_encoder"],
    }
    with pytest.raises(WeightsError, match="gives the token 1000000; the text encoder knows 26"):
        Mochi().encode_text(parts, ["a red circle"])


# SentencePiece.


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    """Return a folder with T5's kind of SentencePiece model."""
    folder = tmp_path_factory.mktemp("spiece")
    words = [f"a {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("circle", "square", "star")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_prefix=str(folder / "spiece"), vocab_size=50, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text('{"extra_ids": 100, "model_max_length": 64}')
    return folder


def test_both_kinds_of_t5_tokenizer_are_read_as_transformers_reads_them(spiece, tmp_path):
    theirs = T5Tokenizer.from_pretrained(spiece)
    theirs.save_pretrained(tmp_path)
    prompts = ["a red circle", "", "\uff46\uff55\uff4c\uff4c  \ufdfa\u3000x", "a <extra_id_7> b</s>c \u2581", "\n a\t"]
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for folder, expected in ((spiece, theirs), (tmp_path, again)):
        ours = load(folder)
        for how in ({}, {"padding": "max_length", "max_length": 9, "truncation": True}):
            assert ours(prompts, **how).input_ids == expected(prompts, **how).input_ids
            assert ours(prompts, **how).attention_mask == expected(prompts, **how).attention_mask


def damage(change):
    def damaged(data):
        model = sentencepiece_model_pb2.ModelProto.FromString(data)
        change(model)
        return model.SerializeToString()

    return damaged


def grow(model):
    model.normalizer_spec.precompiled_charsmap = base64.b64decode(charsmap(b"", b"a" * 1000))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[:-20],
        lambda data: b"\xff" * 100,
        lambda data: b"\x0a" * 100_000,
        damage(lambda model: model.trainer_spec.__setattr__("model_type", 2)),
        damage(lambda model: model.ClearField("pieces")),
        damage(lambda model: model.pieces.pop(0)),
        damage(grow),
    ],
)
def test_a_hostile_sentencepiece_model_is_refused(spiece, tmp_path, change):
    shutil.copytree(spiece, tmp_path / "t")
    (tmp_path / "t/spiece.model").write_bytes(change((spiece / "spiece.model").read_bytes()))
    with pytest.raises(WeightsError, match=r"spiece\.model"):
        load(tmp_path / "t")


# CLIP's words and merges.


def edit_words(**changes):
    def edit(folder):
        words = json.loads((folder / "vocab.json").read_text()) | changes
        (folder / "vocab.json").write_text(json.dumps({word: n for word, n in words.items() if n is not None}))

    return edit


def write(name, text):
    return lambda folder: (folder / name).write_bytes(text)


def make_pipe(folder):
    (folder / "merges.txt").unlink()
    os.mkfifo(folder / "merges.txt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "merges.txt").unlink(), "has no merges.txt"),
        (make_pipe, "merges.txt, or it is not a regular file"),
        (lambda folder: os.truncate(folder / "merges.txt", (1 << 26) + 1), "merges.txt has 67,108,865 bytes"),
        (lambda folder: os.truncate(folder / "vocab.json", (1 << 26) + 1), "vocab.json has 67,108,865 bytes"),
        (write("merges.txt", b"\xff\xfe"), "merges.txt cannot be loaded"),
        (write("merges.txt", b"a b c\n"), "merges.txt cannot be loaded"),
        (write("merges.txt", b"a nowhere\n"), "merges.txt cannot be loaded.*nowhere"),
        (write("vocab.json", b"[]"), "vocab.json is not a JSON object"),
        (write("vocab.json", DEEP.encode()), "vocab.json is not a JSON object"),
        (write("vocab.json", b"{}"), r"vocab.json does not have the token '<\|startoftext\|>'"),
        (edit_words(a=4_000_000_000), "a token has the number 4000000000"),
        (edit_words(a=-1), "a token has the number -1"),
        (edit_words(a=0.5), "a token has the number 0.5"),
        (edit_words(**{"<|endoftext|>": None}), r"vocab.json does not have the token '<\|endoftext\|>'"),
        (edit_words(a=None), "merges.txt cannot be loaded"),
    ],
)
def test_hostile_words_and_merges_are_refused(tmp_path, change, message):
    write_clip_vocabulary(tmp_path / "t")
    change(tmp_path / "t")
    with pytest.raises(WeightsError, match=message) as raised:
        HunyuanVideo().load_tokenizer("tokenizer_2", tmp_path / "t")
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("pattern", [r"\s", r"(?i:'s|'t)|\s+(?!\S)", r"\p{L}+|(a+)+$"])
def test_of_regular_expressions_only_those_of_llama_and_clip_are_known(tmp_path, pattern):
    write_clip_tokenizer(tmp_path / "t", pattern)
    with pytest.raises(WeightsError, match=r"it splits at the pattern .*; expected Llama 3's or CLIP's"):
        HunyuanVideo().load_tokenizer("tokenizer_2", tmp_path / "t")
