"""Encode prompts as HunyuanVideo does: Llama in a template, and CLIP for the text as a whole."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import CLIPTextModel, LlamaConfig, LlamaModel, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from pusa.backbones.tokenizer import tokenize
from pusa.errors import WeightsError

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
LARGEST_ENDS = 2  # by this `eos_token_id`, which is wrong in older files, the end is the token with the largest number


class PusaLlamaModel(LlamaModel):
    """transformers' Llama without its last two layers and its last norm, which HunyuanVideo never uses.

    Configuration, parameter names and files are the base class's; the tensors of what is left out are not read. Both
    layers still count, since other readers count from the last one.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        unused = range(config.num_hidden_layers - UNUSED_LAYERS, config.num_hidden_layers)
        for layer in unused:
            self.layers[layer] = _UnusedLayer()
        self.norm = nn.Identity()
        self._keys_to_ignore_on_load_unexpected = [
            rf"^layers\.({'|'.join(map(str, unused))})\.",
            r"^norm\.weight$",
        ]


class _UnusedLayer(LlamaDecoderLayer):
    """A layer without weights that changes nothing."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


def count_template(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens of the template come before a prompt: 95 by Llama 3's tokenizer.

    Raises:
        WeightsError: the tokenizer leaves no token for a prompt.
    """
    empty, word = tokenizer([TEMPLATE.format(""), TEMPLATE.format("a")], verbose=False).input_ids
    pairs = enumerate(zip(empty, word, strict=False))
    before = next((place for place, (one, other) in pairs if one != other), len(empty))
    if before >= (limit := min(len(empty), tokenizer.model_max_length)):
        raise WeightsError(
            f"Llama's tokenizer leaves no token for a prompt: {before} come before it, and there are {limit} in all"
        )
    return before


def encode_with_llama(
    tokenizer: PreTrainedTokenizerBase, llama: PusaLlamaModel, prompts: Sequence[str], padded: bool
) -> tuple[Tensor, Tensor]:
    """Return the features (B, L, width) of prompts in the template, without those of the template before, and the mask.

    The end token of the template is valid, so that an empty prompt has one token. L is 256, or fewer if the tokenizer
    has a limit of its own, or the length of the longest prompt if not `padded`.

    Raises:
        WeightsError: the tokenizer gives tokens that the text encoder does not know, or leaves none for a prompt.
    """
    before = count_template(tokenizer)
    ids, mask = tokenize(tokenizer, llama, prompts, LLAMA_TOKENS, padded, TEMPLATE, before)
    features = llama(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    mask = mask[:, before:]
    return features[:, before:].masked_fill(~mask[..., None], 0), mask


def encode_with_clip(tokenizer: PreTrainedTokenizerBase, clip: CLIPTextModel, prompts: Sequence[str]) -> Tensor:
    """Return CLIP's pooled features of prompts (B, width), those of the first token that ends the text.

    Raises:
        WeightsError: the tokenizer gives tokens that the text encoder does not know, or does not end the text.
    """
    longest = min(CLIP_TOKENS, clip.config.max_position_embeddings)
    ids, _ = tokenize(tokenizer, clip, prompts, longest, padded=True)
    end = clip.config.eos_token_id
    if end != LARGEST_ENDS and not (ids == end).any(1).all():
        raise WeightsError(f"CLIP's tokenizer does not end a text with the token {end}, as the text encoder expects")
    pooled: Tensor = clip(ids).pooler_output  # CLIP was trained without a mask
    return pooled
