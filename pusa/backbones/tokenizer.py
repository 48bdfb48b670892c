"""Load the tokenizer of T5 and its kin, of Llama 3 or of CLIP from files of strangers, and tokenize prompts.

No code of the folder runs, and encoding takes bounded time and memory.

transformers' `from_pretrained` is not used: it reads every file that it knows in the folder, and whatever is in them. A
tokenizer.json is a program of regular expressions and replacements, of which some never end on some prompts. So only
the steps that these tokenizers are made of are allowed, and none that can make a text much longer. The steps of a
spiece.model are those of transformers' T5Tokenizer, and of a vocab.json with its merges.txt those of its CLIPTokenizer.
"""

import base64
import binascii
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from google.protobuf.message import DecodeError
from pydantic import BeforeValidator, Field
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor
from transformers import CLIPTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, T5Tokenizer

from pusa.backbones.settings import Settings, check_settings, read_small, require_small
from pusa.errors import WeightsError
from pusa.system.failures import Failure, attempt
from pusa.system.text import preview, printable

log = logging.getLogger(__name__)
MAX_BYTES = 1 << 26  # of a vocabulary; the largest of the T5 family has 17 MB
MAX_TOKENS = 1 << 20
MAX_STEPS = 16  # of one kind
MAX_CHARSMAP = 1 << 20  # bytes of SentencePiece's table of characters; the usual one has 0.3 MB
MAX_REPLACEMENT = 64  # bytes for one character in that table; the usual one has up to 33
MAX_ADDED = 8  # tokens that are added to each text
# The only regular expressions. Each ends in time that is linear in the length of the text.
SPACES = (" {2,}", r"\s+")  # to replace
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
WORDS = (  # to split at
    CLIP_WORDS,
    r"<\|startoftext\|>|<\|endoftext\|>|" + CLIP_WORDS,
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",  # Llama 3's
)
NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "Strip", "StripAccents", "Precompiled", "Replace")
PRE_TOKENIZERS = ("Whitespace", "WhitespaceSplit", "Metaspace", "Split", "ByteLevel")
POST_PROCESSORS = ("TemplateProcessing", "RobertaProcessing", "ByteLevel")
ONCE = ("Precompiled", "ByteLevel")  # each of these may make the text longer
MODELS = ("Unigram", "WordLevel", "BPE")
WORD_ENDS = ("", "</w>")  # which a BPE may add to each word
T5_TOKENS = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
CLIP_TOKENS = {"bos_token": "<|startoftext|>", **dict.fromkeys(T5_TOKENS, "<|endoftext|>")}
UNIGRAM = 1  # the number of this kind of model in SentencePiece's files
PROBE = ["", "\u2581 \u00c9\u6f22\ufdfa\U0001f600", "a cat, a dog."]


def _content(token: Any) -> Any:
    """Return the text of a token that is written as an object with its properties."""
    return token.get("content") if isinstance(token, dict) else token


Token = Annotated[str, BeforeValidator(_content), Field(min_length=1, max_length=100)]


class TokenizerSettings(Settings):
    """What is used of tokenizer_config.json and special_tokens_map.json."""

    model_max_length: Annotated[float, Field(ge=2)] = 1e30  # transformers' number for "no limit"
    bos_token: Token | None = None
    pad_token: Token | None = None
    eos_token: Token | None = None
    unk_token: Token | None = None
    extra_ids: Annotated[int, Field(ge=0, le=1000)] = 100

    def tokens(self, defaults: Mapping[str, str]) -> dict[str, str]:
        """Return the special tokens by name: the stated ones, and for the others their defaults."""
        return {name: getattr(self, name) or token for name, token in defaults.items()}


