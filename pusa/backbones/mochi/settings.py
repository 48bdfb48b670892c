"""State the ranges of Mochi's settings: those of diffusers' classes and of T5."""

from math import prod
from typing import Annotated, Literal, Self

from pydantic import Field, StrictBool, model_validator

from pusa.backbones.mochi import FAMILY
from pusa.backbones.settings import Count, Deviation, Settings, Statistic, Steps, T5Settings, Width

GEOMETRY = FAMILY.geometry
CHANNELS = GEOMETRY.channels

TransformerName = Annotated[str, Field(pattern="^(FSDP)?(Pusa)?MochiTransformer3DModel$")]
VaeName = Annotated[str, Field(pattern="^(Pusa)?AutoencoderKLMochi$")]
Widths = Annotated[tuple[Width, ...], Field(min_length=2, max_length=16)]
Expansions = Annotated[tuple[Annotated[int, Field(ge=1, le=16)], ...], Field(min_length=1, max_length=15)]


class TransformerSettings(Settings):
    """Arguments of diffusers' MochiTransformer3DModel."""

    # With "FSDP", as the first versions of Pusa named the model of a checkpoint.
    kind: TransformerName | None = Field(None, alias="_class_name")
    patch_size: Annotated[int, Field(ge=GEOMETRY.patch, le=GEOMETRY.patch)]
    num_attention_heads: Count
    attention_head_dim: Annotated[int, Field(ge=2, le=1024, multiple_of=2)]
    num_layers: Count
    pooled_projection_dim: Width
    in_channels: Annotated[int, Field(ge=CHANNELS, le=CHANNELS)]
    out_channels: Annotated[int, Field(ge=CHANNELS, le=CHANNELS)] | None = None
    qk_norm: Literal["rms_norm"] = "rms_norm"
    text_embed_dim: Annotated[Width, Field(multiple_of=8)]  # which the pooler splits into 8 heads
    time_embed_dim: Annotated[Width, Field(multiple_of=2)]  # sines and cosines
    activation_fn: Literal["swiglu"] = "swiglu"
    max_sequence_length: Steps = 256


class VaeSettings(Settings):
    """Arguments of diffusers' AutoencoderKLMochi."""

    kind: VaeName | None = Field(None, alias="_class_name")
    in_channels: Annotated[int, Field(ge=15, le=15)]  # a pixel's colours, and 12 Fourier features
    out_channels: Annotated[int, Field(ge=3, le=3)]
    encoder_block_out_channels: Widths
    decoder_block_out_channels: Widths
    latent_channels: Annotated[int, Field(ge=CHANNELS, le=CHANNELS)]
    layers_per_block: Annotated[tuple[Annotated[int, Field(ge=0, le=64)], ...], Field(max_length=17)]
    act_fn: Literal["silu"] = "silu"
    temporal_expansions: Expansions
    spatial_expansions: Expansions
    add_attention_block: Annotated[tuple[StrictBool, ...], Field(max_length=17)]
    latents_mean: Annotated[tuple[Statistic, ...], Field(min_length=CHANNELS, max_length=CHANNELS)] = ()
    latents_std: Annotated[tuple[Deviation, ...], Field(min_length=CHANNELS, max_length=CHANNELS)] = ()
    scaling_factor: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        """Check that all stages are described, and that together they compress as the family's geometry says."""
        stages = len(self.temporal_expansions)
        lengths = {
            "spatial_expansions": stages,
            "encoder_block_out_channels": stages + 1,
            "decoder_block_out_channels": stages + 1,
            "layers_per_block": stages + 2,
            "add_attention_block": stages + 2,
        }
        for name, length in lengths.items():
            if len(getattr(self, name)) != length:
                raise ValueError(f"{name} has {len(getattr(self, name))} values; expected {length}")
        for name, whole in (("temporal_expansions", GEOMETRY.temporal), ("spatial_expansions", GEOMETRY.spatial)):
            if prod(getattr(self, name)) != whole:
                raise ValueError(f"{name} compress by {prod(getattr(self, name))}; expected {whole}")
        return self


class TextEncoderSettings(T5Settings):
    """Arguments of transformers' T5Config."""

    kind: Literal["t5", None] = Field(None, alias="model_type")
