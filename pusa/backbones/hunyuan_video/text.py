"""Encode prompts as HunyuanVideo does: a Llama told to describe a video, and CLIP's features of the text as a whole."""

from collections.abc import Sequence
from copy import copy
from typing import Any

from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerBase

from pusa.backbones.t5_tokenizer import tokenize

TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
UNUSED_LAYERS = 2
LLAMA_TOKENS, CLIP_TOKENS = 256, 77  # of a prompt, without the template


class PusaLlamaModel(LlamaModel):
    """transformers' Llama without its last two layers and its last norm, which HunyuanVideo never uses.

    Configuration, parameter names and files are the base class's; the tensors of what is left out are not read.
    """

    def __init__(self, config: LlamaConfig) -> None:
        own = copy(config)
        own.num_hidden_layers = config.num_hidden_layers - UNUSED_LAYERS
        super().__init__(own)
        self.norm = nn.Identity()
        unused = "|".join(str(own.num_hidden_layers + number) for number in range(UNUSED_LAYERS))
        self._keys_to_ignore_on_load_unexpected = [rf"^layers\.({unused})\.", r"^norm\.weight$"]


def count_template(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens of the template come before a prompt: 95 by Llama 3's tokenizer."""
    empty, word = tokenizer([TEMPLATE.format(""), TEMPLATE.format("a")], verbose=False).input_ids
    return next(place for place, (one, other) in enumerate(zip(empty, word, strict=False)) if one != other)


def encode_with_llama(
    tokenizer: PreTrainedTokenizerBase, llama: PusaLlamaModel, prompts: Sequence[str], padded: bool
) -> tuple[Tensor, Tensor]:
    """Return the features (B, L, width) of prompts in the template, without those of the template before, and the mask.

    The end token of the template is valid, so that an empty prompt has one token. L is 256, or fewer if the tokenizer
    has a limit of its own, or the length of the longest prompt if not `padded`.

    Raises:
        WeightsError: the tokenizer gives tokens that the text encoder does not know.
    """
    cut = count_template(tokenizer)
    texts = [TEMPLATE.format(prompt) for prompt in prompts]
    ids, mask = tokenize(tokenizer, llama, texts, LLAMA_TOKENS + cut, padded)
    features: Tensor = llama(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return features[:, cut:] * mask[:, cut:, None], mask[:, cut:]


def encode_with_clip(tokenizer: PreTrainedTokenizerBase, clip: Any, prompts: Sequence[str]) -> Tensor:
    """Return CLIP's pooled features of prompts (B, width).

    Raises:
        WeightsError: the tokenizer gives tokens that the text encoder does not know.
    """
    ids, _ = tokenize(tokenizer, clip, prompts, CLIP_TOKENS, padded=True)
    pooled: Tensor = clip(ids).pooler_output  # CLIP was trained without a mask
    return pooled