def load_tokenizer(folder: Path, vocabularies: Sequence[str]) -> PreTrainedTokenizerBase:
    """Load the tokenizer whose vocabulary is the first file of these names in a folder.

    It pads and cuts on the right, as all the families were trained, whatever the files say.

    Args:
        folder: the tokenizer's folder.
        vocabularies: some of "tokenizer.json", "spiece.model" and "vocab.json", the preferred one first.

    Raises:
        WeightsError: the folder has no vocabulary, or a file is not one of a known tokenizer or is too large.
    """
    path = next((folder / name for name in vocabularies if (folder / name).is_file()), None)
    if path is None:  # transformers would build a vocabulary that knows no word
        raise WeightsError(f"{folder} has no vocabulary; expected one of {', '.join(vocabularies)}")
    settings = _settings(folder)
    load = {"tokenizer.json": _from_json, "spiece.model": _from_sentencepiece, "vocab.json": _from_merges}[path.name]
    common = {"model_max_length": int(settings.model_max_length), "padding_side": "right", "truncation_side": "right"}
    tokenizer = load(path, settings, common)
    if not _guarded(
        path, lambda: tokenizer(PROBE, padding=True, add_special_tokens=False, verbose=False).input_ids[-1]
    ):
        raise WeightsError(f"{path} has no token for any part of {PROBE[-1]!r}")
    if tokenizer.num_special_tokens_to_add() > MAX_ADDED:
        raise WeightsError(f"{path} adds more than {MAX_ADDED} tokens to each text")
    return tokenizer


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: Any,
    prompts: Sequence[str],
    longest: int,
    padded: bool,
    template: str = "{}",
    before: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return token ids and the mask of valid ones, each (B, L), on the text encoder's device.

    Longer prompts are cut, with a warning.

    Args:
        tokenizer: the tokenizer; it may have a shorter limit of its own.
        text_encoder: the model that gets the ids.
        prompts: B texts.
        longest: the most tokens of a prompt.
        padded: make L that limit; otherwise the length of the longest prompt.
        template: the text around each prompt, with {} in its place.
        before: the number of its tokens before a prompt. They are part of L, but not of `longest`.

    Raises:
        WeightsError: the tokenizer gives tokens that the text encoder does not know.
    """
    limit = min(before + longest, tokenizer.model_max_length)
    texts = [template.format(prompt) for prompt in prompts]
    for prompt, ids in zip(prompts, tokenizer(texts, verbose=False).input_ids, strict=True):
        if len(ids) > limit:
            log.warning(
                "a prompt is cut to the first %d of its %d tokens for %s: %.80r",
                limit - before, len(ids) - before, type(text_encoder).__name__, prompt,
            )  # fmt: skip
    tokens = tokenizer(
        texts,
        padding="max_length" if padded else "longest",
        max_length=limit,
        truncation=True,
        return_tensors="pt",
    )
    if (largest := int(tokens.input_ids.max())) >= (words := text_encoder.get_input_embeddings().num_embeddings):
        raise WeightsError(f"the tokenizer gives the token {largest}; the text encoder knows {words:,} tokens")
    tokens = tokens.to(text_encoder.device)
    return tokens.input_ids, tokens.attention_mask.bool()


def _settings(folder: Path) -> TokenizerSettings:
    """Return the settings of tokenizer_config.json; what it does not have, from the older special_tokens_map.json."""
    values: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            values |= {key: value for key, value in read_small(folder / name).items() if value is not None}
    return check_settings(TokenizerSettings, values, f"{folder}: its tokenizer's settings")


def _guarded(path: Path, call: Callable[[], Any]) -> Any:
    """Call a library that may raise anything on a damaged file, panics of Rust too."""
    result = attempt(call, None)
    if isinstance(result, Failure):
        raise WeightsError(f"{path} cannot be loaded as a tokenizer: {printable(result.message)}")
    return result


def _from_json(path: Path, settings: TokenizerSettings, common: dict[str, Any]) -> PreTrainedTokenizerBase:
    content = read_small(path, MAX_BYTES)
    _check_steps(path, content, "normalizer", "normalizers", NORMALIZERS)
    _check_steps(path, content, "pre_tokenizer", "pretokenizers", PRE_TOKENIZERS)
    _check_steps(path, content, "post_processor", "processors", POST_PROCESSORS)
    model = content.get("model")
    # The older files do not name the kind. A list of scored words is Unigram's.
    kind = model.get("type", "Unigram") if isinstance(model, dict) else None
    if not isinstance(model, dict) or kind not in MODELS:
        raise WeightsError(f"{path} has a model of type {preview(kind)}; expected {' or '.join(MODELS)}")
    _check_numbers(path, model.get("vocab"), content.get("added_tokens"))
    for name, allowed in (("dropout", ()), ("continuing_subword_prefix", ("",)), ("end_of_word_suffix", WORD_ENDS)):
        if (value := model.get(name)) is not None and value not in allowed:
            raise WeightsError(
                f"{path}: its {name} is {preview(value)}; expected {' or '.join(map(repr, (*allowed, None)))}"
            )
    # Padding and truncation are set at each call; nothing is decoded. A hostile value of theirs can fill the memory.
    text = json.dumps({**content, "padding": None, "truncation": None, "decoder": None})
    return _guarded(path, lambda: _wrap(path, Tokenizer.from_str(text), settings, common))


def _check_numbers(path: Path, vocabulary: Any, added: Any) -> None:
    """Check the numbers of the tokens: the library allots a table as long as the largest one."""
    numbers = list(vocabulary.values()) if isinstance(vocabulary, dict) else []  # a list's tokens are numbered in order
    numbers += [token.get("id") for token in added or () if isinstance(token, dict)] if isinstance(added, list) else []
    for number in numbers:
        if type(number) is not int or not 0 <= number < MAX_TOKENS:
            raise WeightsError(f"{path}: a token has the number {preview(number)}; expected one below {MAX_TOKENS:,}")


def _wrap(
    path: Path, backend: Tokenizer, settings: TokenizerSettings, common: dict[str, Any]
) -> PreTrainedTokenizerBase:
    """Make a tokenizer with the special tokens that it has. Where none is stated to pad with, it is the one at the end.

    What Llama 3 pads with has no effect: its features are causal, and the mask leaves out those after the text.
    """
    tokens = settings.tokens(T5_TOKENS)
    known = {name: token for name, token in tokens.items() if backend.token_to_id(token) is not None}
    if "eos_token" in known and settings.pad_token is None:
        known.setdefault("pad_token", known["eos_token"])
    if "pad_token" not in known:
        raise WeightsError(f"{path} does not have the pad_token {preview(tokens['pad_token'])}")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **known, **common)


def _check_steps(path: Path, content: dict[str, Any], key: str, inner: str, allowed: tuple[str, ...]) -> None:
    """Check the steps of one kind, alone or in one "Sequence", or none.

    Raises:
        WeightsError: a step is not in `allowed`, or there are too many.
    """
    step = content.get(key)
    steps = step.get(inner) if isinstance(step, dict) and step.get("type") == "Sequence" else [step]
    if not isinstance(steps, list) or len(steps) > MAX_STEPS:
        raise WeightsError(f"{path}: its {key} is not a list of at most {MAX_STEPS} steps")
    kinds = [step.get("type") if isinstance(step, dict) else preview(step) for step in steps if step is not None]
    for kind in kinds:
        if kind not in allowed or (kind in ONCE and kinds.count(kind) > 1):
            raise WeightsError(
                f"{path}: its {key} has a step {preview(kind)}; expected steps of {', '.join(allowed)}, "
                f"{' and '.join(ONCE)} at most once"
            )
    for step in filter(None, steps):
        if step["type"] == "Replace":
            _check_replacement(path, step)
        elif step["type"] == "Precompiled":
            _check_charsmap(path, _decoded(path, step.get("precompiled_charsmap")))
        elif step["type"] == "Split" and step.get("pattern") not in [{"Regex": words} for words in WORDS]:
            raise WeightsError(
                f"{path}: it splits at the pattern {preview(step.get('pattern'))}; expected Llama 3's or CLIP's, since "
                "other regular expressions may never end"
            )
        elif step["type"] == "TemplateProcessing":
            _check_template(path, step.get("single"))


def _check_template(path: Path, pieces: Any) -> None:
    """Check that each text is taken once, and that few tokens are added to it."""
    texts = (
        [piece for piece in pieces if isinstance(piece, dict) and "Sequence" in piece]
        if isinstance(pieces, list)
        else []
    )
    if len(texts) != 1 or len(pieces) > 1 + MAX_ADDED:
        raise WeightsError(
            f"{path}: it makes of a text {preview(pieces)}; expected the text once, and at most {MAX_ADDED} more tokens"
        )


def _check_replacement(path: Path, step: dict[str, Any]) -> None:
    pattern, content = step.get("pattern"), step.get("content")
    if pattern in [{"Regex": spaces} for spaces in SPACES]:
        longest = 1
    elif isinstance(pattern, dict) and list(pattern) == ["String"] and isinstance(pattern["String"], str):
        longest = len(pattern["String"])
    else:
        raise WeightsError(
            f"{path}: it replaces the pattern {preview(pattern)}; expected plain text, or {' or '.join(SPACES)}, "
            "since other regular expressions may never end"
        )
    if not isinstance(content, str) or len(content) > longest or not longest:
        raise WeightsError(
            f"{path}: it replaces {preview(pattern)} by {preview(content)}; expected a text not longer than it"
        )


def _decoded(path: Path, text: Any) -> bytes:
    try:
        return base64.b64decode(text or "", validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: its precompiled_charsmap is not base64 text: {error}") from error


def _check_charsmap(path: Path, table: bytes) -> None:
    """Check that no character is replaced by a long text. The table is a trie, its size before it, and the texts."""
    trie = int.from_bytes(table[:4], "little")
    longest = max(map(len, table[4 + trie :].split(b"\0")))
    if len(table) > MAX_CHARSMAP or (table and trie + 4 > len(table)) or longest > MAX_REPLACEMENT:
        raise WeightsError(
            f"{path}: its table of characters has {len(table):,} bytes, of which {trie:,} are the trie, and "
            f"replaces one by {longest:,} bytes; allowed are {MAX_CHARSMAP:,} bytes, and {MAX_REPLACEMENT} for one"
        )


def _from_sentencepiece(path: Path, settings: TokenizerSettings, common: dict[str, Any]) -> PreTrainedTokenizerBase:
    require_small(path, MAX_BYTES)
    stored = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # protobuf makes it at import
    try:
        stored.ParseFromString(path.read_bytes())
    except (DecodeError, OSError) as error:
        raise WeightsError(f"{path} is not a SentencePiece model: {error}") from error
    if stored.trainer_spec.model_type != UNIGRAM:
        raise WeightsError(f"{path} has a model of type {stored.trainer_spec.model_type}; expected {UNIGRAM}, Unigram")
    table = stored.normalizer_spec.precompiled_charsmap
    _check_charsmap(path, table)
    words = [(piece.piece, piece.score) for piece in stored.pieces]
    tokens = settings.tokens(T5_TOKENS)
    for place, token in enumerate(tokens.values()):  # where T5's vocabulary has them
        if len(words) <= place or words[place][0] != token:
            raise WeightsError(f"{path} does not begin with the tokens of T5: no {token!r} at {place}")
    words += [(f"<extra_id_{number}>", 0.0) for number in range(settings.extra_ids - 1, -1, -1)]
    return _guarded(
        path,
        lambda: T5Tokenizer(
            vocab=words, _spm_precompiled_charsmap=table or None, extra_ids=settings.extra_ids, **tokens, **common
        ),
    )


def _from_merges(path: Path, settings: TokenizerSettings, common: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Build CLIP's tokenizer from the words of vocab.json, and the merges.txt beside it."""
    vocabulary, place = read_small(path, MAX_BYTES), path.with_name("merges.txt")
    _check_numbers(path, vocabulary, None)
    tokens = settings.tokens(CLIP_TOKENS)
    if missing := [token for token in tokens.values() if token not in vocabulary]:
        raise WeightsError(f"{path} does not have the token {preview(missing[0])}")
    require_small(place, MAX_BYTES)
    return _guarded(
        place,
        lambda: CLIPTokenizer(vocab=vocabulary, merges=BPE.read_file(str(path), str(place))[1], **tokens, **common),
    )
