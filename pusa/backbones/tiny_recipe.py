"""Describe how the tiny model of a family is built: the parts of a real one, small enough to train on a CPU.

`pusa.tiny.make` trains it. Each family that has a tiny model names its recipe in `Family.tiny_recipe`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pusa.backbones import find_family
from pusa.diffusion.sampler import TextFeatures
from pusa.errors import ManifestError
from pusa.registry import find

Tokens = Mapping[str, Tensor]  # what is made of N captions -> (N, ...)

TEXT_WIDTH = 64
# Arguments of T5's and UMT5's configuration, beside the size of the vocabulary.
TEXT_ENCODER: dict[str, Any] = {
    "d_model": TEXT_WIDTH,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
}


@dataclass(frozen=True)
class Effort:
    """The drawn clips and the training steps of each part; of the VAE, the steps of each of its phases."""

    vae_clips: int = 1200
    vae_steps: tuple[int, ...] = (2200, 1200)
    base_clips: int = 4800
    base_steps: int = 5000
    pusa_clips: int = 800
    pusa_steps: int = 700


@dataclass(frozen=True)
class VaePhase:
    """How the VAE is trained for some steps, which begin with new optimizers.

    Attributes:
        batches: (clips, frames of a random window of each) of one step after another, in turn; None: whole clips.
        learning_rate: AdamW's.
        matrix_learning_rate: Muon's, which trains the convolutions; None: AdamW trains all weights.
        decoder_only: leave the encoder unchanged.
        noise: standard deviation of noise added to the latents, so that the decoder tolerates imperfect ones.
        absolute: weight of the mean absolute error beside the squared one, which makes contours sharper.
        autocast: compute in bfloat16 where torch's autocast does, which halves the time of a step.
    """

    batches: Sequence[tuple[int, int | None]] = ((2, None),)
    learning_rate: float = 3e-4
    matrix_learning_rate: float | None = None
    decoder_only: bool = False
    noise: float = 0.0
    absolute: float = 0.0
    autocast: bool = False


def _decode(vae: Any, z_BCFhw: Tensor) -> Tensor:
    pixels: Tensor = vae.decode(z_BCFhw).sample
    return pixels


def _tokenize(tokenizer: Any, captions: Sequence[str]) -> Tokens:
    tokens = tokenizer(list(captions), padding="max_length", return_tensors="pt")
    return {"ids": tokens.input_ids, "mask": tokens.attention_mask.bool()}


def _channel_statistics(z_BCFhw: Tensor) -> dict[str, Any]:
    over = (0, 2, 3, 4)
    return {"latents_mean": z_BCFhw.mean(over).tolist(), "latents_std": z_BCFhw.std(over).tolist()}


@dataclass(frozen=True)
class TinyRecipe:
    """The family-specific half of making a tiny model. Everything is built untrained, with torch's global seed.

    Attributes:
        new_vae: builds a VAE, well started for pixels (B, 3, T, H, W) in [-1, 1].
        new_transformer: builds the vectorized transformer.
        new_text_encoders: part -> builds a text encoder for a vocabulary of this number of tokens.
        new_scheduler: builds diffusers' scheduler, which is saved with the model and not used by Pusa.
        max_tokens: tokenizer -> the length that it pads captions to.
        encode_text: (text encoders, tokens of B captions, which captions are kept (B,)) -> their features, with
            gradients. What is not kept becomes the null prompt.
        predict: (transformer, z (B, C, F, h, w), sigma (B,), text) -> velocity x0 - eps, from one level for each clip,
            as a base model is trained.
        saved_classes: part -> the library's class that it is saved as, for parts that are trained as a class of Pusa's.
        model_index: the content of `model_index.json`.
        decode: (VAE, z (B, C, F, h, w)) -> pixels (B, 3, T, H, W), with gradients.
        tokenize: (the first tokenizer, N captions) -> their tokens.
        statistics: latents (B, C, F, h, w) in the VAE's space -> settings of the VAE that lead to the transformer's.
        vae_phases: how the VAE is trained.
        base_matrix_learning_rate: Muon's, which trains the matrices of the transformer's blocks; None: AdamW trains
            all weights.
        train: keys of the fine-tune's manifest: what is trained, and how.
        effort: how much is trained for the models in pusa/builtin.
    """

    new_vae: Callable[[Tensor], Any]
    new_transformer: Callable[[], Any]
    new_text_encoders: Mapping[str, Callable[[int], Any]]
    new_scheduler: Callable[[], Any]
    max_tokens: Mapping[str, int]
    encode_text: Callable[[Mapping[str, Any], Tokens, Tensor], TextFeatures]
    predict: Callable[[Any, Tensor, Tensor, TextFeatures], Tensor]
    saved_classes: Mapping[str, Any]
    model_index: Mapping[str, Any]
    decode: Callable[[Any, Tensor], Tensor] = _decode
    tokenize: Callable[[Any, Sequence[str]], Tokens] = _tokenize
    statistics: Callable[[Tensor], dict[str, Any]] = _channel_statistics
    vae_phases: Sequence[VaePhase] = (VaePhase(), VaePhase(decoder_only=True, noise=0.05))
    base_matrix_learning_rate: float | None = None
    train: Mapping[str, Any] = field(default_factory=lambda: {"learning_rate": 5e-4})
    effort: Effort = Effort()


def find_tiny_recipe(backbone: str) -> TinyRecipe:
    """Return the recipe of a family's tiny model.

    Raises:
        ManifestError: no family has this name, or the family has no recipe.
    """
    place = find_family(backbone).tiny_recipe
    if not place:
        raise ManifestError(f"backbone {backbone} has no recipe for a tiny model; set `tiny_recipe` of its Family")
    recipe: TinyRecipe = find({backbone: place}, backbone, "backbone")
    return recipe
