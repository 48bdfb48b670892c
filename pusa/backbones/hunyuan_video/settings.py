"""State the ranges of HunyuanVideo's settings: those of diffusers' classes, of Llama and of CLIP."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StrictBool, model_validator

from pusa.backbones.hunyuan_video import FAMILY
from pusa.backbones.hunyuan_video.text import CLIP_TOKENS, LARGEST_ENDS, UNUSED_LAYERS
from pusa.backbones.settings import Count, Settings, Steps, Width

GEOMETRY = FAMILY.geometry
IMAGE_TO_VIDEO = "these are weights for image-to-video; Pusa needs the text-to-video weights"
Axis = Annotated[int, Field(ge=2, le=1024, multiple_of=2)]  # sines and cosines
Theta = Annotated[float, Field(gt=0, le=1e9)]
MlpRatio = Annotated[float, Field(gt=0, le=64)]


class TransformerSettings(Settings):
    """Arguments of diffusers' HunyuanVideoTransformer3DModel."""

    kind: Annotated[str, Field(pattern="^(FSDP)?(Pusa)?HunyuanVideoTransformer3DModel$")] | None = Field(
        None, alias="_class_name"
    )
    in_channels: Annotated[int, Field(ge=1, le=1024)] = 16
    out_channels: Annotated[int, Field(ge=1, le=1024)] | None = 16
    num_attention_heads: Count = 24
    attention_head_dim: Axis = 128
    num_layers: Count = 20
    num_single_layers: Count = 40
    num_refiner_layers: Count = 2
    mlp_ratio: MlpRatio = 4.0
    patch_size: Annotated[int, Field(ge=1, le=64)] = 2
    patch_size_t: Annotated[int, Field(ge=1, le=64)] = 1
    qk_norm: Literal["rms_norm"] = "rms_norm"
    guidance_embeds: StrictBool = True
    text_embed_dim: Width = 4096
    pooled_projection_dim: Width = 768
    rope_theta: Theta = 256.0
    rope_axes_dim: tuple[Axis, Axis, Axis] = (16, 56, 56)
    image_condition_type: str | None = None

    @model_validator(mode="after")
    def _check_inputs(self) -> Self:
        """Check that the inputs are noisy latents of the family's VAE, and that the settings fit each other."""
        if self.image_condition_type is not None:
            raise ValueError(f"image_condition_type is {self.image_condition_type!r:.80}; {IMAGE_TO_VIDEO}")
        channels = GEOMETRY.channels
        for name, value in (("in_channels", self.in_channels), ("out_channels", self.out_channels or channels)):
            if value != channels:
                hint = f"; {IMAGE_TO_VIDEO}" if name == "in_channels" else ""
                raise ValueError(f"{name} is {value}; expected {channels}, as the VAE's latents have{hint}")
        for name, value, expected in (
            ("patch_size", self.patch_size, GEOMETRY.patch),
            ("patch_size_t", self.patch_size_t, 1),
            ("the sum of rope_axes_dim", sum(self.rope_axes_dim), self.attention_head_dim),
        ):
            if value != expected:
                raise ValueError(f"{name} is {value}; expected {expected}")
        return self


class VaeSettings(Settings):
    """Arguments of diffusers' AutoencoderKLHunyuanVideo. The kinds of its blocks are always the same."""

    kind: Annotated[str, Field(pattern="^(Pusa)?AutoencoderKLHunyuanVideo$")] | None = Field(None, alias="_class_name")
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    latent_channels: Count = 16
    block_out_channels: Annotated[tuple[Width, ...], Field(min_length=4, max_length=4)] = (128, 256, 512, 512)
    layers_per_block: Annotated[int, Field(ge=1, le=64)] = 2
    act_fn: Literal["silu"] = "silu"
    norm_num_groups: Count = 32
    scaling_factor: Annotated[float, Field(ge=1e-6, le=1e6)] = 0.476986
    spatial_compression_ratio: Literal[8] = 8
    temporal_compression_ratio: Literal[4] = 4
    mid_block_add_attention: StrictBool = True

    @model_validator(mode="after")
    def _check_channels(self) -> Self:
        if self.latent_channels != GEOMETRY.channels:
            raise ValueError(f"latent_channels is {self.latent_channels}; expected {GEOMETRY.channels}")
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels has {width}, which is not a multiple of norm_num_groups, "
                    f"{self.norm_num_groups}"
                )
        return self


class RopeSettings(Settings):
    """How transformers 5 writes the rotation of Llama's positions."""

    rope_type: Literal["default"] = "default"
    rope_theta: Theta


class LlamaSettings(Settings):
    """Arguments of transformers' LlamaConfig, as far as they change the features."""

    kind: Literal["llama", None] = Field(None, alias="model_type")
    vocab_size: Steps = 128_320
    hidden_size: Width = 4096
    intermediate_size: Width = 14_336
    num_hidden_layers: Annotated[int, Field(gt=UNUSED_LAYERS, le=256)] = 32
    num_attention_heads: Count = 32
    num_key_value_heads: Count | None = 8
    head_dim: Axis | None = None
    rms_norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-5
    rope_parameters: RopeSettings | None = None
    rope_theta: Theta = 500_000.0  # of older files, which do not have `rope_parameters`
    rope_scaling: None = None
    hidden_act: Literal["silu"] = "silu"
    attention_bias: StrictBool = False
    mlp_bias: StrictBool = False

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}; expected a multiple of num_key_value_heads, "
                f"{self.num_key_value_heads}"
            )
        return self

    def arguments(self) -> dict[str, Any]:
        """Return all settings: the defaults are Llama 3's, which differ from those of transformers' class."""
        rope = self.rope_parameters or RopeSettings(rope_theta=self.rope_theta)
        others = self.model_dump(exclude={"kind", "rope_parameters", "rope_theta", "rope_scaling"})
        return {**others, "rope_parameters": rope.model_dump()}


class ClipSettings(Settings):
    """Arguments of transformers' CLIPTextConfig, as far as they change the features."""

    kind: Literal["clip_text_model", None] = Field(None, alias="model_type")
    vocab_size: Steps = 49_408
    hidden_size: Width = 768
    intermediate_size: Width = 3072
    num_hidden_layers: Count = 12
    num_attention_heads: Count = 12
    max_position_embeddings: Annotated[int, Field(ge=2, le=1 << 20)] = CLIP_TOKENS
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-5
    eos_token_id: Annotated[int, Field(ge=0, le=1 << 20)] = LARGEST_ENDS

    def arguments(self) -> dict[str, Any]:
        """Return all settings: the defaults are CLIP-L's as HunyuanVideo has it."""
        return self.model_dump(exclude={"kind"})


SETTINGS: Mapping[str, type[Settings]] = {
    "transformer": TransformerSettings,
    "vae": VaeSettings,
    "text_encoder": LlamaSettings,
    "text_encoder_2": ClipSettings,
}
