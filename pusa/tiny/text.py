"""The tiny family's text side: a word-level tokenizer of the captions' own words, and a two-layer T5 encoder."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from pusa.tiny.shapes import COLOURS, DIRECTIONS, GROUNDS, SHAPES

MAX_TOKENS = 16
WIDTH = 64
SPECIAL = ("<pad>", "</s>", "<unk>")
WORDS = ("a", "and", "on", "background", "move", "moves", "grow", "grows", "bounce", "bounces")


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Every word of every caption; anything else is <unk>."""
    words = (*SPECIAL, *WORDS, *COLOURS, *GROUNDS, *SHAPES, *DIRECTIONS)
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_TOKENS,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def new_text_encoder(vocabulary: int) -> T5EncoderModel:
    """A T5 encoder of width `WIDTH`, untrained; it learns together with the base model."""
    config = T5Config(
        vocab_size=vocabulary,
        d_model=WIDTH,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)
