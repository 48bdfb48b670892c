"""Tokenizers of Llama 3's and CLIP's kind, trained on a few sentences, and written as they are published."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from pusa.backbones.hunyuan_video.text import TEMPLATE

SENTENCES = [TEMPLATE, *("a red circle moves right", "the blue squares' background isn't green 12345") * 3]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
LLAMA_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
START, END = "<|startoftext|>", "<|endoftext|>"
LLAMA_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LLAMA_SETTINGS = {
    "add_bos_token": True,
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|end_of_text|>",
    "model_max_length": 1e30,
    "pad_token": "<pad>",
    "padding_side": "right",
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": "<unk>",
}
CLIP_SETTINGS = {
    "bos_token": {"__type": "AddedToken", "content": START, "normalized": True},
    "eos_token": {"__type": "AddedToken", "content": END, "normalized": True},
    "errors": "replace",
    "model_max_length": 77,
    "pad_token": END,
    "tokenizer_class": "CLIPTokenizer",
    "unk_token": {"__type": "AddedToken", "content": END, "normalized": True},
}


def write_llama_tokenizer(folder: Path, others: tuple[str, ...] = ("<unk>", "<pad>"), **settings: object) -> int:
    """Write a tokenizer.json with Llama 3's steps and its settings, and return the number of its tokens."""
    tokenizer = Tokenizer(BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = BpeTrainer(vocab_size=700, initial_alphabet=ALPHABET, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens([*LLAMA_TOKENS, *others])
    start = LLAMA_TOKENS[0]
    template = processors.TemplateProcessing(f"{start} $A", None, [(start, tokenizer.token_to_id(start))])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    tokenizer.decoder = decoders.ByteLevel()
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**LLAMA_SETTINGS, **settings}))
    return tokenizer.get_vocab_size()


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return words and merges as CLIP has them: each byte within and at the end of a word, and the end token last."""
    tokenizer = Tokenizer(BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(CLIP_WORDS), "removed", invert=True), pre_tokenizers.ByteLevel(False)]
    )
    trainer = BpeTrainer(vocab_size=500, initial_alphabet=ALPHABET, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator([text.lower() for text in SENTENCES], trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    words = [*ALPHABET, *(f"{byte}</w>" for byte in ALPHABET), *map("".join, merges), START, END]
    return {word: number for number, word in enumerate(dict.fromkeys(words))}, merges


def write_clip_vocabulary(folder: Path, **settings: object) -> int:
    """Write vocab.json and merges.txt and their settings, and return the number of tokens."""
    words, merges = clip_vocabulary()
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
    (folder / "tokenizer_config.json").write_text(json.dumps({**CLIP_SETTINGS, **settings}))
    return len(words)


def write_clip_tokenizer(folder: Path, pattern: str = CLIP_WORDS) -> int:
    """Write the same tokenizer as a tokenizer.json, and return the number of tokens."""
    words, merges = clip_vocabulary()
    model = BPE(words, merges, unk_token=END, continuing_subword_prefix="", end_of_word_suffix="</w>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "removed", invert=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.add_special_tokens([START, END])
    tokenizer.post_processor = processors.RobertaProcessing((END, words[END]), (START, words[START]), False, False)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CLIP_SETTINGS))
    return len(words)
